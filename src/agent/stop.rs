//! The end of an agent that nobody takes over from.

use std::time::{Duration, Instant};

use super::running::Agent;
use crate::mux::Code;

/// How long migrations of this host may take to end.
const SOURCES_GRACE: Duration = Duration::from_secs(60);
/// How long migrations that come to this host may take to end.
const SERVED_GRACE: Duration = Duration::from_secs(20);
/// How long the rest may take; journals settle what does not end.
const REST_GRACE: Duration = Duration::from_secs(15);

impl Agent {
    /// Takes nothing new, rolls back what may be, finishes what must be, says goodbye.
    pub(super) async fn stop(&self) {
        self.stopping.cancel();
        let since = Instant::now();
        self.registry.cancel_all();
        self.sources.close();
        if tokio::time::timeout(SOURCES_GRACE, self.sources.wait()).await.is_err() {
            tracing::warn!("migrations did not end in time; their journals are settled at the next start");
        }
        // Sessions stay until then: a source must hear why, and a hand-over must get through.
        self.served.close();
        self.libvirt.close();
        if tokio::time::timeout(SERVED_GRACE, self.served.wait()).await.is_err() {
            tracing::warn!("what peers began did not end in time; journals are settled at the next start");
        }
        if tokio::time::timeout(REST_GRACE, self.libvirt.stop()).await.is_err() {
            tracing::warn!("something of libvirt's migrations is left; the next start takes it away");
        }
        self.traces.end();
        self.forwards.stop();
        for session in self.host.pool.all() {
            session.close(Code::Shutdown, "the agent stops");
        }
        self.tasks.close();
        if tokio::time::timeout(REST_GRACE, self.tasks.wait()).await.is_err() {
            tracing::warn!("not everything ended in time; journals are settled at the next start");
        }
        if tokio::time::timeout(REST_GRACE, self.host.has_told_witness()).await.is_err() {
            tracing::warn!("the witness was not told everything that nothing depends on");
        }
        tracing::info!(after_ms = since.elapsed().as_millis() as u64, "the agent ends");
    }
}
