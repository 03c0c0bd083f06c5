//! Two agents' network sides in one process, over real TLS and real sockets: pools that dial each
//! other, a session between them, and local sockets joined by pumps and a stream. A `Road` may lie
//! between them.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

pub mod road;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use vmferry::mux::{Class, Config, Name, Open, purpose};
use vmferry::net::accept::listen;
use vmferry::net::compress::Coding;
use vmferry::net::connect_error::ConnectError;
use vmferry::net::endpoint::Endpoint;
use vmferry::net::identity::Identity;
use vmferry::net::pool::Pool;
use vmferry::net::pump::{Pump, PumpEnd, PumpState};
use vmferry::net::session::{IncomingStream, Session};
use vmferry::net::stream::Stream;
use vmferry::net::tls::{Aead, Tls, TlsPaths};
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

use road::Road;

/// No wait of these tests is longer; none of them is expected to come near it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A handshake has five seconds. Where this machine stalls for as long, one that fails after this time says nothing of
/// who refused it.
pub const LATE: Duration = Duration::from_secs(4);

pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Waits until `is` says so.
pub async fn until(what: &str, is: impl Fn() -> bool) {
    soon(what, async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// An address for somebody else to listen on. No other program chooses it: the host's part of it is this
/// process's number, and the port is none that the kernel gives away.
pub fn own_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(10_000);
    let [.., a, b, c] = std::process::id().to_be_bytes();
    loop {
        let port = NEXT.fetch_add(1, Relaxed);
        assert!(port < 30_000, "so many agents");
        // 127.0.0.1 and its neighbours are everybody's.
        let address = SocketAddr::from(([127, a | 0x80, b, c], port));
        // Somebody may listen on this port of all addresses.
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Blocking work beside the runtime.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon("blocking work", tokio::task::spawn_blocking(work)).await.unwrap()
}

/// An authority with certificates for alpha, bravo and charlie.
pub fn credentials() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    create_ca(dir.path(), &CaRequest { name: None, days: 30, domains: Vec::new() }).unwrap();
    for name in ["alpha", "bravo", "charlie"] {
        let name = name.parse().unwrap();
        issue_host(dir.path(), &HostRequest { name, names: Vec::new(), days: 10, force: false }).unwrap();
    }
    dir
}

pub fn tls(dir: &Path, name: &str) -> Tls {
    let host = dir.join("hosts").join(name);
    let [ca, cert, key] = ["ca-cert.pem", "cert.pem", "key.pem"].map(|file| host.join(file));
    Tls::load(&TlsPaths { ca, cert, key, crl: None }, Aead::Auto).unwrap()
}

/// An agent's network side: a pool, a listener, what peers open, sessions that began.
pub struct Side {
    pub pool: Arc<Pool>,
    pub identity: Identity,
    pub address: SocketAddr,
    pub incoming: mpsc::Receiver<IncomingStream>,
    pub started: mpsc::UnboundedReceiver<Session>,
    _accepting: tokio::task::JoinSet<()>,
}

impl Side {
    /// Its sessions wait for another connection for as long as `resume`.
    pub fn new(dir: &Path, name: &str, config: Config, resume: Duration) -> Self {
        let tls = tls(dir, name);
        let identity = tls.identity.clone();
        let dead = config.dead_after;
        let endpoint = Endpoint::new(tls, config, dead).unwrap().with_resume(resume);
        let (sender, incoming) = mpsc::channel(64);
        let (starts, started) = mpsc::unbounded_channel();
        let pool = Arc::new(Pool::new(endpoint, sender, starts));
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut accepting = tokio::task::JoinSet::new();
        accepting.spawn(accept(Arc::clone(&pool), listener));
        Self { pool, identity, address, incoming, started, _accepting: accepting }
    }

    pub async fn dial(&self, other: &Self) -> Result<Session, ConnectError> {
        self.dial_at(other, other.address).await
    }

    pub async fn dial_at(&self, other: &Self, address: SocketAddr) -> Result<Session, ConnectError> {
        self.pool.session(&other.identity, Some(&address.to_string())).await
    }

    pub async fn offered(&mut self) -> IncomingStream {
        soon("a stream that the peer opens", self.incoming.recv()).await.unwrap()
    }

    pub async fn offered_on(&mut self, channel: u16) -> IncomingStream {
        let stream = self.offered().await;
        assert_eq!(stream.open.channel, channel);
        stream
    }
}

async fn accept(pool: Arc<Pool>, listener: TcpListener) {
    let mut tasks = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let pool = Arc::clone(&pool);
        tasks.spawn(async move { drop(pool.accept(tcp, |_| true).await) });
    }
}

/// Two sides and a session that the first has dialed.
pub struct Pair {
    pub a: Side,
    pub b: Side,
    pub session: Session,
    pub dir: tempfile::TempDir,
}

