//! Wires listeners, sessions, migrations, the local API and metrics; owns all tasks.

mod api;
mod inherit;
mod limits;
mod listen;
mod looks;
mod parcel;
mod passing;
mod registry;
mod reload;
mod start;
mod store;
mod succession;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::api::{MigrateRequest, SessionStatus, Status};
use crate::metrics::Metrics;
use crate::migrate::journal::Role;
use crate::migrate::problem::chain;
use crate::migrate::progress::{Progress, ProgressSink, Reconnecting};
use crate::migrate::share::ShareHandle;
use crate::migrate::vm_state::VmState;
use crate::migrate::{self, Host, SourceRequest};
use crate::mux::{Code, Role as DialRole, Stats};
use crate::net::purposes::Purposes;
use crate::net::session::{IncomingStream, Session};
use limits::LimitsSet;
use looks::Looks;
use registry::{Entry, Registry};

pub use start::{AgentError, How, run, succession_formats};

/// Between two looks at a session's figures.
const SAMPLE: Duration = Duration::from_secs(1);

/// A running agent.
pub(crate) struct Agent {
    host: Arc<Host>,
    registry: Registry,
    metrics: Metrics,
    /// Migrations of which this host is the source, and settlements.
    sources: TaskTracker,
    /// Streams that peers opened: migrations of which this host is the destination.
    served: TaskTracker,
    /// Everything else that belongs to peers.
    tasks: TaskTracker,
    stopping: CancellationToken,
    /// What operators have set; the configuration has the rest.
    limits_set: Mutex<LimitsSet>,
    looks: Looks,
}

impl Agent {
    /// Begins a migration; `None` when the agent is on its way out.
    fn migrate(self: &Arc<Self>, request: MigrateRequest) -> Option<Progress> {
        if self.stopping.is_cancelled() || self.host.is_freezing() {
            return None;
        }
        let id = Uuid::new_v4();
        let identity =
            self.host.config.peers.get(&request.to).map_or(request.to.as_str(), |p| p.identity.as_str());
        let progress = ProgressSink::new(Progress::new(id, &request.vm, Role::Source, identity));
        let MigrateRequest { vm, to: peer, options } = request;
        let (cancel, share) = (CancellationToken::new(), ShareHandle::new(&options, progress.clone()));
        let entry = Entry { progress: progress.clone(), cancel: cancel.clone(), share: Some(share.clone()) };
        self.registry.insert(entry);
        let source = SourceRequest { id, vm, peer, options, retry: None, share };
        let (agent, sink) = (Arc::clone(self), progress.clone());
        self.sources.spawn(async move {
            migrate::migrate(Arc::clone(&agent.host), source, sink.clone(), cancel).await;
            agent.ended(&sink);
        });
        Some(progress.now())
    }

    /// A migration as this host shows it.
    fn named(&self, progress: Progress) -> Progress {
        Progress { host: self.host.identity.to_string(), ..progress }
    }

    /// Counts a migration that is at its end; one that was left to another process is not.
    fn ended(&self, progress: &ProgressSink) {
        self.metrics.migration_ended(&progress.now());
    }

    /// Serves the streams that peers open.
    async fn serve_streams(self: Arc<Self>, mut incoming: mpsc::Receiver<IncomingStream>) {
        let purposes = Arc::new(self.purposes());
        while let Some(stream) = incoming.recv().await {
            if self.host.is_freezing() {
                // Whoever takes the session up hears of it again.
                stream.leave();
                continue;
            }
            let purposes = Arc::clone(&purposes);
            self.served.spawn(async move { purposes.accept(stream).await });
        }
    }

    /// Who takes which of these streams.
    fn purposes(self: &Arc<Self>) -> Purposes {
        let mut purposes = Purposes::default();
        let agent = Arc::clone(self);
        migrate::accept_streams(&mut purposes, &self.host, move |progress: ProgressSink| {
            agent.registry.add(progress.clone());
            let agent = Arc::clone(&agent);
            move || agent.ended(&progress)
        });
        purposes
    }

    /// Follows each session from its start to its end.
    async fn serve_sessions(self: Arc<Self>, mut started: mpsc::UnboundedReceiver<Session>) {
        while let Some(session) = started.recv().await {
            let agent = Arc::clone(&self);
            self.tasks.spawn(async move { agent.follow(session).await });
        }
    }

