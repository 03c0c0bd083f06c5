//! A QEMU that ends: its death is proved, its last words are told, and what a start command has
//! started in vain does not stay.

use std::io::Write;

use anyhow::{Context, Result, ensure};

use crate::faults::{End, Plan, Reach, Stage};
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::SHORT;
use crate::support::process::run_any;
use crate::support::{Agent, AgentSpec, Credentials, DiskFormat, Version, Vm, VmEntry, VmSpec, with_lab};

/// Adds a line to what QEMU has said, as QEMU would.
fn says(vm: &Vm, line: &str) -> Result<()> {
    let log = vm.dir().join("qemu.log");
    let mut log = std::fs::File::options().append(true).open(&log).context("QEMU's log")?;
    Ok(writeln!(log, "{line}")?)
}

/// A QEMU is killed on either side in mid-copy, having said something before the migration and during it.
#[test]
fn the_last_words_of_a_qemu_are_told_and_its_end_is_proved() -> Result<()> {
    with_lab("the_last_words_of_a_qemu_are_told_and_its_end_is_proved", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        says(&stage.source, "of yesterday")?;
        let migration = stage.reach(Reach::Mirror)?;
        says(&stage.destination, "bravo's \x1b[31mlast words")?;
        stage.destination.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        let words = &["the destination's QEMU of VM web1 has gone: its process", "it said: ", "last words"];
        End::failed(&["mirror"], words).fits(&report)?;
        let cause = report["outcome"]["cause"].to_string();
        ensure!(!cause.contains("u001b") && !cause.contains('\x1b'), "{cause}");
        stage.is_as_before()?;

        let migration = stage.reach(Reach::Mirror)?;
        let pid = stage.source.pid().context("no QEMU")?;
        says(&stage.source, "alpha's last words")?;
        stage.source.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        let words = &["the source's QEMU has gone: its process", "it said: ", "alpha's last words"];
        End::failed(&["mirror"], words).leaves("VM web1 runs nowhere").fits(&report)?;
        let outcome = report["outcome"].to_string();
        let proof = format!("its QEMU at the source has ended (process {pid}); start it there again");
        ensure!(outcome.contains(&proof) && !outcome.contains("of yesterday"), "{outcome}");
        stage.destination.wait_ended()
    })
}

/// The agent on bravo looks for the monitor in a wrong place. Its start command leaves its session and
/// its process group, and has succeeded.
#[test]
fn a_qemu_that_was_started_in_vain_does_not_stay() -> Result<()> {
    with_lab("a_qemu_that_was_started_in_vain_does_not_stay", |lab| {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo])?;
        let spec = VmSpec { disks: vec![DiskFormat::Raw], ..VmSpec::new("web1", Version::V10) };
        let source = Vm::define(&lab.paths, &net.alpha, &spec)?;
        let destination = Vm::define(&lab.paths, &net.bravo, &spec)?;
        source.boot()?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let on_alpha = AgentSpec::default().peer(&net.bravo).vm(VmEntry::of(&source));
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let mut entry = VmEntry::of(&destination);
        entry.qmp = destination.dir().join("elsewhere.qmp");
        let end_lines = "[deadlines]\nqemu_start_s = 4\n".to_owned();
        let on_bravo = AgentSpec { end_lines, ..AgentSpec::default() }.peer(&net.alpha).vm(entry);
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        for (command, starts) in [("check", 1), ("migrate", 2), ("check", 3)] {
            let outcome = alpha.vmferry(&[command, "web1", "--to", "bravo"])?;
            let text = format!("{}{}", outcome.stdout, outcome.stderr);
            ensure!(
                outcome.code != 0 && text.contains("did not answer within 4 s"),
                "{command}: {outcome:?}"
            );
            ensure!(!text.contains("did not end"), "{command}: {text}");
            ensure!(destination.starts() == starts, "{command} was to start a QEMU");
            ensure!(!destination.is_running(), "{command} has left a QEMU");
        }
        let recovered = bravo.vmferry(&["recover"])?;
        ensure!(recovered.code == 0, "{recovered:?}");
        drop(alpha);
        ensure!(source.qmp()?.status()? == "running");
        let left = run_any(std::process::Command::new("pgrep").arg("-f").arg(destination.dir()), SHORT)?;
        ensure!(left.code != 0, "there is still: {}", left.stdout);
        Ok(())
    })
}
