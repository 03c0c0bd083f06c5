//! The local API against its own description: every route is described, every described route
//! answers, and live answers carry exactly the documented fields. Needs no QEMU and no root.

mod described;
mod document;
pub(crate) mod drained;
mod limits;
pub(crate) mod schema;
mod settled;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use schema::Description;
use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::api::{
    CheckRequest, DiskChoice, ForceRequest, ForwardRequest, InBand, Incremental, MigrateRequest, Migration,
    Options, PeerLimitRequest, ShareRequest, Side,
};
use vmferry::migrate::journal::Role;
use vmferry::migrate::phase::Phase;
use vmferry::migrate::problem::{Problem, ProblemKind};
use vmferry::migrate::progress::{
    DiskProgress, Downtime, HeldUp, Outcome, Progress, ProgressSink, RamProgress, Whole,
};

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// An agent that knows one peer, which is not there, and one VM, which is not there either.
pub(crate) struct Agent {
    child: Child,
    pub(crate) socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), "")
    }

    /// With more in its configuration.
    pub(crate) fn start_in(folder: tempfile::TempDir, more: &str) -> Self {
        let pki = folder.path().join("pki");
        for words in [&["ca"][..], &["host", "alpha"]] {
            let made =
                Command::new(VMFERRY).arg("certs").args(words).arg("--dir").arg(&pki).output().unwrap();
            assert!(made.status.success(), "{made:?}");
        }
        let config = folder.path().join("vmferry.toml");
        std::fs::write(&config, configuration(&pki.join("hosts/alpha")) + more).unwrap();
        let mut command = Command::new(VMFERRY);
        command.arg("agent").arg("--config").arg(&config).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let socket = folder.path().join("run/vmferry.sock");
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        while !socket.exists() || UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                log.by_ref().map_while(Result::ok).for_each(|line| said += &line);
                panic!("the agent ended with {status}: {said}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // The metrics' listener is the last that it opens.
        let metrics = more.split_once("[metrics]\nlisten = '").and_then(|(_, rest)| rest.split_once('\''));
        while metrics.is_some_and(|(address, _)| TcpStream::connect(address).is_err()) {
            assert!(child.try_wait().unwrap().is_none(), "the agent has ended");
            std::thread::sleep(Duration::from_millis(2));
        }
        // A full pipe would stop it.
        std::thread::spawn(move || log.map_while(Result::ok).for_each(drop));
        Self { child, socket, folder }
    }

    /// Its processor time so far (proc(5), clock ticks of a hundredth of a second).
    fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        Duration::from_millis([11, 12].map(|at| 10 * fields[at].parse::<u64>().unwrap()).iter().sum())
    }

    /// Status, content type and body; HTTP/1.0, so that the answer ends where the connection does.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String, String) {
        self.ask_with(method, path, body, "")
    }

    /// With more headers, each with its end.
    fn ask_with(&self, method: &str, path: &str, body: Option<&str>, more: &str) -> (u16, String, String) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
        let body = body.unwrap_or("");
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nhost: vmferry\r\ncontent-type: application/json\r\n{more}content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let kind =
            head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-type: ").map(str::to_owned));
        (status, kind.unwrap_or_default(), body.to_owned())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn configuration(tls: &Path) -> String {
    let tls = tls.display();
    format!(
        "state_dir = 'state'\nruntime_dir = 'run'\nlisten = []\n\
         [tls]\nca = '{tls}/ca-cert.pem'\ncert = '{tls}/cert.pem'\nkey = '{tls}/key.pem'\n\
         [peer.bravo]\nidentity = 'bravo'\naddress = '127.0.0.1:1'\nsend = ['*']\n\
         [vm.web1]\nqmp = 'nobody.qmp'\n"
    )
}

