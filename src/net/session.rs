//! A session as the rest of the agent holds it, and the thread that runs its driver.
//!
//! Each session has a thread with a runtime of its own: the driver and the pumps of its
//! streams share one core's cache and wake each other without crossing threads, and a session
//! that ends takes its pumps, and with them every local socket they hold, along.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls_pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot, watch};

use super::connect::Established;
use super::driver::{Command, Driver};
use super::identity::Identity;
use super::stream::{Stream, StreamEnded};
use crate::mux::{self, Code, Open, Role, StreamId};

/// How long a stream may wait for its acceptance by the peer (WIRE §8).
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

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
    /// We ended it.
    #[error("closed here: {}", .0.name())]
    Closed(Code),
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
    /// No answer in time.
    #[error("{peer} did not answer the opening of a stream within {} s", OPEN_DEADLINE.as_secs())]
    Deadline {
        /// The peer.
        peer: Identity,
    },
}

/// What does not change while a session lives.
#[derive(Debug)]
pub struct SessionInfo {
    /// The peer, as its certificate names it.
    pub peer: Identity,
    /// Its address.
    pub address: SocketAddr,
    /// Which side dialed.
    pub role: Role,
    /// The TLS cipher suite and key exchange in use.
    pub cipher: String,
    /// The certificates with which the peer proved itself, its own first.
    pub chain: Vec<CertificateDer<'static>>,
    /// When it began.
    pub since: Instant,
}

/// A handle to a live session; clones share it.
#[derive(Debug, Clone)]
pub struct Session {
    commands: mpsc::UnboundedSender<Command>,
    runtime: tokio::runtime::Handle,
    info: Arc<SessionInfo>,
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
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let Established { tcp, record, peer, address, role, negotiated, cipher, chain } = established;
        let core = mux::Session::new(role, config, &negotiated, Instant::now());
        let (commands, queue) = mpsc::unbounded_channel();
        let (end, ended) = watch::channel(None);
        let session = Self {
            commands,
            runtime: runtime.handle().clone(),
            info: Arc::new(SessionInfo { peer, address, role, cipher, chain, since: Instant::now() }),
            ended,
        };
        let tcp = tcp.into_std()?;
        let handle = session.clone();
        let drive = async move {
            match tokio::net::TcpStream::from_std(tcp) {
                Ok(tcp) => Driver::new(tcp, record, core, (handle, queue), incoming).run().await,
                Err(e) => SessionEnd { cause: EndCause::Io(e), stats: core.stats() },
            }
        };
        std::thread::Builder::new().name("vmferry-session".into()).spawn(move || {
            let session_end = runtime.block_on(drive);
            end.send_replace(Some(Arc::new(session_end)));
        })?;
        Ok(session)
    }

    pub(crate) fn commands(&self) -> &mpsc::UnboundedSender<Command> {
        &self.commands
    }

    /// What does not change while the session lives.
    #[must_use]
    pub fn info(&self) -> &SessionInfo {
        &self.info
    }

    /// Opens a stream and waits until the peer's end is connected.
    ///
    /// # Errors
    /// [`OpenStreamError`]; nothing is left of the stream.
    pub async fn open(&self, open: Open) -> Result<Stream, OpenStreamError> {
        let peer = || self.info.peer.clone();
        let lost = || StreamEnded(Code::SessionLost);
        let work = async {
            let (reply, answer) = oneshot::channel();
            let _ = self.commands.send(Command::Open(open, reply));
            let refused = |source| OpenStreamError::Refused { peer: peer(), source };
            let mut stream = answer
                .await
                .map_err(|_| refused(lost()))?
                .map_err(|source| OpenStreamError::Limit { peer: peer(), source })?;
            stream.accepted().await.map_err(refused)?;
            Ok(stream)
        };
        match tokio::time::timeout(OPEN_DEADLINE, work).await {
            Ok(done) => done,
            Err(_) => Err(OpenStreamError::Deadline { peer: peer() }),
        }
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
