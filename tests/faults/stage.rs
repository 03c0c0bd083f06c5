//! The stage: two hosts, an agent on each, and one guest that is defined on both and runs on alpha. A
//! gate stands before every command of either agent, so that a migration each way can be held.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::Side;
use super::gate::Gate;
use super::judge::Before;
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{LONG, run, signal_pid, wait_for};
use crate::support::proof::HandoverCopies;
use crate::support::vm::{quoted, write_script};
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Etcd, Guest, Lab, Net, Paths, Version, Vm, VmEntry, VmSpec,
    Volume,
};

/// The guest.
pub const VM: &str = "web1";
const MIB: u64 = 1 << 20;
/// What bravo's agent has for `qemu-img`.
const MAKES_IMAGES: &str = "makes-images";

/// What a stage is made of.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Both QEMUs, but for `to`.
    pub version: Version,
    /// The QEMU on bravo, if it is another one.
    pub to: Option<Version>,
    pub disk_mib: u32,
    /// MiB of random data at the end of each disk, so that its copy takes time and bandwidth.
    pub ballast_mib: u32,
    /// MiB of RAM that the guest dirties: 0 with QEMU 7.2, whose RAM phase then cannot be held.
    pub dirty_mib: u32,
    /// How long the guest rests after each round of that, in milliseconds.
    pub dirty_rest_ms: u64,
    /// Blocks of 4 KiB that the guest goes round in on each disk.
    pub blocks: u64,
    /// Blocks that the guest writes per second; 0 is as fast as it can.
    pub rate: u64,
    /// Each agent's state lies on a volume of its own, of so many MiB.
    pub state_volume_mib: Option<u64>,
    /// The second disk lies on a volume of its own, of so many MiB: on alpha, on bravo.
    pub disk_volume_mib: [Option<u64>; 2],
    /// How many of the images there, in their order, bravo's agent makes. They lie on the volume, if there is one.
    pub created: usize,
    /// Further lines of its `[create]`.
    pub create_lines: &'static str,
    /// Connections of each agent to the other, if not as many as by default.
    pub lanes: Option<usize>,
    /// More arguments for both QEMUs.
    pub extra: &'static [&'static str],
    /// QEMU opens its images anew when it may write no longer, as libvirt would have it.
    pub auto_read_only: bool,
    /// The guest moves both ways, and puts into each block on whose QEMU it is.
    pub both_ways: bool,
    /// The agents' deadlines.
    pub deadlines: &'static str,
    /// A hand-over without an answer is shown as undecided after so long.
    pub undecided_s: u64,
    /// There is an etcd, which both agents have as their witness and wait so many seconds for.
    pub witness: Option<u64>,
}

impl Plan {
    /// QEMU 10 with a guest that dirties RAM. Its disks are large enough to be hit while they are
    /// copied, and a mirror of the first 32 MiB can fall well behind.
    pub const ORDINARY: Self = Self {
        version: Version::V10,
        to: None,
        disk_mib: 192,
        ballast_mib: 32,
        dirty_mib: 16,
        // Faster than any link of these tests carries, and yet the guest leaves its core to others.
        dirty_rest_ms: 20,
        blocks: 8192,
        // Each block makes QEMU copy 64 KiB of each disk: more than a slow link carries.
        rate: 100,
        state_volume_mib: None,
        disk_volume_mib: [None; 2],
        created: 0,
        create_lines: "",
        lanes: None,
        extra: &[],
        auto_read_only: false,
        both_ways: false,
        // An agent that does not come back is given up soon.
        deadlines: "resume_s = 8\nresume_paused_s = 4\n",
        undecided_s: 30,
        witness: None,
    };

    fn spec(&self, side: Side) -> VmSpec {
        let mut extra: Vec<String> = self.extra.iter().map(|word| (*word).to_owned()).collect();
        if self.both_ways {
            extra.push("-fw_cfg".to_owned());
            extra.push(format!("name=opt/vmferry/host,string={}", side.name()));
        }
        VmSpec {
            disk_mib: self.disk_mib,
            blocks: self.blocks,
            dirty_mib: self.dirty_mib,
            dirty_rest_ms: self.dirty_rest_ms,
            rate: self.rate,
            auto_read_only: self.auto_read_only,
            extra,
            ..VmSpec::new(VM, self.to.filter(|_| side == Side::Bravo).unwrap_or(self.version))
        }
    }
}

