//! The stage: two hosts, an agent on each, one guest whose disks are large enough to be hit while
//! they are copied. Brings a migration to a phase, and tells whether everything is as it was.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Reach;
use super::cut;
use super::gate::Gate;
use super::migration::Migration;
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::proof::{self, HandoverCopies};
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Host, Lab, Net, Paths, Qmp, Version, Vm, VmEntry, VmSpec,
    Volume,
};

const VM: &str = "web1";
const DISK_MIB: u32 = 192;
/// The guest goes round in the first 32 MiB of each disk, so that a mirror can fall well behind.
const BLOCKS: u64 = 8192;
/// Random data on the rest of each disk, so that its copy takes time and bandwidth.
const BALLAST_MIB: u64 = 64;
const MIB: u64 = 1 << 20;
/// The disks take 16 s or more at this rate.
const MIRROR_MBIT: u32 = 64;
/// What is left to copy when the guest is paused takes some seconds at this rate.
const PAUSE_MBIT: u32 = 24;
const PAUSE_LAG_BYTES: u64 = 8 * MIB;
/// An agent that does not come back is given up soon.
const DEADLINES: &str = "[deadlines]\nresume_s = 8\nresume_paused_s = 4\n";
/// QEMU never believes that the rest of the RAM fits into this pause while the guest dirties some.
const NEVER_MS: &str = "1";
/// QEMU pauses the guest as soon as it may.
const AT_ONCE_MS: u64 = 600_000;

/// What a stage is made of.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Both QEMUs.
    pub version: Version,
    /// MiB of RAM that the guest dirties: 0 with QEMU 7.2, whose RAM phase then cannot be held.
    pub dirty_mib: u32,
    /// How long the guest rests after each round of that, in milliseconds.
    pub dirty_rest_ms: u64,
    /// Blocks of 4 KiB that the guest goes round in on each disk.
    pub blocks: u64,
    /// Blocks that the guest writes per second; 0 is as fast as it can.
    pub rate: u64,
    /// Each agent's state lies on a volume of its own, of so many MiB.
    pub small_state_mib: Option<u64>,
    /// Connections of each agent to the other, if not as many as by default.
    pub lanes: Option<usize>,
    /// The destination's second disk lies on a volume that is too small for it.
    pub small_disk_mib: Option<u64>,
    /// The source's second disk lies on a volume of its own, of so many MiB.
    pub source_disk_mib: Option<u64>,
    /// More arguments for both QEMUs.
    pub extra: &'static [&'static str],
    /// QEMU opens its images anew when it may write no longer, as libvirt would have it.
    pub auto_read_only: bool,
    /// A hand-over without an answer is shown as undecided after so long.
    pub undecided_s: u64,
}

impl Plan {
    /// QEMU 10 with a guest that dirties RAM.
    pub const ORDINARY: Self = Self {
        version: Version::V10,
        dirty_mib: 16,
        dirty_rest_ms: 0,
        blocks: BLOCKS,
        rate: 0,
        small_state_mib: None,
        lanes: None,
        small_disk_mib: None,
        source_disk_mib: None,
        extra: &[],
        auto_read_only: false,
        undecided_s: 30,
    };
}

/// Everything that takes part.
pub struct Stage {
    pub paths: Paths,
    pub net: Net,
    pub source: Vm,
    pub destination: Vm,
    pub copies: HandoverCopies,
    pub alpha: Agent,
    pub bravo: Agent,
    /// Before the destination's QEMU is started.
    pub start: Gate,
    /// After the hand-over and before the guest starts.
    pub hook: Gate,
    pub state: Option<[Volume; 2]>,
    pub disk: Option<Volume>,
    /// That of the source's second disk.
    pub source_disk: Option<Volume>,
    /// The sockets of the disks' streams, at the source and at the destination, by inode.
    pub disk_streams: [Vec<u64>; 2],
    limited: bool,
    before: Before,
}

/// What must be as it was after each failure.
struct Before {
    descriptors: [usize; 2],
    qemu_descriptors: usize,
    capabilities: Value,
    downtime_limit: Value,
}

