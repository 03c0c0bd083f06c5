//! The sessions of this agent: with each peer one in use, or as many as it has lanes.
//!
//! A session serves both directions, whoever dialed. When two agents dial each other at the
//! same moment, both sides use the session that the smaller identity dialed. Knows no streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::accept::{self, Accepted, LEAVING};
use super::coming_sessions::{Coming, ComingSessions};
use super::connect_error::{ConnectError, TWO_AGENTS, UNKNOWN_PEER};
use super::connection::Established;
use super::dial;
use super::duplicate_agent;
use super::endpoint::Endpoint;
use super::frozen::FrozenSession;
use super::hello_exchange::Denial;
use super::identity::Identity;
use super::message::MESSAGE_BYTES_MAX;
use super::message_budget::MessageBudget;
use super::pending_handshakes::{PendingHandshakes, RoomLimits};
use super::session::{IncomingStream, Session};
use super::session_thread;
use super::single_flight::SingleFlight;
use super::stream_owner::{self, StreamOwner, ThawedStreams};
use crate::error_chain::chain;
use crate::mux::hello::{Hello, Mode};
use crate::mux::{Code, Role, SharedLimit};
use crate::rate::Rate;

/// Connections that have said nothing whole yet: each costs a descriptor and a buffer. At 2,000 new ones a
/// second from one network each has 190 ms to say what it wants.
pub(super) const SILENT: RoomLimits = RoomLimits { places: 512, of_one: 384 };
/// Connections that have spoken and not proved their identity: each costs a handshake's keys as well. At
/// 2,000 new ones a second from one network each has 95 ms for a round trip.
pub(super) const SPEAKING: RoomLimits = RoomLimits { places: 256, of_one: 192 };
/// What unfinished messages of a peer may hold beyond what each stream may, unless more was set: two of the
/// longest.
const MESSAGE_BYTES_LITTLE: usize = 2 * (MESSAGE_BYTES_MAX + 1024);
/// Sessions that a peer may have: its lanes, as many again when both agents dial at the same moment,
/// and two for a process that has taken another's place.
const fn sessions_max(lanes: usize) -> usize {
    2 * lanes + 2
}

/// How long a session may take to stop for another process.
const FREEZE_DEADLINE: Duration = Duration::from_secs(3);
/// How long there are fewer lanes before a further one is tried again.
const LANE_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// What its configuration and its operators want of the sessions with one peer.
#[derive(Debug)]
struct Terms {
    limit: Option<(Rate, SharedLimit)>,
    receive_limit: Option<SharedLimit>,
    lanes: usize,
    /// When a further lane could not be dialed.
    refused: Option<Instant>,
    messages: Option<MessageBudget>,
}

impl Terms {
    fn shared_limit(&self) -> Option<SharedLimit> {
        self.limit.as_ref().map(|(_, shared_limit)| shared_limit.clone())
    }
}

impl Default for Terms {
    fn default() -> Self {
        Self { limit: None, receive_limit: None, lanes: 1, refused: None, messages: None }
    }
}

/// Owns all sessions.
#[derive(Debug)]
pub struct Pool {
    endpoint: Arc<Endpoint>,
    sessions: Mutex<BTreeMap<Identity, Vec<Session>>>,
    dialing: SingleFlight,
    pending: Arc<PendingHandshakes>,
    coming: ComingSessions,
    incoming: mpsc::Sender<IncomingStream>,
    started: mpsc::UnboundedSender<Session>,
    dial_failures: Mutex<BTreeMap<&'static str, u64>>,
    /// Peers that the last dial did not reach.
    unreached: Mutex<BTreeSet<Identity>>,
    terms: Mutex<BTreeMap<Identity, Terms>>,
    /// Goes up with each stream that is given a lane.
    turn: AtomicUsize,
    leaving: AtomicBool,
}

impl Pool {
    /// A pool without sessions; streams that peers open arrive on `incoming`, each new session
    /// on `started`.
    pub fn new(
        endpoint: Endpoint,
        incoming: mpsc::Sender<IncomingStream>,
        started: mpsc::UnboundedSender<Session>,
    ) -> Self {
        Self {
            endpoint: Arc::new(endpoint),
            sessions: Mutex::default(),
            dialing: SingleFlight::default(),
            pending: PendingHandshakes::new(SILENT, SPEAKING),
            coming: ComingSessions::default(),
            incoming,
            started,
            dial_failures: Mutex::default(),
            unreached: Mutex::default(),
            terms: Mutex::default(),
            turn: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
        }
    }

