//! The sessions of this agent, at most one in use per peer.
//!
//! A session serves both directions, whoever dialed. When two agents dial each other at the
//! same moment, both sides use the session that the smaller identity dialed. Knows no streams.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::connect::{Accepted, ConnectError, Denial, Endpoint, Established, LEAVING};
use super::identity::Identity;
use super::lobby::Lobby;
use super::session::{IncomingStream, Session};
use crate::mux::hello::Mode;
use crate::mux::{Code, Role};
use crate::rate::Rate;

/// Connections that have not proved their identity yet (WIRE §8).
pub const UNAUTHENTICATED_MAX: usize = 32;
/// Sessions of one peer (WIRE §8).
pub const SESSIONS_PER_PEER_MAX: usize = 4;

/// Owns all sessions.
#[derive(Debug)]
pub struct Pool {
    endpoint: Arc<Endpoint>,
    sessions: Mutex<BTreeMap<Identity, Vec<Session>>>,
    dialing: tokio::sync::Mutex<()>,
    lobby: Arc<Lobby>,
    incoming: mpsc::Sender<IncomingStream>,
    started: mpsc::UnboundedSender<Session>,
    dial_failures: Mutex<BTreeMap<&'static str, u64>>,
    /// What each session with a peer may send.
    limits: Mutex<BTreeMap<Identity, Rate>>,
    leaving: AtomicBool,
}

impl Pool {
    /// A pool without sessions; streams that peers open arrive on `incoming`, each new session
    /// on `started`.
    #[must_use]
    pub fn new(
        endpoint: Endpoint,
        incoming: mpsc::Sender<IncomingStream>,
        started: mpsc::UnboundedSender<Session>,
    ) -> Self {
        Self {
            endpoint: Arc::new(endpoint),
            sessions: Mutex::default(),
            dialing: tokio::sync::Mutex::default(),
            lobby: Lobby::new(UNAUTHENTICATED_MAX),
            incoming,
            started,
            dial_failures: Mutex::default(),
            limits: Mutex::default(),
            leaving: AtomicBool::new(false),
        }
    }

    /// Credentials and limits.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// A session with `peer` that has a connection, dialed at `address` if there is none.
    ///
    /// # Errors
    /// [`ConnectError`].
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
        // One dial at a time: two migrations that begin together share the session.
        let _dialing = self.dialing.lock().await;
        if let Some(session) = self.live(peer).filter(|session| session.away_since().is_none()) {
            return Ok(session);
        }
        let Some(address) = address else {
            return Err(ConnectError::NoAddress { peer: peer.clone() });
        };
        let dialed = self.endpoint.dial(address, peer).await;
        let established = dialed.inspect_err(|e| self.count_dial_failure(e))?;
        self.adopt(established)?;
        self.live(peer).ok_or_else(|| ConnectError::Refused { code: Code::Limit, text: String::new() })
    }

    /// Takes a connection from a listener through handshake and HELLO.
    ///
    /// # Errors
    /// [`ConnectError`]; a refused peer has been told why.
    pub async fn accept(
        &self,
        tcp: TcpStream,
        known: impl FnOnce(&Identity) -> bool,
    ) -> Result<Session, ConnectError> {
        let address = tcp.peer_addr().map_err(ConnectError::BeforeHello)?;
        let place = self.lobby.enter();
        let admit = |peer: &Identity, mode: &Mode| self.admit(peer, known(peer), mode);
        tokio::select! {
            accepted = self.endpoint.accept(tcp, address, admit) => match accepted? {
                Accepted::New(established) => self.adopt(*established),
                Accepted::Resumed(session) => Ok(session),
            },
            () = place.taken() => Err(ConnectError::TooManyUnauthenticated),
        }
    }

    /// Which session a proved identity may have: a new one (`None`), or the one that it resumes.
    fn admit(&self, peer: &Identity, is_known: bool, mode: &Mode) -> Result<Option<Session>, Denial> {
        if !is_known {
            return Err((Code::Auth, "no peer with this identity is configured here"));
        }
        if self.leaving.load(Relaxed) {
            return Err(LEAVING);
        }
        if let Mode::Resume { session_id, .. } = mode {
            let found = self.find(peer, session_id);
            return found.map(Some).ok_or((Code::NoSession, "this agent does not know that session"));
        }
        if self.count(peer) >= SESSIONS_PER_PEER_MAX {
            return Err((Code::Limit, "too many sessions"));
        }
        Ok(None)
    }

    fn find(&self, peer: &Identity, id: &[u8; 16]) -> Option<Session> {
        let sessions = self.locked();
        sessions.get(peer)?.iter().find(|s| s.is_live() && s.info().key.id == *id).cloned()
    }

    /// Dials that became no session, by reason.
    #[must_use]
    pub fn dial_failures(&self) -> BTreeMap<&'static str, u64> {
        self.dial_failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count_dial_failure(&self, error: &ConnectError) {
        let mut failures = self.dial_failures.lock().unwrap_or_else(PoisonError::into_inner);
        *failures.entry(error.label()).or_default() += 1;
    }

    /// All live sessions. Forgets the others: each holds the descriptors of its runtime.
    #[must_use]
    pub fn all(&self) -> Vec<Session> {
        let mut sessions = self.locked();
        sessions.values_mut().for_each(|of_peer| of_peer.retain(Session::is_live));
        sessions.values().flatten().cloned().collect()
    }

    /// Limits what is sent to `peer` from now on, in its sessions and in those to come.
    pub fn set_limit(&self, peer: &Identity, limit: Option<Rate>) {
        let mut limits = self.locked_limits();
        match limit {
            Some(limit) => limits.insert(peer.clone(), limit),
            None => limits.remove(peer),
        };
        // With the limits locked: a session that begins now gets this one or the next.
        self.locked().get(peer).into_iter().flatten().for_each(|session| session.limit(limit.map(Rate::get)));
    }

    /// What may be sent to `peer`.
    #[must_use]
    pub fn limit(&self, peer: &Identity) -> Option<Rate> {
        self.locked_limits().get(peer).copied()
    }

    /// While all sessions are left to another process, peers are told to come again.
    pub fn leave(&self, leaving: bool) {
        self.leaving.store(leaving, Relaxed);
    }

    /// Adds a session that an earlier process has left.
    pub fn take_up(&self, session: Session) {
        let _ = self.started.send(session.clone());
        let limits = self.locked_limits();
        session.limit(limits.get(&session.info().peer).map(|limit| limit.get()));
        self.locked().entry(session.info().peer.clone()).or_default().push(session);
    }

    fn adopt(&self, established: Established) -> Result<Session, ConnectError> {
        let config = self.endpoint.config().clone();
        let session =
            Session::start(established, config, self.incoming.clone()).map_err(ConnectError::Start)?;
        let _ = self.started.send(session.clone());
        let limits = self.locked_limits();
        session.limit(limits.get(&session.info().peer).map(|limit| limit.get()));
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
    fn locked_limits(&self) -> std::sync::MutexGuard<'_, BTreeMap<Identity, Rate>> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<Identity, Vec<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the process that `old` was held with is gone: an agent keeps its instance for as long as
/// it lives, and its sessions die with it.
fn is_orphaned(old: &Session, new: &Session) -> bool {
    old.info().key.peer_instance != new.info().key.peer_instance
}
