//! Metrics of this host: its virtual machines, its peers, and what waits for somebody.

use prometheus::{Error, IntGaugeVec};

use super::register::Register;
use crate::migrate::vm_state::{Here, VmState};

/// What is measured of the host.
#[derive(Debug)]
pub struct HostMetrics {
    vms: IntGaugeVec,
    leftovers: IntGaugeVec,
    refused_journals: IntGaugeVec,
    reachable: IntGaugeVec,
}

impl HostMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            vms: register.gauge(
                "vms",
                "Configured virtual machines by what their QEMU on this host has of the guest.",
                &["state"],
            )?,
            leftovers: register.gauge(
                "migrations_with_leftovers",
                "Ended migrations that have left something to clean up on this host; absent if not known.",
                &[],
            )?,
            refused_journals: register.gauge(
                "journals_refused",
                "Journals that are not believed: whose their virtual machines are is not known.",
                &[],
            )?,
            reachable: register.gauge(
                "peer_reachable",
                "1 while a session with the peer has a connection, 0 when the last try to reach it came to \
                 nothing or its sessions have lost theirs; absent when nothing is known.",
                &["peer"],
            )?,
        })
    }

    /// As it is now.
    pub fn set(&self, vms: &[VmState], leftovers: Option<usize>, refused_journals: usize) {
        for state in Here::ALL {
            let count = vms.iter().filter(|vm| vm.here == state).count();
            self.vms.with_label_values(&[state.name()]).set(count as i64);
        }
        match leftovers {
            Some(count) => self.leftovers.with_label_values::<&str>(&[]).set(count as i64),
            None => self.leftovers.reset(),
        }
        self.refused_journals.with_label_values::<&str>(&[]).set(refused_journals as i64);
    }

    /// Whether a peer can be reached, as far as that is known.
    pub fn set_reachable(&self, peer: &str, reachable: Option<bool>) {
        match reachable {
            Some(is) => self.reachable.with_label_values(&[peer]).set(i64::from(is)),
            None => drop(self.reachable.remove_label_values(&[peer])),
        }
    }
}