/// Everything that takes part. What there is twice is alpha's, then bravo's.
pub struct Stage {
    pub paths: Paths,
    pub net: Net,
    /// The guest on alpha, where it boots.
    pub source: Vm,
    /// The guest on bravo.
    pub destination: Vm,
    pub alpha: Agent,
    pub bravo: Agent,
    /// Before a QEMU is started.
    pub starts: [Gate; 2],
    /// After a hand-over and before the guest runs.
    pub hooks: [Gate; 2],
    /// Before an image is made on bravo, by its disk.
    pub images: [Gate; 2],
    /// The disks that a host got at the last hand-over to it.
    pub copies: [HandoverCopies; 2],
    pub witness: Option<Etcd>,
    state: Option<[Volume; 2]>,
    /// Those of the second disk.
    pub disks: [Option<Volume>; 2],
    /// Where the guest is, as far as the judge knows.
    pub at: Side,
    /// The sockets of the disks' streams, at the source and at the destination, by inode.
    pub disk_streams: [Vec<u64>; 2],
    /// What must be as it was after each failure.
    pub(super) before: Before,
    limited: bool,
    /// The source's QEMU that stands still.
    stopped: Option<u32>,
    /// How many images bravo's agent makes there.
    pub(super) created: usize,
}

impl Stage {
    /// Boots the guest and starts both agents.
    ///
    /// # Errors
    /// The bed's.
    pub fn set_up(lab: &Lab, plan: Plan) -> Result<Self> {
        let net = lab.two_hosts()?;
        let ways: &[Way] = if plan.both_ways { &[Way::ToBravo, Way::ToAlpha] } else { &[Way::ToBravo] };
        net.only_port(PORT, ways)?;
        let guest = Guest::define(lab, &net, &plan.spec(Side::Alpha), &plan.spec(Side::Bravo))?;
        let vms = [&guest.alpha, &guest.bravo];
        if plan.ballast_mib > 0 {
            (0..vms[0].spec.disks.len()).try_for_each(|disk| ballast(&lab.paths, vms[0], disk, plan))?;
        }
        let made = [0, plan.created];
        let disk = |side: usize| {
            plan.disk_volume_mib[side].map(|mib| own_volume(vms[side], mib, made[side])).transpose()
        };
        let disks = [disk(0)?, disk(1)?];
        let state = |host: &crate::support::Host, mib| Volume::mount(&host.dir.join("state"), mib);
        let state = match plan.state_volume_mib {
            Some(mib) => Some([state(&net.alpha, mib)?, state(&net.bravo, mib)?]),
            None => None,
        };
        let copies = [guest.alpha_copies.clone(), guest.bravo_copies.clone()];
        let start = |side: usize| Gate::before(&vms[side].start_script(), vms[side].dir(), "start-gate");
        let hook = |side: usize| Gate::before(copies[side].hook(), vms[side].dir(), "hook-gate");
        let (starts, hooks) = ([start(0)?, start(1)?], [hook(0)?, hook(1)?]);
        let images = images_made(&lab.paths, vms[1], plan.created)?;
        guest.alpha.boot()?;
        let witness = plan.witness.map(|answer_s| Etcd::start(lab, &net, answer_s)).transpose()?;
        let tables = [&net.alpha, &net.bravo].map(|host| witness.as_ref().map(|etcd| etcd.table(host)));
        let [alpha, bravo] = agents(lab, &net, (&plan, tables), vms, [&starts, &hooks])?;
        let before = Before::of(&guest.alpha, &alpha, &bravo)?;
        Ok(Self {
            paths: lab.paths.clone(),
            net,
            source: guest.alpha,
            destination: guest.bravo,
            alpha,
            bravo,
            starts,
            hooks,
            images,
            copies,
            witness,
            state,
            disks,
            at: Side::Alpha,
            disk_streams: [Vec::new(), Vec::new()],
            before,
            limited: false,
            stopped: None,
            created: plan.created,
        })
    }

    /// The gate before the destination's QEMU is started.
    pub fn start(&self) -> &Gate {
        &self.starts[Side::Bravo.index()]
    }

