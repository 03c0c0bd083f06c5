//! A forwarding at work: accepts what programs of this host connect, and opens a stream for each, in the
//! order in which they came.
//!
//! ```text
//! listener ─► a place, room in the session, the session ─► OPEN ─┬─ accepted ─► carried by a pump
//!   one after the other, so OPENs are in order                   └─ refused, lost ─► closed at once
//! ```
//! The answers are waited for side by side. Before another session is used, all that was opened in the one
//! before is answered: so the order holds over sessions, too.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures_util::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::connections::{Connections, Place, StoppedConnection};
use super::limits::{ACCEPT_PAUSE, LISTEN_BACKLOG, ROOM_DEADLINE, ROOM_POLL};
use super::listener::{Listener, SocketFile};
use super::peers::{Bounds, Peers};
use super::reason::{Throttle, in_words};
use super::spec::{ShareChange, Spec};
use crate::config::PeerConfig;
use crate::error_chain::chain;
use crate::mux::{Class, Code, Name, Open, OpenError, Share, SharedLimit, WEIGHT_DEFAULT, purpose};
use crate::net::connect_error::ConnectError;
use crate::net::session::{OpenStreamError, Session};
use crate::net::stream::{StoppedStream, Stream, StreamEnded};
use crate::net::stream_owner::SessionId;

/// An accepted connection that the peer has not answered, stopped for another process.
#[derive(Debug)]
pub(super) struct StoppedOpening {
    pub(super) session: SessionId,
    pub(super) local: OwnedFd,
    pub(super) stream: StoppedStream,
}

/// What a forwarding begins with.
#[derive(Debug)]
pub(super) struct Beginning {
    pub(super) id: Uuid,
    /// Of one in the configuration.
    pub(super) name: Option<String>,
    pub(super) spec: Spec,
    pub(super) peer: PeerConfig,
    pub(super) connections: Connections,
    pub(super) file: Option<SocketFile>,
}

/// A forwarding at work.
#[derive(Debug)]
pub(super) struct Forwarding {
    pub(super) id: Uuid,
    pub(super) name: Option<String>,
    pub(super) spec: Spec,
    pub(super) connections: Connections,
    pub(super) file: Option<SocketFile>,
    peer: PeerConfig,
    peers: Arc<Peers>,
    bounds: Arc<Bounds>,
    share: Mutex<Share>,
    /// What an operator has changed since it began.
    changed: Mutex<ShareChange>,
    open: Open,
    /// The session in use.
    lane: Mutex<Option<Session>>,
    /// Streams that the peer has not answered.
    unanswered: watch::Sender<usize>,
    throttle: Throttle,
    end: CancellationToken,
    freeze: CancellationToken,
    listening: Mutex<Option<JoinHandle<Option<Listener>>>>,
    answers: TaskTracker,
    /// Accepted and not opened when everything stopped.
    unopened: Mutex<Vec<OwnedFd>>,
    openings: Mutex<Vec<StoppedOpening>>,
}

/// A forwarding that has stopped; its sessions have not.
#[derive(Debug)]
pub(super) struct StoppedForwarding {
    /// None if it could not be told apart from its runtime.
    pub(super) listener: Option<OwnedFd>,
    pub(super) carried: Vec<StoppedConnection>,
    pub(super) openings: Vec<StoppedOpening>,
    pub(super) unopened: Vec<OwnedFd>,
}

/// Counts a stream that waits for its answer.
struct Unanswered {
    of: Arc<Forwarding>,
    _room: OwnedSemaphorePermit,
}

impl Unanswered {
    fn new(of: &Arc<Forwarding>, room: OwnedSemaphorePermit) -> Self {
        of.unanswered.send_modify(|count| *count += 1);
        Self { of: Arc::clone(of), _room: room }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.of.unanswered.send_modify(|count| *count -= 1);
    }
}

/// Why an accepted connection is not opened, for now or for good.
enum NotOpened {
    Failed(Code),
    NoSession(ConnectError),
    /// Everything stops for another process.
    Frozen,
    /// The forwarding ends.
    Ended,
}

impl Forwarding {
    pub(super) fn new(beginning: Beginning, peers: &Arc<Peers>) -> Arc<Self> {
        let Beginning { id, name, spec, peer, connections, file } = beginning;
        let limit = spec.limit_bytes_per_s.map(|rate| SharedLimit::new(rate.get(), Instant::now()));
        let share = Share { weight: spec.weight.into(), limit, ahead: false };
        let open = Open {
            purpose: purpose::FORWARD,
            class: if spec.urgent { Class::Urgent } else { Class::Bulk },
            weight: WEIGHT_DEFAULT,
            migration: *id.as_bytes(),
            channel: 0,
            name: Name::new(spec.target.as_str().as_bytes()).unwrap_or(Name::NONE),
        };
        Arc::new(Self {
            share: Mutex::new(share),
            changed: Mutex::default(),
            bounds: peers.bounds(&peer.identity),
            peers: Arc::clone(peers),
            id,
            name,
            spec,
            connections,
            file,
            peer,
            open,
            lane: Mutex::default(),
            unanswered: watch::Sender::new(0),
            throttle: Throttle::default(),
            end: CancellationToken::new(),
            freeze: CancellationToken::new(),
            listening: Mutex::default(),
            answers: TaskTracker::new(),
            unopened: Mutex::default(),
            openings: Mutex::default(),
        })
    }

