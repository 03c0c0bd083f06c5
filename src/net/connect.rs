//! Dialing and accepting: from an address or a fresh socket to an established connection,
//! that is one whose peer has proved its identity and agreed to a session.
//!
//! Everything before that has a deadline and a byte limit. Knows no stream and no migration.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::handshake::{
    self, HANDSHAKE_DEADLINE, HandshakeError, HandshakeFailure, classify_handshake_error,
};
use super::identity::Identity;
use super::record::Record;
use super::tls::Tls;
use crate::mux::hello::{self, FirstFrame, Hello, HelloError, Mode, Negotiated};
use crate::mux::{Code, Config, Role};

/// How long TCP may take to connect (WIRE §8).
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long the peer's HELLO may take after TLS (WIRE §8).
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Bytes that may lie unsent in the kernel: what is sealed late can still be overtaken.
const NOTSENT_LOWAT_BYTES: u32 = 64 * 1024;
/// Connections that the kernel keeps for us before they are accepted.
const LISTEN_BACKLOG: i32 = 128;

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The peer's name has no address.
    #[error("cannot resolve {address}; check the peer's `address` in the configuration")]
    Resolve {
        /// As configured.
        address: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// TCP did not come about.
    #[error("cannot connect to {address}; is its agent running, and does the firewall pass this port?")]
    Connect {
        /// As configured.
        address: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// TLS refused, on either side.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The peer went away before its HELLO.
    #[error("the connection ended before the peer said HELLO: {}", classify_handshake_error(.0))]
    BeforeHello(#[source] io::Error),
    /// The peer's first frame is not one.
    #[error("the peer's first frame is not a HELLO of this protocol")]
    Hello(#[source] HelloError),
    /// The peer said no.
    #[error("the peer refused the session ({}){}{text}", code.name(), if text.is_empty() { "" } else { ": " })]
    Refused {
        /// Why.
        code: Code,
        /// In its words.
        text: String,
    },
    /// We said no.
    #[error("the peer's HELLO was refused ({})", .0.name())]
    Incompatible(Code),
    /// A deadline passed.
    #[error("no answer from the peer within {} s", .0.as_secs())]
    Deadline(Duration),
    /// The operating system gave no randomness.
    #[error("no randomness")]
    Random(#[source] getrandom::Error),
    /// The operating system gave no thread or descriptor for the session.
    #[error("the session could not be started")]
    Start(#[source] io::Error),
    /// The peer has no address and no live session.
    #[error("{peer} is not connected, and its configuration has no `address` to dial")]
    NoAddress {
        /// The peer.
        peer: Identity,
    },
    /// Too many connections have not proved their identity yet, and this was the oldest.
    #[error("too many connections wait for their handshake, and this one has waited longest")]
    TooManyUnauthenticated,
}

impl ConnectError {
    /// Whether one side has judged the other's certificate.
    #[must_use]
    pub fn is_distrust(&self) -> bool {
        match self {
            Self::Handshake(e) => !e.failure.may_pass(),
            Self::BeforeHello(e) => !classify_handshake_error(e).may_pass(),
            _ => false,
        }
    }

    /// Whether dialing again later may succeed without anybody's doing.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        let decided = matches!(
            self,
            Self::Refused { code: Code::Auth | Code::Version | Code::Feature, .. }
                | Self::Incompatible(_)
                | Self::Hello(_)
        );
        !decided && !self.is_distrust() && !matches!(self, Self::NoAddress { .. })
    }

    /// A bounded label for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Handshake(e) => e.failure.label(),
            Self::BeforeHello(e) => classify_handshake_error(e).label(),
            Self::Hello(_) => "hello",
            Self::Refused { .. } => "refused",
            Self::Incompatible(Code::Auth) => "unknown_peer",
            Self::Incompatible(_) => "incompatible",
            Self::Deadline(_) => HandshakeFailure::Timeout.label(),
            Self::Random(_) => "random",
            Self::Start(_) => "start",
            Self::NoAddress { .. } => "no_address",
            Self::TooManyUnauthenticated => "too_many",
        }
    }
}

/// Why a peer gets no session: the code that it is told, and words.
pub(super) type Denial = (Code, &'static str);

/// A connection on which a session can run.
pub struct Established {
    pub(crate) tcp: TcpStream,
    pub(crate) record: Record,
    /// Who is at the other end.
    pub peer: Identity,
    /// Its address.
    pub address: SocketAddr,
    pub(crate) role: Role,
    pub(crate) negotiated: Negotiated,
    /// Cipher suite and key exchange, for people.
    pub cipher: String,
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

/// What this agent brings into every connection.
#[derive(Debug)]
pub struct Endpoint {
    tls: RwLock<Arc<Tls>>,
    instance: [u8; 16],
    config: Config,
    dead_peer: Duration,
    congestion: Option<String>,
}

impl Endpoint {
    /// An endpoint with the given credentials; `dead_peer` bounds a silent connection.
    ///
    /// # Errors
    /// [`ConnectError::Random`].
    pub fn new(tls: Tls, config: Config, dead_peer: Duration) -> Result<Self, ConnectError> {
        let instance = random()?;
        Ok(Self { tls: RwLock::new(Arc::new(tls)), instance, config, dead_peer, congestion: None })
    }

    /// Asks for this congestion control on every connection instead of the system's default
    /// (tcp(7), TCP_CONGESTION).
    #[must_use]
    pub fn with_congestion(self, name: &str) -> Self {
        Self { congestion: Some(name.to_owned()), ..self }
    }

    /// The credentials in use for new connections.
    #[must_use]
    pub fn tls(&self) -> Arc<Tls> {
        let tls = self.tls.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(&tls)
    }

    /// Uses other credentials for new connections.
    pub fn set_tls(&self, tls: Tls) {
        *self.tls.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(tls);
    }

    /// The protocol's limits.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Dials a peer and establishes a new session, proving that it is `peer`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn dial(&self, address: &str, peer: &Identity) -> Result<Established, ConnectError> {
        let (tcp, address) = connect(address).await?;
        self.prepare(&tcp);
        let mut tls = handshake::connect(&self.tls(), tcp, peer, HANDSHAKE_DEADLINE).await?;
        let ours = self.hello(Mode::New { session_id: random()?, secret_share: random()? });
        let negotiated = within(HELLO_DEADLINE, async {
            send(&mut tls, &ours.encode()).await?;
            let theirs = receive_hello(&mut tls).await?;
            if !matches!(theirs.mode, Mode::Accepted { .. }) {
                return Err(ConnectError::Incompatible(Code::Protocol));
            }
            hello::negotiate(&ours, &theirs).map_err(ConnectError::Incompatible)
        })
        .await?;
        let (tcp, tls) = tls.into_inner();
        let (peer, role) = (peer.clone(), Role::Dialer);
        let (cipher, chain) = (cipher(&tls), chain(&tls));
        let record = Record::new(tls.into());
        Ok(Established { tcp, record, peer, address, role, negotiated, cipher, chain })
    }

    /// Establishes a session on a socket that a listener accepted. `admit` decides whether the
    /// proved identity may have a session, or with which words it is turned away.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub(super) async fn accept(
        &self,
        tcp: TcpStream,
        address: SocketAddr,
        admit: impl FnOnce(&Identity) -> Result<(), Denial>,
    ) -> Result<Established, ConnectError> {
        self.prepare(&tcp);
        let (mut tls, peer) = handshake::accept(&self.tls(), tcp, HANDSHAKE_DEADLINE).await?;
        let admitted = admit(&peer);
        let negotiated = within(HELLO_DEADLINE, async {
            let theirs = receive_hello(&mut tls).await?;
            match self.answer(&theirs, admitted) {
                Ok((ours, negotiated)) => {
                    send(&mut tls, &ours.encode()).await?;
                    Ok(negotiated)
                }
                Err((code, text)) => {
                    send(&mut tls, &hello::encode_goaway(code, 0, text)).await?;
                    let _ = tls.shutdown().await;
                    Err(ConnectError::Incompatible(code))
                }
            }
        })
        .await?;
        let (tcp, tls) = tls.into_inner();
        let (cipher, chain) = (cipher(&tls), chain(&tls));
        let record = Record::new(tls.into());
        Ok(Established { tcp, record, peer, address, role: Role::Acceptor, negotiated, cipher, chain })
    }

    fn answer(&self, theirs: &Hello, admitted: Result<(), Denial>) -> Result<(Hello, Negotiated), Denial> {
        admitted?;
        if !matches!(theirs.mode, Mode::New { .. }) {
            return Err((Code::NoSession, "this agent does not know that session"));
        }
        let share = random().map_err(|_| (Code::Internal, "no randomness"))?;
        let ours = self.hello(Mode::Accepted { secret_share: share });
        let negotiated =
            hello::negotiate(&ours, theirs).map_err(|code| (code, "versions or features do not match"))?;
        Ok((ours, negotiated))
    }

    fn hello(&self, mode: Mode) -> Hello {
        Hello::new(&self.config, self.instance, mode)
    }

    /// Options that a bulk and latency connection needs; failing ones cost only speed.
    fn prepare(&self, tcp: &TcpStream) {
        let socket = SockRef::from(tcp);
        let keepalive = TcpKeepalive::new().with_time(self.dead_peer).with_interval(Duration::from_secs(1));
        let options = [
            socket.set_tcp_nodelay(true),
            socket.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES),
            socket.set_tcp_user_timeout(Some(self.dead_peer)),
            socket.set_tcp_keepalive(&keepalive),
            self.congestion.as_ref().map_or(Ok(()), |name| socket.set_tcp_congestion(name.as_bytes())),
        ];
        for error in options.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "a socket option was refused");
        }
    }
}