    /// The gate after the hand-over and before the guest starts at the destination.
    pub fn hook(&self) -> &Gate {
        &self.hooks[Side::Bravo.index()]
    }

    /// The disks that the destination got at the hand-over.
    pub fn copies(&self) -> &HandoverCopies {
        &self.copies[Side::Bravo.index()]
    }

    /// The guest on one host.
    pub fn vm(&self, side: Side) -> &Vm {
        match side {
            Side::Alpha => &self.source,
            Side::Bravo => &self.destination,
        }
    }

    /// The agent of one host.
    pub fn agent(&self, side: Side) -> &Agent {
        match side {
            Side::Alpha => &self.alpha,
            Side::Bravo => &self.bravo,
        }
    }

    /// The same, to be killed or started.
    pub fn agent_mut(&mut self, side: Side) -> &mut Agent {
        match side {
            Side::Alpha => &mut self.alpha,
            Side::Bravo => &mut self.bravo,
        }
    }

    /// Where an agent's state lies, if that is on a volume of its own.
    pub fn state_volume(&self, side: Side) -> Option<&Volume> {
        self.state.as_ref().map(|both| &both[side.index()])
    }

    /// That the images which bravo's agent has made are gone, at the latest when `recover` has asked alpha.
    ///
    /// # Errors
    /// One is there.
    pub fn has_no_made_image(&self) -> Result<()> {
        let vm = &self.destination;
        let there = || (0..self.created).map(|disk| vm.disk(disk)).filter(|path| path.exists());
        if self.created == 0 {
            return Ok(());
        }
        let mut said = None;
        let gone = wait_for("the images that were made to be gone", LONG, || {
            let gone = there().next().is_none();
            if !gone {
                said = Some(self.bravo.vmferry(&["recover"])?);
            }
            Ok(gone.then_some(()))
        });
        gone.with_context(|| format!("{:?}: {said:?}", there().collect::<Vec<_>>()))?;
        let unfinished = fs::read_dir(vm.dir())?.flatten();
        let mut unfinished = unfinished.filter(|e| e.file_name().to_string_lossy().starts_with(".vmferry"));
        ensure!(unfinished.next().is_none(), "an image was left unfinished");
        Ok(())
    }

    /// Makes the link slow.
    ///
    /// # Errors
    /// The network's.
    pub fn limit(&mut self, mbit: u32) -> Result<()> {
        self.limited = true;
        self.net.limit_mbit(mbit)
    }

    /// Takes all limits of the network away.
    ///
    /// # Errors
    /// The network's.
    pub fn calm_network(&mut self) -> Result<()> {
        if std::mem::take(&mut self.limited) {
            self.net.no_limit()?;
        }
        Ok(())
    }

    /// Opens all gates and takes all limits away.
    ///
    /// # Errors
    /// The network's.
    pub fn calm(&mut self) -> Result<()> {
        self.starts.iter().chain(&self.hooks).chain(&self.images).for_each(Gate::open);
        if let Some(pid) = self.stopped.take() {
            signal_pid(pid, Signal::SIGCONT)?;
        }
        self.calm_network()
    }

    /// Those before all commands of a host's agent.
    pub fn gates(&self, side: Side) -> impl Iterator<Item = &Gate> {
        let images = if side == Side::Bravo { &self.images[..] } else { &[] };
        [&self.starts[side.index()], &self.hooks[side.index()]].into_iter().chain(images)
    }

    /// Has the source's QEMU stand still until all is calmed.
    ///
    /// # Errors
    /// There is none.
    pub fn stop_source(&mut self) -> Result<()> {
        let pid = self.source.pid().context("no QEMU at the source")?;
        self.stopped = Some(pid);
        signal_pid(pid, Signal::SIGSTOP)
    }
}

