//! Sessions that outlive their connections, over real TLS and real sockets: whatever happens to
//! the road between two agents, bytes come out as they went in; and nobody but the peer can go on
//! with a session.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure here is a failure of the test")]

#[path = "road/mod.rs"]
mod road;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use road::{Road, State};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use vmferry::mux::hello::{Hello, Mode};
use vmferry::mux::{Class, Code, Config, Open, purpose};
use vmferry::net::connect::{self, Endpoint};
use vmferry::net::handshake;
use vmferry::net::identity::Identity;
use vmferry::net::lanes::Lanes;
use vmferry::net::pool::Pool;
use vmferry::net::pump::{Pump, PumpEnd};
use vmferry::net::session::{EndCause, IncomingStream, Session};
use vmferry::net::stream::StreamEnded;
use vmferry::net::tls::{Aead, Tls, TlsPaths};
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

/// No wait of these tests is longer; none of them is expected to come near it.
const PATIENCE: Duration = Duration::from_secs(120);

async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

fn tls(dir: &Path, name: &str) -> Tls {
    let host = dir.join("hosts").join(name);
    let paths = TlsPaths {
        ca: host.join("ca-cert.pem"),
        cert: host.join("cert.pem"),
        key: host.join("key.pem"),
        crl: None,
    };
    Tls::load(&paths, Aead::Auto).unwrap()
}

/// Dead connections are noticed within half a second.
fn quick() -> Config {
    Config {
        ping_after: Duration::from_millis(100),
        dead_after: Duration::from_millis(700),
        ..Config::default()
    }
}

struct Side {
    pool: Arc<Pool>,
    identity: Identity,
    address: SocketAddr,
    incoming: mpsc::Receiver<IncomingStream>,
    _accepting: tokio::task::JoinSet<()>,
}

impl Side {
    async fn new(dir: &Path, name: &str, resume: Duration) -> Self {
        let tls = tls(dir, name);
        let identity = tls.identity.clone();
        let endpoint = Endpoint::new(tls, quick(), quick().dead_after).unwrap().with_resume(resume);
        let (sender, incoming) = mpsc::channel(64);
        let (starts, _) = mpsc::unbounded_channel();
        let pool = Arc::new(Pool::new(endpoint, sender, starts));
        let listener = connect::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepting = tokio::task::JoinSet::new();
        accepting.spawn(accept(Arc::clone(&pool), listener));
        Self { pool, identity, address, incoming, _accepting: accepting }
    }
}

async fn accept(pool: Arc<Pool>, listener: TcpListener) {
    let mut tasks = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let pool = Arc::clone(&pool);
        tasks.spawn(async move { drop(pool.accept(tcp, |_| true).await) });
    }
}

/// Two sides, a road between them, and a session that the first has dialed along it.
struct Pair {
    b: Side,
    road: Road,
    session: Session,
    dir: tempfile::TempDir,
    a: Side,
}