impl Pair {
    pub async fn new(config: Config, resume: Duration) -> Self {
        let dir = credentials();
        let a = Side::new(dir.path(), "alpha", config.clone(), resume);
        let b = Side::new(dir.path(), "bravo", config, resume);
        let session = a.dial(&b).await.unwrap();
        Self::joined(a, b, session, dir).await
    }

    /// The session goes along a road.
    pub async fn by_road(config: Config, resume: Duration) -> (Self, Road) {
        let dir = credentials();
        let a = Side::new(dir.path(), "alpha", config.clone(), resume);
        let b = Side::new(dir.path(), "bravo", config, resume);
        let road = Road::to(b.address).await;
        let session = a.dial_at(&b, road.address()).await.unwrap();
        (Self::joined(a, b, session, dir).await, road)
    }

    /// The other side has the session a moment later.
    async fn joined(a: Side, b: Side, session: Session, dir: tempfile::TempDir) -> Self {
        until("the session at the other side", || !b.pool.all().is_empty()).await;
        Self { a, b, session, dir }
    }

    /// The session at the other side.
    pub fn far_session(&self) -> Session {
        self.b.pool.all().pop().unwrap()
    }

    /// A stream from the first side to the second, accepted there.
    pub async fn stream(&mut self, channel: u16) -> (Stream, Stream) {
        let opening = self.session.open(open(channel));
        let accepting = async { self.b.offered_on(channel).await.accept().await.unwrap() };
        let (ours, theirs) = soon("a stream", async { tokio::join!(opening, accepting) }).await;
        (ours.unwrap(), theirs)
    }

    /// Local sockets joined by pumps and a stream.
    pub async fn pumped(&mut self, channel: u16) -> Pumped {
        self.pumped_as(channel, PumpState::default(), PumpState::default()).await
    }

    pub async fn pumped_with(&mut self, channel: u16, near: Coding, far: Coding) -> Pumped {
        self.pumped_as(channel, PumpState::new(near), PumpState::new(far)).await
    }

    /// Each pump deals with bytes in its own way.
    pub async fn pumped_as(&mut self, channel: u16, near_state: PumpState, far_state: PumpState) -> Pumped {
        let (far, far_fd) = UnixStream::pair().unwrap();
        self.pumped_into(channel, near_state, far_state, far, far_fd).await
    }

    /// The far pump's socket is one of a program: `far` is anything that the test reads or keeps.
    pub async fn pumped_into(
        &mut self,
        channel: u16,
        near_state: PumpState,
        far_state: PumpState,
        far: UnixStream,
        far_fd: UnixStream,
    ) -> Pumped {
        let (ours, theirs) = self.stream(channel).await;
        let (near, near_fd) = UnixStream::pair().unwrap();
        let (near_pump, near_end) = pump(&self.session, near_fd.into(), ours, near_state);
        let (far_pump, far_end) = pump(&self.far_session(), far_fd.into(), theirs, far_state);
        for socket in [&near, &far] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.set_write_timeout(Some(PATIENCE)).unwrap();
        }
        Pumped { near, far, near_pump, far_pump, near_end, far_end }
    }
}

/// Dropping a pump cuts it.
pub struct Pumped {
    pub near: UnixStream,
    pub far: UnixStream,
    pub near_pump: Pump,
    pub far_pump: Pump,
    pub near_end: mpsc::UnboundedReceiver<PumpEnd>,
    pub far_end: mpsc::UnboundedReceiver<PumpEnd>,
}

fn pump(
    session: &Session,
    fd: OwnedFd,
    stream: Stream,
    state: PumpState,
) -> (Pump, mpsc::UnboundedReceiver<PumpEnd>) {
    let (sender, end) = mpsc::unbounded_channel();
    let tell = move |how| drop(sender.send(how));
    (Pump::resume(session.runtime(), fd, stream, state, tell), end)
}

pub fn open(channel: u16) -> Open {
    Open {
        purpose: purpose::NBD,
        class: Class::Bulk,
        weight: 16,
        migration: [7; 16],
        channel,
        name: Name::NONE,
    }
}

/// Bytes that tell their place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
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

/// Sends so many bytes each way through each pair of sockets, to their ends, and checks every one of
/// them.
pub async fn exchange(pumped: Vec<(Pumped, usize)>) {
    use std::io::{Read, Write};
    let mut jobs = tokio::task::JoinSet::new();
    let mut pumps = Vec::new();
    for (n, (one, len)) in pumped.into_iter().enumerate() {
        pumps.push((one.near_pump, one.far_pump));
        let (near, far) = (one.near.try_clone().unwrap(), one.far.try_clone().unwrap());
        for (seed, mut from, mut to) in [(2 * n as u64, near, far), (2 * n as u64 + 1, one.far, one.near)] {
            jobs.spawn_blocking(move || {
                from.write_all(&pattern(seed, len)).unwrap();
                from.shutdown(std::net::Shutdown::Write).unwrap();
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