/// Of migrations to it, over the years, whose sources never said that they know.
#[test]
fn an_agent_with_many_old_journals_starts_and_answers_soon() {
    const MANY: u32 = 2_000;
    let folder = tempfile::tempdir().unwrap();
    let journals = folder.path().join("state/migrations");
    std::fs::create_dir_all(&journals).unwrap();
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    for number in 1..=MANY {
        let (id, began_at) = (Uuid::from_u128(number.into()), now - i64::from(number) * 3_600);
        let begun = json!({"begun": {"format": 1, "migration": id, "role": "destination", "vm": "web1",
                                     "host": "alpha", "peer": "bravo", "began_at": began_at, "running": true}});
        let ended = json!({"ended": {"result": "moved", "leftovers": []}});
        let text = format!("{begun}\n\"starting\"\n\"runs\"\n{ended}\n");
        std::fs::write(journals.join(format!("{id}.destination.journal")), text).unwrap();
    }
    let since = Instant::now();
    let agent = Agent::start_in(folder, "");
    for path in ["/v1/status", "/v1/migrations", "/v1/recover"] {
        let (status, _, body) = agent.ask("GET", path, None);
        assert_eq!(status, 200, "{path}: {body}");
        assert!(!body.contains("refused"), "{path}: {body}");
    }
    // Neither work nor waiting: whatever else this machine does meanwhile, it does not wait for minutes.
    let (work, all) = (agent.processor_time(), since.elapsed());
    assert!(work < Duration::from_secs(20) && all < 2 * ANSWER_WITHIN, "{work:?} of work in {all:?}");
    assert_eq!(
        std::fs::read_dir(journals).unwrap().count(),
        MANY as usize,
        "their sources may still come and ask"
    );
}

#[test]
fn every_route_is_described_and_no_other() {
    let source = concat!(
        include_str!("../../src/agent/routes.rs"),
        include_str!("../../src/agent/libvirt_routes.rs"),
        include_str!("../../src/agent/drain_routes.rs"),
        include_str!("../../src/agent/replica_routes.rs")
    );
    let route = |route: &str| {
        let mut words = route.split('"').skip(1);
        let (path, rest) = (words.next().unwrap(), words.next().unwrap());
        let method = rest.trim_start_matches([',', ' ', '\n']).split('(').next().unwrap();
        format!("{method} {path}")
    };
    let mut routes: Vec<String> = source.split(".route(Call::").skip(1).map(route).collect();
    routes.sort();
    assert!(routes.len() >= 30, "{routes:?}");
    assert_eq!(routes, Description::load().operations());
}