    /// Credentials and limits.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// A session with `peer` that has a connection, dialed at `address` if there is none.
    pub async fn session(&self, peer: &Identity, address: Option<&str>) -> Result<Session, ConnectError> {
        let waiting = match self.live(peer) {
            None => None,
            Some(session) if session.away_since().is_none() => return Ok(session),
            // It is being dialed.
            Some(session) if session.info().role == Role::Dialer => {
                if session.joined().await {
                    return Ok(session);
                }
                None
            }
            // Its dialer may be gone for good, and with it what the session is about.
            Some(session) => Some(session),
        };
        match (self.dialed(peer, address).await, waiting) {
            // What cannot be reached from here may still come by itself.
            (Err(_), Some(session)) if session.joined().await => Ok(session),
            (dialed, _) => dialed,
        }
    }

    async fn dialed(&self, peer: &Identity, address: Option<&str>) -> Result<Session, ConnectError> {
        let turn = self.dialing.turn(peer).await?;
        if let Some(session) = self.live(peer).filter(|session| session.away_since().is_none()) {
            return Ok(session);
        }
        let Some(address) = address else {
            return Err(ConnectError::NoAddress { peer: peer.clone() });
        };
        turn.end(self.dial_another(peer, address).await)?;
        self.live(peer).ok_or_else(|| ConnectError::Refused { code: Code::Limit, text: String::new() })
    }

    /// Takes a connection from a listener through handshake and HELLO.
    /// Errors: [`ConnectError`]; a refused peer has been told why.
    pub async fn accept(
        &self,
        tcp: TcpStream,
        known: impl FnOnce(&Identity) -> bool,
    ) -> Result<Session, ConnectError> {
        let address = tcp.peer_addr().map_err(ConnectError::BeforeHello)?;
        let place = self.pending.enter(address.ip());
        // Held until the session is among the others.
        let coming = OnceLock::new();
        let admit = |peer: Identity, hello: Hello| {
            let is_known = known(&peer);
            if is_known {
                place.proved(&peer);
            }
            let coming = &coming;
            async move { self.admit(&peer, is_known, &hello, coming).await }
        };
        tokio::select! {
            accepted = accept::accept(&self.endpoint, tcp, address, || place.spoke(), admit) => match accepted? {
                Accepted::New(established) => self.adopt(*established),
                Accepted::Resumed(session) => Ok(session),
            },
            () = place.taken() => Err(ConnectError::TooManyUnauthenticated),
        }
    }

    /// Which session a proved identity may have: a new one (`None`), or the one that it resumes.
    async fn admit(
        &self,
        peer: &Identity,
        is_known: bool,
        hello: &Hello,
        coming: &OnceLock<Coming>,
    ) -> Result<Option<Session>, Denial> {
        if !is_known {
            return Err((Code::Auth, UNKNOWN_PEER));
        }
        if self.leaving.load(Relaxed) {
            return Err(LEAVING);
        }
        if let Mode::Resume { session_id, .. } = &hello.mode {
            let found = self.find(peer, session_id);
            return found.map(Some).ok_or((Code::NoSession, "this agent does not know that session"));
        }
        let most = sessions_max(self.lanes(peer));
        let one_more = self.coming.one_more(peer, || most.saturating_sub(self.count(peer)));
        if one_more.is_none_or(|one_more| coming.set(one_more).is_err()) {
            return Err((Code::Limit, "too many sessions"));
        }
        let others = self.connected(peer);
        if let Some(other) = others.iter().find(|s| s.info().key.peer_instance != hello.agent_instance)
            && duplicate_agent::speaks(other).await
        {
            return Err((Code::Limit, TWO_AGENTS));
        }
        Ok(None)
    }

    fn find(&self, peer: &Identity, id: &[u8; 16]) -> Option<Session> {
        let sessions = self.locked();
        sessions.get(peer)?.iter().find(|s| s.is_live() && s.info().key.id == *id).cloned()
    }

    /// Dials that became no session, by reason.
    pub fn dial_failures(&self) -> BTreeMap<&'static str, u64> {
        self.dial_failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether `peer` can be reached, by its sessions or else the last dial; `None` when nothing is known.
    pub fn reachable(&self, peer: &Identity) -> Option<bool> {
        if !self.connected(peer).is_empty() {
            return Some(true);
        }
        let is_unreached = self.unreached.lock().unwrap_or_else(PoisonError::into_inner).contains(peer);
        (is_unreached || self.count(peer) > 0).then_some(false)
    }

    fn count_dial_failure(&self, error: &ConnectError) {
        let mut failures = self.dial_failures.lock().unwrap_or_else(PoisonError::into_inner);
        *failures.entry(error.label()).or_default() += 1;
    }

