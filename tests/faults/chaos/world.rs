//! What chaos happens on: a stage whose guest moves there and back, with a watcher; and one fault at
//! its moment of one migration.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::plan::Injection;
use super::run::Run;
use crate::faults::gate::Gate;
use crate::faults::stage::VM;
use crate::faults::{Fault, Plan, Side, Stage, Who};
use crate::support::process::{SHORT, run};
use crate::support::{Lab, Watcher};

/// The disk that lies on a volume.
const SMALL_DISK: usize = 1;
const PLAN: Plan = Plan {
    disk_mib: 64,
    ballast_mib: 0,
    dirty_mib: 1,
    dirty_rest_ms: 200,
    // Goes round in half a minute. Each block makes QEMU copy 64 KiB per disk: a link of 100 Mbit/s must
    // still carry all of it.
    blocks: 2048,
    rate: 60,
    state_volume_mib: Some(16),
    disk_volume_mib: [Some(96); 2],
    extra: &["-device", "virtio-scsi-pci,id=hotplug"],
    both_ways: true,
    // So that "for ever" is over in some seconds.
    deadlines: "dead_peer_s = 2\nresume_s = 6\nresume_paused_s = 4\nqemu_start_s = 20\nstall_s = 15\n\
                hook_s = 15\nhandover_s = 8\n",
    ..Plan::ORDINARY
};

/// All that takes part.
pub struct World {
    pub stage: Stage,
    pub watcher: Watcher,
}

/// When it hit.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The moment.
    pub at: Instant,
    /// The phase that the source had said last.
    pub phase: String,
}

impl World {
    /// Boots the guest on alpha and starts both agents.
    ///
    /// # Errors
    /// The bed's.
    pub fn set_up(lab: &Lab) -> Result<Self> {
        let stage = Stage::set_up(lab, PLAN)?;
        let watcher = Watcher::start([&stage.source, &stage.destination])?;
        Ok(Self { stage, watcher })
    }

    /// Begins a migration of the guest to the other host.
    ///
    /// # Errors
    /// It does not begin.
    pub fn begin(&self) -> Result<Run> {
        Run::begin(self.stage.agent(self.stage.at), VM, self.stage.at)
    }

    /// Begins the migration that a fault will hit, and holds it if that is the plan.
    ///
    /// # Errors
    /// It does not begin.
    pub fn begin_held(&mut self, injection: &Injection) -> Result<Run> {
        if injection.fault == Fault::DestinationDiskFull {
            self.empty_small_disk(self.stage.at.other())?;
        }
        if injection.moment.held {
            self.gate(injection).close()?;
        }
        if let Some(mbit) = injection.link_mbit {
            self.stage.limit(mbit)?;
        }
        self.begin()
    }

    /// Waits for the fault's moment, breaks, repairs.
    ///
    /// # Errors
    /// The fault itself could not be made.
    pub fn inflict(&mut self, run: &Run, injection: &Injection) -> Result<Hit> {
        if injection.moment.held {
            self.gate(injection).wait_reached()?;
        } else {
            run.reach(injection.moment.phase)?;
        }
        sleep(Duration::from_millis(injection.moment.after_ms));
        let hit = Hit { at: Instant::now(), phase: run.phase() };
        if injection.moment.held {
            // It goes on while the thing is broken.
            let gate = self.gate(injection).clone();
            let after = Duration::from_millis(injection.lasts_ms / 2);
            std::thread::spawn(move || {
                sleep(after);
                gate.open();
            });
        }
        let broken = match injection.fault {
            Fault::Kill(Who::CommandLine) => run.cli.signal(Signal::SIGKILL),
            fault => {
                let lasts = injection.lasts();
                fault.inflict(&mut self.stage, &run.migration, lasts, injection.variant)
            }
        };
        broken.with_context(|| format!("the fault itself: {injection}"))?;
        self.stage.calm()?;
        Ok(hit)
    }

    /// What holds a migration at this injection's phase.
    fn gate(&self, injection: &Injection) -> &Gate {
        let prepare = injection.moment.phase == "prepare";
        let gates = if prepare { &self.stage.starts } else { &self.stage.hooks };
        &gates[self.stage.at.other().index()]
    }

    /// Makes all disks of a host anew: no QEMU may have them open.
    ///
    /// # Errors
    /// qemu-img's.
    pub fn empty_disks(&self, side: Side) -> Result<()> {
        self.stage.vm(side).create_disk(0, PLAN.disk_mib)?;
        self.empty_small_disk(side)
    }

    /// Makes the second disk anew, in place, so that its copy needs room: the guest is not there.
    fn empty_small_disk(&self, side: Side) -> Result<()> {
        let disk = self.stage.vm(side).disk(SMALL_DISK);
        let create = ["create", "-q", "-f", "qcow2"];
        let size = format!("{}M", PLAN.disk_mib);
        run(self.stage.paths.qemu_img().args(create).arg(&disk).arg(size), SHORT)
            .map(drop)
            .with_context(|| disk.display().to_string())
    }
}
