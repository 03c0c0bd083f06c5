//! Stops everything that this agent does, for the next process, and goes on with what one has left.
//!
//! ```text
//! freeze: migrations stop ─► sessions stop ─► state and descriptors
//! thaw:   sessions, waiting for a connection ─► migrations go on
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::state::{HandoffState, Stopped, format};
use crate::agent::registry::Entry;
use crate::agent::running::Agent;
use crate::migrate::{self, TakenUp};
use crate::net::stream_owner::Descriptors;

/// How long migrations may take to stop. One that has not by then is left to its journal.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

impl Agent {
    /// Stops everything where it is. The agent does nothing more until it ends, or
    /// [`Agent::thaw`] gives everything back to it.
    pub(crate) async fn freeze(&self) -> (HandoffState, Descriptors) {
        // While the journals are still written, of those that are left to their journals as well.
        let has_a_witness = self.host.has_a_witness();
        self.host.freeze.set(true);
        self.libvirt.set_frozen(true);
        self.forwards.freeze().await;
        self.sources.close();
        self.served.close();
        let stopped = async {
            self.sources.wait().await;
            self.served.wait().await;
        };
        if tokio::time::timeout(STOP_DEADLINE, stopped).await.is_err() {
            tracing::warn!("not every migration could stop in time; the others are left to their journals");
        }
        let sessions = self.host.pool.freeze().await;
        let mut fds = Descriptors::default();
        let migrations = migrate::settle_stopped(&self.host, &mut fds);
        let forwards = self.forwards.settle(&mut fds);
        let deadlines = &self.host.config.deadlines;
        let is_waited_for = match migrations.has_paused() {
            true => deadlines.resume().min(deadlines.resume_paused()),
            false => deadlines.resume(),
        };
        let state = HandoffState {
            format: format(has_a_witness || migrations.have_a_witness()),
            version: env!("CARGO_PKG_VERSION").into(),
            identity: self.host.identity.to_string(),
            state_dir: Some(self.host.config.state_dir.clone()),
            stopped: Some(Stopped::now(is_waited_for)),
            instance: self.host.pool.endpoint().instance(),
            sessions,
            migrations,
            limits: self.peer_limits.set(),
            forwards,
            counts: Some(self.left_counts().await),
            timelines: self.registry.timelines(),
        };
        tracing::info!(left = state.summary(), "everything has stopped for the next process");
        (state, fds)
    }

    /// Goes on with what a process has left, perhaps this one. Returns its migrations, to be run.
    pub(crate) fn thaw(&self, state: HandoffState, fds: &mut Descriptors) -> Vec<TakenUp> {
        let HandoffState { sessions, mut migrations, mut forwards, limits, stopped, .. } = state;
        migrations.have_stood(stopped.map_or(Duration::ZERO, Stopped::ago));
        // Before there is a session.
        self.peer_limits.restore(&self.host, limits);
        self.host.freeze.set(false);
        self.sources.reopen();
        self.served.reopen();
        let mut streams = self.host.pool.thaw(sessions, &mut [&mut migrations, &mut forwards]);
        self.forwards.take_up(forwards, &mut streams, fds);
        self.libvirt.set_frozen(false);
        migrate::take_up(&self.host, migrations, &mut streams, fds)
    }

    /// Runs a migration that was taken up.
    pub(crate) fn resume(self: &Arc<Self>, taken: TakenUp) {
        let (progress, cancel) = (taken.progress.clone(), taken.cancel.clone());
        self.registry.insert(Entry { progress, cancel, share: taken.share.clone() });
        let agent = Arc::clone(self);
        self.sources.spawn(async move {
            let progress = taken.progress.clone();
            migrate::go_on(&agent.host, taken).await;
            agent.ended(&progress);
        });
    }
}
