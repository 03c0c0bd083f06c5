//! A session as the rest of the agent holds it, and the thread that runs its driver.
//!
//! Each session has a thread with a runtime of its own: the driver and the pumps of its
//! streams share one core's cache and wake each other without crossing threads, and a session
//! that ends takes its pumps, and with them every local socket they hold, along.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::connect::{ConnectError, Connection, ConnectionInfo, Endpoint, Established};
use super::driver::{Command, Driver};
use super::edge::Edges;
use super::frozen::{FrozenSession, FrozenStream};
use super::identity::Identity;
use super::resume::{Redial, Resumed, SessionKey};
use super::stream::{Stream, StreamEnded};
use crate::mux::{self, Code, MigrationId, Open, Role, Share, SharedLimit, StreamId};

/// Tasks polled until the kernel is asked for events while there is always something to do: each
/// moves up to a batch, and what has arrived meanwhile waits.
const POLLS_PER_WAIT: u32 = 8;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum EndCause {
    /// Reading or writing the socket failed.
    #[error("the connection failed")]
    Io(#[source] std::io::Error),
    /// TLS refused what came.
    #[error("the TLS connection failed")]
    Tls(#[source] rustls::Error),
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// The peer broke the protocol, went silent, or a limit was passed.
    #[error("the session failed")]
    Session(#[source] mux::SessionError),
    /// The connection has given way to a newer one of the same session.
    #[error("the peer dialed again")]
    Replaced,
    /// The connection was lost, and no other came in time.
    #[error("the connection was lost and not replaced within {} s{}", after.as_secs(), refused(refusal))]
    Lost {
        /// How long it was tried.
        after: Duration,
        /// Why the peer would have none.
        refusal: Option<Box<ConnectError>>,
        /// How it was lost.
        source: Box<EndCause>,
    },
    /// The connection was lost as others before it, over which nothing had moved.
    #[error("{words}")]
    Stuck {
        /// What was seen of them.
        words: String,
        /// How the last one was lost.
        source: Box<EndCause>,
    },
    /// It goes on in another process.
    #[error("the agent's process changed")]
    Frozen,
    /// We ended it.
    #[error("closed here: {}", .0.name())]
    Closed(Code),
}

fn refused(refusal: &Option<Box<ConnectError>>) -> String {
    refusal.as_ref().map(|e| format!(" ({e})")).unwrap_or_default()
}

impl EndCause {
    /// Whether only the connection is lost, so that the session may go on over another.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        match self {
            Self::Io(_) | Self::Tls(_) | Self::PeerClosed | Self::Replaced => true,
            Self::Session(error) => error.is_resumable(),
            Self::Lost { .. } | Self::Stuck { .. } | Self::Frozen | Self::Closed(_) => false,
        }
    }

    /// A bounded label for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "io",
            Self::Tls(_) => "tls",
            Self::PeerClosed => "peer_closed",
            Self::Session(_) => "session",
            Self::Replaced => "replaced",
            Self::Lost { .. } => "lost",
            Self::Stuck { .. } => "stuck",
            Self::Frozen => "frozen",
            Self::Closed(code) => code.name(),
        }
    }
}

/// A session without a connection.
#[derive(Debug, Clone)]
pub struct Away {
    /// Since when.
    pub since: Instant,
    /// When it ends if there is none by then.
    pub until: Instant,
    /// How the connection was lost, in words.
    pub cause: String,
}

/// A session's connection, or the want of one.
#[derive(Debug, Clone)]
pub struct LinkState {
    /// Set while there is none.
    pub away: Option<Away>,
    /// The connection; the last one while there is none.
    pub connection: Arc<ConnectionInfo>,
}

