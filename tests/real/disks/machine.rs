//! A QEMU with odd disks and no system on them: it is paused at the source, and waits at the
//! destination. What is on its disks is written and read by `qemu-io`, with QEMU not there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::process::{LONG, SHORT, run, run_any, wait_for};
use crate::support::{Host, Paths, Qmp, Version};

/// For images that are encrypted.
pub(super) const SECRET: &str = "secret,id=key,data=not-a-secret";
/// Of each image, unless it says otherwise.
pub(super) const DISK_BYTES: u64 = 4 << 20;

/// What kind of machine a QEMU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arch {
    X86,
    /// `virt`, by the QEMU of tests/setup/arm.sh.
    Arm,
}

impl Arch {
    fn program(self, place: &Place) -> PathBuf {
        match self {
            Self::X86 => place.paths.qemu(place.version, "qemu-system-x86_64"),
            Self::Arm => place.paths.qemu_of_arm(place.version),
        }
    }

    fn machine(self) -> &'static str {
        match self {
            Self::X86 => "-machine pc-q35-7.2 -cpu qemu64",
            Self::Arm => "-machine virt-7.2 -cpu cortex-a57",
        }
    }
}

/// Where a QEMU and its images live.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) paths: Paths,
    pub(super) host: Host,
    pub(super) version: Version,
    pub(super) arch: Arch,
    pub(super) dir: PathBuf,
    /// Both hosts' QEMUs see it.
    pub(super) shared: PathBuf,
}

impl Place {
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes an image by `qemu-img create` with these options. An encrypted one is made once and copied:
    /// QEMU measures for seconds of CPU time how often its key is to be hashed.
    pub(super) fn create(&self, format: &str, options: &str, name: &str, bytes: u64) -> Result<PathBuf> {
        static MADE: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::new(BTreeMap::new());
        let file = self.file(name);
        let make = || {
            let mut command = self.paths.qemu_img();
            command.args(["create", "-q", "--object", SECRET, "-f", format]);
            if !options.is_empty() {
                command.args(["-o", options]);
            }
            run(command.arg(&file).arg(bytes.to_string()), LONG)
        };
        if !options.contains("key-secret") {
            make()?;
            return Ok(file);
        }
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = format!("{format} {options} {bytes}");
        match made.get(&kind) {
            Some(image) => fs::write(&file, image)?,
            None => {
                make()?;
                made.insert(kind, fs::read(&file)?);
            }
        }
        Ok(file)
    }

    /// An image of the ordinary size.
    pub(super) fn image(&self, format: &str, options: &str, name: &str) -> Result<PathBuf> {
        self.create(format, options, name, DISK_BYTES)
    }

    /// Runs a command of `qemu-io` on an image.
    pub(super) fn io(&self, options: &str, command: &str) -> Result<()> {
        let program = self.paths.qemu(Version::V10, "qemu-io");
        let mut io = std::process::Command::new(program);
        io.args(["--object", SECRET, "--image-opts", options, "-c", command]);
        let outcome = run_any(&mut io, LONG)?;
        ensure!(outcome.code == 0 && !outcome.stdout.contains("failed"), "{options}: {command}: {outcome:?}");
        Ok(())
    }

    /// Starts a `qemu-storage-daemon` that serves a file of its own at a socket of that name, or writes its `--pidfile`
    /// of that name when it does. It lives as long as the lab.
    #[allow(clippy::zombie_processes, reason = "the lab's janitor ends what runs on its hosts")]
    pub(super) fn daemon(&self, socket: &Path, words: &[&str]) -> Result<()> {
        let file = socket.with_extension("served");
        fs::File::create(&file)?.set_len(DISK_BYTES)?;
        let mut command = self.host.command(self.paths.qemu(Version::V10, "qemu-storage-daemon"));
        command.args(["--blockdev", &format!("driver=file,node-name=n,filename={}", file.display())]);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let sockets = format!("/proc/{}/net/unix", command.spawn()?.id());
        // The file of a socket is there a moment before anybody listens: tests/support/start-vm.sh.
        let end = format!(" {}", socket.display());
        let listens = |line: &str| line.contains(" 00010000 ") && line.ends_with(&end);
        wait_for("the storage daemon", SHORT, || {
            let serves = socket.is_file() || fs::read_to_string(&sockets)?.lines().any(listens);
            Ok(serves.then_some(()))
        })
    }