fn agents(
    lab: &Lab,
    net: &Net,
    (plan, tables): (&Plan, [Option<String>; 2]),
    vms: [&Vm; 2],
    gates: [&[Gate; 2]; 2],
) -> Result<[Agent; 2]> {
    let credentials = Credentials::create(&lab.paths, lab.dir())?;
    let hosts = [&net.alpha, &net.bravo];
    let [starts, hooks] = gates;
    let start = |side: usize| -> Result<Agent> {
        let mut entry = VmEntry::of(vms[side]).with_hook(hooks[side].script());
        entry.start = Some(starts[side].script().to_owned());
        let created = if side == 1 { create_lines(vms[side], plan) } else { String::new() };
        let end_lines =
            format!("{created}[deadlines]\n{}undecided_s = {}\n", plan.deadlines, plan.undecided_s);
        let end_lines = end_lines + tables[side].as_deref().unwrap_or_default();
        let spec = AgentSpec { lanes: plan.lanes, end_lines, ..AgentSpec::default() };
        let spec = spec.peer(hosts[1 - side]).vm(entry);
        Agent::start(&lab.paths, hosts[side], &spec, &credentials.issue(&hosts[side].name)?)
    };
    Ok([start(0)?, start(1)?])
}

/// What makes images stands behind one gate for each disk; those that are to be made are not there.
fn images_made(paths: &Paths, vm: &Vm, created: usize) -> Result<[Gate; 2]> {
    let qemu_img = PathBuf::from(paths.qemu_img().get_program());
    let gate =
        |format: DiskFormat| Gate::before(&qemu_img, vm.dir(), &format!("image-gate-{}", format.name()));
    let gates = [gate(DiskFormat::Raw)?, gate(DiskFormat::Qcow2)?];
    let [raw, qcow2] = gates.each_ref().map(|gate| quoted(&gate.script().display().to_string()));
    let text = format!(
        "#!/bin/sh\ncase \" $* \" in *\" -f raw \"*) exec {raw} \"$@\";; esac\nexec {qcow2} \"$@\"\n"
    );
    write_script(&vm.dir().join(MAKES_IMAGES), &text)?;
    for disk in (0..created).map(|disk| vm.disk(disk)).filter(|disk| disk.exists()) {
        fs::remove_file(disk)?;
    }
    Ok(gates)
}

fn create_lines(vm: &Vm, plan: &Plan) -> String {
    if plan.created == 0 {
        return String::new();
    }
    let folder = if plan.disk_volume_mib[1].is_some() { volume_folder(vm) } else { vm.dir().to_owned() };
    let (path, program) = (folder.join("{disk}.{format}"), vm.dir().join(MAKES_IMAGES));
    format!(
        "[vm.{VM}.create]\npath = \"{}\"\nformat = \"source\"\nqemu_img = \"{}\"\n{}",
        path.display(),
        program.display(),
        plan.create_lines
    )
}

/// Fills the end of a disk with random bytes. The guest must not run yet.
fn ballast(paths: &Paths, vm: &Vm, disk: usize, plan: Plan) -> Result<()> {
    let raw = vm.disk(disk).with_extension("ballast");
    let bytes = u64::from(plan.ballast_mib) * MIB;
    let mut file = fs::File::create(&raw)?;
    file.set_len(u64::from(plan.disk_mib) * MIB - bytes)?;
    file.seek(SeekFrom::End(0))?;
    let mut random = std::io::Read::take(fs::File::open("/dev/urandom")?, bytes);
    std::io::copy(&mut random, &mut file)?;
    file.flush()?;
    let format = vm.spec.disks[disk].name();
    let convert = ["convert", "-f", "raw", "-O", format];
    run(paths.qemu_img().args(convert).arg(&raw).arg(vm.disk(disk)), LONG)?;
    Ok(fs::remove_file(raw)?)
}

/// Where the volume of a guest's second disk is mounted.
pub fn volume_folder(vm: &Vm) -> std::path::PathBuf {
    vm.dir().join("small")
}

/// Puts the qcow2 disk on a volume of its own, where it may not have room enough, and the images that are made.
fn own_volume(vm: &Vm, mib: u64, made: usize) -> Result<Volume> {
    let volume = Volume::mount(&volume_folder(vm), mib)?;
    let moves = |disk: &usize| *disk < made || vm.spec.disks[*disk] == DiskFormat::Qcow2;
    for disk in (0..vm.spec.disks.len()).filter(moves) {
        let image = vm.disk(disk);
        let inside = volume_folder(vm).join(image.file_name().context("a disk without a name")?);
        if disk >= made {
            fs::copy(&image, &inside)?;
        }
        fs::remove_file(&image)?;
        std::os::unix::fs::symlink(&inside, &image)?;
    }
    Ok(volume)
}
