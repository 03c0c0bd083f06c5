//! A running agent: what it has, and the migrations that it begins or serves.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::certificate_files::CertificatesInUse;
use super::confine::Confinement;
use super::draining::Draining;
use super::history::History;
use super::journals_read::JournalsRead;
use super::limits::PeerLimits;
use super::ping::accept_probes;
use super::refusals::Refusals;
use super::registry::{Entry, Registry};
use super::traces::Traces;
use super::vm_states::VmStates;
use crate::api::{MigrateRequest, Migration};
use crate::audit::Audit;
use crate::config::Config;
use crate::forward::Forwards;
use crate::libvirt::Libvirt;
use crate::metrics::Metrics;
use crate::migrate::bandwidth::ShareHandle;
use crate::migrate::journal::Role;
use crate::migrate::progress::{Progress, ProgressSink};
use crate::migrate::{self, Host, SourceRequest};
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::purposes::Purposes;
use crate::net::session::IncomingStream;
use crate::peer_refusals::Reason;

pub(super) struct Agent {
    pub(super) host: Arc<Host>,
    pub(super) registry: Registry,
    /// What it is asked for of those that ended, over restarts.
    pub(super) history: History,
    pub(super) traces: Traces,
    pub(super) forwards: Arc<Forwards>,
    /// Migrations that libvirt makes itself.
    pub(super) libvirt: Arc<Libvirt>,
    pub(super) metrics: Metrics,
    pub(super) certificates: CertificatesInUse,
    /// Migrations of which this host is the source, and settlements.
    pub(super) sources: TaskTracker,
    /// Streams that peers opened: migrations of which this host is the destination.
    pub(super) served: TaskTracker,
    /// Everything else that belongs to peers.
    pub(super) tasks: TaskTracker,
    pub(super) stopping: CancellationToken,
    pub(super) peer_limits: PeerLimits,
    pub(super) vm_states: VmStates,
    /// Whether this host is being emptied.
    pub(super) draining: Draining,
    pub(super) refusals: Refusals,
    pub(super) journals_read: JournalsRead,
    /// Where its configuration came from; a reload reads the `[tls]` of it again.
    pub(super) config_path: PathBuf,
    /// What this process has taken from itself.
    pub(super) confinement: Confinement,
}

/// What came of a migration that was asked for.
pub(super) enum Asked {
    Begun(Progress),
    /// It had been asked for before, and this is what has become of it.
    Before(Progress),
    /// Another one has its identity.
    OtherwiseBefore(Progress),
    /// The agent is on its way out.
    Leaving,
}

impl Agent {
    /// An agent that has not begun to do anything.
    pub(super) fn new(
        (config, config_path): (Config, &Path),
        identity: Identity,
        pool: Pool,
        audit: Audit,
        confinement: Confinement,
    ) -> Result<Self, prometheus::Error> {
        let stopping = CancellationToken::new();
        let host = Arc::new(Host::new(config, identity, pool, stopping.clone(), audit));
        let history = History::new(&host.config.state_dir);
        let forwards =
            Arc::new(Forwards::new(&host.config, Arc::clone(&host.pool), Arc::clone(&host.refusals)));
        let draining = Draining::new(&host.config.state_dir);
        let tunnel = (Arc::clone(&host.pool), Arc::clone(&forwards));
        let asking = (Arc::clone(&host.refusals), Arc::clone(&host.control_streams));
        let libvirt = Libvirt::new(&host.config, host.identity.clone(), tunnel, asking);
        Ok(Self {
            forwards,
            libvirt: Arc::new(libvirt),
            host,
            registry: Registry::default(),
            history,
            traces: Traces::default(),
            metrics: Metrics::new()?,
            certificates: CertificatesInUse::default(),
            sources: TaskTracker::new(),
            served: TaskTracker::new(),
            tasks: TaskTracker::new(),
            stopping,
            peer_limits: PeerLimits::default(),
            vm_states: VmStates::default(),
            draining,
            refusals: Refusals::default(),
            journals_read: JournalsRead::default(),
            config_path: config_path.to_owned(),
            confinement,
        })
    }

    /// Begins a migration under this identity, unless there is one.
    pub(super) fn migrate_once(self: &Arc<Self>, id: Uuid, request: MigrateRequest) -> Asked {
        let _one_at_a_time = self.registry.one_at_a_time();
        let Some(before) = self.registry.get(id).map(|entry| entry.progress.now()) else {
            return self.migrate_as(id, request).map_or(Asked::Leaving, Asked::Begun);
        };
        let peer = self.host.config.peers.get(&request.to).map(|peer| peer.identity.as_str());
        let is_same = before.vm == request.vm && before.peer == peer.unwrap_or(&request.to);
        if is_same { Asked::Before(before) } else { Asked::OtherwiseBefore(before) }
    }

    /// Begins a migration; `None` when the agent is on its way out. There is none of that identity.
    pub(super) fn migrate_as(self: &Arc<Self>, id: Uuid, request: MigrateRequest) -> Option<Progress> {
        if self.is_leaving() {
            return None;
        }
        let identity =
            self.host.config.peers.get(&request.to).map_or(request.to.as_str(), |p| p.identity.as_str());
        let progress = Progress::new(id, &request.vm, Role::Source, identity);
        let progress = ProgressSink::new(progress).recorded(&self.host.audit);
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

    /// Whether nothing new is begun: it stops, or another process is about to take over.
    pub(super) fn is_leaving(&self) -> bool {
        self.stopping.is_cancelled() || self.host.freeze.is_on()
    }

    /// A migration as this host shows it.
    pub(super) fn shown(&self, progress: Progress) -> Migration {
        Migration::new(progress, self.host.identity.as_str())
    }

    /// Counts a migration that is at its end; one that was left to another process is not.
    pub(super) fn ended(&self, progress: &ProgressSink) {
        let now = progress.now();
        self.metrics.migrations.count(now.role, &progress.take_uncounted());
        self.metrics.migrations.count_end(&now);
        self.history.add(&now);
        self.traces.add(self.host.identity.as_str(), progress);
    }

    /// Migrations that are not at their end.
    pub(super) fn active(&self) -> usize {
        self.registry.all().iter().filter(|p| p.outcome.is_none()).count()
    }

    /// Serves the streams that peers open.
    pub(super) async fn serve_streams(self: Arc<Self>, mut incoming: mpsc::Receiver<IncomingStream>) {
        let purposes = self.purposes();
        while let Some(stream) = incoming.recv().await {
            if self.host.freeze.is_on() {
                // Whoever takes the session up hears of it again.
                stream.leave();
                continue;
            }
            let purpose = stream.open.purpose;
            if !purposes.has(purpose) {
                let what = || format!("a stream of purpose {purpose}");
                self.host.refused(&stream.session().info().peer, Reason::NotUnderstood, what);
            }
            self.served.spawn(purposes.accept(stream));
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
        self.forwards.accept_streams(&mut purposes);
        self.libvirt.accept_streams(&mut purposes);
        accept_probes(&mut purposes, &self.host);
        purposes
    }
}
