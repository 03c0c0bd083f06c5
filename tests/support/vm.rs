//! A guest under a real QEMU on one host: its disks, the script that starts it (by the test as a
//! running guest, by the agent as a waiting destination), its two monitors and its serial line.
//! Knows no agent.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;

use super::console::Console;
use super::lab::{Paths, Version};
use super::net::Host;
use super::process::{LONG, SHORT, run, signal_pid, wait_for};
use super::qmp::Qmp;
use super::saved;

/// From QEMU's start to the first completed block, on a busy machine without KVM.
const BOOT_WITHIN: Duration = Duration::from_secs(120);
/// What the guest's kernel is told in any case.
pub const KERNEL_WORDS: &str = "console=ttyS0 quiet tsc=reliable no_timer_check mitigations=off nokaslr \
                            random.trust_cpu=on nosoftlockup cryptomgr.notests 8250.nr_uarts=1 audit=0 selinux=0 apparmor=0";

/// How a disk is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// A plain file.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What a guest is made of. Both hosts need the same, but for `version`, formats and sizes.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its name, in vmferry's configuration too.
    pub name: String,
    /// Which QEMU runs it.
    pub version: Version,
    /// Its disks, in order: `vda`, `vdb`, ... (those are their node names too).
    pub disks: Vec<DiskFormat>,
    /// Size of each disk in MiB.
    pub disk_mib: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// The machine type, which must be known to both QEMUs.
    pub machine: String,
    /// How many blocks of 4 KiB the guest goes round in on each disk: a power of two.
    pub blocks: u64,
    /// Blocks per second; 0 is as fast as it can.
    pub rate: u64,
    /// MiB of RAM that the guest rewrites and checks in a loop. QEMU 7.2 under TCG loses such
    /// writes while it migrates, so leave it 0 there.
    pub dirty_mib: u32,
    /// How long it rests after each round of that, in milliseconds: 0 takes a core for itself.
    pub dirty_rest_ms: u64,
    /// Text of 24 to 63 bytes without blanks that the guest puts into every block and into RAM.
    pub marker: String,
    /// QEMU opens its images anew when it may write no longer.
    pub auto_read_only: bool,
    /// Its disks are QEMU's old `-drive`s.
    pub drives: bool,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl VmSpec {
    /// A guest with a raw and a qcow2 disk of 64 MiB that writes, and leaves its core to others.
    pub fn new(name: &str, version: Version) -> Self {
        Self {
            name: name.to_owned(),
            version,
            disks: vec![DiskFormat::Raw, DiskFormat::Qcow2],
            disk_mib: 64,
            memory_mib: 128,
            machine: "pc-q35-7.2".to_owned(),
            blocks: 2048,
            rate: 200,
            dirty_mib: 0,
            dirty_rest_ms: 0,
            marker: format!("vmferry-marker-of-guest-{name}-{}", std::process::id()),
            auto_read_only: false,
            drives: false,
            extra: Vec::new(),
        }
    }

    /// What the guest is told to do.
    pub fn words(&self) -> String {
        format!(
            "vf_blocks={} vf_rate={} vf_disks={} vf_dirty={} vf_dirty_rest={} vf_marker={}",
            self.blocks,
            self.rate,
            self.disks.len(),
            self.dirty_mib,
            self.dirty_rest_ms,
            self.marker
        )
    }
}

/// A guest on one host. Whether a QEMU runs there at the moment is asked, never remembered.
#[derive(Debug, Clone)]
pub struct Vm {
    /// What it is made of.
    pub spec: VmSpec,
    host: Host,
    pub(super) paths: Paths,
    dir: PathBuf,
}

/// Letters of the guest's disks.
const LETTERS: &str = "abcdefgh";