/// A session's end and its last figures.
#[derive(Debug)]
pub struct SessionEnd {
    /// Why it ended.
    pub cause: EndCause,
    /// What it had carried.
    pub stats: mux::Stats,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStreamError {
    /// A limit of the session, ours or the peer's.
    #[error("no further stream in the session with {peer}")]
    Limit {
        /// The peer.
        peer: Identity,
        /// Which limit.
        source: mux::OpenError,
    },
    /// The peer answered no, or the session ended.
    #[error("{peer} did not accept the stream")]
    Refused {
        /// The peer.
        peer: Identity,
        /// With which code.
        source: StreamEnded,
    },
}

/// What does not change while a session lives.
#[derive(Debug)]
pub struct SessionInfo {
    /// The peer, as its certificate names it.
    pub peer: Identity,
    /// Which side dialed, and dials again.
    pub role: Role,
    /// When it began.
    pub since: Instant,
    pub(super) key: SessionKey,
}

/// What a session begins with.
struct Begun {
    info: Arc<SessionInfo>,
    connection: ConnectionInfo,
    core: mux::Session,
    edges: Edges,
}

/// What a driver needs of the outside.
pub(super) struct Lines {
    pub(super) redial: Option<Redial>,
    pub(super) resume_within: Duration,
    pub(super) generation: u64,
    pub(super) incoming: mpsc::Sender<IncomingStream>,
}

/// A handle to a live session; clones share it.
#[derive(Debug, Clone)]
pub struct Session {
    commands: mpsc::UnboundedSender<Command>,
    runtime: tokio::runtime::Handle,
    info: Arc<SessionInfo>,
    link: watch::Receiver<LinkState>,
    ended: watch::Receiver<Option<Arc<SessionEnd>>>,
}

impl Session {
    /// Starts the driver of an established connection on a thread of its own. Streams that the
    /// peer opens arrive on `incoming`; when that is full they are refused.
    ///
    /// # Errors
    /// The operating system gives no further thread or descriptor.
    pub fn start(
        established: Established,
        config: mux::Config,
        incoming: mpsc::Sender<IncomingStream>,
    ) -> std::io::Result<Self> {
        let core = mux::Session::new(established.role, config, &established.negotiated, Instant::now());
        let Established { connection, peer, role, key, redial, resume_within, .. } = established;
        let info = Arc::new(SessionInfo { peer, role, since: Instant::now(), key });
        let begun = Begun { info, connection: connection.info.clone(), core, edges: Default::default() };
        let lines = Lines { redial, resume_within, generation: 0, incoming };
        let (commands, queue) = mpsc::unbounded_channel();
        Self::run(begun, Some(connection), lines, commands, queue)
    }

    /// Takes up a session that another process has left, with those of its streams that have an
    /// owner, in the order of `owned`; the others are ended. It waits for a connection at first.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn thaw(
        frozen: FrozenSession,
        owned: Vec<FrozenStream>,
        endpoint: &Arc<Endpoint>,
        incoming: mpsc::Sender<IncomingStream>,
    ) -> std::io::Result<(Self, Vec<Stream>)> {
        let role = if frozen.is_dialer { Role::Dialer } else { Role::Acceptor };
        let (peer, key, since) = (frozen.peer.clone(), frozen.key(), frozen.since());
        let lines = Lines {
            redial: frozen.redial(endpoint),
            resume_within: endpoint.resume_within(),
            generation: frozen.generation(),
            incoming,
        };
        let connection = frozen.connection();
        let (commands, queue) = mpsc::unbounded_channel();
        let (core, edges, streams) = frozen.thaw(endpoint.config().clone(), owned, &commands);
        let info = Arc::new(SessionInfo { peer, role, since, key });
        let begun = Begun { info, connection, core, edges };
        Ok((Self::run(begun, None, lines, commands, queue)?, streams))
    }

