//! Dialing and accepting: from an address or a fresh socket to a connection whose peer has proved
//! its identity and agreed to a session, a new one or one that goes on.
//!
//! Everything before that has a deadline and a byte limit. Knows no stream and no migration.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::addresses;
use super::handshake::{
    self, HANDSHAKE_DEADLINE, HandshakeError, HandshakeFailure, classify_handshake_error,
};
use super::identity::Identity;
use super::record::Record;
use super::resume::{self, Exported, Redial, Resumed, SessionKey};
use super::session::{EndCause, Session};
use super::tls::Tls;
use crate::mux::hello::{self, FirstFrame, Hello, HelloError, Mode, Negotiated};
use crate::mux::{Code, Config, Role};

/// How long TCP may take to connect (WIRE §8).
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long it may take when a session is to be resumed: a packet that was lost while the link was
/// down is sent again by the kernel ever more rarely, a new attempt sends one at once.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// How long a session goes on without a connection, unless told otherwise (WIRE §4).
pub const RESUME_DEADLINE: Duration = Duration::from_secs(60);
/// How long our own session may take to let go of its old connection.
const FENCE_DEADLINE: Duration = Duration::from_secs(5);
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
    /// TLS gave no keying material.
    #[error("the TLS connection gives no keying material to bind the session to")]
    Exporter(#[source] rustls::Error),
    /// The session that was to be resumed has ended here meanwhile.
    #[error("the session to be resumed has ended here")]
    Gone,
    /// The operating system gave no thread or descriptor for the session.
    #[error("the session could not be started")]
    Start(#[source] io::Error),
    /// The peer has no address and no live session.
    #[error("{peer} is not connected, and its configuration has no `address` to dial")]
    NoAddress {
        /// The peer.
        peer: Identity,
    },
    /// Too many connections have not proved their identity yet, and this one made room.
    #[error(
        "too many connections wait for their handshake, and this one has waited longest of those from there"
    )]
    TooManyUnauthenticated,
    /// Somebody else has dialed the same peer at the same time, with this end.
    #[error(transparent)]
    Shared(Arc<Self>),
}

impl ConnectError {
    /// Whether the peer knows nobody of this host's identity.
    #[must_use]
    pub fn is_stranger(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == Code::Auth,
            Self::Shared(e) => e.is_stranger(),
            _ => false,
        }
    }

    /// Whether one side has judged the other's certificate.
    #[must_use]
    pub fn is_distrust(&self) -> bool {
        match self {
            Self::Handshake(e) => !e.failure.may_pass(),
            Self::BeforeHello(e) => !classify_handshake_error(e).may_pass(),
            Self::Shared(e) => e.is_distrust(),
            _ => false,
        }
    }

    /// Whether dialing again later may succeed without anybody's doing.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        if let Self::Shared(e) = self {
            return e.may_pass();
        }
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
            Self::Exporter(_) => "exporter",
            Self::Gone => "gone",
            Self::Start(_) => "start",
            Self::NoAddress { .. } => "no_address",
            Self::TooManyUnauthenticated => "too_many",
            Self::Shared(e) => e.label(),
        }
    }
}

/// Why a peer gets no session: the code that it is told, and words.
pub(super) type Denial = (Code, &'static str);

/// What is known of a session's connection. It changes with each one.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// The peer's address.
    pub address: SocketAddr,
    /// Cipher suite and key exchange, for people.
    pub cipher: String,
    /// The certificates with which the peer proved itself, its own first.
    pub chain: Vec<CertificateDer<'static>>,
    /// When it was made.
    pub since: Instant,
}

/// A connection past TLS and HELLO. It belongs to no runtime yet.
pub(crate) struct Connection {
    pub(crate) tcp: std::net::TcpStream,
    pub(crate) record: Record,
    pub(crate) info: ConnectionInfo,
}

impl Connection {
    fn new(
        tcp: TcpStream,
        tls: impl Into<rustls::Connection>,
        address: SocketAddr,
    ) -> Result<Self, ConnectError> {
        let tls = tls.into();
        let chain = tls.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
        let info = ConnectionInfo { address, cipher: resume::cipher(&tls), chain, since: Instant::now() };
        let tcp = tcp.into_std().map_err(ConnectError::Start)?;
        Ok(Self { tcp, record: Record::new(tls), info })
    }
}

/// To a peer that comes while another process takes over: it is to come again.
pub(super) const LEAVING: Denial = (Code::Shutdown, "this agent's process changes; come again");

/// A connection on which a new session begins.
pub struct Established {
    pub(crate) connection: Connection,
    /// Who is at the other end.
    pub peer: Identity,
    pub(crate) role: Role,
    pub(crate) negotiated: Negotiated,
    pub(crate) key: SessionKey,
    /// How to come back, when this side is to.
    pub(crate) redial: Option<Redial>,
    /// How long the session goes on without a connection.
    pub(crate) resume_within: Duration,
}

/// What an accepted connection is for.
pub(super) enum Accepted {
    /// A new session.
    New(Box<Established>),
    /// It has been given to this session, which goes on.
    Resumed(Session),
}