impl Vm {
    /// Makes the guest's folder, empty disks and start script on a host. Nothing runs yet.
    pub fn define(paths: &Paths, host: &Host, spec: &VmSpec) -> Result<Self> {
        ensure!((24..64).contains(&spec.marker.len()), "a marker has 24 to 63 bytes: {:?}", spec.marker);
        let dir = host.dir.join(&spec.name);
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let vm = Self { spec: spec.clone(), host: host.clone(), paths: paths.clone(), dir };
        for disk in 0..spec.disks.len() {
            vm.create_disk(disk, spec.disk_mib)?;
        }
        write_script(&vm.start_script(), &vm.script())?;
        Ok(vm)
    }

    /// Makes a disk anew, of any size: the guest must not run.
    pub fn create_disk(&self, disk: usize, mib: u32) -> Result<()> {
        let _ = fs::remove_file(self.disk(disk));
        let create = ["create", "-q", "-f", self.spec.disks[disk].name()];
        run(self.paths.qemu_img().args(create).arg(self.disk(disk)).arg(format!("{mib}M")), SHORT).map(drop)
    }

    /// Has the image of each disk made by the host's agent, and the lines for its configuration.
    pub fn without_disks(&self) -> Result<String> {
        for disk in 0..self.spec.disks.len() {
            fs::remove_file(self.disk(disk))?;
        }
        let (path, qemu_img) = (self.dir.join("{disk}.{format}"), self.paths.qemu_img());
        let (path, qemu_img) = (path.display(), qemu_img.get_program().display());
        Ok(format!(
            "[vm.{}.create]\npath = \"{path}\"\nformat = \"source\"\nqemu_img = \"{qemu_img}\"\n",
            self.spec.name
        ))
    }

    /// Writes to a disk as the guest would, where the guest itself does not. False: the disk has no room for that.
    pub fn write_beyond(&self, disk: usize, mib: u64) -> Result<bool> {
        let (from, bytes) = (self.spec.blocks * 4096, mib << 20);
        if from + bytes > u64::from(self.spec.disk_mib) << 20 {
            return Ok(false);
        }
        let line =
            format!("qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"write -P 7 {from} {bytes}\"");
        let told = self.qmp()?.execute("human-monitor-command", json!({"command-line": line}))?;
        ensure!(!told.to_string().to_lowercase().contains("fail"), "{line}: {told}");
        Ok(true)
    }

    /// The image file of a disk.
    pub fn disk(&self, disk: usize) -> PathBuf {
        self.dir.join(format!("disk{disk}.{}", self.spec.disks[disk].name()))
    }

    /// The name of the host.
    pub fn host_name(&self) -> &str {
        &self.host.name
    }

    /// What the guest has written on its serial line here, a file.
    pub fn serial(&self) -> PathBuf {
        self.dir.join("guest.serial")
    }

    /// The guest's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The monitor that is vmferry's.
    pub fn agent_monitor(&self) -> PathBuf {
        self.dir.join("agent.qmp")
    }

    /// The command for vmferry's configuration: starts a fresh QEMU that waits for a guest. It
    /// refuses while another QEMU of this guest runs here.
    pub fn start_script(&self) -> PathBuf {
        self.dir.join(format!("start-{}", self.spec.name))
    }

    /// Starts the guest here and waits until it has written some blocks.
    pub fn boot(&self) -> Result<()> {
        self.begin_boot()?;
        self.wait_count_within(10, BOOT_WITHIN).map(drop)
    }

    /// Starts the guest here, from a saved state if that may be, and waits for no more than that QEMU has
    /// loaded it: until then its QEMU is one that waits for a migration.
    pub fn begin_boot(&self) -> Result<()> {
        let mut start = self.host.command(self.start_script());
        start.arg("boot");
        let Some(state) = saved::state(self)? else { return run(&mut start, SHORT).map(drop) };
        run(start.arg("-incoming").arg(format!("exec:cat '{}'", state.display())), SHORT)?;
        let loaded = || Ok((self.qmp()?.status()? != "inmigrate").then_some(()));
        wait_for(&format!("{} to be loaded", self.spec.name), LONG, loaded).with_context(|| {
            format!(
                "its QEMU {}; it said: {}",
                if self.is_running() { "runs" } else { "has ended" },
                self.qemu_log()
            )
        })
    }