    /// All live sessions. Forgets the others: each holds the descriptors of its runtime.
    pub fn all(&self) -> Vec<Session> {
        let mut sessions = self.locked();
        sessions.values_mut().for_each(|of_peer| of_peer.retain(Session::is_live));
        sessions.values().flatten().cloned().collect()
    }

    /// Limits what is sent to `peer` from now on, over all its sessions and those to come.
    pub fn set_limit(&self, peer: &Identity, limit: Option<Rate>) {
        let mut terms = self.locked_terms();
        let terms = terms.entry(peer.clone()).or_default();
        let before = terms.limit.take().map(|(_, shared_limit)| shared_limit);
        terms.limit = limit.map(|rate| (rate, SharedLimit::renewed(before, rate.get(), Instant::now())));
        // With the terms locked: a session that begins now gets this one or the next.
        let sessions = self.locked();
        sessions.get(peer).into_iter().flatten().for_each(|session| session.limit(terms.shared_limit()));
    }

    /// Holds `peer` to so much in a second, in sessions to come, over all of them.
    pub fn set_receive_rate(&self, peer: &Identity, rate: Option<Rate>) {
        let limit = rate.map(|rate| SharedLimit::of_arrivals(rate.get(), Instant::now()));
        self.locked_terms().entry(peer.clone()).or_default().receive_limit = limit;
    }

    /// What may be sent to `peer`.
    pub fn limit(&self, peer: &Identity) -> Option<Rate> {
        Some(self.locked_terms().get(peer)?.limit.as_ref()?.0)
    }

    /// How many connections the streams to and from `peer` may be spread over.
    pub fn set_lanes(&self, peer: &Identity, lanes: usize) {
        self.locked_terms().entry(peer.clone()).or_default().lanes = lanes.max(1);
    }

    /// What unfinished messages of `peer` may hold in sessions to come, over all of them.
    pub fn set_message_bytes(&self, peer: &Identity, bytes: usize) {
        let budget = MessageBudget::new(bytes, self.endpoint.config().credit_floor());
        self.locked_terms().entry(peer.clone()).or_default().messages = Some(budget);
    }

    fn messages(&self, peer: &Identity) -> MessageBudget {
        let mut terms = self.locked_terms();
        let messages = &mut terms.entry(peer.clone()).or_default().messages;
        let window_bytes = self.endpoint.config().credit_floor();
        messages.get_or_insert_with(|| MessageBudget::new(MESSAGE_BYTES_LITTLE, window_bytes)).clone()
    }

    fn lanes(&self, peer: &Identity) -> usize {
        self.locked_terms().get(peer).map_or(1, |terms| terms.lanes)
    }

    /// Whether there are fewer lanes than there may be, and none was refused lately.
    fn lacks_a_lane(&self, peer: &Identity, lanes: usize) -> bool {
        let refused = self.locked_terms().get(peer).and_then(|terms| terms.refused);
        // One without a connection counts: it comes back, or ends soon.
        self.count(peer) < lanes && refused.is_none_or(|at| at.elapsed() >= LANE_AGAIN_AFTER)
    }

    fn no_further_lane(&self, peer: &Identity, lanes: usize, error: &ConnectError) {
        let have = self.connected(peer).len();
        tracing::warn!(%peer, lanes, have, error = chain(error), "no further lane");
        self.locked_terms().entry(peer.clone()).or_default().refused = Some(Instant::now());
    }

    /// Where the next stream to `first`'s peer goes: to each of its lanes in turn. One that is missing
    /// is dialed at `address`; if that fails there are fewer.
    pub async fn lane(&self, first: &Session, address: Option<&str>) -> Session {
        let peer = &first.info().peer;
        let lanes = self.lanes(peer);
        if lanes == 1 {
            return first.clone();
        }
        if let (true, Some(address)) = (self.lacks_a_lane(peer, lanes), address) {
            match self.further_lane(peer, lanes, address).await {
                Ok(Some(session)) => return session,
                Ok(None) => {}
                Err(e) => self.no_further_lane(peer, lanes, &e),
            }
        }
        let mut ready = self.connected(peer);
        ready.truncate(lanes);
        let turn = self.turn.fetch_add(1, Relaxed);
        turn.checked_rem(ready.len()).map_or(first, |at| &ready[at]).clone()
    }

    /// `None` when somebody else has dialed it meanwhile.
    async fn further_lane(
        &self,
        peer: &Identity,
        lanes: usize,
        address: &str,
    ) -> Result<Option<Session>, ConnectError> {
        let turn = self.dialing.turn(peer).await?;
        if !self.lacks_a_lane(peer, lanes) {
            return Ok(None);
        }
        turn.end(self.dial_another(peer, address).await).map(Some)
    }