    /// Begins to listen, with what an earlier process had accepted and not opened.
    pub(super) fn start(self: &Arc<Self>, tasks: &TaskTracker, listener: Listener, unopened: Vec<OwnedFd>) {
        let listening = tasks.spawn(Arc::clone(self).listen(listener, unopened.into()));
        *locked(&self.listening) = Some(listening);
    }

    /// Goes on with a connection of an earlier process.
    pub(super) fn go_on(self: &Arc<Self>, session: &Session, local: OwnedFd, stream: Stream) {
        let (Ok(place), Ok(room)) = (
            self.connections.enter(&self.bounds.outgoing),
            Arc::clone(&self.bounds.unanswered).try_acquire_owned(),
        ) else {
            return;
        };
        let waiting = Unanswered::new(self, room);
        self.answers.spawn(Arc::clone(self).answered(place, local, session.clone(), stream, waiting));
    }

    /// A place for a carried connection of an earlier process.
    pub(super) fn enter(&self) -> Option<Place> {
        self.connections.enter(&self.bounds.outgoing).ok()
    }

    /// Uses this session, in which connections of an earlier process are.
    pub(super) fn use_lane(&self, session: &Session) {
        let before = locked(&self.lane).replace(session.clone());
        if let Some(before) = before.filter(|before| before.id() != session.id()) {
            before.share(*self.id.as_bytes(), Share::default());
        }
        session.share(*self.id.as_bytes(), locked(&self.share).clone());
    }

    /// Changes what it may send, from now on.
    pub(super) fn change_share(&self, change: ShareChange) {
        let share = {
            let (mut share, mut changed) = (locked(&self.share), locked(&self.changed));
            changed.add(change);
            if let Some(limit) = change.limit_bytes_per_s {
                let before = share.limit.take();
                share.limit = limit.map(|rate| SharedLimit::renewed(before, rate.get(), Instant::now()));
            }
            if let Some(weight) = change.weight {
                share.weight = weight.into();
            }
            share.clone()
        };
        if let Some(session) = locked(&self.lane).as_ref() {
            session.share(*self.id.as_bytes(), share);
        }
    }

    /// What has been changed of it.
    pub(super) fn changed(&self) -> ShareChange {
        *locked(&self.changed)
    }

    /// What it is, with what has been changed.
    pub(super) fn spec_now(&self) -> Spec {
        self.changed().applied_to(self.spec.clone())
    }

    /// Whether its socket is still the one that was made: others could listen in its place.
    pub(super) fn is_intact(&self) -> bool {
        self.file.as_ref().is_none_or(SocketFile::is_there)
    }

    /// Whether it accepts connections.
    pub(super) fn is_listening(&self) -> bool {
        locked(&self.listening).as_ref().is_some_and(|task| !task.is_finished())
    }

    /// Closes its socket and all its connections.
    pub(super) fn end(&self) {
        self.end.cancel();
        self.connections.end();
        if let Some(file) = &self.file {
            file.remove();
        }
        if let Some(session) = locked(&self.lane).take() {
            session.share(*self.id.as_bytes(), Share::default());
        }
    }

    /// Stops, for another process.
    pub(super) async fn freeze(&self) -> StoppedForwarding {
        self.freeze.cancel();
        let listening = locked(&self.listening).take();
        let listener = match listening {
            Some(task) => task.await.ok().flatten(),
            None => None,
        };
        self.answers.close();
        self.answers.wait().await;
        StoppedForwarding {
            listener: listener.and_then(|listener| listener.into_socket().ok()),
            carried: self.connections.freeze().await,
            openings: std::mem::take(&mut locked(&self.openings)),
            unopened: std::mem::take(&mut locked(&self.unopened)),
        }
    }

    async fn listen(self: Arc<Self>, listener: Listener, mut waiting: VecDeque<OwnedFd>) -> Option<Listener> {
        loop {
            let local = match waiting.pop_front() {
                Some(local) => local,
                None => match self.accept(&listener).await {
                    Ok(local) => local,
                    Err(NotOpened::Frozen) => break,
                    Err(_) => return None,
                },
            };
            match self.begin().await {
                Ok((place, session, stream, room)) => {
                    let waiting = Unanswered::new(&self, room);
                    self.answers.spawn(Arc::clone(&self).answered(place, local, session, stream, waiting));
                }
                Err(NotOpened::Frozen) => {
                    waiting.push_front(local);
                    break;
                }
                Err(NotOpened::Ended) => return None,
                Err(NotOpened::Failed(code)) => self.fail(local, code, None),
                Err(NotOpened::NoSession(e)) => {
                    self.fail(local, Code::NoSession, Some(&e));
                    // Those who came meanwhile would wait as long, one after the other.
                    waiting.drain(..).for_each(|local| self.fail(local, Code::NoSession, Some(&e)));
                    for _ in 0..LISTEN_BACKLOG {
                        let Some(Ok(local)) = listener.accept().now_or_never() else { break };
                        self.fail(local, Code::NoSession, Some(&e));
                    }
                }
            }
        }
        locked(&self.unopened).extend(waiting);
        Some(listener)
    }

