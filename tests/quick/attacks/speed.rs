//! What attacks cost honest work: a stream through the agent to a program's socket, alone and beside each attack
//! from another address. Measures, prints, and fails where too little is kept, on a machine that has nothing else
//! to do (`make attacks`); the attacker, the honest side and the agent share its processors, so the agent's own time is told as well.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use socket2::{Domain, Socket, Type};
use vmferry::mux::frame::{FLAG_ABORT, Header, Kind, encode_open};
use vmferry::mux::{Class, Name, Open, purpose};
use vmferry::net::session::Session;

use super::flood::client_hello;
use super::raw::{ATTACKER, Raw};
use super::victim::{Attacker, PATIENT, Victim, control, patient};
use crate::rig::{blocking, soon};

const HONEST_BYTES: usize = 1 << 30;
const CHUNK: usize = 64 << 10;

/// What the honest stream has got through, and what it cost the agent.
#[derive(Clone, Copy)]
struct Figures {
    mib_per_s: f64,
    cpu_s_per_gib: f64,
}

/// The agent's processor time so far, in seconds.
fn cpu_s(victim: &Victim) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", victim.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

async fn carried(victim: &Victim, session: &Session, sink: &UnixListener) -> Figures {
    let open = Open {
        purpose: purpose::FORWARD,
        class: Class::Bulk,
        weight: 16,
        migration: [7; 16],
        channel: 0,
        name: Name::new(b"sink").unwrap(),
    };
    let (begin, before) = (Instant::now(), cpu_s(victim));
    let listener = sink.try_clone().unwrap();
    let read = tokio::spawn(blocking(move || {
        let (mut socket, mut buffer, mut total) = (listener.accept().unwrap().0, vec![0; 1 << 20], 0);
        while let Ok(n) = socket.read(&mut buffer) {
            if n == 0 {
                break;
            }
            total += n;
        }
        total
    }));
    let mut stream = session.open(open).await.unwrap();
    stream.accepted().await.unwrap();
    let chunk = Bytes::from(vec![0x5a; CHUNK]);
    for _ in 0..HONEST_BYTES / CHUNK {
        stream.send.send(chunk.clone()).await.unwrap();
    }
    stream.send.finish().unwrap();
    assert_eq!(read.await.unwrap(), HONEST_BYTES);
    let gib = HONEST_BYTES as f64 / f64::from(1 << 30);
    Figures {
        mib_per_s: gib * 1024.0 / begin.elapsed().as_secs_f64(),
        cpu_s_per_gib: (cpu_s(victim) - before) / gib,
    }
}