    /// Boots the guest here up to where it waits for its words: how long its serial line's file was
    /// before. A QEMU that loads its state lets it run, whatever it did when it was saved.
    pub(super) fn boot_until_ready(&self) -> Result<u64> {
        let said = fs::metadata(self.serial()).map_or(0, |file| file.len());
        let words = ["ready", "-global", "migration.store-global-state=off"];
        run(self.host.command(self.start_script()).args(words), SHORT)?;
        wait_for(&format!("{} to be ready", self.spec.name), BOOT_WITHIN, || {
            ensure!(self.is_running(), "its QEMU has ended; it said: {}", self.qemu_log());
            let lines = fs::read(self.serial())?;
            let lines = String::from_utf8_lossy(lines.get(said as usize..).unwrap_or_default());
            Ok(lines.contains("READY").then_some(said))
        })
    }

    /// Starts a QEMU that waits for a guest, as the agent would.
    pub fn start_incoming(&self) -> Result<()> {
        run(&mut self.host.command(self.start_script()), SHORT).map(drop)
    }

    /// A connection to the test's own monitor.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.join("test.qmp"))
    }

    /// The process id of the QEMU that runs now.
    pub fn pid(&self) -> Option<u32> {
        let pid: u32 = fs::read_to_string(self.dir.join("qemu.pid")).ok()?.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&command).contains(&*self.dir.to_string_lossy()).then_some(pid)
    }

    /// Whether a QEMU of this guest runs here.
    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }

    /// How many QEMUs have been started here so far.
    pub fn starts(&self) -> usize {
        fs::read_to_string(self.dir.join("starts")).map_or(0, |text| text.lines().count())
    }

    /// What the guest has said here. An error when it complained.
    pub fn console(&self) -> Result<Console> {
        Console::read(&self.serial())
    }

    /// Waits until block `seq` is complete here.
    ///
    /// # Errors
    /// The guest complained, its QEMU ended, or 60 s passed.
    pub fn wait_count(&self, seq: u64) -> Result<u64> {
        self.wait_count_within(seq, Duration::from_secs(60))
    }

    /// Waits until the guest has completed `more` blocks more than now.
    pub fn wait_more(&self, more: u64) -> Result<u64> {
        let now = self.console()?.last().unwrap_or(0);
        self.wait_count(now + more)
    }

    fn wait_count_within(&self, seq: u64, within: Duration) -> Result<u64> {
        wait_for(&format!("{} to count to {seq} on {}", self.spec.name, self.host.name), within, || {
            let last = self.console()?.last().unwrap_or(0);
            ensure!(
                last >= seq || self.is_running(),
                "its QEMU has ended at {last}; it said: {}",
                self.qemu_log()
            );
            Ok((last >= seq).then_some(last))
        })
    }

    /// What QEMU has said on its standard error.
    pub fn qemu_log(&self) -> String {
        fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default()
    }

    /// Kills QEMU and waits for its end.
    pub fn kill(&self) -> Result<()> {
        if let Some(pid) = self.pid() {
            signal_pid(pid, Signal::SIGKILL)?;
        }
        self.wait_ended()
    }

    /// Stops the guest and ends QEMU in an orderly way, so that its disks are whole.
    pub fn quit(&self) -> Result<()> {
        if self.is_running() {
            // It may close the monitor before it has answered.
            let _ = self.qmp()?.query("quit");
        }
        self.wait_ended()
    }

    /// Waits until no QEMU of this guest runs here.
    pub fn wait_ended(&self) -> Result<()> {
        wait_for(&format!("the end of {} on {}", self.spec.name, self.host.name), SHORT, || {
            Ok((!self.is_running()).then_some(()))
        })
    }

    /// Judges a disk by what the guest wrote on it: `image` may be the disk or a copy of it.
    pub fn verify(&self, disk: usize, image: &Path) -> Result<DiskVerdict> {
        let raw = match self.spec.disks[disk] {
            DiskFormat::Raw => image.to_owned(),
            DiskFormat::Qcow2 => self.to_raw(image)?,
        };
        let mut command = std::process::Command::new(&self.paths.verify);
        let outcome = super::process::run_any(command.arg("disk").arg(&raw).arg(disk.to_string()), LONG)?;
        serde_json::from_str(&outcome.stdout).with_context(|| format!("verify said {outcome:?}"))
    }

    fn to_raw(&self, image: &Path) -> Result<PathBuf> {
        let raw = image.with_extension("converted");
        let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
        run(self.paths.qemu_img().args(convert).arg(image).arg(&raw), LONG)?;
        Ok(raw)
    }

    fn script(&self) -> String {
        include_str!("start-vm.sh")
            .replace("@NAME@", &self.spec.name)
            .replace("@WORDS@", &self.spec.words())
            .replace("@DIR@", &self.dir.display().to_string())
            .replace("@QEMU@", &self.arguments().iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" "))
    }

    /// QEMU's program and arguments, but for the guest's words.
    pub(super) fn arguments(&self) -> Vec<String> {
        let spec = &self.spec;
        let dir = self.dir.display();
        let mut words = vec![self.paths.qemu(spec.version, "qemu-system-x86_64").display().to_string()];
        let fixed = format!(
            "-name guest={} -accel tcg -cpu qemu64 -smp 1 -machine {} -m {} -nodefaults -no-user-config -display none \
             -chardev file,id=serial,path={dir}/guest.serial,append=on -serial chardev:serial",
            spec.name, spec.machine, spec.memory_mib
        );
        words.extend(fixed.split_whitespace().map(str::to_owned));
        for monitor in ["agent", "test"] {
            words.push("-chardev".to_owned());
            words.push(format!("socket,id={monitor},path={dir}/{monitor}.qmp,server=on,wait=off"));
            words.extend(["-mon".to_owned(), format!("chardev={monitor},mode=control")]);
        }
        for (option, value) in [
            ("-kernel", self.paths.kernel.display().to_string()),
            ("-initrd", self.paths.initrd.display().to_string()),
            ("-append", KERNEL_WORDS.to_owned()),
        ] {
            words.extend([option.to_owned(), value]);
        }
        for disk in 0..spec.disks.len() {
            words.extend(self.disk_arguments(disk));
        }
        words.extend(spec.extra.iter().cloned());
        words
    }

    fn disk_arguments(&self, disk: usize) -> [String; 4] {
        if self.spec.drives {
            let (file, format) = (self.disk(disk), self.spec.disks[disk].name());
            let how = "if=none,cache=none,discard=unmap";
            let drive = format!("{how},id=drive{disk},format={format},file={}", file.display());
            let device = format!("virtio-blk-pci,id=disk{disk},drive=drive{disk}");
            return ["-drive".to_owned(), drive, "-device".to_owned(), device];
        }
        let mut file = json!({"driver": "file", "filename": self.disk(disk), "cache": {"direct": true}, "discard": "unmap"});
        if self.spec.auto_read_only {
            file["auto-read-only"] = json!(true);
        }
        let node = json!({"driver": self.spec.disks[disk].name(), "node-name": node_name(disk), "discard": "unmap", "file": file});
        let device = format!("virtio-blk-pci,id=disk{disk},drive={}", node_name(disk));
        ["-blockdev".to_owned(), node.to_string(), "-device".to_owned(), device]
    }
}

/// What `verify disk` found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct DiskVerdict {
    /// Whole blocks of the guest's.
    pub blocks: u64,
    /// The highest block number.
    pub max_seq: u64,
    /// The boot that wrote it.
    pub generation: String,
    /// Numbers that should be there and are not.
    pub lost: u64,
    /// Torn or misplaced blocks.
    pub bad: u64,
    /// Blocks of another boot.
    pub stale: u64,
    /// None lost, none bad, none stale, some there.
    pub ok: bool,
}

/// `vda` is the first disk.
pub fn node_name(disk: usize) -> String {
    format!("vd{}", &LETTERS[disk..=disk])
}

/// Writes an executable shell script.
pub fn write_script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// A word as the shell will read it back.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
