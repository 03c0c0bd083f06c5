//! Looks at the VMs of this host for whoever asks for the agent's status: one at a time, and not more
//! often than is of use, however many ask. Knows no QEMU.

use std::collections::BTreeMap;
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

    /// What there is to be seen now.
    pub(super) async fn look_anew(&self, host: &Arc<Host>) -> Vec<VmState> {
        let mut last = self.0.lock().await;
        let states = vm_state::look(host).await;
        *last = Some((Instant::now(), states.clone()));
        states
    }

    /// What the disks of these VMs have, one after the other: none of those whose QEMU does not say.
    pub(super) async fn disk_bytes(&self, host: &Host, vms: &[String]) -> BTreeMap<String, u64> {
        // A monitor serves one of us at a time.
        let _no_look_meanwhile = self.0.lock().await;
        let mut found = BTreeMap::new();
        for vm in vms {
            if let Some(bytes) = vm_state::disk_bytes(host, vm).await {
                found.insert(vm.clone(), bytes);
            }
        }
        found
    }
}
