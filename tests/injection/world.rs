//! Two hosts that can both be source and destination: an agent on each, whose journals have a small
//! volume of their own, one guest that may run on either, whose second disk has one too, and the
//! watcher.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Side;
use super::plan::{Fault, Injection};
use super::run::Run;
use crate::faults::gate::Gate;
use crate::support::agent::PORT;
use crate::support::net::{Net, Way};
use crate::support::pair::Guest;
use crate::support::process::{SHORT, run};
use crate::support::{
    Agent, AgentSpec, Credentials, Lab, Paths, Version, Vm, VmEntry, VmSpec, Volume, Watcher,
};

/// The guest.
pub const VM: &str = "web1";
/// Where its blocks go round: in half a minute.
const BLOCKS: u64 = 2048;
/// Each makes QEMU copy 64 KiB per disk: a link of 100 Mbit/s must still carry all of it.
const RATE: u64 = 60;
const DIRTY_MIB: u32 = 1;
const DIRTY_REST_MS: u64 = 200;
const DISK_MIB: u32 = 64;
const STATE_VOLUME_MIB: u64 = 16;
const DISK_VOLUME_MIB: u64 = 96;
/// The disk that lies on a volume.
pub const SMALL_DISK: usize = 1;
/// So that "for ever" is over in some seconds.
const DEADLINES: &str = "\
[deadlines]
dead_peer_s = 2
resume_s = 6
resume_paused_s = 4
qemu_start_s = 20
stall_s = 15
hook_s = 15
handover_s = 8
";

/// All that takes part.
pub struct World {
    pub paths: Paths,
    pub net: Net,
    pub guest: Guest,
    /// Started and stopped by the faults. Alpha's, then bravo's.
    pub agents: [Agent; 2],
    /// Before a QEMU is started.
    pub starts: [Gate; 2],
    /// After the hand-over and before the guest runs.
    pub hooks: [Gate; 2],
    pub state: [Volume; 2],
    pub disk: [Volume; 2],
    pub watcher: Watcher,
    /// Where the guest is, as far as the judge knows.
    pub at: Side,
    idle: [usize; 2],
    limited: bool,
}

impl World {
    /// Boots the guest on alpha and starts both agents.
    ///
    /// # Errors
    /// The bed's.
    pub fn set_up(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        let spec = |side: Side| VmSpec {
            disk_mib: DISK_MIB,
            blocks: BLOCKS,
            rate: RATE,
            dirty_mib: DIRTY_MIB,
            dirty_rest_ms: DIRTY_REST_MS,
            extra: vec![
                "-fw_cfg".to_owned(),
                format!("name=opt/vmferry/host,string={}", side.name()),
                "-device".to_owned(),
                "virtio-scsi-pci,id=hotplug".to_owned(),
            ],
            ..VmSpec::new(VM, Version::V10)
        };
        let guest = Guest::define(lab, &net, &spec(Side::Alpha), &spec(Side::Bravo))?;
        let vms = [&guest.alpha, &guest.bravo];
        let disk = [own_volume(vms[0])?, own_volume(vms[1])?];
        let state = [&net.alpha, &net.bravo].map(|h| Volume::mount(&h.dir.join("state"), STATE_VOLUME_MIB));
        let [alpha_state, bravo_state] = state;
        let watcher = Watcher::start(vms)?;
        guest.alpha.boot()?;
        let copies = [&guest.alpha_copies, &guest.bravo_copies];
        let gate = |name: &str, next: PathBuf, vm: &Vm| Gate::before(&next, vm.dir(), name);
        let start = |i: usize| gate("start-gate", vms[i].start_script(), vms[i]);
        let hook = |i: usize| gate("hook-gate", copies[i].hook().to_owned(), vms[i]);
        let (starts, hooks) = ([start(0)?, start(1)?], [hook(0)?, hook(1)?]);
        let agents = agents(lab, &net, vms, [&starts, &hooks])?;
        let idle = [agents[0].open_descriptors()?, agents[1].open_descriptors()?];
        Ok(Self {
            paths: lab.paths.clone(),
            net,
            guest,
            agents,
            starts,
            hooks,
            state: [alpha_state?, bravo_state?],
            disk,
            watcher,
            at: Side::Alpha,
            idle,
            limited: false,
        })
    }