    fn run(
        begun: Begun,
        connection: Option<Connection>,
        lines: Lines,
        commands: mpsc::UnboundedSender<Command>,
        queue: mpsc::UnboundedReceiver<Command>,
    ) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .event_interval(POLLS_PER_WAIT)
            .enable_all()
            .build()?;
        let (end, ended) = watch::channel(None);
        let connection_info = Arc::new(begun.connection);
        let (state, link) = watch::channel(LinkState { away: None, connection: connection_info });
        let session = Self { commands, runtime: runtime.handle().clone(), info: begun.info, link, ended };
        let (handle, core, edges) = (session.clone(), begun.core, begun.edges);
        let drive = async move {
            match Driver::new(connection, core, edges, (handle, queue), state, lines) {
                Ok(driver) => driver.run().await,
                Err(e) => SessionEnd { cause: EndCause::Io(e), stats: mux::Stats::default() },
            }
        };
        std::thread::Builder::new().name("vmferry-session".into()).spawn(move || {
            // A task among the pumps: the runtime asks the kernel for events before it polls what it
            // blocks on, which would be a system call for each chunk.
            match runtime.block_on(runtime.spawn(drive)) {
                Ok(session_end) => drop(end.send_replace(Some(Arc::new(session_end)))),
                Err(e) => {
                    if let Ok(panic) = e.try_into_panic() {
                        std::panic::resume_unwind(panic);
                    }
                }
            }
        })?;
        Ok(session)
    }

    /// Ends the session here and leaves it to another process; `None` if it has ended already. The
    /// owners of its streams must have stopped.
    pub async fn freeze(&self) -> Option<FrozenSession> {
        let (reply, frozen) = oneshot::channel();
        let _ = self.commands.send(Command::Freeze(reply));
        frozen.await.ok()
    }

    pub(crate) fn commands(&self) -> &mpsc::UnboundedSender<Command> {
        &self.commands
    }

    /// What does not change while the session lives.
    #[must_use]
    pub fn info(&self) -> &SessionInfo {
        &self.info
    }

    /// The session's name, which is no secret.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.info.key.id
    }

    pub(super) fn key(&self) -> &SessionKey {
        &self.info.key
    }

    /// Lets go of the connection for the attempt `generation` to resume, and tells what was
    /// received; `None` if a later attempt has come first, or the session has ended.
    pub(super) async fn fence(&self, generation: u64) -> Option<u64> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Fence(generation, reply));
        answer.await.ok()
    }

    /// Goes on over another connection.
    pub(super) fn rejoin(&self, generation: u64, resumed: Resumed) {
        let _ = self.commands.send(Command::Rejoin(generation, Box::new(resumed)));
    }

    /// The connection, or the want of one.
    #[must_use]
    pub fn link(&self) -> LinkState {
        self.link.borrow().clone()
    }

    /// Watches [`Session::link`].
    #[must_use]
    pub fn watch_link(&self) -> watch::Receiver<LinkState> {
        self.link.clone()
    }

    /// Since when the session has no connection; `None` while it has one.
    #[must_use]
    pub fn away_since(&self) -> Option<Instant> {
        self.link.borrow().away.as_ref().map(|away| away.since)
    }

    /// Waits while the session has no connection; false: it has ended instead.
    pub async fn joined(&self) -> bool {
        let mut link = self.link.clone();
        link.wait_for(|link| link.away.is_none()).await.is_ok() && self.is_live()
    }

    /// Waits until the session has no connection, or has ended.
    pub async fn missed(&self) {
        let _ = self.link.clone().wait_for(|link| link.away.is_some()).await;
    }

    /// Opens a stream and waits until the peer's end is connected. How long that may take is in
    /// [`mux::Config::open_deadline`]; it does not run while the session has no connection.
    ///
    /// # Errors
    /// [`OpenStreamError`]; nothing is left of the stream.
    pub async fn open(&self, open: Open) -> Result<Stream, OpenStreamError> {
        let peer = || self.info.peer.clone();
        let refused = |source| OpenStreamError::Refused { peer: peer(), source };
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Open(open, reply));
        let mut stream = answer
            .await
            .map_err(|_| refused(StreamEnded(Code::SessionLost)))?
            .map_err(|source| OpenStreamError::Limit { peer: peer(), source })?;
        stream.accepted().await.map_err(refused)?;
        Ok(stream)
    }

    /// Where the pumps of this session's streams run.
    #[must_use]
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Whether streams can still be opened.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.ended.borrow().is_none() && !self.commands.is_closed()
    }

    /// Waits for the session's end.
    pub async fn ended(&self) -> Arc<SessionEnd> {
        let mut ended = self.ended.clone();
        let gone = SessionEnd { cause: EndCause::Closed(Code::Internal), stats: mux::Stats::default() };
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(|| Arc::new(gone)),
            Err(_) => Arc::new(gone),
        }
    }

    /// The session's figures now; its last ones when it has ended.
    pub async fn stats(&self) -> mux::Stats {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Stats(reply));
        match answer.await {
            Ok(stats) => stats,
            Err(_) => self.ended.borrow().as_ref().map(|e| e.stats.clone()).unwrap_or_default(),
        }
    }

    /// Limits what is sent on all bulk streams together; `None` for no limit.
    pub fn limit(&self, limit: Option<SharedLimit>) {
        let _ = self.commands.send(Command::Limit(limit));
    }

    /// What a migration may send from now on; [`Share::default`] forgets it.
    pub fn share(&self, migration: MigrationId, share: Share) {
        let _ = self.commands.send(Command::Share(migration, share));
    }

    /// Ends the session: says why, lets what is queued go out, closes.
    pub fn close(&self, code: Code, text: &str) {
        let _ = self.commands.send(Command::Close(code, text.to_owned()));
    }
}

/// A stream that the peer wants to open. Dropped unanswered, it is refused.
#[derive(Debug)]
pub struct IncomingStream {
    id: StreamId,
    /// What the peer says that it is for.
    pub open: Open,
    session: Session,
    answered: bool,
}

impl IncomingStream {
    pub(crate) fn new(id: StreamId, open: Open, session: Session) -> Self {
        Self { id, open, session, answered: false }
    }

    /// The session that it comes in.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Leaves the question to the process that takes the session up.
    pub fn leave(mut self) {
        self.answered = true;
    }

    /// Accepts: the local end is connected.
    ///
    /// # Errors
    /// The stream or the session has ended meanwhile.
    pub async fn accept(mut self) -> Result<Stream, StreamEnded> {
        self.answered = true;
        let (reply, answer) = oneshot::channel();
        let _ = self.session.commands.send(Command::Accept(self.id, reply));
        answer.await.unwrap_or(Err(StreamEnded(Code::SessionLost)))
    }

    /// Refuses with a code that tells the peer why.
    pub fn refuse(mut self, code: Code) {
        self.answered = true;
        let _ = self.session.commands.send(Command::Refuse(self.id, code));
    }
}

impl Drop for IncomingStream {
    fn drop(&mut self) {
        if !self.answered {
            let _ = self.session.commands.send(Command::Refuse(self.id, Code::Refused));
        }
    }
}
