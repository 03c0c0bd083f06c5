//! A collector of traces is told of migrations that have ended, and nothing waits for it. `make observe` has a guest move
//! and both agents tell of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use serde_json::Value;
use uuid::Uuid;

use crate::api::Agent;
use crate::rig::{PATIENCE, own_address};

/// A collector that is asked one thing after the other, and takes its time.
struct Collector(TcpListener);

/// One request, which is not answered yet.
struct Told {
    stream: TcpStream,
    head: Vec<String>,
    body: Value,
}

impl Collector {
    fn next(&self) -> Told {
        let (stream, _) = self.0.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let head: Vec<String> =
            reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let length =
            head.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.expect("a length")];
        reader.read_exact(&mut body).unwrap();
        Told { stream, head, body: serde_json::from_slice(&body).unwrap() }
    }
}

impl Told {
    fn answer(mut self, status: &str) {
        write!(self.stream, "HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\n{{}}").unwrap();
    }

    fn root(&self) -> Value {
        self.body["resourceSpans"][0]["scopeSpans"][0]["spans"][0].clone()
    }
}

fn traces(metrics: SocketAddr) -> [u64; 3] {
    let mut stream = TcpStream::connect(metrics).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    ["sent", "failed", "dropped"].map(|result| {
        let name = format!("vmferry_traces_total{{result=\"{result}\"}} ");
        page.lines()
            .find_map(|line| line.strip_prefix(&name)?.parse().ok())
            .unwrap_or_else(|| panic!("{name}: {page}"))
    })
}

/// A migration of a VM that is not there; its end.
fn failed(agent: &Agent) -> Uuid {
    let begun = agent.ask("POST", "/v1/migrations", Some(r#"{"vm":"web1","to":"bravo"}"#));
    let id = serde_json::from_str::<Value>(&begun.2).unwrap()["id"].as_str().unwrap().parse().unwrap();
    let events = agent.ask("GET", &format!("/v1/migrations/{id}/events"), None).2;
    let last: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!((&last["end"], &last["outcome"]["result"]), (&true.into(), &"failed".into()), "{last}");
    id
}

#[test]
fn a_collector_is_told_of_what_has_ended_and_nothing_waits_for_it() {
    let collector = Collector(TcpListener::bind("127.0.0.1:0").unwrap());
    socket2::SockRef::from(&collector.0).set_read_timeout(Some(PATIENCE)).unwrap();
    let (url, metrics) = (collector.0.local_addr().unwrap(), own_address());
    let more = format!("[metrics]\nlisten = '{metrics}'\n[traces]\nurl = 'http://{url}'\n");
    let agent = Agent::start_in(tempfile::tempdir().unwrap(), &more);
    assert_eq!(traces(metrics), [0, 0, 0]);
    // Both end while the collector has not answered anything.
    let (first, second) = (failed(&agent), failed(&agent));
    let told = collector.next();
    assert_eq!(told.head[0], "POST /v1/traces HTTP/1.1");
    assert!(
        told.head.iter().any(|line| line.eq_ignore_ascii_case("content-type: application/json")),
        "{:?}",
        told.head
    );
    let host = &told.body["resourceSpans"][0]["resource"]["attributes"][2];
    assert_eq!((&host["key"], &host["value"]["stringValue"]), (&"host.name".into(), &"alpha".into()));
    let root = told.root();
    assert_eq!(
        (&root["traceId"], &root["status"]["code"]),
        (&first.simple().to_string().into(), &2.into()),
        "{root}"
    );
    told.answer("503 Service Unavailable");
    let told = collector.next();
    assert_eq!(told.root()["traceId"], second.simple().to_string(), "what failed is not tried again");
    told.answer("200 OK");
    // It is counted when it has read the answer.
    failed(&agent);
    collector.next().answer("200 OK");
    failed(&agent);
    let last = collector.next();
    assert_eq!(traces(metrics), [2, 1, 0]);
    drop(last);
}
