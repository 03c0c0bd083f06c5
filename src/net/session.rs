//! A session as the rest of the agent holds it, and the streams that its peer wants to open. The thread
//! behind it is begun in `session_thread`.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};

use super::connection::Resumed;
use super::cpu_time::CpuTime;
use super::frozen::FrozenSession;
use super::identity::Identity;
pub use super::link::{Away, EndCause, LinkState, SessionEnd};
use super::message_budget::MessageBudget;
use super::session_key::SessionKey;
use super::stream::{Command, Stream, StreamEnded};
use crate::mux::{self, Code, MigrationId, Open, Role, Share, SharedLimit, StreamId};

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStreamError {
    #[error("no further stream in the session with {peer}")]
    Limit { peer: Identity, source: mux::OpenError },
    /// The peer answered no, or the session ended.
    #[error("{peer} did not accept the stream")]
    Refused { peer: Identity, source: StreamEnded },
}

/// What does not change while a session lives.
#[derive(Debug)]
pub struct SessionInfo {
    /// The peer, as its certificate names it.
    pub peer: Identity,
    /// Which side dialed, and dials again.
    pub role: Role,
    pub since: Instant,
    pub(super) key: SessionKey,
    /// Of its peer, shared with all other sessions with that.
    pub(super) messages: MessageBudget,
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
    pub(super) fn new(
        commands: mpsc::UnboundedSender<Command>,
        runtime: tokio::runtime::Handle,
        info: Arc<SessionInfo>,
        link: watch::Receiver<LinkState>,
        ended: watch::Receiver<Option<Arc<SessionEnd>>>,
    ) -> Self {
        Self { commands, runtime, info, link, ended }
    }

    /// Ends the session here and leaves it to another process; `None` if it has ended already. The
    /// owners of its streams must have stopped.
    pub async fn freeze(&self) -> Option<FrozenSession> {
        self.ask(Command::Freeze).await
    }

    /// The driver's answer to a command; none if the session has ended.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(command(reply));
        answer.await.ok()
    }

    pub(super) fn commands(&self) -> &mpsc::UnboundedSender<Command> {
        &self.commands
    }

    /// What does not change while the session lives.
    pub fn info(&self) -> &SessionInfo {
        &self.info
    }

    /// The session's name, which is no secret.
    pub fn id(&self) -> [u8; 16] {
        self.info.key.id
    }

    pub(super) fn key(&self) -> &SessionKey {
        &self.info.key
    }

    /// Lets go of the connection for the attempt `generation` to resume, and tells what was
    /// received; `None` if a later attempt has come first, or the session has ended.
    pub(super) async fn fence(&self, generation: u64) -> Option<u64> {
        self.ask(|reply| Command::Fence(generation, reply)).await
    }

    /// Goes on over another connection.
    pub(super) fn rejoin(&self, generation: u64, resumed: Resumed) {
        let _ = self.commands.send(Command::Rejoin(generation, Box::new(resumed)));
    }

    /// The connection, or the want of one.
    pub fn link(&self) -> LinkState {
        self.link.borrow().clone()
    }

    /// Watches [`Session::link`].
    pub fn watch_link(&self) -> watch::Receiver<LinkState> {
        self.link.clone()
    }

    /// Since when the session has no connection; `None` while it has one.
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
    /// Errors: [`OpenStreamError`]; nothing is left of the stream.
    pub async fn open(&self, open: Open) -> Result<Stream, OpenStreamError> {
        let mut stream = self.begin_open(open).await?;
        let refused = |source| OpenStreamError::Refused { peer: self.info.peer.clone(), source };
        stream.accepted().await.map_err(refused)?;
        Ok(stream)
    }

    /// Opens a stream, and does not wait for the peer's answer, which [`Stream::accepted`] tells. The
    /// peer hears of streams in the order in which they were begun.
    pub async fn begin_open(&self, open: Open) -> Result<Stream, OpenStreamError> {
        let peer = || self.info.peer.clone();
        let lost = || OpenStreamError::Refused { peer: peer(), source: StreamEnded(Code::SessionLost) };
        let opened = self.ask(|reply| Command::Open(open, reply)).await.ok_or_else(lost)?;
        opened.map_err(|source| OpenStreamError::Limit { peer: peer(), source })
    }

    /// How often what was to be sent on a stream has waited for the peer to take more; none when the
    /// stream is forgotten.
    pub async fn stalls(&self, stream: StreamId) -> Option<u64> {
        self.ask(|reply| Command::StreamStats(stream, reply)).await?.map(|stats| stats.credit_stalls)
    }

    /// Where the pumps of this session's streams run.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Whether streams can still be opened.
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
        match self.ask(Command::Stats).await {
            Some(stats) => stats,
            // It has stopped to answer, and its end may not be known yet.
            None => self.ended().await.stats.clone(),
        }
    }

    /// What the session's thread has used of a processor: its driver, its pumps, encryption. None where
    /// the kernel does not tell, or the session has ended.
    pub async fn cpu_time(&self) -> Option<CpuTime> {
        self.ask(Command::CpuTime).await?
    }

    /// Limits what is sent on all bulk streams together; `None` for no limit.
    pub fn limit(&self, limit: Option<SharedLimit>) {
        let _ = self.commands.send(Command::Limit(limit));
    }

    /// Holds the peer to what it may send on all streams together; `None` for no limit.
    pub fn receive_limit(&self, limit: Option<SharedLimit>) {
        let _ = self.commands.send(Command::ReceiveLimit(limit));
    }

    /// What a migration may send from now on; [`Share::default`] forgets it.
    pub fn share(&self, migration: MigrationId, share: Share) {
        let _ = self.commands.send(Command::Share(migration, share));
    }

    /// Lets go of the connection, so that the next one's handshake proves anew who is at the other end.
    pub fn renew_connection(&self) {
        let _ = self.commands.send(Command::Renew);
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
    pub(super) fn new(id: StreamId, open: Open, session: Session) -> Self {
        Self { id, open, session, answered: false }
    }

    /// The session that it comes in.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Leaves the question to the process that takes the session up.
    pub fn leave(mut self) {
        self.answered = true;
    }

    /// Accepts: the local end is connected.
    /// Errors: the stream or the session has ended meanwhile.
    pub async fn accept(mut self) -> Result<Stream, StreamEnded> {
        self.answered = true;
        let accepted = self.session.ask(|reply| Command::Accept(self.id, reply)).await;
        accepted.unwrap_or(Err(StreamEnded(Code::SessionLost)))
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
