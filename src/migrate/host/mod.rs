//! What every migration of this agent needs: configuration, sessions, journals, and the
//! registry of migrations under way.

mod ask_error;
pub(crate) mod decisions;
pub(crate) mod reservations;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::{Config, PeerConfig, VmConfig};
use crate::net::connect_error::ConnectError;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::session::Session;

use super::handoff::Stopped;
use super::journal::{Beginning, Header, Journal, JournalError, Past, Record, Role};
use super::model::problem::{Problem, ProblemKind, chain};
use super::model::progress::Outcome;
use super::protocol::server::Incoming;
pub(crate) use ask_error::AskError;
use decisions::Order;
pub(crate) use reservations::Reservation;
use reservations::{Looking, Reserved};

/// One agent's host, shared by all its migrations.
#[derive(Debug)]
pub struct Host {
    /// The configuration.
    pub config: Config,
    /// This host's identity.
    pub identity: Identity,
    /// Sessions with peers.
    pub pool: Pool,
    /// Cancelled when the agent was told to stop.
    pub stopping: CancellationToken,
    reserved: Reserved,
    destinations: Mutex<BTreeMap<Uuid, Incoming>>,
    /// True while everything stops for another process to take it up.
    freezing: watch::Sender<bool>,
    stopped: Mutex<Vec<Stopped>>,
    /// Journals of migrations that have ended, but whose disk did not take the last record.
    unended: Mutex<Vec<(Journal, Outcome)>>,
    /// Journals that are not believed.
    refused: Mutex<Vec<Refused>>,
    /// Where operators' decisions go, by migration: those that may be decided by one.
    orders: Mutex<BTreeMap<Uuid, mpsc::Sender<Order>>>,
    /// What is open about migrations, in words.
    questions: Mutex<BTreeMap<Uuid, String>>,
}

/// A journal that is not believed: nobody knows whose its virtual machine is.
#[derive(Debug, Clone)]
pub(crate) struct Refused {
    pub(crate) path: PathBuf,
    /// Of its header, where that can be read.
    pub(crate) vm: Option<String>,
    pub(crate) cause: String,
}

impl Host {
    /// A host without migrations.
    #[must_use]
    pub fn new(config: Config, identity: Identity, pool: Pool, stopping: CancellationToken) -> Self {
        Self {
            config,
            identity,
            pool,
            stopping,
            reserved: Reserved::default(),
            destinations: Mutex::default(),
            freezing: watch::Sender::new(false),
            stopped: Mutex::default(),
            unended: Mutex::default(),
            refused: Mutex::default(),
            orders: Mutex::default(),
            questions: Mutex::default(),
        }
    }

    /// Asks all migrations to stop where they are, or to go on with what they have not begun.
    pub fn freeze(&self, freezing: bool) {
        self.freezing.send_replace(freezing);
    }

