//! Looks at the VMs of this host for whoever asks for the agent's status: one at a time, and not more
//! often than is of use, however many ask. Knows no QEMU.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::migrate::Host;
use crate::migrate::vm_state::{self, VmState};

/// For how long a look is good enough.
const FRESH: Duration = Duration::from_secs(1);

/// The last look.
#[derive(Debug, Default)]
pub(super) struct VmStates(Mutex<Option<(Instant, Vec<VmState>)>>);

impl VmStates {
    /// What there is to be seen, no older than a second.
    pub(super) async fn look(&self, host: &Arc<Host>) -> Vec<VmState> {
        let mut last = self.0.lock().await;
        if let Some((at, states)) = &*last
            && at.elapsed() < FRESH
        {
            return states.clone();
        }
        let states = vm_state::look(host).await;
        *last = Some((Instant::now(), states.clone()));
        states
    }
}
