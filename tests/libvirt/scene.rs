//! Two hosts with a domain that writes and an agent each, and moves that are slow enough to be disturbed in a
//! phase of the test's choice.

use anyhow::Result;
use serde_json::Value;

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER};
use crate::moves::spec;
use crate::support::process::LONG;
use crate::support::{Lab, VmSpec, VmferryRun, Way};

/// The options of most moves.
pub(crate) const COPY: [&str; 2] = ["--p2p", "--copy-storage-all"];
/// At this rate a disk takes seconds, and RAM more of them.
pub(crate) const SLOW_MBIT: u32 = 40;
/// More than a socket's buffers hold, so it was on the wire.
const UNDER_WAY_BYTES: u64 = 4_000_000;

/// What libvirt is copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Disks,
    Ram,
}

/// All that a test needs.
pub(crate) struct Scene {
    pub(crate) hosts: Hosts,
    pub(crate) domain: Domain,
    pub(crate) agents: Agents,
}

impl Scene {
    /// With a guest that writes so much that a slow move stays with its disks.
    pub(crate) fn set(lab: &Lab) -> Result<Self> {
        Self::set_of(lab, [Libvirt::V9; 2], &spec())
    }

    /// With one that writes so little that a slow move gets to its RAM.
    pub(crate) fn set_calm(lab: &Lab) -> Result<Self> {
        Self::set_of(lab, [Libvirt::V9; 2], &calm())
    }

    /// The same for a slow move that arrives: QEMU 7.2 without KVM sometimes loses what a guest writes to its RAM
    /// while that is on its way, and the more often the longer that takes. Newer ones do not.
    pub(crate) fn set_sound(lab: &Lab) -> Result<Self> {
        Self::set_of(lab, [Libvirt::V11; 2], &calm())
    }

    /// With these libvirts and any guest.
    pub(crate) fn set_of(lab: &Lab, libvirts: [Libvirt; 2], spec: &VmSpec) -> Result<Self> {
        let hosts = Hosts::start_of(lab, QEMU_USER, libvirts)?;
        let domain = Domain::boot(lab, &hosts, spec)?;
        let agents = Agents::start(lab, &hosts)?;
        Ok(Self { hosts, domain, agents })
    }

    /// Begins a move that takes a while, and returns when its disks are on their way.
    pub(crate) fn slow_move(&self) -> Result<VmferryRun> {
        self.slow_move_to(Way::ToBravo, &COPY, Phase::Disks)
    }

    /// The same either way, with these options, up to that phase.
    pub(crate) fn slow_move_to(&self, way: Way, options: &[&str], phase: Phase) -> Result<VmferryRun> {
        self.hosts.net.limit_mbit(SLOW_MBIT)?;
        let run = self.agents.begin_move(way, &self.domain.name, options)?;
        self.wait_phase(way, phase)?;
        Ok(run)
    }

    /// Waits until all disks are on their way (a QEMU gives an NBD client up that does not greet within 10 s),
    /// or the RAM is.
    pub(crate) fn wait_phase(&self, way: Way, phase: Phase) -> Result<()> {
        let is_there = |m: &Value| is_under_way(m) && phase_of(m) == Some(phase);
        self.agents.wait_migration_from(way, &format!("{phase:?} on their way"), is_there).map(drop)
    }

    /// The guest runs on here, nothing is left anywhere, and a further try moves it.
    pub(crate) fn proves_another_try(&self) -> Result<()> {
        self.hosts.net.no_limit()?;
        self.domain.proves_stay(Way::ToBravo)?;
        self.agents.are_clean()?;
        code(&self.agents.migrate(&COPY)?, 0)?;
        self.domain.proves_move(Way::ToBravo)?;
        self.agents.are_clean()
    }

    /// Lets a slow move go on, which must end well.
    pub(crate) fn arrives(&self, run: VmferryRun) -> Result<()> {
        self.hosts.net.no_limit()?;
        code(&run.wait(LONG)?, 0)?;
        self.domain.proves_move(Way::ToBravo)?;
        self.agents.are_clean()
    }
}

/// QEMU copies 64 KiB for each block of 4 that the guest has written.
pub(crate) fn calm() -> VmSpec {
    VmSpec { rate: 20, ..spec() }
}

pub(crate) fn is_under_way(migration: &Value) -> bool {
    migration["stage"] == "under_way"
}

/// What a migration copies now, once enough of it is on its way.
pub(crate) fn phase_of(migration: &Value) -> Option<Phase> {
    let of = |channel: &str, what: &str| migration["channels"][channel][what].as_u64().unwrap_or_default();
    if of("ram", "open") > 0 && of("ram", "sent_bytes") > UNDER_WAY_BYTES {
        return Some(Phase::Ram);
    }
    let disks = of("ram", "connections") == 0 && of("nbd", "open") == 2;
    (disks && of("nbd", "sent_bytes") > UNDER_WAY_BYTES).then_some(Phase::Disks)
}