/// What an agent really says, in every status that can be had without a guest.
#[test]
fn live_answers_are_as_described() {
    let agent = Agent::start();
    let description = Description::load();
    let (status, _, served) = agent.ask("GET", "/v1/openapi.json", None);
    assert_eq!((status, serde_json::from_str::<Value>(&served).unwrap()), (200, description.whole()));
    let begun = agent.ask("POST", "/v1/migrations", Some(r#"{"vm":"web1","to":"bravo"}"#));
    let id = serde_json::from_str::<Value>(&begun.2).unwrap()["id"].as_str().expect("an id").to_owned();
    description.accepts("post", "/v1/migrations", &begun);
    // The events end with the migration, so what follows meets one that has ended.
    let one = |tail: &str| format!("/v1/migrations/{id}{tail}");
    let unknown = |tail: &str| format!("/v1/migrations/{}{tail}", Uuid::nil());
    let limit_of = |peer: &str| format!("/v1/peers/{peer}/limit");
    let good = Some(r#"{"vm":"web1","to":"bravo"}"#);
    let folder = agent.folder.path().to_owned();
    let forward = |to: &str, socket: &str| {
        let asked =
            json!({"listen": folder.join(socket), "to": to, "target": "vnc", "limit_bytes_per_s": 1_000_000});
        Some(&*asked.to_string().leak())
    };
    let asked: &[(&str, &str, String, Option<&str>, u16)] = &[
        ("GET", "/v1/migrations/{id}/events", one("/events"), None, 200),
        ("GET", "/v1/migrations/{id}/events", unknown("/events"), None, 404),
        ("GET", "/v1/migrations/{id}/events", "/v1/migrations/x/events".into(), None, 400),
        ("GET", "/v1/migrations/{id}", one(""), None, 200),
        ("GET", "/v1/migrations/{id}/timeline", one("/timeline"), None, 200),
        ("GET", "/v1/migrations/{id}/timeline", unknown("/timeline"), None, 404),
        ("GET", "/v1/migrations/{id}/timeline", "/v1/migrations/x/timeline".into(), None, 400),
        ("GET", "/v1/migrations/{id}", unknown(""), None, 404),
        ("GET", "/v1/migrations/{id}", "/v1/migrations/x".into(), None, 400),
        ("POST", "/v1/migrations/{id}/cancel", one("/cancel"), None, 409),
        ("POST", "/v1/migrations/{id}/cancel", unknown("/cancel"), None, 404),
        ("POST", "/v1/migrations/{id}/cancel", "/v1/migrations/x/cancel".into(), None, 400),
        ("GET", "/v1/migrations", "/v1/migrations".into(), None, 200),
        ("POST", "/v1/migrations", "/v1/migrations".into(), Some("{"), 400),
        ("POST", "/v1/migrations", "/v1/migrations".into(), Some("{}"), 400),
        ("POST", "/v1/migrations/{id}/limit", one("/limit"), Some(r#"{"weight":300}"#), 409),
        ("POST", "/v1/migrations/{id}/limit", one("/limit"), Some(r#"{"weight":0}"#), 400),
        ("POST", "/v1/migrations/{id}/limit", unknown("/limit"), Some("{}"), 404),
        ("POST", "/v1/migrations/{id}/limit", "/v1/migrations/x/limit".into(), Some("{}"), 400),
        ("GET", "/v1/limits", "/v1/limits".into(), None, 200),
        ("POST", "/v1/peers/{name}/limit", limit_of("bravo"), Some(r#"{"limit_bytes_per_s":1000000}"#), 200),
        ("POST", "/v1/peers/{name}/limit", limit_of("bravo"), Some(r#"{"limit_bytes_per_s":1}"#), 400),
        ("POST", "/v1/peers/{name}/limit", limit_of("nobody"), Some("{}"), 404),
        ("POST", "/v1/peers/{name}/ping", "/v1/peers/bravo/ping".into(), Some("{}"), 200),
        ("POST", "/v1/peers/{name}/ping", "/v1/peers/nobody/ping".into(), Some("{}"), 404),
        ("POST", "/v1/peers/{name}/ping", "/v1/peers/bravo/ping".into(), Some(r#"{"bytes":-1}"#), 400),
        ("GET", "/v1/replicas", "/v1/replicas".into(), None, 200),
        ("POST", "/v1/replicas/end", "/v1/replicas/end".into(), Some(r#"{"vm":"web1","to":"nobody"}"#), 404),
        ("POST", "/v1/replicas/end", "/v1/replicas/end".into(), good, 409),
        ("POST", "/v1/replicas/end", "/v1/replicas/end".into(), Some(r#"{"vm":"web1"}"#), 400),
        ("GET", "/v1/forwards", "/v1/forwards".into(), None, 200),
        ("POST", "/v1/forwards", "/v1/forwards".into(), forward("bravo", "near"), 201),
        ("GET", "/v1/forwards", "/v1/forwards".into(), None, 200),
        ("POST", "/v1/forwards", "/v1/forwards".into(), forward("bravo", "near"), 409),
        ("POST", "/v1/forwards", "/v1/forwards".into(), forward("bravo", "no/such/folder"), 409),
        ("POST", "/v1/forwards", "/v1/forwards".into(), forward("nobody", "other"), 404),
        (
            "POST",
            "/v1/forwards",
            "/v1/forwards".into(),
            Some(r#"{"listen":"near","to":"bravo","target":"x"}"#),
            400,
        ),
        ("POST", "/v1/forwards/{id}/end", format!("/v1/forwards/{}/end", Uuid::nil()), None, 404),
        ("POST", "/v1/forwards/{id}/end", "/v1/forwards/x/end".into(), None, 400),
        ("GET", "/v1/recover", "/v1/recover".into(), None, 200),
        ("POST", "/v1/recover", "/v1/recover".into(), None, 200),
        ("GET", "/v1/recover", "/v1/recover?peers=false".into(), None, 200),
        ("GET", "/v1/recover", format!("/v1/recover?id={}", Uuid::nil()), None, 404),
        ("POST", "/v1/recover", format!("/v1/recover?id={}", Uuid::nil()), None, 404),
        ("GET", "/v1/recover", "/v1/recover?id=x".into(), None, 400),
        ("POST", "/v1/recover", "/v1/recover?ids=x".into(), None, 400),
        ("POST", "/v1/recover/{id}", format!("/v1/recover/{id}"), Some(r#"{"force":"here"}"#), 409),
        ("POST", "/v1/recover/{id}", format!("/v1/recover/{id}"), Some(r#"{"force":"up"}"#), 400),
        ("POST", "/v1/recover/{id}", format!("/v1/recover/{id}"), Some(r#"{"force":"here","until":1}"#), 409),
        ("POST", "/v1/recover/{id}", "/v1/recover/x".into(), Some(r#"{"force":"here"}"#), 400),
        ("GET", "/v1/drain", "/v1/drain".into(), None, 404),
        ("GET", "/v1/drain/events", "/v1/drain/events".into(), None, 404),
        ("POST", "/v1/drain/cancel", "/v1/drain/cancel".into(), None, 404),
        ("POST", "/v1/drain", "/v1/drain".into(), Some(r#"{"to":["nobody"]}"#), 404),
        ("POST", "/v1/drain", "/v1/drain".into(), Some(r#"{"to":["bravo"],"at_once":5}"#), 400),
        ("POST", "/v1/drain", "/v1/drain".into(), Some(r#"{"to":[]}"#), 400),
        ("POST", "/v1/drain/plan", "/v1/drain/plan".into(), Some(r#"{"to":["bravo"]}"#), 200),
        ("POST", "/v1/drain/plan", "/v1/drain/plan".into(), Some(r#"{"to":["bravo"],"at_once":65}"#), 400),
        ("POST", "/v1/drain", "/v1/drain".into(), Some(r#"{"to":["bravo"],"vms":["web*"]}"#), 201),
        ("GET", "/v1/drain/events", "/v1/drain/events".into(), None, 200),
        ("GET", "/v1/drain", "/v1/drain".into(), None, 200),
        ("GET", "/v1/libvirt", "/v1/libvirt".into(), None, 200),
        (
            "POST",
            "/v1/libvirt",
            "/v1/libvirt".into(),
            Some(r#"{"domain":"web1","to":"nobody","rpc":true}"#),
            404,
        ),
        ("POST", "/v1/libvirt", "/v1/libvirt".into(), Some(r#"{"domain":"","to":"bravo","rpc":true}"#), 409),
        ("POST", "/v1/libvirt", "/v1/libvirt".into(), Some(r#"{"domain":"web1"}"#), 400),
        (
            "POST",
            "/v1/libvirt/check",
            "/v1/libvirt/check".into(),
            Some(r#"{"domain":"web1","to":"bravo","rpc":true}"#),
            409,
        ),
        ("POST", "/v1/libvirt/check", "/v1/libvirt/check".into(), Some("{"), 400),
        ("GET", "/v1/libvirt/{id}/events", format!("/v1/libvirt/{id}/events"), None, 404),
        ("GET", "/v1/libvirt/{id}/events", "/v1/libvirt/x/events".into(), None, 400),
        (
            "POST",
            "/v1/libvirt/{id}/end",
            format!("/v1/libvirt/{id}/end"),
            Some(r#"{"moved":{"ram":1,"nbd":2}}"#),
            404,
        ),
        ("POST", "/v1/libvirt/{id}/end", format!("/v1/libvirt/{id}/end"), Some(r#""failed""#), 404),
        ("POST", "/v1/libvirt/{id}/end", format!("/v1/libvirt/{id}/end"), Some(r#""well""#), 400),
        ("GET", "/v1/status", "/v1/status".into(), None, 200),
        ("GET", "/v1/names", "/v1/names".into(), None, 200),
        ("POST", "/v1/check", "/v1/check".into(), good, 200),
        ("POST", "/v1/check", "/v1/check".into(), Some(r#"{"vm":"web1","to":"bravo","too":1}"#), 400),
    ];
    for (method, described, path, body, expected) in asked {
        let answer = agent.ask(method, path, *body);
        assert_eq!(answer.0, *expected, "{method} {path}: {}", answer.2);
        description.accepts(&method.to_lowercase(), described, &answer);
    }
    for (method, path, expected) in [("GET", "/v1/nowhere", 404), ("DELETE", "/v1/status", 405)] {
        let (status, kind, body) = agent.ask(method, path, None);
        assert_eq!((status, kind.as_str()), (expected, "application/problem+json"));
        let body = serde_json::from_str(&body).unwrap();
        description.check("Error", &body);
        assert_eq!(body["status"], expected);
    }
}

/// A value outside its range is refused before anything begins, by its field and the range.
#[test]
fn what_is_outside_its_range_is_refused_by_field_and_range() {
    let agent = Agent::start();
    let migrate = |options: &str| format!(r#"{{"vm":"web1","to":"bravo","options":{{{options}}}}}"#);
    let one = |tail: &str| format!("/v1/migrations/{}{tail}", Uuid::nil());
    let migrations = || "/v1/migrations".to_owned();
    for (path, body, field, words) in [
        (migrations(), migrate(r#""retry":101"#), "options.retry", "from 0 to 100"),
        (migrations(), migrate(r#""retry":-1"#), "options.retry", "from 0 to 100"),
        (migrations(), migrate(r#""downtime_limit_ms":2000001"#), "options.downtime_limit_ms", "to 2000000"),
        (migrations(), migrate(r#""limit_bytes_per_s":1"#), "options.limit_bytes_per_s", "at least 65536"),
        (migrations(), migrate(r#""weight":0"#), "options.weight", "from 1 to 1000"),
        (migrations(), migrate(r#""weight":70000"#), "options.weight", "from 1 to 1000"),
        (migrations(), migrate(r#""disks_at_once":257"#), "options.disks_at_once", "from 1 to 256"),
        (migrations(), migrate(r#""accept":["tired"]"#), "options.accept[0]", "docs/check.md"),
        (migrations(), migrate(r#""speed":1"#), "options.speed", "unknown field"),
        (one("/limit"), r#"{"weight":1001}"#.into(), "weight", "from 1 to 1000"),
        (
            "/v1/peers/bravo/limit".into(),
            r#"{"limit_bytes_per_s":0}"#.into(),
            "limit_bytes_per_s",
            "at least",
        ),
        ("/v1/drain".into(), r#"{"to":["bravo"],"at_once":65}"#.into(), "at_once", "from 1 to 64"),
    ] {
        let (status, kind, text) = agent.ask("POST", &path, Some(&body));
        assert_eq!((status, kind.as_str()), (400, "application/problem+json"), "{body}: {text}");
        let refused: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(refused["field"], field, "{body}: {text}");
        assert!(refused["detail"].as_str().unwrap().contains(words), "{body}: {text}");
    }
    assert_eq!(agent.ask("GET", "/v1/migrations", None).2, "[]", "none of them began anything");
}

/// The same key is the same migration, however often and by how many it is sent; another request is refused.
#[test]
fn a_request_that_is_sent_again_is_carried_out_once() {
    let agent = Agent::start();
    let ask = |vm: &str, key: &str| {
        let body = json!({"vm": vm, "to": "bravo"}).to_string();
        let (status, _, body) =
            agent.ask_with("POST", "/v1/migrations", Some(&body), &format!("idempotency-key: {key}\r\n"));
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    let (begun, again, other) = (ask("web1", "one"), ask("web1", "one"), ask("web1", "two"));
    assert_eq!((begun.0, again.0, other.0), (201, 200, 201), "{begun:?} {again:?} {other:?}");
    assert_eq!(begun.1["id"], again.1["id"]);
    assert_ne!(begun.1["id"], other.1["id"]);
    let refused = ask("web2", "one");
    assert_eq!(refused.0, 409, "{refused:?}");
    assert_eq!(ask("web1", "no key").0, 400);
    // Each of many at once is the same one.
    let ids: BTreeSet<String> = std::thread::scope(|scope| {
        let asking: Vec<_> =
            (0..20).map(|_| scope.spawn(|| ask("web1", "many").1["id"].to_string())).collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(ids.len(), 1, "{ids:?}");
    let all: Value = serde_json::from_str(&agent.ask("GET", "/v1/migrations", None).2).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 3, "{all}");
    let events =
        agent.ask("GET", &format!("/v1/migrations/{}/events", begun.1["id"].as_str().unwrap()), None);
    let last: Value = serde_json::from_str(events.2.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event_format"], &last["end"]), (&json!(1), &json!(true)), "{last}");
}

/// A monitor that greets, knows two questions, and says so when its client has gone.
fn monitor(path: &Path, state: &'static str, migration: &'static str) -> std::sync::mpsc::Receiver<()> {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    let (gone, is_gone) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
            // One that goes again before it was answered; the next one is served all the same.
            if writeln!(socket, "{}", json!({"QMP": {"version": version, "capabilities": []}})).is_err() {
                continue;
            }
            for line in BufReader::new(socket.try_clone().unwrap()).lines().map_while(Result::ok) {
                let asked: Value = serde_json::from_str(&line).unwrap();
                let answer = match asked["execute"].as_str().unwrap() {
                    "query-status" => json!({"status": state, "running": state == "running"}),
                    "query-migrate" => json!({"status": migration}),
                    _ => json!({}),
                };
                if writeln!(socket, "{}", json!({"return": answer, "id": asked["id"]})).is_err() {
                    break;
                }
            }
            gone.send(()).unwrap();
        }
    });
    is_gone
}

/// The agent's status once it knows all that can be known: a monitor has two seconds to answer, and on a slow machine
/// any VM may be unknown.
fn known_status(agent: &Agent) -> ((u16, String, String), Value) {
    let since = Instant::now();
    loop {
        let answer = agent.ask("GET", "/v1/status", None);
        let status: Value = serde_json::from_str(&answer.2).unwrap();
        let states = status["vm_states"].as_array().unwrap();
        let is_known = |state: &Value| state["here"] != "unknown" || state["vm"] == "silent";
        if states.iter().all(is_known) || since.elapsed() > ANSWER_WITHIN {
            return (answer, status);
        }
    }
}

/// What the command line shows once so few are unknown.
fn known_shown(agent: &Agent, words: &[&str], unknown: usize) -> String {
    let since = Instant::now();
    loop {
        let mut command = Command::new(VMFERRY);
        let shown = command.arg("--socket").arg(&agent.socket).args(words).output().unwrap();
        assert!(shown.status.success(), "{shown:?}");
        let shown = String::from_utf8(shown.stdout).unwrap();
        if shown.matches("unknown: ").count() <= unknown || since.elapsed() > ANSWER_WITHIN {
            return shown;
        }
    }
}

/// Who runs a VM and who does not is said of each, and no monitor is kept.
#[test]
fn the_status_says_of_each_vm_what_its_qemu_has() {
    let folder = tempfile::tempdir().unwrap();
    let kept = [
        monitor(&folder.path().join("runs.qmp"), "running", "none"),
        monitor(&folder.path().join("waits.qmp"), "inmigrate", "none"),
        monitor(&folder.path().join("odd.qmp"), "of-tomorrow", "completed"),
    ];
    // Somebody else's monitor: it takes connections and says nothing.
    let silent = std::os::unix::net::UnixListener::bind(folder.path().join("silent.qmp")).unwrap();
    let table = |name: &str| format!("[vm.{name}]\nqmp = '{name}.qmp'\n");
    let agent = Agent::start_in(folder, &["runs", "waits", "odd", "silent"].map(table).concat());
    let (answer, status) = known_status(&agent);
    Description::load().accepts("get", "/v1/status", &answer);
    let of = |vm: &str| {
        let states = status["vm_states"].as_array().unwrap();
        states.iter().find(|s| s["vm"] == vm).unwrap_or_else(|| panic!("{vm} in {status}")).clone()
    };
    let here = |vm: &str| of(vm)["here"].as_str().unwrap().to_owned();
    assert_eq!((here("runs"), here("waits"), here("odd")), ("runs".into(), "waits".into(), "holds".into()));
    assert_eq!((here("web1"), here("silent")), ("no-qemu".into(), "unknown".into()));
    assert_eq!(of("odd")["qemu_state"], "of-tomorrow");
    for monitor in &kept {
        monitor.recv_timeout(ANSWER_WITHIN).expect("a monitor that is let go");
    }
    let one = known_shown(&agent, &["status", "runs"], 0);
    assert_eq!(one.trim(), "runs runs here (alpha)");
    for words in [&["status"][..], &["list"]] {
        let all = known_shown(&agent, words, 1);
        for said in ["runs here", "a QEMU waits for it", "(of-tomorrow)", "unknown: ", "nobody listens"] {
            assert!(all.contains(said), "{said} in {all}");
        }
    }
    drop(silent);
}

/// Whoever reads the first line of an answer and goes has not made anything fail.
#[test]
fn an_output_that_nobody_reads_ends_quietly() {
    let agent = Agent::start();
    for words in [&["list", "--json"][..], &["status"], &["limit"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(VMFERRY);
        command.arg("--socket").arg(&agent.socket).args(words).stdout(writer).stderr(Stdio::piped());
        let ended = command.output().unwrap();
        assert_eq!((ended.status.code(), &ended.stderr[..]), (Some(141), &b""[..]), "{words:?}: {ended:?}");
    }
    let listed = Command::new(VMFERRY).arg("--socket").arg(&agent.socket).args(["list", "--json"]).output();
    let listed: Value = serde_json::from_slice(&listed.unwrap().stdout).unwrap();
    assert_eq!(listed, json!({"schema": 1, "migrations": [], "libvirt": []}));
}

/// What ended is listed by the next process as well: what it knew itself, and not only the journals.
#[test]
fn what_ended_is_remembered_over_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("state")).unwrap();
    let path = folder.path().join("state/history.jsonl");
    let mut moved = Progress::new(Uuid::new_v4(), "db", Role::Source, "bravo");
    (moved.phase, moved.elapsed_ms) = (Phase::Done, 4200);
    moved.downtime = Some(Downtime { total_ms: 23, ..Downtime::default() });
    moved.outcome = Some(Outcome::Moved { leftovers: Vec::new() });
    std::fs::write(&path, serde_json::to_string(&moved).unwrap() + "\n").unwrap();
    let agent = Agent::start_in(folder, "");
    let listed = Command::new(VMFERRY).arg("--socket").arg(&agent.socket).arg("list").output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("moved after 4.2 s, stood still for 23 ms"), "{listed}");
    // One more that ends: there is no such VM, so no journal tells of it.
    let (status, ..) = agent.ask("POST", "/v1/migrations", Some(r#"{"vm": "nobody", "to": "bravo"}"#));
    assert_eq!(status, 201);
    let since = Instant::now();
    loop {
        let text = std::fs::read_to_string(agent.folder.path().join("state/history.jsonl")).unwrap();
        if text.lines().count() == 2 && text.ends_with('\n') {
            let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
            assert_eq!(
                (&last["vm"], &last["outcome"]["result"]),
                (&json!("nobody"), &json!("failed")),
                "{last}"
            );
            break;
        }
        assert!(since.elapsed() < ANSWER_WITHIN, "it is not remembered: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Without an agent, and with what only the certificate tells.
#[test]
fn a_configuration_is_judged_alone() {
    let agent = Agent::start();
    let path = agent.folder.path().join("vmferry.toml");
    let good = std::fs::read_to_string(&path).unwrap();
    for (text, code, said) in [
        (good.clone(), 0, "is right: host alpha, peers: 1, VMs: 1"),
        (good.replace("'bravo'", "'alpha'"), 2, "peer.bravo.identity: \"alpha\" is this host's own identity"),
        (
            good.clone() + "[audit]\nfiles = 'many'\n",
            2,
            "audit.files: a whole number that is not negative is expected",
        ),
        (good.replace("/cert.pem", "/nothing.pem"), 2, "nothing.pem"),
    ] {
        std::fs::write(&path, text).unwrap();
        let judged = Command::new(VMFERRY).args(["agent", "--check-config", "--config"]).arg(&path).output();
        let judged = judged.unwrap();
        let words = String::from_utf8_lossy(if code == 0 { &judged.stdout } else { &judged.stderr });
        assert_eq!(judged.status.code(), Some(code), "{judged:?}");
        assert!(words.contains(said), "{said:?} not in {words}");
    }
}

/// What no agent without a guest would say: a migration in full, and each of its ends.
#[test]
fn a_whole_migration_is_as_described() {
    let problem = Problem::new(ProblemKind::Busy, "text", "remedy");
    let outcomes = [
        Outcome::Moved { leftovers: vec!["x".to_owned().into()] },
        Outcome::Failed {
            phase: Phase::HandOver,
            cause: "x".into(),
            problems: vec![problem],
            cancelled: true,
            leftovers: Vec::new(),
        },
        Outcome::Undecided { cause: "x".into() },
    ];
    let description = Description::load();
    for outcome in outcomes {
        let mut progress = Progress::new(Uuid::new_v4(), "web1", Role::Destination, "bravo");
        progress.disks = vec![DiskProgress::default()];
        progress.ram = Some(RamProgress::default());
        progress.whole = Some(Whole { left_s: Some(1), ..Whole::default() });
        progress.downtime = Some(Downtime { hook_ms: Some(1), ..Downtime::default() });
        progress.outcome = Some(outcome);
        description.check("Migration", &serde_json::to_value(Migration::new(progress, "alpha")).unwrap());
    }
    for phase in Phase::ALL {
        let mut progress = Progress::new(Uuid::new_v4(), "web1", Role::Source, "bravo");
        progress.phase = phase;
        description.check("Migration", &serde_json::to_value(Migration::new(progress, "alpha")).unwrap());
    }
}

/// Nothing holds up what is not copied.
#[test]
fn what_holds_a_copy_up_is_told_while_it_copies() {
    let sink = ProgressSink::new(Progress::new(Uuid::new_v4(), "web1", Role::Source, "bravo"));
    for (phase, told) in [
        (Phase::Mirror, true),
        (Phase::Precopy, true),
        (Phase::Switchover, false),
        (Phase::Precopy, true),
        (Phase::RollBack, false),
    ] {
        sink.update(|p| (p.phase, p.held_up_by) = (phase, Some(HeldUp::Limit)));
        assert_eq!(sink.now().held_up_by, told.then_some(HeldUp::Limit), "{phase:?}");
        sink.update(|p| p.phase = Phase::Device);
        assert_eq!(sink.now().held_up_by, None, "after {phase:?}");
    }
}

/// What the command line asks with.
#[test]
fn whole_requests_are_as_described() {
    let (vm, to) = ("web1".to_owned(), "bravo".to_owned());
    let rate = Some("1M".parse().unwrap());
    let accept = BTreeSet::from(["cpu".parse().unwrap()]);
    let disks = DiskChoice::Except(BTreeSet::from(["vdb".to_owned()]));
    let disks_at_once = Some(2.try_into().unwrap());
    let options = Options {
        limit_bytes_per_s: rate,
        accept: accept.clone(),
        disks,
        disks_at_once,
        verify: Some(10.try_into().unwrap()),
        incremental: Some(Incremental::Only(BTreeSet::from(["vda".to_owned()]))),
        in_band: Some(InBand::Blk),
        never_in_band: true,
        ..Options::default()
    };
    let share = ShareRequest { limit_bytes_per_s: Some(None), weight: Some(300.try_into().unwrap()) };
    let forward = ForwardRequest {
        listen: "/run/near".parse().unwrap(),
        to: to.clone(),
        target: "vnc".parse().unwrap(),
        weight: 300.try_into().unwrap(),
        limit_bytes_per_s: rate,
        urgent: true,
        owner: Some("nobody".to_owned()),
        group: None,
        mode: "0660".to_owned().try_into().unwrap(),
    };
    let requests = [
        ("MigrateRequest", json!(MigrateRequest { vm: vm.clone(), to: to.clone(), options })),
        (
            "CheckRequest",
            json!(CheckRequest {
                compare_read_only: false,
                vm,
                to,
                strict: true,
                accept,
                disks: DiskChoice::Only(vec!["vda".into()]),
                verify: true,
                incremental: Some(Incremental::All),
                in_band: Some(InBand::Inc),
                never_in_band: true,
            }),
        ),
        ("ShareRequest", json!(share)),
        ("ForwardRequest", json!(forward)),
        ("PeerLimitRequest", json!(PeerLimitRequest { limit_bytes_per_s: rate })),
        ("ForceRequest", json!(ForceRequest { force: Side::There, until: Some(1) })),
    ];
    let description = Description::load();
    for (name, request) in requests {
        description.check(name, &request);
    }
}

#[test]
fn the_check_against_the_description_can_fail() {
    let description = Description::load();
    let good = json!({"type": "about:blank", "title": "t", "status": 400, "detail": "x", "error": "x", "remedy": "y"});
    assert_eq!(description.errors("Error", &good), Vec::<String>::new());
    let with = |key: &str, value: Value| {
        let mut bad = good.clone();
        bad[key] = value;
        bad
    };
    for bad in [
        json!({"error": "x"}),
        with("more", json!(1)),
        with("error", json!(1)),
        with("status", json!(200)),
        json!([]),
    ] {
        assert!(!description.errors("Error", &bad).is_empty(), "{bad}");
    }
    let outcome = |o: Value| description.errors("Outcome", &o).is_empty();
    assert!(outcome(json!({"result": "moved", "leftovers": []})));
    assert!(!outcome(json!({"result": "lost", "leftovers": []})));
    assert!(!outcome(json!({"result": "moved", "leftovers": [1]})));
    let kind = json!({"kind": "tired", "text": "", "remedy": ""});
    assert!(!description.errors("Problem", &kind).is_empty());
}