    async fn dial_another(&self, peer: &Identity, address: &str) -> Result<Session, ConnectError> {
        let dialed = dial::dial(&self.endpoint, address, peer).await;
        let mut unreached = self.unreached.lock().unwrap_or_else(PoisonError::into_inner);
        match &dialed {
            Ok(_) => drop(unreached.remove(peer)),
            Err(_) => drop(unreached.insert(peer.clone())),
        }
        drop(unreached);
        self.adopt(dialed.inspect_err(|e| self.count_dial_failure(e))?)
    }

    /// The sessions with a connection, in the order in which they began.
    fn connected(&self, peer: &Identity) -> Vec<Session> {
        let sessions = self.locked();
        let of_peer = sessions.get(peer).into_iter().flatten();
        of_peer.filter(|s| s.is_live() && s.away_since().is_none()).cloned().collect()
    }

    /// Stops all sessions, for another process; until [`Pool::thaw`] peers are told to come again. The
    /// owners of the streams must have stopped.
    pub async fn freeze(&self) -> Vec<FrozenSession> {
        self.leaving.store(true, Relaxed);
        let mut sessions = Vec::new();
        for session in self.all() {
            match timeout(FREEZE_DEADLINE, session.freeze()).await {
                Ok(Some(frozen)) => sessions.push(frozen),
                _ => tracing::warn!(peer = %session.info().peer, "a session could not be left"),
            }
        }
        sessions
    }

    /// Takes up the sessions that a process has left, perhaps this one, with the streams of all `owners`.
    pub fn thaw(&self, sessions: Vec<FrozenSession>, owners: &mut [&mut dyn StreamOwner]) -> ThawedStreams {
        let mut thawed = ThawedStreams::default();
        for frozen in sessions {
            let (peer, owned) = (frozen.peer.clone(), stream_owner::take_streams(owners, frozen.id()));
            let messages = self.messages(&peer);
            match session_thread::thaw(frozen, owned, &self.endpoint, self.incoming.clone(), messages) {
                Ok((session, streams)) => {
                    let _ = self.started.send(session.clone());
                    let terms = self.locked_terms();
                    begin_limits(&session, terms.get(&peer));
                    streams.into_iter().for_each(|stream| thawed.add(&session, stream));
                    self.locked().entry(peer).or_default().push(session);
                }
                Err(error) => tracing::error!(%peer, %error, "a session cannot be taken up"),
            }
        }
        self.leaving.store(false, Relaxed);
        thawed
    }

    fn adopt(&self, established: Established) -> Result<Session, ConnectError> {
        let messages = self.messages(&established.peer);
        let session = session_thread::start(established, &self.endpoint, self.incoming.clone(), messages)
            .map_err(ConnectError::Start)?;
        let _ = self.started.send(session.clone());
        let terms = self.locked_terms();
        begin_limits(&session, terms.get(&session.info().peer));
        let mut sessions = self.locked();
        let of_peer = sessions.entry(session.info().peer.clone()).or_default();
        of_peer.retain(Session::is_live);
        for old in of_peer.iter().filter(|old| is_orphaned(old, &session)) {
            tracing::info!(peer = %old.info().peer, "the peer's agent is a new one; the old one's session ends");
            old.close(Code::NoSession, "the peer's agent has been replaced");
        }
        of_peer.push(session.clone());
        Ok(session)
    }

    fn live(&self, peer: &Identity) -> Option<Session> {
        let ours = self.endpoint.tls().identity.clone();
        let dialer = |s: &Session| match s.info().role {
            Role::Dialer => ours.clone(),
            Role::Acceptor => peer.clone(),
        };
        let mut sessions = self.locked();
        let of_peer = sessions.get_mut(peer)?;
        of_peer.retain(Session::is_live);
        of_peer.iter().min_by_key(|s| (s.away_since().is_some(), dialer(s))).cloned()
    }

    fn count(&self, peer: &Identity) -> usize {
        self.locked().get(peer).map_or(0, |s| s.iter().filter(|s| s.is_live()).count())
    }

    /// Taken before the sessions, where both are.
    fn locked_terms(&self) -> MutexGuard<'_, BTreeMap<Identity, Terms>> {
        self.terms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Identity, Vec<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a session what may be sent, both ways.
fn begin_limits(session: &Session, terms: Option<&Terms>) {
    session.limit(terms.and_then(Terms::shared_limit));
    session.receive_limit(terms.and_then(|terms| terms.receive_limit.clone()));
}

/// Whether the process that `old` was held with is gone: an agent keeps its instance for as long as
/// it lives, and its sessions die with it.
fn is_orphaned(old: &Session, new: &Session) -> bool {
    old.info().key.peer_instance != new.info().key.peer_instance
}
