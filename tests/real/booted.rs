//! A machine whose first process is a real systemd, in the network namespace of a host of the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::support::Lab;
use crate::support::net::Host;
use crate::support::process::{LONG, SHORT, run, run_any, wait_for};

/// Gone when dropped.
pub(crate) struct Machine {
    dir: PathBuf,
    namespace: String,
    shared: Vec<PathBuf>,
}

impl Machine {
    /// Boots it. The `shared` folders are the same inside.
    pub(crate) fn boot(lab: &Lab, host: &Host, shared: &[&Path]) -> Result<Self> {
        let machine = Self {
            dir: lab.dir().join(format!("machine-{}", host.name)),
            namespace: host.namespace().to_owned(),
            shared: shared.iter().map(|path| path.to_path_buf()).collect(),
        };
        machine.start("up")?;
        Ok(machine)
    }

    fn start(&self, what: &str) -> Result<()> {
        run(self.script(what).arg(&self.namespace).args(&self.shared), LONG).map(drop)
    }

    fn script(&self, what: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/container/container.sh"));
        command.arg(what).arg(&self.dir);
        command
    }

    /// A command inside.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = self.script("exec");
        command.args(words);
        command
    }

    /// Runs a command inside, which must succeed, and gives what it printed.
    pub(crate) fn run(&self, words: &[&str]) -> Result<String> {
        run(&mut self.command(words), LONG)
    }

    /// Its files, seen from outside.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub(crate) fn units(&self) -> PathBuf {
        self.root().join("etc/systemd/system")
    }

    /// Changes the service from its next start on.
    pub(crate) fn drop_in(&self, name: &str, lines: &str) -> Result<()> {
        let folder = self.units().join("vmferry.service.d");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{name}.conf")), format!("[Service]\n{lines}"))?;
        self.systemctl(&["daemon-reload"])
    }

    pub(crate) fn systemctl(&self, words: &[&str]) -> Result<()> {
        self.run(&[&["systemctl"], words].concat())
            .map(drop)
            .with_context(|| format!("systemctl {}: {}", words.join(" "), self.log()))
    }

    /// What `systemctl show` says of a unit.
    pub(crate) fn shown(&self, property: &str, unit: &str) -> Result<String> {
        Ok(self.run(&["systemctl", "show", "-P", property, unit])?.trim().to_owned())
    }

    /// Shuts it down, as an operator does, and boots it again.
    pub(crate) fn reboot(&self) -> Result<()> {
        self.systemctl(&["poweroff"])?;
        let ended = || Ok((run_any(&mut self.script("ended"), SHORT)?.code == 0).then_some(()));
        wait_for("the machine to shut down", LONG, ended)
            .with_context(|| fs::read_to_string(self.dir.join("console.log")).unwrap_or_default())?;
        self.start("boot")
    }

    /// The end of the agent's log.
    pub(crate) fn log(&self) -> String {
        let journal = ["journalctl", "-u", "vmferry", "-n", "80", "-o", "cat"];
        run(&mut self.command(&journal), SHORT).unwrap_or_else(|e| e.to_string())
    }

    /// How many descriptors systemd keeps for the service.
    pub(crate) fn kept(&self) -> Result<u32> {
        Ok(self.shown("NFileDescriptorStore", "vmferry")?.parse()?)
    }

    /// What systemd still held would keep QEMU from noticing the end of a stream.
    pub(crate) fn restart(&self) -> Result<()> {
        self.systemctl(&["restart", "vmferry"])?;
        wait_for("systemd to keep nothing", SHORT, || Ok((self.kept()? == 0).then_some(())))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = run(&mut self.script("down"), LONG);
    }
}