impl Pair {
    async fn new(resume: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        create_ca(dir.path(), &CaRequest { name: None, days: 30, domains: Vec::new() }).unwrap();
        for name in ["alpha", "bravo", "charlie"] {
            let name = name.parse().unwrap();
            let request = HostRequest { name, names: Vec::new(), days: 10, force: false };
            issue_host(dir.path(), &request).unwrap();
        }
        let a = Side::new(dir.path(), "alpha", resume).await;
        let b = Side::new(dir.path(), "bravo", resume).await;
        let road = Road::to(b.address).await;
        let session = a.pool.session(&b.identity, Some(&road.address().to_string())).await.unwrap();
        // The other side has the session a moment later.
        soon("the session at the other side", async {
            while b.pool.all().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        Self { a, b, road, session, dir }
    }

    /// A stream with local sockets and pumps at both ends.
    async fn pumped(&mut self, channel: u16) -> Pumped {
        let opening = self.session.open(open(channel));
        let accepting = async { self.b.incoming.recv().await.unwrap().accept().await.unwrap() };
        let (ours, theirs) = soon("a stream", async { tokio::join!(opening, accepting) }).await;
        let (near, near_fd) = UnixStream::pair().unwrap();
        let (far, far_fd) = UnixStream::pair().unwrap();
        let (near_tell, near_end) = mpsc::channel(1);
        let (far_tell, far_end) = mpsc::channel(1);
        let runtime = self.session.runtime();
        let near_pump = Pump::start(runtime, near_fd.into(), ours.unwrap(), move |end| {
            drop(near_tell.try_send(end));
        });
        let far_session = self.b.pool.all().pop().unwrap();
        let far_pump = Pump::start(far_session.runtime(), far_fd.into(), theirs, move |end| {
            drop(far_tell.try_send(end));
        });
        Pumped { near, far, near_end, far_end, pumps: [near_pump, far_pump] }
    }
}

struct Pumped {
    near: UnixStream,
    far: UnixStream,
    near_end: mpsc::Receiver<PumpEnd>,
    far_end: mpsc::Receiver<PumpEnd>,
    pumps: [Pump; 2],
}

fn open(channel: u16) -> Open {
    Open { purpose: purpose::NBD, class: Class::Bulk, weight: 16, migration: [0; 16], channel }
}

/// A stream of bytes in which every place is different from its neighbours.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Sends `len` bytes each way through each pair of sockets and checks every one of them.
async fn exchange(pumped: Vec<Pumped>, len: usize) {
    let mut jobs = tokio::task::JoinSet::new();
    let mut pumps = Vec::new();
    for (n, one) in pumped.into_iter().enumerate() {
        pumps.push(one.pumps);
        for (seed, from, to) in [
            (2 * n as u64 + 1, one.near.try_clone(), one.far.try_clone()),
            (2 * n as u64 + 2, one.far.try_clone(), one.near.try_clone()),
        ] {
            let (mut from, mut to) = (from.unwrap(), to.unwrap());
            jobs.spawn_blocking(move || {
                from.write_all(&pattern(seed, len)).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
            });
            jobs.spawn_blocking(move || {
                let mut got = Vec::new();
                to.read_to_end(&mut got).unwrap();
                assert!(got == pattern(seed, len), "seed {seed}: {} of {len} bytes", got.len());
            });
        }
    }
    while let Some(done) = soon("all bytes", jobs.join_next()).await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_survive_a_connection_that_is_reset_over_and_over() {
    let mut pair = Pair::new(PATIENCE).await;
    let pumped = vec![pair.pumped(1).await, pair.pumped(2).await];
    let road = pair.road.clone();
    let cutting = tokio::spawn(async move {
        let mut bytes = 0;
        loop {
            // By bytes and not by time: every part of the transfer is hit, however fast it is.
            road.passed(bytes + 700_000).await;
            bytes = road.bytes();
            road.reset();
        }
    });
    exchange(pumped, 12_000_000).await;
    cutting.abort();
    let stats = pair.session.stats().await;
    assert!(stats.reconnects >= 20, "only {} reconnections", stats.reconnects);
    assert!(stats.replayed_bytes > 0);
    eprintln!("{} reconnections, {} bytes sent again from this side", stats.reconnects, stats.replayed_bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_survive_black_holes_in_either_direction_and_a_peer_that_is_half_gone() {
    let mut pair = Pair::new(PATIENCE).await;
    let pumped = vec![pair.pumped(1).await];
    let road = pair.road.clone();
    let hurting = tokio::spawn(async move {
        for state in [State::Hole, State::UpOnly, State::DownOnly, State::ResetNear, State::ResetFar] {
            let bytes = road.bytes();
            road.passed(bytes + 1_000_000).await;
            road.set(state);
            // Longer than a dead connection takes to be noticed.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            road.set(State::Open);
        }
    });
    exchange(pumped, 24_000_000).await;
    soon("all faults", hurting).await.unwrap();
    let stats = pair.session.stats().await;
    assert!(stats.reconnects >= 4, "only {} reconnections", stats.reconnects);
    assert!(stats.away > Duration::from_secs(1), "{:?}", stats.away);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_there_is_no_connection_little_is_taken_and_it_is_told() {
    let mut pair = Pair::new(PATIENCE).await;
    let one = pair.pumped(1).await;
    pair.road.set(State::Hole);
    let mut near = one.near.try_clone().unwrap();
    let taken = tokio::task::spawn_blocking(move || {
        near.set_write_timeout(Some(Duration::from_millis(1500))).unwrap();
        let chunk = vec![1; 1 << 16];
        let mut taken = 0;
        while let Ok(n) = near.write(&chunk) {
            taken += n;
        }
        taken
    })
    .await
    .unwrap();
    // The send queue, the stream's credit on a connection that was still thought to be there, and
    // two kernels' buffers.
    assert!(taken < 12 << 20, "{taken} bytes were taken without a connection");
    soon("the word that there is no connection", async {
        while pair.session.away_since().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let away = pair.session.link().away.unwrap();
    assert!(away.until > away.since && !away.cause.is_empty(), "{away:?}");
    // A stream can be asked for meanwhile; it comes about when there is a connection again.
    let opening = tokio::spawn({
        let session = pair.session.clone();
        async move { session.open(open(2)).await }
    });
    // Time that is spent without a connection is nobody's.
    let waited = tokio::spawn({
        let lanes = Lanes::from(pair.session.clone());
        async move { lanes.within(Duration::from_millis(400), std::future::pending::<()>()).await }
    });
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(!opening.is_finished() && !waited.is_finished());
    pair.road.set(State::Open);
    let offered = soon("the offer", pair.b.incoming.recv()).await.unwrap();
    let _theirs = offered.accept().await.unwrap();
    soon("the stream", opening).await.unwrap().unwrap();
    assert!(soon("the deadline", waited).await.unwrap().is_none());
    assert!(pair.session.link().away.is_none());
    drop(one);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_time_is_over_ends_at_both_sides() {
    let mut pair = Pair::new(Duration::from_secs(2)).await;
    let mut one = pair.pumped(1).await;
    let far_session = pair.b.pool.all().pop().unwrap();
    pair.road.set(State::Hole);
    for session in [&pair.session, &far_session] {
        let end = soon("the session's end", session.ended()).await;
        assert!(matches!(end.cause, EndCause::Lost { .. }), "{:?}", end.cause);
        assert!(!session.is_live());
    }
    // The pumps end with their session's runtime, perhaps before they can say so.
    for end in [&mut one.near_end, &mut one.far_end] {
        let end = soon("the pump's end", end.recv()).await;
        assert!(matches!(end, None | Some(PumpEnd::Remote(StreamEnded(Code::SessionLost)))), "{end:?}");
    }
    let mut rest = [0; 16];
    assert!(matches!(one.near.read(&mut rest), Ok(0) | Err(_)), "the local program hears of it");
}

/// Where handshakes pass and data does not, a session is resumed again and again; that ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_resumed_and_moves_nothing_ends_when_its_time_is_over() {
    let mut pair = Pair::new(Duration::from_secs(6)).await;
    let one = pair.pumped(1).await;
    pair.road.set(State::Small);
    let near = one.near.try_clone().unwrap();
    near.set_nonblocking(true).unwrap();
    let _full = (&near).write(&pattern(1, 1 << 17));
    let end = soon("the session's end", pair.session.ended()).await;
    assert!(matches!(end.cause, EndCause::Lost { .. }), "{:?}", end.cause);
    let said = std::error::Error::source(&end.cause).unwrap().to_string();
    assert!(said.contains("full-size packets"), "{said}");
    assert!(end.stats.reconnects >= 1, "only {} reconnections", end.stats.reconnects);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_does_not_know_the_old_ones_session() {
    let mut pair = Pair::new(PATIENCE).await;
    let mut one = pair.pumped(1).await;
    let successor = Side::new(pair.dir.path(), "bravo", PATIENCE).await;
    pair.road.lead_to(successor.address);
    pair.road.reset();
    let end = soon("the session's end", pair.session.ended()).await;
    let EndCause::Lost { refusal: Some(refusal), .. } = &end.cause else { panic!("{:?}", end.cause) };
    assert!(refusal.to_string().contains("no_session"), "{refusal}");
    let mut rest = [0; 16];
    assert!(matches!(one.near.read(&mut rest), Ok(0) | Err(_)), "the local program hears of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peers_new_process_ends_the_old_ones_session_at_once() {
    let pair = Pair::new(PATIENCE).await;
    let old = pair.b.pool.all().pop().unwrap();
    // The process dies without a word, and another takes its place.
    pair.road.set(State::Hole);
    let successor = Side::new(pair.dir.path(), "alpha", PATIENCE).await;
    let new = successor.pool.session(&pair.b.identity, Some(&pair.b.address.to_string())).await.unwrap();
    let end = soon("the old session's end", old.ended()).await;
    assert!(matches!(end.cause, EndCause::Closed(Code::NoSession)), "{:?}", end.cause);
    assert!(new.is_live());
}

/// A copy of a host must not end what the host is about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_with_the_identity_of_a_live_one_is_refused() {
    let pair = Pair::new(PATIENCE).await;
    let clone = Side::new(pair.dir.path(), "alpha", PATIENCE).await;
    let refused = clone.pool.session(&pair.b.identity, Some(&pair.b.address.to_string())).await.unwrap_err();
    let text = format!("{refused:?}");
    assert!(text.contains("Limit") && text.contains("another agent with this identity"), "{text}");
    assert!(pair.session.is_live() && pair.session.away_since().is_none(), "the first one's session goes on");
}

/// A session whose dialer is gone for good is not what a new migration is bound to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_for_a_session_dials_when_the_other_side_does_not() {
    let pair = Pair::new(PATIENCE).await;
    let old = pair.b.pool.all().pop().unwrap();
    pair.road.set(State::Hole);
    pair.road.reset();
    soon("the loss", old.missed()).await;
    let successor = Side::new(pair.dir.path(), "alpha", PATIENCE).await;
    let (alpha, address) = (successor.identity.clone(), successor.address.to_string());
    let new = soon("a session", pair.b.pool.session(&alpha, Some(&address))).await.unwrap();
    assert!(new.id() != old.id() && new.is_live() && new.away_since().is_none());
    soon("the old session's end", old.ended()).await;
}

/// Where nobody answers, the other side may still come back by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_for_a_session_waits_when_nobody_answers() {
    let pair = Pair::new(PATIENCE).await;
    let old = pair.b.pool.all().pop().unwrap();
    pair.road.set(State::Hole);
    pair.road.reset();
    soon("the loss", old.missed()).await;
    let (pool, alpha) = (Arc::clone(&pair.b.pool), pair.a.identity.clone());
    let asked = tokio::spawn(async move { pool.session(&alpha, Some("127.0.0.1:1")).await });
    // The dial has failed by the time that its failure is counted.
    soon("the failed dial", async {
        while pair.b.pool.dial_failures().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!asked.is_finished(), "it gave up although the session may come back");
    pair.road.set(State::Open);
    pair.road.reset();
    let session = soon("the session", asked).await.unwrap().unwrap();
    assert_eq!(session.id(), old.id());
    // And who has dialed a session waits for it, because it is dialing already.
    pair.road.reset();
    let address = pair.road.address().to_string();
    let same = soon("the session", pair.a.pool.session(&pair.b.identity, Some(&address))).await.unwrap();
    assert_eq!(same.id(), old.id());
}

/// What somebody says who has a certificate of the CA, but not the session.
async fn attempt(pair: &Pair, name: &str, generation: u64, proof: [u8; 32], instance: [u8; 16]) -> Vec<u8> {
    let own = tls(pair.dir.path(), name);
    let tcp = TcpStream::connect(pair.b.address).await.unwrap();
    let mut stream = handshake::connect(&own, tcp, &pair.b.identity, Duration::from_secs(10)).await.unwrap();
    let session_id = pair.session.id();
    let mode = Mode::Resume { session_id, generation, rx_seq: 0, proof };
    stream.write_all(&Hello::new(&quick(), instance, mode).encode()).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the refusal", stream.read_to_end(&mut answer)).await;
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_can_take_a_session() {
    let mut pair = Pair::new(PATIENCE).await;
    let one = pair.pumped(1).await;
    let goaway = |answer: &[u8]| u32::from_be_bytes(answer[8..12].try_into().unwrap());
    // The same host's certificate in another process; another host's; a session of another peer.
    let forged = attempt(&pair, "alpha", 99, [7; 32], [1; 16]).await;
    assert_eq!(goaway(&forged), Code::Auth.to_wire());
    let zero = attempt(&pair, "alpha", 0, [0; 32], [1; 16]).await;
    assert_eq!(goaway(&zero), Code::Auth.to_wire());
    let stranger = attempt(&pair, "charlie", 99, [7; 32], [1; 16]).await;
    assert_eq!(goaway(&stranger), Code::NoSession.to_wire());
    // The session has not even noticed.
    exchange(vec![one], 1_000_000).await;
    let stats = pair.session.stats().await;
    assert_eq!(stats.reconnects, 0);
    assert_eq!(pair.b.pool.all().len(), 1);
}