impl Stage {
    /// Boots the guest and starts both agents.
    ///
    /// # Errors
    /// The bed's.
    pub fn set_up(lab: &Lab, plan: Plan) -> Result<Self> {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo])?;
        let spec = VmSpec {
            disk_mib: DISK_MIB,
            blocks: plan.blocks,
            dirty_mib: plan.dirty_mib,
            dirty_rest_ms: plan.dirty_rest_ms,
            rate: plan.rate,
            extra: plan.extra.iter().map(|word| (*word).to_owned()).collect(),
            auto_read_only: plan.auto_read_only,
            ..VmSpec::new(VM, plan.version)
        };
        let source = Vm::define(&lab.paths, &net.alpha, &spec)?;
        let destination = Vm::define(&lab.paths, &net.bravo, &spec)?;
        (0..spec.disks.len()).try_for_each(|disk| ballast(&lab.paths, &source, disk))?;
        let disk = plan.small_disk_mib.map(|mib| small_disk(&destination, mib)).transpose()?;
        let source_disk = plan.source_disk_mib.map(|mib| small_disk(&source, mib)).transpose()?;
        let small = |host: &Host, mib| Volume::mount(&host.dir.join("state"), mib);
        let state = match plan.small_state_mib {
            Some(mib) => Some([small(&net.alpha, mib)?, small(&net.bravo, mib)?]),
            None => None,
        };
        let copies = HandoverCopies::define(&destination)?;
        let start = Gate::before(&destination.start_script(), destination.dir(), "start-gate")?;
        let hook = Gate::before(copies.hook(), destination.dir(), "hook-gate")?;
        source.boot()?;
        let (alpha, bravo) = agents(lab, &net, &plan, [&source, &destination], [&start, &hook])?;
        let before = Before::of(&source, &alpha, &bravo)?;
        let paths = lab.paths.clone();
        Ok(Self {
            paths,
            net,
            source,
            destination,
            copies,
            alpha,
            bravo,
            start,
            hook,
            state,
            disk,
            source_disk,
            disk_streams: [Vec::new(), Vec::new()],
            limited: false,
            before,
        })
    }

    /// Begins a migration and brings it to where a fault is to hit.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach(&mut self, reach: Reach) -> Result<Migration> {
        self.reach_with(reach, &[])
    }

    /// The same, with further options of `vmferry migrate`.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach_with(&mut self, reach: Reach, more: &[&str]) -> Result<Migration> {
        match reach {
            Reach::Prepare => self.start.close()?,
            Reach::Mirror => self.limit(MIRROR_MBIT)?,
            Reach::HandOver => self.hook.close()?,
            Reach::Precopy | Reach::Switchover | Reach::Device => {}
        }
        let options: &[&str] = match reach {
            Reach::Precopy | Reach::Switchover | Reach::Device => &["--downtime-limit", NEVER_MS],
            _ => &[],
        };
        // That its disk is too small is found beforehand.
        let accept: &[&str] = if self.disk.is_some() { &["--accept", "no-room"] } else { &[] };
        let migration = Migration::begin(&self.alpha, VM, "bravo", &[options, accept, more].concat())?;
        self.advance(reach, &migration).with_context(|| format!("reaching {reach:?}"))?;
        Ok(migration)
    }

    fn advance(&mut self, reach: Reach, migration: &Migration) -> Result<()> {
        match reach {
            Reach::Prepare => self.start.wait_reached(),
            Reach::HandOver => self.hook.wait_reached(),
            Reach::Mirror => self.mirror(migration),
            Reach::Precopy => self.precopy(migration),
            Reach::Switchover => self.pause(migration, "switchover"),
            Reach::Device => self.pause(migration, "device"),
        }
    }

    /// Brings a migration that was begun with [`Stage::begin`] from one phase to the next.
    ///
    /// # Errors
    /// It does not get there.
    pub fn bring_to(&mut self, reach: Reach, migration: &Migration) -> Result<()> {
        let alpha = self.alpha.socket();
        match reach {
            Reach::Mirror => {
                let flows = |p: &Value| disks(p).all(|d| number(d, "done_bytes") > MIB);
                migration.reach(&alpha, "mirror", flows).map(drop)
            }
            Reach::Precopy => {
                self.calm()?;
                migration.reach(&alpha, "precopy", ram_flows).map(drop)
            }
            Reach::Switchover => {
                self.limit(PAUSE_MBIT)?;
                migration.reach(&alpha, "precopy", |p| lag(p) > PAUSE_LAG_BYTES)?;
                self.pause_at_once();
                migration.reach(&alpha, "switchover", |_| true).map(drop)
            }
            Reach::Device => migration.reach(&alpha, "device", |_| true).map(drop),
            Reach::HandOver => self.hook.wait_reached(),
            Reach::Prepare => self.start.wait_reached(),
        }
        .with_context(|| format!("reaching {reach:?}"))
    }

    /// Begins a migration that is slow and does not pause the guest by itself.
    ///
    /// # Errors
    /// The command line's.
    pub fn begin(&mut self) -> Result<Migration> {
        self.limit(MIRROR_MBIT)?;
        Migration::begin(&self.alpha, VM, "bravo", &["--downtime-limit", NEVER_MS, "--keep-source"])
    }

    fn mirror(&mut self, migration: &Migration) -> Result<()> {
        let flow = |p: &Value| disks(p).all(|d| number(d, "done_bytes") > MIB);
        migration.reach(&self.alpha.socket(), "mirror", flow)?;
        let inodes = |agent, vm| -> Result<Vec<u64>> {
            Ok(cut::streams(agent, vm)?.into_iter().map(|(inode, _)| inode).collect())
        };
        self.disk_streams = [inodes(&self.alpha, &self.source)?, inodes(&self.bravo, &self.destination)?];
        let count = self.source.spec.disks.len();
        ensure!(self.disk_streams.iter().all(|s| s.len() == count), "{:?}", self.disk_streams);
        Ok(())
    }

    fn precopy(&mut self, migration: &Migration) -> Result<()> {
        self.mirror(migration)?;
        migration.reach(&self.alpha.socket(), "precopy", ram_flows).map(drop)
    }

    fn pause(&mut self, migration: &Migration, phase: &str) -> Result<()> {
        self.precopy(migration)?;
        self.limit(PAUSE_MBIT)?;
        let alpha = self.alpha.socket();
        migration.reach(&alpha, "precopy", |p| lag(p) > PAUSE_LAG_BYTES)?;
        self.pause_at_once();
        migration.reach(&alpha, phase, |_| true).map(drop)
    }

    /// Has the source's QEMU pause its guest for the rest of the RAM, however much that is.
    /// Does not wait for QEMU's answer: its main loop may be busy with the pause before it answers.
    pub fn pause_at_once(&self) {
        let source = self.source.clone();
        std::thread::spawn(move || {
            let now = json!({"downtime-limit": AT_ONCE_MS});
            source.qmp().and_then(|mut qmp| qmp.execute("migrate-set-parameters", now))
        });
    }

    fn limit(&mut self, mbit: u32) -> Result<()> {
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
        self.start.open();
        self.hook.open();
        self.calm_network()
    }

    /// That the guest runs on the source alone, without a lost write, and that neither QEMU nor
    /// agent has anything of a migration left. Waits for what the destination does by itself.
    ///
    /// # Errors
    /// It is not so.
    pub fn is_as_before(&self) -> Result<()> {
        let mut qmp = self.source.qmp()?;
        ensure!(qmp.status()? == "running", "the guest is {} on the source", qmp.status()?);
        self.source.wait_more(20)?;
        self.destination.wait_ended().context("the destination's QEMU")?;
        ensure!(self.destination.console()?.counts.is_empty(), "the guest has run on the destination");
        proof::qemu_is_clean(&mut qmp)?;
        self.before.holds(&self.source, &mut qmp)?;
        self.is_clean()
    }

    /// That the agents have nothing of a migration left.
    ///
    /// # Errors
    /// They have: an open journal, a descriptor, a file or a stream.
    pub fn is_clean(&self) -> Result<()> {
        self.all_ended(&self.alpha)?;
        self.all_ended(&self.bravo)?;
        proof::agent_is_clean(&self.alpha, self.before.descriptors[0])?;
        proof::agent_is_clean(&self.bravo, self.before.descriptors[1])
    }

    /// That a migration which was interrupted after its hand-over has moved the guest all the same,
    /// and both sides say so.
    ///
    /// # Errors
    /// It is not so.
    pub fn has_moved(&self, migration: &Migration) -> Result<()> {
        self.source.wait_ended().context("the source's QEMU")?;
        for agent in [&self.alpha, &self.bravo] {
            let report = migration.ended(agent)?;
            ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
        }
        proof::guest_continued(&self.source, &self.destination)?;
        proof::qemu_is_clean(&mut self.destination.qmp()?)?;
        self.is_clean()?;
        self.destination.qmp()?.query("stop")?;
        proof::disks_whole(&self.destination)
    }

    /// That no journal of an agent is open, by its files and by what it lists.
    fn all_ended(&self, agent: &Agent) -> Result<()> {
        let folder = agent.host().dir.join("state/migrations");
        wait_for(&format!("the journals on {} to end", agent.host().name), SHORT, || {
            let listed = agent.api("/v1/migrations")?;
            let open = listed.as_array().is_none_or(|all| all.iter().any(|p| p["outcome"].is_null()));
            Ok((!open && open_journals(&folder)?.is_empty()).then_some(()))
        })
        .with_context(|| format!("{:?}; {:?}", open_journals(&folder), agent.api("/v1/migrations")))
    }

    /// Moves the guest at last, and proves it as the demo does.
    ///
    /// # Errors
    /// It does not move, or a proof fails.
    pub fn moves(&mut self) -> Result<()> {
        self.calm()?;
        let outcome = self.alpha.vmferry(&["migrate", VM, "--to", "bravo", "--keep-source"])?;
        ensure!(outcome.code == 0, "the retry gave {outcome:?}");
        self.is_moved()
    }

    /// That the guest has moved with `--keep-source`, whole, and nothing is left.
    ///
    /// # Errors
    /// A proof fails.
    pub fn is_moved(&self) -> Result<()> {
        let loses_ram = self.destination.spec.version == Version::V72;
        // QEMU 7.2 under TCG may lose RAM on the way: there the disks alone are judged.
        if !loses_ram {
            proof::guest_continued(&self.source, &self.destination)?;
        }
        let states = (self.source.qmp()?.status()?, self.destination.qmp()?.status()?);
        ensure!(states == ("postmigrate".to_owned(), "running".to_owned()), "{states:?}");
        self.copies.same_as_source(&self.paths, &self.source, &self.destination)?;
        if !loses_ram {
            self.destination.qmp()?.query("stop")?;
            proof::disks_whole(&self.destination)?;
        }
        proof::qemu_is_clean(&mut self.source.qmp()?)?;
        proof::qemu_is_clean(&mut self.destination.qmp()?)?;
        self.is_clean()
    }
}

