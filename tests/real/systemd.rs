//! The service under a real systemd: `systemctl restart vmferry` in the middle of a migration is a
//! non-event, `systemctl stop` rolls it back. The unit is deploy/'s own; a drop-in gives it this
//! test's paths and user, and leaves all else as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::faults::{Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::proof::{self, field};
use crate::support::{Lab, with_lab};
use anyhow::{Context, Result, ensure};

/// A machine whose first process is systemd, on one host of the lab. Gone when dropped.
struct Container {
    dir: PathBuf,
}

impl Container {
    fn boot(lab: &Lab, stage: &Stage) -> Result<Self> {
        let container = Self { dir: lab.dir().join("machine") };
        let host = stage.alpha.host();
        let mut up = container.script("up");
        up.arg(host.namespace()).arg(&host.dir).arg(lab.dir().join("certs"));
        run(&mut up, LONG)?;
        container.install(stage)?;
        Ok(container)
    }

    fn script(&self, what: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/container/container.sh"));
        command.arg(what).arg(&self.dir);
        command
    }

    fn install(&self, stage: &Stage) -> Result<()> {
        let units = self.dir.join("root/etc/systemd/system");
        let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/vmferry.service");
        fs::copy(unit, units.join("vmferry.service"))?;
        let folder = units.join("vmferry.service.d");
        fs::create_dir_all(&folder)?;
        let dir = stage.alpha.host().dir.display().to_string();
        let program = stage.paths.vmferry.display();
        let lines = format!(
            "[Service]\nExecStart=\nExecStart={program} agent --config {dir}/vmferry.toml\n\
             User=root\nGroup=root\nSupplementaryGroups=\nPrivateTmp=no\nProtectHome=no\nReadWritePaths={dir}\n"
        );
        fs::write(folder.join("test.conf"), lines)?;
        self.systemctl(&["daemon-reload"])
    }

    fn systemctl(&self, words: &[&str]) -> Result<()> {
        run(self.script("exec").arg("systemctl").args(words), LONG).map(drop).with_context(|| {
            let journal = run(self.script("exec").args(["journalctl", "-u", "vmferry", "-n", "60"]), SHORT);
            format!("systemctl {}: {}", words.join(" "), journal.unwrap_or_else(|e| e.to_string()))
        })
    }

    /// How many descriptors systemd keeps for the service.
    fn kept(&self) -> Result<u32> {
        let show = ["systemctl", "show", "-P", "NFileDescriptorStore", "vmferry"];
        Ok(run(self.script("exec").args(show), SHORT)?.trim().parse()?)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = run(&mut self.script("down"), LONG);
    }
}

/// The stage with the source's agent as a service.
fn with_service(name: &str, test: impl FnOnce(&mut Stage, &Container) -> Result<()>) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        stage.alpha.terminate()?;
        let container = Container::boot(lab, &stage)?;
        container.systemctl(&["start", "vmferry"])?;
        let tested = test(&mut stage, &container);
        tested.with_context(|| {
            let log = run(container.script("exec").args(["journalctl", "-u", "vmferry", "-n", "80"]), SHORT);
            log.unwrap_or_else(|e| e.to_string())
        })
    })
}

#[test]
fn systemctl_restart_in_the_middle_of_a_migration_is_a_non_event() -> Result<()> {
    with_service("systemctl_restart_in_the_middle_of_a_migration_is_a_non_event", |stage, machine| {
        let migration = stage.begin()?;
        for reach in [Reach::Mirror, Reach::Precopy, Reach::Switchover] {
            stage.bring_to(reach, &migration)?;
            machine.systemctl(&["restart", "vmferry"])?;
            // What systemd still held would keep QEMU from noticing the end of a stream.
            wait_for("systemd to keep nothing", SHORT, || Ok((machine.kept()? == 0).then_some(())))?;
            let now = migration.now(&stage.alpha)?;
            let over = now["outcome"]["result"] == "moved";
            ensure!(now["outcome"].is_null() || over, "{reach:?}: it ended: {now}");
        }
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        proof::guest_continued(&stage.source, &stage.destination)?;
        stage.copies.same_as_source(&stage.paths, &stage.source, &stage.destination)
    })
}

#[test]
fn systemctl_stop_rolls_back_and_keeps_nothing() -> Result<()> {
    with_service("systemctl_stop_rolls_back_and_keeps_nothing", |stage, machine| {
        let migration = stage.begin()?;
        stage.bring_to(Reach::Mirror, &migration)?;
        machine.systemctl(&["stop", "vmferry"])?;
        ensure!(machine.kept()? == 0, "systemd keeps descriptors of a stopped service");
        stage.source.wait_more(20)?;
        proof::qemu_is_clean(&mut stage.source.qmp()?)?;
        stage.destination.wait_ended()?;
        machine.systemctl(&["start", "vmferry"])?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
        Ok(())
    })
}