    /// The words that every QEMU gets besides.
    fn all_words(&self, words: &[String], incoming: bool) -> Vec<String> {
        let fixed =
            format!("-S {} -accel tcg -m 64 -nodefaults -no-user-config -display none", self.arch.machine());
        let mut all: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
        for monitor in ["agent", "test"] {
            let path = self.file(&format!("{monitor}.qmp"));
            let chardev = format!("socket,id={monitor},path={},server=on,wait=off", path.display());
            all.extend([
                "-chardev".into(),
                chardev,
                "-mon".into(),
                format!("chardev={monitor},mode=control"),
            ]);
        }
        if incoming {
            all.extend(["-incoming".into(), "defer".into()]);
        }
        all.extend_from_slice(words);
        all
    }

    /// Starts QEMU with these words.
    pub(super) fn start(&self, words: &[String], incoming: bool) -> Result<Machine> {
        let log = fs::File::create(self.file("qemu.log"))?;
        let mut command = self.host.command(self.arch.program(self));
        command.args(self.all_words(words, incoming));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut machine = Machine { child: command.spawn()?, dir: self.dir.clone() };
        machine.wait_up()?;
        if !incoming {
            // From `prelaunch` to `paused`.
            let mut qmp = machine.qmp()?;
            qmp.query("cont")?;
            qmp.query("stop")?;
        }
        Ok(machine)
    }

    /// Has the agent start QEMU with these words when a guest comes.
    pub(super) fn will_start(&self, words: &[String]) -> Result<()> {
        let program = self.arch.program(self);
        let words: Vec<String> = self.all_words(words, true).iter().map(|word| format!("'{word}'")).collect();
        crate::support::vm::write_script(
            &self.file("start"),
            &format!("#!/bin/sh\nexec '{}' {}", program.display(), words.join(" ")),
        )
    }

    /// Ends the QEMU that the agent has started and that has the guest, which is paused.
    pub(super) fn quit_started(&self) -> Result<()> {
        let monitor = self.file("test.qmp");
        let mut qmp = Qmp::connect(&monitor)?;
        ensure!(qmp.status()? == "paused", "the guest was paused");
        let _ = qmp.query("quit");
        drop(qmp);
        wait_for("the end of QEMU", SHORT, || Ok(UnixStream::connect(&monitor).is_err().then_some(())))
    }
}

/// Words of QEMU's for a block node.
pub(super) fn blockdev(node: &Value) -> [String; 2] {
    ["-blockdev".to_owned(), node.to_string()]
}

/// Words of QEMU's for a device.
pub(super) fn device(words: &str) -> [String; 2] {
    ["-device".to_owned(), words.to_owned()]
}

/// A raw node on a file.
pub(super) fn raw(name: &str, file: &Path) -> Value {
    json!({"driver": "raw", "node-name": name, "discard": "unmap", "file": file_node(file)})
}

pub(super) fn file_node(file: &Path) -> Value {
    json!({"driver": "file", "filename": file, "discard": "unmap"})
}

/// A running QEMU, killed when dropped.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    dir: PathBuf,
}

impl Machine {
    fn wait_up(&mut self) -> Result<()> {
        wait_for("QEMU's monitors", SHORT, || {
            let log = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
            ensure!(self.child.try_wait()?.is_none(), "QEMU has ended: {log}");
            Ok(Qmp::connect(&self.dir.join("test.qmp")).is_ok().then_some(()))
        })
    }

    pub(super) fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.join("test.qmp"))
    }

    /// Kills it.
    pub(super) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("the end of QEMU")
    }

    /// Ends it in order, so that its images are whole.
    pub(super) fn quit(mut self) -> Result<()> {
        // It may have ended already, as a source does that has been moved.
        let _ = self.qmp().and_then(|mut qmp| qmp.query("quit"));
        wait_for("the end of QEMU", SHORT, || Ok(self.child.try_wait()?)).map(drop)
    }

    /// What a refused migration must leave as it was: QEMU's state, and each of its files.
    pub(super) fn snapshot(&self) -> Result<Value> {
        let mut qmp = self.qmp()?;
        let mut all = json!({});
        for query in ["query-status", "query-jobs", "query-block-exports", "query-migrate-capabilities"] {
            all[query] = qmp.query(query)?;
        }
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
        let node = |node: &Value| json!([node["node-name"], node["drv"], node["dirty-bitmaps"]]);
        all["nodes"] = nodes.as_array().context("no nodes")?.iter().map(node).collect();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() && entry.file_name() != "qemu.log" {
                let bytes = fs::read(entry.path())?;
                let sum: u64 = bytes.iter().fold(7, |sum: u64, byte| sum.wrapping_mul(31) + u64::from(*byte));
                all["files"][entry.file_name().to_string_lossy().into_owned()] = json!([bytes.len(), sum]);
            }
        }
        Ok(all)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