    async fn follow(&self, session: Session) {
        let info = session.info();
        let peer = info.peer.as_str();
        let connection = session.link().connection;
        tracing::info!(peer, address = %connection.address, cipher = connection.cipher, "session begins");
        let mut before = Stats::default();
        let end = loop {
            tokio::select! {
                end = session.ended() => break end,
                () = tokio::time::sleep(SAMPLE) => {}
            }
            let now = session.stats().await;
            self.metrics.session_moved(peer, &before, &now);
            before = now;
            self.sample(peer).await;
        };
        self.metrics.session_moved(peer, &before, &end.stats);
        self.sample(peer).await;
        self.metrics.session_ended(peer, end.cause.label());
        tracing::info!(peer, cause = chain(&end.cause), "session ends");
    }

    async fn sample(&self, peer: &str) {
        let live = self.host.pool.all();
        let mut stats = Vec::new();
        let mut away = 0;
        for session in live.iter().filter(|s| s.info().peer.as_str() == peer) {
            stats.push(session.stats().await);
            away += usize::from(session.away_since().is_some());
        }
        self.metrics.peer_sessions(peer, away, &stats);
    }

    async fn status(&self) -> Status {
        let mut sessions = Vec::new();
        for session in self.host.pool.all() {
            let (info, link, stats) = (session.info(), session.link(), session.stats().await);
            sessions.push(SessionStatus {
                peer: info.peer.to_string(),
                address: link.connection.address.to_string(),
                dialed: info.role == DialRole::Dialer,
                cipher: link.connection.cipher.clone(),
                reconnecting: link.away.as_ref().map(Reconnecting::now),
                age_s: info.since.elapsed().as_secs(),
                streams: stats.streams as u64,
                sent_bytes: stats.sent_data_bytes,
                received_bytes: stats.received_data_bytes,
            });
        }
        let config = &self.host.config;
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            identity: self.host.identity.to_string(),
            certificate_not_after: self.host.pool.endpoint().tls().not_after.unix_timestamp(),
            sessions,
            migrations_active: self.active(),
            vms: config.vms.keys().cloned().collect(),
            vm_states: self.vm_states().await,
            peers: config.peers.keys().cloned().collect(),
        }
    }

    async fn vm_states(&self) -> Vec<VmState> {
        let mut states = self.looks.look(&self.host).await;
        // A check has no migration that anybody could ask for.
        let is_known = |id: &Uuid| self.registry.get(*id).is_some();
        states.iter_mut().for_each(|state| state.migration = state.migration.filter(is_known));
        states
    }

    fn active(&self) -> usize {
        self.registry.all().iter().filter(|p| p.outcome.is_none()).count()
    }

    /// The text for Prometheus.
    fn metrics_text(&self) -> Result<String, prometheus::Error> {
        let all = self.registry.all();
        for role in [Role::Source, Role::Destination] {
            let count = all.iter().filter(|p| p.role == role && p.outcome.is_none()).count();
            self.metrics.active(role.name(), count);
        }
        let limits = all
            .iter()
            .filter(|p| p.outcome.is_none())
            .filter_map(|p| Some((p.vm.as_str(), p.share?.limit_bytes_per_s?.into())));
        self.metrics.migration_limits(limits);
        self.metrics.dials_failed(&self.host.pool.dial_failures());
        self.metrics.text()
    }

    /// Takes nothing new, rolls back what may be, finishes what must be, says goodbye.
    async fn stop(&self) {
        /// How long migrations of this host may take to end.
        const SOURCES_GRACE: Duration = Duration::from_secs(60);
        /// How long migrations that come to this host may take to end.
        const SERVED_GRACE: Duration = Duration::from_secs(20);
        /// How long the rest may take; journals settle what does not end.
        const REST_GRACE: Duration = Duration::from_secs(15);
        self.stopping.cancel();
        let since = Instant::now();
        self.registry.cancel_all();
        self.sources.close();
        if tokio::time::timeout(SOURCES_GRACE, self.sources.wait()).await.is_err() {
            tracing::warn!("migrations did not end in time; their journals are settled at the next start");
        }
        // Sessions stay until then: a source must hear why, and a hand-over must get through.
        self.served.close();
        if tokio::time::timeout(SERVED_GRACE, self.served.wait()).await.is_err() {
            tracing::warn!("what peers began did not end in time; journals are settled at the next start");
        }
        for session in self.host.pool.all() {
            session.close(Code::Shutdown, "the agent stops");
        }
        self.tasks.close();
        if tokio::time::timeout(REST_GRACE, self.tasks.wait()).await.is_err() {
            tracing::warn!("not everything ended in time; journals are settled at the next start");
        }
        tracing::info!(after_ms = since.elapsed().as_millis() as u64, "the agent ends");
    }
}