    async fn accept(&self, listener: &Listener) -> Result<OwnedFd, NotOpened> {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.end.cancelled() => return Err(NotOpened::Ended),
                () = self.freeze.cancelled() => return Err(NotOpened::Frozen),
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(local) => return Ok(local),
                Err(error) => {
                    tracing::warn!(listen = %self.spec.listen, %error, "a forwarding cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Opens a stream for an accepted connection. Its answer is still to come.
    async fn begin(&self) -> Result<(Place, Session, Stream, OwnedSemaphorePermit), NotOpened> {
        let place = self.connections.enter(&self.bounds.outgoing).map_err(NotOpened::Failed)?;
        let until = Instant::now() + ROOM_DEADLINE;
        self.unless_stopped(self.bounds.pace()).await?;
        loop {
            let room = Arc::clone(&self.bounds.unanswered).acquire_owned();
            let room = self.unless_stopped(room).await?.map_err(|_| NotOpened::Ended)?;
            let session = self.unless_stopped(self.session()).await?.map_err(NotOpened::NoSession)?;
            // Not given up half-way: what is opened is answered, or left as opened.
            match session.begin_open(self.open).await {
                Ok(stream) => return Ok((place, session, stream, room)),
                Err(e) if Instant::now() >= until || !may_pass(&e) => {
                    return Err(NotOpened::Failed(code_of(&e)));
                }
                Err(OpenStreamError::Limit {
                    source: OpenError::Pending { .. } | OpenError::Rate, ..
                }) => {}
                Err(_) => drop(locked(&self.lane).take()),
            }
            drop(room);
            self.unless_stopped(tokio::time::sleep(ROOM_POLL)).await?;
        }
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, NotOpened> {
        tokio::select! {
            biased;
            () = self.end.cancelled() => Err(NotOpened::Ended),
            () = self.freeze.cancelled() => Err(NotOpened::Frozen),
            done = work => Ok(done),
        }
    }

    /// The session in use; another one only when nothing waits for an answer in it.
    async fn session(&self) -> Result<Session, ConnectError> {
        let current = locked(&self.lane).clone();
        if let Some(session) = current.filter(|s| s.is_live() && s.away_since().is_none()) {
            return Ok(session);
        }
        // The sender is ours: there is no error.
        let _ = self.unanswered.subscribe().wait_for(|count| *count == 0).await;
        let session = self.peers.lane(&self.peer).await?;
        self.use_lane(&session);
        Ok(session)
    }

    /// Waits for the peer's answer.
    async fn answered(
        self: Arc<Self>,
        place: Place,
        local: OwnedFd,
        session: Session,
        mut stream: Stream,
        waiting: Unanswered,
    ) {
        let answer = tokio::select! {
            biased;
            answer = stream.accepted() => Some(answer),
            () = self.end.cancelled() => return,
            () = self.freeze.cancelled() => None,
        };
        match answer {
            Some(Ok(())) => place.begin(&session, local, stream),
            Some(Err(StreamEnded(code))) => self.fail(local, code, None),
            None => {
                let stopped = StoppedOpening { session: session.id(), local, stream: stream.stop() };
                locked(&self.openings).push(stopped);
            }
        }
        drop(waiting);
    }

    /// A connection comes to nothing: its program hears of it at once, and the operator why.
    fn fail(&self, local: OwnedFd, code: Code, cause: Option<&ConnectError>) {
        // Its program may look at once.
        let _closed_last = local;
        self.connections.failed(code);
        let Some(unsaid) = self.throttle.say(code) else { return };
        let cause = cause.map_or_else(|| in_words(code).to_owned(), |e| chain(e));
        tracing::warn!(
            listen = %self.spec.listen, peer = self.spec.to, target = %self.spec.target,
            reason = code.name(), cause, unsaid, "a forwarded connection was closed"
        );
    }
}

/// Whether there may be room, or another session, in a moment.
fn may_pass(error: &OpenStreamError) -> bool {
    match error {
        OpenStreamError::Limit { source, .. } => !matches!(source, OpenError::Streams { .. }),
        OpenStreamError::Refused { .. } => true,
    }
}

fn code_of(error: &OpenStreamError) -> Code {
    match error {
        OpenStreamError::Limit { .. } => Code::Limit,
        OpenStreamError::Refused { source: StreamEnded(code), .. } => *code,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
