//! Streams that peers open to be connected to a target of this host.
//!
//! ```text
//! OPEN ─► may this peer use that target? ─► queue of its forwarding ─► connect ─► ACCEPT ─► pump
//!                └─► refused at once              one after the other
//! ```
//! There is a queue for each forwarding of each session: connect(2) of its n-th connection is complete
//! before that of the next begins, so the target sees them in the order in which they were accepted at the
//! peer. Forwardings do not wait for each other. How many streams may wait is bounded by their session.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connections::{Connections, Place};
use super::connector::{TargetError, connect, connect_granted};
use super::peers::Peers;
use super::reason::Throttle;
use super::tally::{Labels, Side};
use super::targets::{Found, Targets};
use crate::config::{LocalSocket, TargetName};
use crate::error_chain::chain;
use crate::mux::{Code, MigrationId};
use crate::net::session::IncomingStream;
use crate::net::stream_owner::SessionId;
use crate::peer_refusals::{PeerRefusals, Reason};
use crate::printable::printable;

/// The label of what was never let in.
const NONE: &str = "none";

/// A stream that waits to be connected.
#[derive(Debug)]
struct Waiting {
    stream: IncomingStream,
    connect: LocalSocket,
    /// By a grant, not by the configuration.
    is_granted: bool,
    /// Must be there when it is connected.
    beside: Option<PathBuf>,
    connections: Connections,
    place: Place,
}

impl Waiting {
    /// A connection to its target.
    async fn connect(&self) -> Result<OwnedFd, TargetError> {
        match &self.beside {
            Some(beside) if beside.symlink_metadata().is_err() => Err(TargetError::Alone(beside.clone())),
            _ if self.is_granted => connect_granted(&self.connect).await,
            _ => connect(&self.connect).await,
        }
    }
}

/// Which queue: the session, and the forwarding at the peer.
type Key = (SessionId, MigrationId);

#[derive(Debug, Default)]
struct Queues {
    /// One that is here has a task.
    all: BTreeMap<Key, VecDeque<Waiting>>,
    /// Everything stops for another process: no stream is taken.
    is_frozen: bool,
    freeze: CancellationToken,
}

/// Takes streams to targets.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) targets: Targets,
    peers: Arc<Peers>,
    labels: Arc<Labels>,
    queues: Mutex<Queues>,
    tasks: TaskTracker,
    throttle: Throttle,
    refusals: Arc<PeerRefusals>,
}

impl Incoming {
    pub(super) fn new(
        targets: Targets,
        peers: Arc<Peers>,
        labels: Arc<Labels>,
        refusals: Arc<PeerRefusals>,
    ) -> Arc<Self> {
        Arc::new(Self {
            targets,
            peers,
            labels,
            queues: Mutex::default(),
            tasks: TaskTracker::new(),
            throttle: Throttle::default(),
            refusals,
        })
    }

    /// Takes a stream, or refuses it. Calls must be in the order in which streams were opened.
    pub(super) fn take(self: &Arc<Self>, stream: IncomingStream) {
        if self.locked().is_frozen {
            return stream.leave();
        }
        let (Found { connect, is_granted, beside, connections }, place) = match self.admit(&stream) {
            Ok(admitted) => admitted,
            Err(code) => {
                self.refused(&stream, code);
                return stream.refuse(code);
            }
        };
        let waiting = Waiting { stream, connect, is_granted, beside, connections, place };
        let key = (waiting.stream.session().id(), waiting.stream.open.migration);
        let mut queues = self.locked();
        if queues.is_frozen {
            return waiting.stream.leave();
        }
        match queues.all.get_mut(&key) {
            Some(queue) => queue.push_back(waiting),
            None => {
                queues.all.insert(key, VecDeque::from([waiting]));
                self.tasks.spawn(Arc::clone(self).work(key, queues.freeze.clone()));
            }
        }
    }

    /// Whether its peer may use the target that it names.
    fn admit(&self, stream: &IncomingStream) -> Result<(Found, Place), Code> {
        let peer = &stream.session().info().peer;
        let name = std::str::from_utf8(stream.open.name.as_bytes()).unwrap_or_default();
        let name = name.parse::<TargetName>().map_err(|_| Code::NoTarget)?;
        let found = self.targets.find(&name, self.peers.name_of(peer), peer)?;
        let entered = found.connections.enter(&self.peers.bounds(peer).incoming);
        let place = entered.inspect_err(|code| found.connections.failed(*code))?;
        Ok((found, place))
    }

    fn refused(&self, stream: &IncomingStream, code: Code) {
        if code != Code::Limit {
            self.labels.of(Side::Target, NONE).failed(code);
        }
        let (reason, cause) = match code {
            Code::NoTarget => (Reason::NoTarget, "there is no target of that name here"),
            Code::Denied => (Reason::NotPermitted, "that target is not for this peer"),
            Code::TargetAbsent => (Reason::NoTarget, "the socket's path would be too long with that name"),
            _ => (Reason::Quota, "there are too many connections"),
        };
        let peer = &stream.session().info().peer;
        let target = || printable(&String::from_utf8_lossy(stream.open.name.as_bytes()));
        let what = || format!("a connection to target {}: {cause}", target());
        let Some(unsaid) = self.refusals.to_be_said(peer, reason, what) else { return };
        let target = target();
        tracing::warn!(%peer, target, reason = code.name(), cause, unsaid, "a forwarded connection was refused");
    }

    /// Connects the streams of one queue, one after the other, until it is empty.
    async fn work(self: Arc<Self>, key: Key, freeze: CancellationToken) {
        while let Some(waiting) = self.next(key) {
            // It was granted, and the grant has been revoked meanwhile.
            if waiting.connections.is_over() {
                waiting.stream.refuse(Code::Denied);
                continue;
            }
            let connected = tokio::select! {
                biased;
                // Whoever takes the session up hears of it again, and of all behind it.
                () = freeze.cancelled() => {
                    waiting.stream.leave();
                    continue;
                }
                connected = waiting.connect() => connected,
            };
            match connected {
                Ok(local) => begin(waiting, local).await,
                Err(e) => {
                    let code = e.code();
                    waiting.connections.failed(code);
                    if let Some(unsaid) = self.throttle.say(code) {
                        let peer = &waiting.stream.session().info().peer;
                        let (socket, cause) = (waiting.connect.to_string(), chain(&e));
                        tracing::warn!(%peer, socket, reason = code.name(), cause, unsaid, "a target cannot be connected to");
                    }
                    waiting.stream.refuse(code);
                }
            }
        }
    }

    /// The next of a queue; none: the queue is gone, and so is its task.
    fn next(&self, key: Key) -> Option<Waiting> {
        let mut queues = self.locked();
        let next = queues.all.get_mut(&key).and_then(VecDeque::pop_front);
        if next.is_none() {
            queues.all.remove(&key);
        }
        next
    }

    /// Leaves all streams that are not connected to another process.
    pub(super) async fn freeze(&self) {
        {
            let mut queues = self.locked();
            queues.is_frozen = true;
            queues.freeze.cancel();
        }
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }

    /// Takes streams again.
    pub(super) fn thaw(&self) {
        let mut queues = self.locked();
        queues.is_frozen = false;
        queues.freeze = CancellationToken::new();
    }

    fn locked(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts a stream whose target is connected.
async fn begin(waiting: Waiting, local: OwnedFd) {
    let Waiting { stream, connections, place, .. } = waiting;
    let session = stream.session().clone();
    match stream.accept().await {
        Ok(stream) => place.begin(&session, local, stream),
        Err(e) => connections.failed(e.0),
    }
}