impl Before {
    fn of(source: &Vm, alpha: &Agent, bravo: &Agent) -> Result<Self> {
        let descriptors = [idle_descriptors(alpha)?, idle_descriptors(bravo)?];
        let mut qmp = source.qmp()?;
        let (capabilities, downtime_limit) = settings(&mut qmp)?;
        Ok(Self { descriptors, qemu_descriptors: qemu_descriptors(source)?, capabilities, downtime_limit })
    }

    fn holds(&self, source: &Vm, qmp: &mut Qmp) -> Result<()> {
        let (capabilities, downtime_limit) = settings(qmp)?;
        ensure!(self.capabilities == capabilities, "QEMU's capabilities are now {capabilities}");
        ensure!(self.downtime_limit == downtime_limit, "its downtime-limit is now {downtime_limit}");
        let settled = wait_for("QEMU's descriptors to be as they were", SHORT, || {
            Ok((qemu_descriptors(source)? <= self.qemu_descriptors).then_some(()))
        });
        settled.with_context(|| format!("{} then, {:?} now", self.qemu_descriptors, qemu_descriptors(source)))
    }
}

/// The local API's connection by which the agent was asked last may still be closing.
fn idle_descriptors(agent: &Agent) -> Result<usize> {
    let (mut least, mut same) = (usize::MAX, 0);
    wait_for("a steady count of descriptors", SHORT, || {
        let now = agent.open_descriptors()?;
        same = if now == least { same + 1 } else { 0 };
        least = now;
        Ok((same == 10).then_some(now))
    })
}