/// Listens on one address; an unspecified IPv6 address takes IPv4 as well.
///
/// # Errors
/// The operating system's answer.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn connect(address: &str) -> Result<(TcpStream, SocketAddr), ConnectError> {
    let named = || address.to_owned();
    let work = async {
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(address)
            .await
            .map_err(|source| ConnectError::Resolve { address: named(), source })?
            .collect();
        let tcp = TcpStream::connect(&*addresses)
            .await
            .map_err(|source| ConnectError::Connect { address: named(), source })?;
        let remote = tcp.peer_addr().map_err(|source| ConnectError::Connect { address: named(), source })?;
        Ok((tcp, remote))
    };
    match timeout(CONNECT_DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => Err(ConnectError::Connect { address: named(), source: io::ErrorKind::TimedOut.into() }),
    }
}

async fn within<T>(
    deadline: Duration,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    timeout(deadline, work).await.unwrap_or(Err(ConnectError::Deadline(deadline)))
}

async fn send(tls: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), ConnectError> {
    tls.write_all(bytes).await.map_err(ConnectError::BeforeHello)?;
    tls.flush().await.map_err(ConnectError::BeforeHello)
}

/// Reads exactly the peer's first frame, so that what follows stays with the TLS connection.
async fn receive_hello(tls: &mut (impl AsyncRead + Unpin)) -> Result<Hello, ConnectError> {
    let mut bytes = vec![0; hello::HEADER_LEN];
    tls.read_exact(&mut bytes).await.map_err(ConnectError::BeforeHello)?;
    loop {
        match hello::peek(&bytes).map_err(ConnectError::Hello)? {
            Some(FirstFrame::Hello { hello, .. }) => return Ok(*hello),
            Some(FirstFrame::GoAway { code, text, .. }) => return Err(ConnectError::Refused { code, text }),
            None => {}
        }
        let length = hello::first_frame_len(&bytes).map_err(ConnectError::Hello)?;
        let have = bytes.len();
        bytes.resize(length.max(have + 1), 0);
        tls.read_exact(&mut bytes[have..]).await.map_err(ConnectError::BeforeHello)?;
    }
}

fn cipher(tls: &rustls::CommonState) -> String {
    let suite = tls.negotiated_cipher_suite().and_then(|s| s.suite().as_str()).unwrap_or("unknown");
    match tls.negotiated_key_exchange_group() {
        Some(group) => format!("{suite} {:?}", group.name()),
        None => suite.to_owned(),
    }
}

/// What the peer proved itself with, to be judged again when our files change.
fn chain(tls: &rustls::CommonState) -> Vec<CertificateDer<'static>> {
    tls.peer_certificates().map(<[_]>::to_vec).unwrap_or_default()
}

fn random<const N: usize>() -> Result<[u8; N], ConnectError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ConnectError::Random)?;
    Ok(bytes)
}
