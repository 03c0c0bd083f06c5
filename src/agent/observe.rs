//! What the agent has counted and measured, brought together: for Prometheus, and for the next process.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::confine::Confinement;
use super::handoff::LeftCounts;
use super::running::Agent;
use crate::api::LibvirtRole;
use crate::metrics::UnderWay;
use crate::migrate::journal::Role;
use crate::migrate::known_vms;
use crate::migrate::progress::Outcome;

/// The label of a virtual machine that is not in the configuration.
const OTHER: &str = "other";
/// Between two looks at whether the witness is there.
const PROBE_EVERY: Duration = Duration::from_secs(60);

/// Looks at what nobody asks for, and sums up what is refused.
pub(super) fn keep(agent: &Arc<Agent>, servers: &TaskTracker) {
    let summing = Arc::clone(agent);
    servers.spawn(async move { summing.refusals.sum_up(&summing.host.audit).await });
    let probing = Arc::clone(agent);
    servers.spawn(async move { probing.stopping.run_until_cancelled(probe_witness(&probing)).await });
}

/// Whether the witness is there is known before a migration wants it.
async fn probe_witness(agent: &Agent) {
    let Some(witness) = &agent.host.witness else { return };
    loop {
        witness.probe().await;
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

impl Agent {
    /// The text for Prometheus.
    pub(super) async fn metrics_text(self: &Arc<Self>) -> Result<String, prometheus::Error> {
        let (vms, leftovers) =
            (self.vm_states.look(&self.host).await, self.journals_read.leftovers(&self.host).await);
        self.metrics.host.set(&vms, leftovers, self.host.journals_refused());
        self.measure_migrations();
        for config in self.host.config.peers.values() {
            let reachable = self.host.pool.reachable(&config.identity);
            self.metrics.host.set_reachable(config.identity.as_str(), reachable);
        }
        let Confinement { landlock, seccomp } = &self.confinement;
        self.metrics.set_sandbox([("landlock", landlock.is_on()), ("seccomp", seccomp.is_on())]);
        for role in [LibvirtRole::Source, LibvirtRole::Destination] {
            self.metrics.libvirt.set_active(role, self.libvirt.active(role));
        }
        self.metrics.drain.set(self.draining.now().map(|shown| shown.drain).as_ref());
        self.count().await;
        self.metrics.text()
    }

    /// What has been counted, for the next process. Everything has stopped.
    pub(super) async fn left_counts(&self) -> LeftCounts {
        self.count().await;
        let (counts, sessions) = self.metrics.left();
        LeftCounts { counts, sessions }
    }

    /// Goes on with what the process before has counted. To be called before anything of it goes on here, and is
    /// counted.
    pub(super) fn inherit_counts(&self, left: LeftCounts) {
        self.metrics.inherit(left.counts);
        self.metrics.sessions.restore_counted(left.sessions);
    }

    /// Brings the counters up to now.
    async fn count(&self) {
        for session in self.host.pool.all() {
            let stats = session.stats().await;
            self.metrics.sessions.count(session.info().peer.as_str(), session.id(), &stats);
        }
        for progress in self.registry.sinks() {
            self.metrics.migrations.count(progress.now().role, &progress.take_uncounted());
        }
        self.metrics.sessions.set_dial_failures(&self.host.pool.dial_failures());
        self.metrics.forward.set(&self.forwards.figures(), self.forwards.bypassed());
        for ((role, ended), count) in self.libvirt.take_ends() {
            self.metrics.libvirt.count_ended(role, ended, count);
        }
        self.metrics.sessions.set_refusals(&self.host.refusals.counts());
        self.metrics.set_audit(&self.host.audit.figures());
        self.metrics.set_traces(self.traces.counts());
        self.metrics.witness.set(self.host.witness_figures());
    }

    fn measure_migrations(&self) {
        let mut under_way = Vec::new();
        let mut undecided = Vec::new();
        for sink in self.registry.sinks() {
            let progress = sink.now();
            match &progress.outcome {
                None => {
                    let (idle_ms, phase_ms) = sink.idle_and_phase_ms();
                    under_way.push(UnderWay { progress, idle_ms, phase_ms });
                }
                Some(Outcome::Undecided { .. }) => undecided.push(progress.role),
                Some(_) => {}
            }
        }
        for role in [Role::Source, Role::Destination] {
            let active = under_way.iter().filter(|one| one.progress.role == role).count();
            let undecided = undecided.iter().filter(|one| **one == role).count();
            self.metrics.migrations.set_counts(role, active, undecided);
        }
        // A source may name a machine as it likes.
        let known = |vm: &str| if known_vms::is_here(&self.host.config, vm) { vm } else { OTHER }.to_owned();
        self.metrics.migrations.set_under_way(&under_way, known);
    }
}