/// The migration settings that vmferry changes.
fn settings(qmp: &mut Qmp) -> Result<(Value, Value)> {
    let parameters = qmp.query("query-migrate-parameters")?;
    Ok((qmp.query("query-migrate-capabilities")?, parameters["downtime-limit"].clone()))
}

/// The sockets that QEMU has open while the test's monitor is connected and the agent's is not: what
/// was passed to it and is not used up cannot be asked for in any other way.
fn qemu_descriptors(source: &Vm) -> Result<usize> {
    let pid = source.pid().context("no QEMU")?;
    let count = fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter(|entry| {
            fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
        })
        .count();
    Ok(count)
}

fn open_journals(folder: &std::path::Path) -> Result<Vec<PathBuf>> {
    let mut open = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        // Its end need not be its last line: what the source confirms, or is cleaned late, follows.
        let records = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        if records.iter().all(|line| line["record"]["ended"].is_null()) {
            open.push(path);
        }
    }
    Ok(open)
}

fn agents(lab: &Lab, net: &Net, plan: &Plan, vms: [&Vm; 2], gates: [&Gate; 2]) -> Result<(Agent, Agent)> {
    let credentials = Credentials::create(&lab.paths, lab.dir())?;
    let end_lines = format!("{DEADLINES}undecided_s = {}\n", plan.undecided_s);
    let spec = || AgentSpec { lanes: plan.lanes, end_lines: end_lines.clone(), ..AgentSpec::default() };
    let on_alpha = spec().peer(&net.bravo).vm(VmEntry::of(vms[0]));
    let mut entry = VmEntry::of(vms[1]).with_hook(gates[1].script());
    entry.start = Some(gates[0].script().to_owned());
    let on_bravo = spec().peer(&net.alpha).vm(entry);
    let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
    let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
    Ok((alpha, bravo))
}

