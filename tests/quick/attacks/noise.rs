//! What a flood leaves in the log: a word for each cause and address, and numbers for the rest.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use socket2::{Domain, Socket, Type};
use uuid::Uuid;
use vmferry::migrate::message::{Request, Response};
use vmferry::mux::{Config, Open, RateLimit, purpose};

use super::victim::{Attacker, PATIENT, Victim, ask, control, offer, patient};
use crate::rig::{PATIENCE, soon, until};

fn connect_from(address: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What is no TLS, from a few addresses, a thousand times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_connections_are_told_once_for_each_cause_and_address_and_counted() {
    const EACH: usize = 250;
    let victim = Victim::start();
    let to = victim.address;
    let flood = (2..6u8).map(|last| {
        tokio::task::spawn_blocking(move || {
            for _ in 0..EACH {
                let mut stream = connect_from(IpAddr::from([127, 0, 0, last]), to);
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: alpha\r\n\r\n");
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        })
    });
    for one in flood.collect::<Vec<_>>() {
        soon("the flood", one).await.unwrap();
    }
    let counted = || victim.metric("vmferry_connect_failures_total{direction=\"in\",reason=\"garbage\"}");
    until("all to be counted", || counted() >= 4.0 * EACH as f64).await;
    let told: Vec<_> = victim.log().into_iter().filter(|line| line.contains("was refused")).collect();
    assert!((4..=4 * victim.told_at_most()).contains(&told.len()), "{told:#?}");
}

/// Streams of messages that begin and are gone, about migrations of ours and of libvirt's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_on_which_nothing_is_asked_are_told_once_for_each_peer_and_counted() {
    const EACH: usize = 600;
    let victim = Victim::start();
    let fast = RateLimit { per_second: 4000, burst: 8192 };
    for (name, purpose) in [("bravo", purpose::CONTROL), ("charlie", purpose::LIBVIRT)] {
        let attacker = Attacker::with(&victim, name, Config { opens: fast, ..Config::default() });
        let session = attacker.session(&victim).await;
        let flood = async {
            for _ in 0..EACH {
                let open = Open { purpose, ..control(Uuid::new_v4()) };
                let mut stream = loop {
                    match session.open(open).await {
                        Ok(stream) => break stream,
                        // Those before have their places still.
                        Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                };
                // Reset when it is dropped, with or without the byte.
                stream.send.send(Bytes::from_static(b"{")).await.unwrap();
            }
        };
        soon("the flood", flood).await;
        let counter = format!("vmferry_peer_refusals_total{{peer=\"{name}\",reason=\"nothing_asked\"}}");
        until("all to be counted", || victim.metric(&counter) >= EACH as f64).await;
        assert_eq!(victim.metric(&counter), EACH as f64);
        let told = told(&victim, name, &["without a request", "nothing was asked"]);
        assert!((1..=victim.told_at_most()).contains(&told.len()), "{told:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn virtual_machines_that_cannot_be_prepared_are_told_once_and_counted() {
    const TIMES: usize = 40;
    let victim = Victim::start();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    for n in 0..TIMES {
        let answer = ask(&session, Request::Prepare(offer(["web1", "web2", "web9"][n % 3]))).await;
        assert!(matches!(answer, Response::Refused(_)), "{answer:?}");
    }
    let counted = victim.metric("vmferry_peer_refusals_total{peer=\"bravo\",reason=\"not_possible\"}");
    assert_eq!(counted, TIMES as f64);
    let told = told(&victim, "", &["not prepared"]);
    assert!((1..=victim.told_at_most()).contains(&told.len()), "{told:#?}");
}

/// A copy of a host, or of its certificate, that comes again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_of_one_identity_is_told_once_and_counted() {
    const TIMES: usize = 3;
    let victim = Victim::start_with(|text| text + PATIENT);
    // It is heard of often while the victim listens whether it lives.
    let often = Config { ping_after: Duration::from_millis(200), ..patient() };
    let first = Attacker::with(&victim, "bravo", often);
    let lives = first.session(&victim).await;
    let counter = "vmferry_connect_failures_total{direction=\"in\",reason=\"two_agents\"}";
    soon("so many to be refused", async {
        let mut tries = 0;
        // Where this machine was too slow for a handshake, it was refused for that.
        while tries < TIMES || victim.metric(counter) < TIMES as f64 {
            assert!(Attacker::new(&victim, "bravo").dial(&victim).await.is_err());
            tries += 1;
        }
    })
    .await;
    let told = told(&victim, "", &["two agents", "another agent with this identity"]);
    assert!((1..=victim.told_at_most()).contains(&told.len()), "{told:#?}");
    assert!(lives.is_live());
}

/// Lines of the log with `whose` and one of these words in them.
fn told(victim: &Victim, whose: &str, words: &[&str]) -> Vec<String> {
    let is = |line: &String| line.contains(whose) && words.iter().any(|words| line.contains(words));
    victim.log().into_iter().filter(is).collect()
}