/// An attack while it lasts, and how often it was done.
struct Attack {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

/// Calls `act` so many times a second.
fn at_rate(per_second: f64, mut act: impl FnMut() + Send + 'static) -> Attack {
    let attack = Attack { stop: Arc::default(), done: Arc::default() };
    let (stop, done) = (Arc::clone(&attack.stop), Arc::clone(&attack.done));
    std::thread::spawn(move || {
        let begin = Instant::now();
        while !stop.load(Relaxed) {
            if (done.load(Relaxed) as f64) < begin.elapsed().as_secs_f64() * per_second {
                act();
                done.fetch_add(1, Relaxed);
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    attack
}

/// Connections that say so much and are held for a while.
fn connections(victim: &Victim, per_second: f64, said: Vec<u8>) -> Attack {
    let to = victim.address;
    let mut held = std::collections::VecDeque::new();
    at_rate(per_second, move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((IpAddr::from(ATTACKER), 0)).into()).unwrap();
        if socket.connect(&to.into()).is_ok() {
            let _ = (&socket).write_all(&said);
            held.push_back(socket);
        }
        if held.len() > 300 {
            held.pop_front();
        }
    })
}

/// A known peer sends so many frames a second, and comes again when it is thrown out.
fn frames(victim: &Arc<Victim>, per_second: f64, make: fn(u32) -> Vec<u8>) -> Attack {
    const AT_ONCE: u32 = 50;
    let attack = Attack { stop: Arc::default(), done: Arc::default() };
    let (stop, done) = (Arc::clone(&attack.stop), Arc::clone(&attack.done));
    let victim = Arc::clone(victim);
    tokio::spawn(async move {
        let mut id = 0_u8;
        while !stop.load(Relaxed) {
            let mut raw = Raw::connect(&victim, "charlie").await;
            id = id.wrapping_add(1);
            raw.greet(id).await;
            let mut n = 0;
            while !stop.load(Relaxed) {
                let some: Vec<u8> = (n..n + AT_ONCE).flat_map(make).collect();
                n += AT_ONCE;
                done.fetch_add(u64::from(AT_ONCE), Relaxed);
                if raw.say(&some).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs_f64(f64::from(AT_ONCE) / per_second)).await;
            }
        }
    });
    attack
}

fn ping(n: u32) -> Vec<u8> {
    Header::new(Kind::Ping, 0, u64::from(n)).encode().to_vec()
}

fn open_and_reset(n: u32) -> Vec<u8> {
    let (id, payload) = (2 * n + 1, encode_open(&control(uuid::Uuid::nil())));
    let open = Header::new(Kind::Open, id, 65_536).with_len(payload.len()).encode();
    let reset = Header::new(Kind::Reset, id, 0).with_len(4).with_flags(FLAG_ABORT).encode();
    [&open[..], &payload, &reset, &[0, 0, 0, 7]].concat()
}

fn scrapes(victim: &Victim, per_second: f64) -> Attack {
    let to = victim.metrics;
    at_rate(per_second, move || {
        if let Ok(mut stream) = std::net::TcpStream::connect(to) {
            let _ = stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    })
}

fn an_attack(victim: &Arc<Victim>, name: &str) -> Attack {
    match name {
        "2,000 silent connections a second" => connections(victim, 2000.0, Vec::new()),
        "300 ClientHellos a second" => connections(victim, 300.0, client_hello(victim)),
        "1,000 HTTP requests to the port a second" => {
            connections(victim, 1000.0, b"GET / HTTP/1.1\r\n\r\n".to_vec())
        }
        "5,000 PING a second, a known peer" => frames(victim, 5000.0, ping),
        "5,000 OPEN and RESET a second, a known peer" => frames(victim, 5000.0, open_and_reset),
        "200 scrapes of the metrics a second" => scrapes(victim, 200.0),
        other => panic!("{other}"),
    }
}

/// How often each attack is measured; shown is the median and [least–greatest].
const ROUNDS: usize = 5;
/// What honest work keeps of its speed beside each attack, in the median of the rounds.
const KEPT_MIN: f64 = 0.8;

/// The median, and how it is shown.
fn spread(mut values: Vec<f64>) -> (f64, String) {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    (median, format!("{median:.2} [{:.2}–{:.2}]", values[0], values[values.len() - 1]))
}

/// One attack beside the honest stream: how often it was done in a second, the stream's speed and the agent's time
/// for its bytes beside it, both to those alone, just before and just after.
async fn round(victim: &Arc<Victim>, session: &Session, sink: &UnixListener, name: &str) -> [f64; 3] {
    let alone = carried(victim, session, sink).await;
    let (attack, begin) = (an_attack(victim, name), Instant::now());
    let beside = soon(name, carried(victim, session, sink)).await;
    let per_second = attack.done.load(Relaxed) as f64 / begin.elapsed().as_secs_f64();
    attack.stop.store(true, Relaxed);
    let again = carried(victim, session, sink).await;
    let speed = (alone.mib_per_s + again.mib_per_s) / 2.0;
    let cost = (alone.cpu_s_per_gib + again.cpu_s_per_gib) / 2.0;
    [per_second, beside.mib_per_s / speed, beside.cpu_s_per_gib / cost]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures: make attacks"]
async fn honest_streams_beside_attacks() {
    let folder = tempfile::tempdir().unwrap();
    let sink = UnixListener::bind(folder.path().join("sink")).unwrap();
    let target =
        format!("[target.sink]\nconnect = '{}'\nfrom = ['bravo']\n", folder.path().join("sink").display());
    let victim = Arc::new(Victim::start_with(|text| text + &target + PATIENT));
    let bravo = Attacker::with(&victim, "bravo", patient());
    let session = bravo.session(&victim).await;
    let alone = carried(&victim, &session, &sink).await;
    println!("alone: {:.0} MiB/s, {:.2} s of the agent for a GiB", alone.mib_per_s, alone.cpu_s_per_gib);
    println!("| attack | done in a second | of its speed | of the agent's time for a GiB | resident MiB |");
    println!("|---|---|---|---|---|");
    let mut slowed = Vec::new();
    for name in [
        "2,000 silent connections a second",
        "300 ClientHellos a second",
        "1,000 HTTP requests to the port a second",
        "5,000 PING a second, a known peer",
        "5,000 OPEN and RESET a second, a known peer",
        "200 scrapes of the metrics a second",
    ] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(round(&victim, &session, &sink, name).await);
        }
        let resident = victim.resident_bytes() >> 20;
        let of = |at: usize| rounds.iter().map(|round| round[at]).collect::<Vec<_>>();
        let done = of(0).iter().sum::<f64>() / ROUNDS as f64;
        let ((speed, kept), (_, cost)) = (spread(of(1)), spread(of(2)));
        println!("| {name} | {done:.0} | {kept} | {cost} | {resident} |");
        if speed < KEPT_MIN {
            slowed.push(format!("{name}: {kept}"));
        }
        assert!(session.is_live() && session.stats().await.reconnects == 0, "{name}");
    }
    assert!(slowed.is_empty(), "less than {KEPT_MIN} of its speed beside {}", slowed.join("; beside "));
}