/// What this agent brings into every connection.
#[derive(Debug)]
pub struct Endpoint {
    tls: RwLock<Arc<Tls>>,
    instance: [u8; 16],
    config: Config,
    dead_peer: Duration,
    resume_within: Duration,
    congestion: Option<String>,
}

impl Endpoint {
    /// An endpoint with the given credentials; `dead_peer` bounds a silent connection.
    ///
    /// # Errors
    /// [`ConnectError::Random`].
    pub fn new(tls: Tls, config: Config, dead_peer: Duration) -> Result<Self, ConnectError> {
        let instance = random()?;
        let (tls, resume_within) = (RwLock::new(Arc::new(tls)), RESUME_DEADLINE);
        Ok(Self { tls, instance, config, dead_peer, resume_within, congestion: None })
    }

    /// Goes by the name of an earlier process, whose sessions it has taken up.
    #[must_use]
    pub fn with_instance(self, instance: [u8; 16]) -> Self {
        Self { instance, ..self }
    }

    /// The name of this process to its peers.
    #[must_use]
    pub fn instance(&self) -> [u8; 16] {
        self.instance
    }

    /// Sessions go on without a connection for this long instead of [`RESUME_DEADLINE`].
    #[must_use]
    pub fn with_resume(self, resume_within: Duration) -> Self {
        Self { resume_within, ..self }
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
    pub async fn dial(self: &Arc<Self>, address: &str, peer: &Identity) -> Result<Established, ConnectError> {
        let (mut tls, remote) = self.reach(address, peer, CONNECT_DEADLINE).await?;
        let (session_id, secret_share) = (random()?, random()?);
        let ours = self.hello(Mode::New { session_id, secret_share });
        let (negotiated, share) = within(HELLO_DEADLINE, async {
            send(&mut tls, &ours.encode()).await?;
            let theirs = receive_hello(&mut tls).await?;
            let Mode::Accepted { secret_share } = theirs.mode else {
                return Err(ConnectError::Incompatible(Code::Protocol));
            };
            let negotiated = hello::negotiate(&ours, &theirs).map_err(ConnectError::Incompatible)?;
            Ok((negotiated, secret_share))
        })
        .await?;
        let (tcp, tls) = tls.into_inner();
        let instance = negotiated.peer_instance;
        Ok(Established {
            connection: Connection::new(tcp, tls, remote)?,
            peer: peer.clone(),
            role: Role::Dialer,
            key: SessionKey::derive(session_id, &secret_share, &share, instance, negotiated.version),
            negotiated,
            redial: Some(Redial {
                endpoint: Arc::clone(self),
                address: address.to_owned(),
                peer: peer.clone(),
            }),
            resume_within: self.resume_within,
        })
    }

    /// TLS with `peer` at one of the addresses that its name has now.
    async fn reach(
        &self,
        name: &str,
        peer: &Identity,
        deadline: Duration,
    ) -> Result<(TlsStream<TcpStream>, SocketAddr), ConnectError> {
        let found = addresses::resolve(name).await?;
        let own = self.tls();
        let attempt = |address| {
            let own = &own;
            async move {
                let tcp = addresses::tcp(address, deadline).await?;
                self.prepare(&tcp);
                let tls = handshake::connect(own, tcp, peer, HANDSHAKE_DEADLINE).await?;
                Ok((tls, address))
            }
        };
        addresses::first_of(name, found, attempt).await
    }

    /// One attempt to go on with a session over a new connection.
    pub(super) async fn resume(
        &self,
        redial: &Redial,
        key: &SessionKey,
        generation: u64,
        rx_seq: u64,
    ) -> Result<Resumed, ConnectError> {
        let (mut tls, remote) = self.reach(&redial.address, &redial.peer, RECONNECT_DEADLINE).await?;
        let exported = resume::export(tls.get_ref().1)?;
        let ours = self.hello(resume::resume_mode(key, &exported, generation, rx_seq));
        let peer_rx_seq = within(HELLO_DEADLINE, async {
            send(&mut tls, &ours.encode()).await?;
            let theirs = receive_hello(&mut tls).await?;
            let Mode::Resumed { rx_seq, proof } = theirs.mode else {
                return Err(ConnectError::Incompatible(Code::Protocol));
            };
            agree(key, &ours, &theirs).map_err(|(code, _)| ConnectError::Incompatible(code))?;
            if !key.is_proof(&proof, &exported, generation, Role::Acceptor) {
                return Err(ConnectError::Incompatible(Code::Auth));
            }
            Ok(rx_seq)
        })
        .await?;
        let (tcp, tls) = tls.into_inner();
        Ok(Resumed { connection: Connection::new(tcp, tls, remote)?, peer_rx_seq })
    }

    /// Takes a socket that a listener accepted through TLS and HELLO. `admit` decides whether the
    /// proved identity may have the session that it asks for: a new one (`None`), or which it means.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub(super) async fn accept<F: Future<Output = Result<Option<Session>, Denial>>>(
        &self,
        tcp: TcpStream,
        address: SocketAddr,
        admit: impl FnOnce(Identity, Hello) -> F,
    ) -> Result<Accepted, ConnectError> {
        self.prepare(&tcp);
        let (mut tls, peer) = handshake::accept(&self.tls(), tcp, HANDSHAKE_DEADLINE).await?;
        let exported = resume::export(tls.get_ref().1)?;
        let theirs = within(HELLO_DEADLINE, receive_hello(&mut tls)).await?;
        let answer = match admit(peer.clone(), theirs.clone()).await {
            Err(denial) => Err(denial),
            Ok(None) => self.accept_new(&theirs),
            Ok(Some(session)) => self.accept_resume(&theirs, &exported, session).await,
        };
        let (ours, what) = match answer {
            Ok(answer) => answer,
            Err((code, text)) => {
                let _ = within(HELLO_DEADLINE, async {
                    send(&mut tls, &hello::encode_goaway(code, 0, text)).await?;
                    tls.shutdown().await.map_err(ConnectError::BeforeHello)
                })
                .await;
                return Err(ConnectError::Incompatible(code));
            }
        };
        within(HELLO_DEADLINE, send(&mut tls, &ours.encode())).await?;
        let (tcp, tls) = tls.into_inner();
        let connection = Connection::new(tcp, tls, address)?;
        match what {
            Answer::New(negotiated, key) => Ok(Accepted::New(Box::new(Established {
                connection,
                peer,
                role: Role::Acceptor,
                negotiated: *negotiated,
                key,
                redial: None,
                resume_within: self.resume_within,
            }))),
            Answer::Resume { session, generation, peer_rx_seq } => {
                session.rejoin(generation, Resumed { connection, peer_rx_seq });
                Ok(Accepted::Resumed(session))
            }
        }
    }