/// Fills the end of a disk with random bytes. The guest must not run yet.
fn ballast(paths: &Paths, vm: &Vm, disk: usize) -> Result<()> {
    let raw = vm.disk(disk).with_extension("ballast");
    let mut file = fs::File::create(&raw)?;
    file.set_len((u64::from(DISK_MIB) - BALLAST_MIB) * MIB)?;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
    let mut random = std::io::Read::take(fs::File::open("/dev/urandom")?, BALLAST_MIB * MIB);
    std::io::copy(&mut random, &mut file)?;
    file.flush()?;
    let format = vm.spec.disks[disk].name();
    let convert = ["convert", "-f", "raw", "-O", format];
    run(paths.qemu_img().args(convert).arg(&raw).arg(vm.disk(disk)), LONG)?;
    Ok(fs::remove_file(raw)?)
}

/// Puts a qcow2 disk on a volume of its own, where it may not have room enough.
fn small_disk(vm: &Vm, mib: u64) -> Result<Volume> {
    let Some(disk) = vm.spec.disks.iter().position(|d| *d == DiskFormat::Qcow2) else {
        bail!("no disk that grows");
    };
    let volume = Volume::mount(&vm.dir().join("small"), mib)?;
    let image = vm.disk(disk);
    let inside = vm.dir().join("small").join(image.file_name().context("a disk without a name")?);
    fs::copy(&image, &inside)?;
    fs::remove_file(&image)?;
    std::os::unix::fs::symlink(&inside, &image)?;
    Ok(volume)
}

fn disks(progress: &Value) -> impl Iterator<Item = &Value> {
    progress["disks"].as_array().into_iter().flatten()
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

fn ram_flows(progress: &Value) -> bool {
    number(&progress["ram"], "stream_bytes") > MIB
}

/// Bytes that the mirrors are behind.
fn lag(progress: &Value) -> u64 {
    disks(progress).map(|d| number(d, "total_bytes").saturating_sub(number(d, "done_bytes"))).sum()
}