    /// Waits until migrations are to stop.
    pub fn frozen(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut freezing = self.freezing.subscribe();
        async move {
            if freezing.wait_for(|freezing| *freezing).await.is_err() {
                // The host is gone, and with it whoever could ask.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether migrations are to stop.
    #[must_use]
    pub fn is_freezing(&self) -> bool {
        *self.freezing.borrow()
    }

    /// A migration has stopped.
    pub(crate) fn stopped(&self, stopped: Stopped) {
        lock(&self.stopped).push(stopped);
    }

    pub(crate) fn take_stopped(&self) -> Vec<Stopped> {
        std::mem::take(&mut *lock(&self.stopped))
    }

    /// Where journals live.
    #[must_use]
    pub fn journals(&self) -> PathBuf {
        self.config.state_dir.join("migrations")
    }

    /// Ends a journal. A disk that does not take the last record is tried again from time to time,
    /// and before the next migration of that VM begins: two open journals of one guest would
    /// contradict each other.
    pub(crate) fn end(&self, mut journal: Journal, outcome: Outcome) {
        if let Err(e) = journal.record(Record::Ended(outcome.clone())) {
            tracing::error!(error = chain(&e), "the journal's end cannot be written; it is tried again");
            lock(&self.unended).push((journal, outcome));
        }
    }

    /// Ends the journals that could not be ended when their migrations did.
    ///
    /// # Errors
    /// [`JournalError`] of the first that still cannot be ended.
    pub fn end_late(&self) -> Result<(), JournalError> {
        let mut unended = lock(&self.unended);
        while let Some((journal, outcome)) = unended.last_mut() {
            journal.record(Record::Ended(outcome.clone()))?;
            unended.pop();
        }
        Ok(())
    }

    /// A migration whose journal does not say yet how it ended, and how it did.
    pub(crate) fn unended(&self, migration: Uuid, role: Role) -> Option<(Past, Outcome)> {
        let unended = lock(&self.unended);
        let mut pasts = unended.iter().map(|(journal, outcome)| (journal.past(), outcome));
        let found = pasts.find(|(p, _)| p.header.migration == migration && p.header.role == role);
        found.map(|(past, outcome)| (past.clone(), outcome.clone()))
    }

    /// Takes note of a journal that is not believed.
    pub(crate) fn refuse(&self, refused: Refused) {
        let mut all = lock(&self.refused);
        all.retain(|r| r.path != refused.path);
        all.push(refused);
    }

    /// The journals that are not believed and have not been taken away.
    pub(crate) fn refused(&self) -> Vec<Refused> {
        let mut all = lock(&self.refused);
        all.retain(|r| r.path.exists());
        all.clone()
    }

    /// Operators' decisions over `migration`, until [`Host::leave_orders`].
    pub(crate) fn take_orders(&self, migration: Uuid) -> mpsc::Receiver<Order> {
        let (sender, receiver) = mpsc::channel(1);
        lock(&self.orders).insert(migration, sender);
        receiver
    }

    /// It is decided.
    pub(crate) fn leave_orders(&self, migration: Uuid) {
        lock(&self.orders).remove(&migration);
        self.answered(migration);
    }

    /// Something is open about `migration`: what, and what is done about it.
    pub(crate) fn open_question(&self, migration: Uuid, words: String) {
        lock(&self.questions).insert(migration, words);
    }

    /// Nothing is open about it any more.
    pub(crate) fn answered(&self, migration: Uuid) {
        lock(&self.questions).remove(&migration);
    }

    /// What is open about `migration`.
    pub(crate) fn question(&self, migration: Uuid) -> Option<String> {
        lock(&self.questions).get(&migration).cloned()
    }

    /// Where an operator's decision over `migration` goes; `None` when there is nothing to decide.
    pub(crate) fn orders(&self, migration: Uuid) -> Option<mpsc::Sender<Order>> {
        lock(&self.orders).get(&migration).cloned()
    }

    /// Begins a journal.
    pub(crate) fn journal(
        &self,
        migration: Uuid,
        role: Role,
        peer: &Identity,
        beginning: Beginning<'_>,
    ) -> Result<Journal, JournalError> {
        self.end_late()?;
        let header = Header {
            format: super::journal::FORMAT,
            migration,
            role,
            vm: beginning.vm.into(),
            host: self.identity.to_string(),
            peer: peer.to_string(),
            began_at: time::OffsetDateTime::now_utc().unix_timestamp(),
            running: beginning.running,
            keep_source: beginning.keep_source,
            retry: beginning.retry,
            accepted: beginning.accepted,
        };
        Journal::create(&self.journals(), header)
    }

    /// The VM's configuration.
    pub(crate) fn vm(&self, name: &str, side: &str) -> Result<&VmConfig, Problem> {
        self.config.vms.get(name).ok_or_else(|| {
            let known: Vec<_> = self.config.vms.keys().map(String::as_str).collect();
            Problem::new(
                ProblemKind::VmUnknown,
                format!("the {side} {} knows no VM {name}; it knows {}", self.identity, listed(&known)),
                format!("add [vm.{name}] with its `qmp` to the configuration of {}", self.identity),
            )
        })
    }

    /// The peer's configuration.
    pub(crate) fn peer(&self, name: &str) -> Result<(&PeerConfig, Identity), Problem> {
        let known: Vec<_> = self.config.peers.keys().map(String::as_str).collect();
        let peer = self.config.peers.get(name).ok_or_else(|| {
            Problem::new(
                ProblemKind::PeerUnknown,
                format!("{} knows no peer {name}; it knows {}", self.identity, listed(&known)),
                format!("add [peer.{name}] with `identity` and `address` to its configuration"),
            )
        })?;
        Ok((peer, peer.identity.clone()))
    }

    /// What the configuration calls the peer that a journal names.
    pub(crate) fn peer_name(&self, identity: &str) -> Option<String> {
        let identity: Identity = identity.parse().ok()?;
        self.config.peer_by_identity(&identity).map(|(name, _)| name.to_owned())
    }

    /// A session with the peer of that name.
    pub(crate) async fn session(&self, name: &str) -> Result<Session, AskError> {
        let (peer, identity) = self.peer(name).map_err(AskError::Unknown)?;
        let connected = self.pool.session(&identity, peer.address.as_deref()).await;
        connected.map_err(|source| AskError::Connect { peer: name.into(), source })
    }

    /// Where the next stream to that peer goes: `first`, or another of its lanes.
    pub(crate) async fn lane(&self, first: &Session, name: &str) -> Session {
        let address = self.config.peers.get(name).and_then(|peer| peer.address.as_deref());
        self.pool.lane(first, address).await
    }

    /// What a failed connection means to an operator.
    pub(crate) fn connect_problem(&self, peer: &str, error: &ConnectError) -> Problem {
        let text = format!("no session with peer {peer}: {}", chain(error));
        if error.is_stranger() {
            let remedy = format!(
                "add a peer with `identity` \"{}\", which is this host, to the configuration of {peer}",
                self.identity
            );
            return Problem::new(ProblemKind::NotPermitted, text, remedy);
        }
        if error.is_distrust() {
            let remedy =
                "compare both sides with `vmferry certs check`, and the peer's `identity` on both sides";
            return Problem::new(ProblemKind::PeerNotTrusted, text, remedy);
        }
        let remedy = "check that its agent runs, its `address`, and that the firewall passes that one port";
        Problem::new(ProblemKind::PeerUnreachable, text, remedy)
    }

    /// Reserves the VM for one migration on this host.
    pub(crate) fn reserve(&self, vm: &str, migration: Uuid) -> Result<Reservation, Problem> {
        if let Some(refused) = self.refused().into_iter().find(|r| r.vm.as_deref() == Some(vm)) {
            let text = format!("whose VM {vm} is cannot be known on {}: {}", self.identity, refused.cause);
            let remedy = format!(
                "find out by hand where the VM runs, then take {} away; see `vmferry recover`",
                refused.path.display()
            );
            return Err(Problem::new(ProblemKind::Busy, text, remedy));
        }
        self.reserved.reserve(vm, migration).map_err(|other| {
            let text = format!("VM {vm} is already part of migration {other} on {}", self.identity);
            Problem::new(ProblemKind::Busy, text, "wait for it or cancel it")
        })
    }

    /// Begins to look at a VM that is in no migration; the migration that has it is the error.
    pub(crate) fn begin_look(&self, vm: &str) -> Result<Looking, Uuid> {
        self.reserved.begin_look(vm)
    }

    pub(crate) fn register(self: &Arc<Self>, migration: Uuid, incoming: Incoming) -> Registration {
        lock(&self.destinations).insert(migration, incoming);
        Registration { host: Arc::clone(self), migration }
    }

    pub(crate) fn destination(&self, migration: Uuid) -> Option<Incoming> {
        lock(&self.destinations).get(&migration).cloned()
    }
}

/// A destination that can be reached by its migration; dropped, it cannot.
#[derive(Debug)]
pub(crate) struct Registration {
    host: Arc<Host>,
    migration: Uuid,
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.host.destinations).remove(&self.migration);
        self.host.leave_orders(self.migration);
    }
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