    fn accept_new(&self, theirs: &Hello) -> Result<(Hello, Answer), Denial> {
        let Mode::New { session_id, secret_share } = theirs.mode else {
            return Err((Code::Protocol, "a HELLO that only an acceptor says"));
        };
        let share = random().map_err(|_| (Code::Internal, "no randomness"))?;
        let ours = self.hello(Mode::Accepted { secret_share: share });
        let negotiated = hello::negotiate(&ours, theirs).map_err(|code| (code, MISMATCH))?;
        let (instance, version) = (negotiated.peer_instance, negotiated.version);
        let key = SessionKey::derive(session_id, &secret_share, &share, instance, version);
        Ok((ours, Answer::New(Box::new(negotiated), key)))
    }

    /// The session lets go of its old connection *before* it says what it has received: bytes that
    /// still come over that one would be counted twice.
    async fn accept_resume(
        &self,
        theirs: &Hello,
        exported: &Exported,
        session: Session,
    ) -> Result<(Hello, Answer), Denial> {
        let Mode::Resume { generation, rx_seq, proof, .. } = theirs.mode else {
            return Err((Code::Protocol, "a HELLO that only an acceptor says"));
        };
        let key = session.key();
        if !key.is_proof(&proof, exported, generation, Role::Dialer) {
            return Err((Code::Auth, "the proof for that session is wrong"));
        }
        let mut ours = self.hello(Mode::Resumed { rx_seq: 0, proof: [0; 32] });
        agree(key, &ours, theirs)?;
        let fenced = timeout(FENCE_DEADLINE, session.fence(generation)).await.ok().flatten();
        let Some(our_rx_seq) = fenced else {
            let end = timeout(FENCE_DEADLINE, session.ended()).await;
            return Err(match end.as_deref().map(|end| &end.cause) {
                Ok(EndCause::Frozen) => LEAVING,
                _ => (Code::NoSession, "that session has ended, or has been resumed since"),
            });
        };
        let proof = session.key().proof(exported, generation, Role::Acceptor);
        ours.mode = Mode::Resumed { rx_seq: our_rx_seq, proof };
        Ok((ours, Answer::Resume { session, generation, peer_rx_seq: rx_seq }))
    }

    /// How long sessions go on without a connection.
    #[must_use]
    pub fn resume_within(&self) -> Duration {
        self.resume_within
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

/// What a HELLO is answered with.
enum Answer {
    New(Box<Negotiated>, SessionKey),
    Resume { session: Session, generation: u64, peer_rx_seq: u64 },
}

const MISMATCH: &str = "versions or features do not match";

/// That two HELLOs of a resumption fit the session: the same processes, the same version.
fn agree(key: &SessionKey, ours: &Hello, theirs: &Hello) -> Result<(), Denial> {
    let negotiated = hello::negotiate(ours, theirs).map_err(|code| (code, MISMATCH))?;
    if negotiated.peer_instance != key.peer_instance {
        return Err((Code::NoSession, "another process of that host has the session"));
    }
    if negotiated.version != key.version {
        return Err((Code::Version, "the session speaks another version"));
    }
    Ok(())
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

fn random<const N: usize>() -> Result<[u8; N], ConnectError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ConnectError::Random)?;
    Ok(bytes)
}