    /// The guest on one host.
    pub fn vm(&self, side: Side) -> &Vm {
        match side {
            Side::Alpha => &self.guest.alpha,
            Side::Bravo => &self.guest.bravo,
        }
    }

    /// The agent of one host.
    pub fn agent(&self, side: Side) -> &Agent {
        &self.agents[side.index()]
    }

    /// The same, to be killed or started.
    pub fn agent_mut(&mut self, side: Side) -> &mut Agent {
        &mut self.agents[side.index()]
    }

    /// How many descriptors an agent has when it does nothing.
    pub fn idle_descriptors(&self, side: Side) -> usize {
        self.idle[side.index()]
    }

    /// Begins the migration that a fault will hit, and holds it if that is the plan.
    ///
    /// # Errors
    /// It does not begin.
    pub fn begin(&mut self, injection: &Injection) -> Result<Run> {
        let destination = self.at.other();
        if injection.fault == Fault::DestinationDiskFull {
            self.empty_small_disk(destination)?;
        }
        if injection.moment.held {
            self.gate(injection, destination).close()?;
        }
        if let Some(mbit) = injection.link_mbit {
            self.limit(mbit)?;
        }
        Run::begin(self.agent(self.at), VM, self.at)
    }

    /// What holds a migration at this injection's phase.
    pub fn gate(&self, injection: &Injection, destination: Side) -> &Gate {
        let gates = if injection.moment.phase == "prepare" { &self.starts } else { &self.hooks };
        &gates[destination.index()]
    }

    /// Makes the link slow.
    ///
    /// # Errors
    /// The network's.
    pub fn limit(&mut self, mbit: u32) -> Result<()> {
        self.limited = true;
        self.net.limit_mbit(mbit)
    }

    /// Opens all gates, takes all limits away.
    ///
    /// # Errors
    /// The network's.
    pub fn calm(&mut self) -> Result<()> {
        self.starts.iter().chain(&self.hooks).for_each(Gate::open);
        if std::mem::take(&mut self.limited) {
            self.net.no_limit()?;
        }
        Ok(())
    }

    /// Makes all disks of a host anew: no QEMU may have them open.
    ///
    /// # Errors
    /// qemu-img's.
    pub fn empty_disks(&self, side: Side) -> Result<()> {
        self.vm(side).create_disk(0, DISK_MIB)?;
        self.empty_small_disk(side)
    }

    /// Makes the second disk anew, in place, so that its copy needs room: the guest is not there.
    fn empty_small_disk(&self, side: Side) -> Result<()> {
        let disk = self.vm(side).disk(SMALL_DISK);
        let create = ["create", "-q", "-f", "qcow2"];
        run(self.paths.qemu_img().args(create).arg(&disk).arg(format!("{DISK_MIB}M")), SHORT)
            .map(drop)
            .with_context(|| disk.display().to_string())
    }
}

/// The folder of a guest's volume.
pub fn volume_folder(vm: &Vm) -> PathBuf {
    vm.dir().join("small")
}

/// Puts the guest's second disk on a volume of its own, on which there is room for it.
fn own_volume(vm: &Vm) -> Result<Volume> {
    let volume = Volume::mount(&volume_folder(vm), DISK_VOLUME_MIB)?;
    let image = vm.disk(SMALL_DISK);
    let inside = volume_folder(vm).join(image.file_name().context("a disk without a name")?);
    fs::copy(&image, &inside)?;
    fs::remove_file(&image)?;
    std::os::unix::fs::symlink(&inside, &image)?;
    Ok(volume)
}

fn agents(lab: &Lab, net: &Net, vms: [&Vm; 2], gates: [&[Gate; 2]; 2]) -> Result<[Agent; 2]> {
    let credentials = Credentials::create(&lab.paths, lab.dir())?;
    let hosts = [&net.alpha, &net.bravo];
    let start = |i: usize| -> Result<Agent> {
        let mut entry = VmEntry::of(vms[i]).with_hook(gates[1][i].script());
        entry.start = Some(gates[0][i].script().to_owned());
        let mut spec = AgentSpec::default().peer(hosts[1 - i]).vm(entry);
        spec.end_lines = DEADLINES.to_owned();
        Agent::start(&lab.paths, hosts[i], &spec, &credentials.issue(&hosts[i].name)?)
    };
    Ok([start(0)?, start(1)?])
}
