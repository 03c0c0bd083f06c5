//! What others do while a migration is under way: the operator at a monitor of his own, and the
//! guest itself. `docs/meanwhile.md` is the table of it; each of its rows names a test of these.
//! Judged by QEMU's own state, over the test's monitor, and by the guest's count.

use crate::faults::{End, Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::{Qmp, Version, Vm, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// An ACPI power-down, as the guest's kernel asks the machine for it.
const POWER_DOWN: &str = "o /2h 0x604 0x2000";
/// A panic, as the guest's kernel tells it to pvpanic.
const PANIC: &str = "o /1b 0x505 1";

fn failed(phases: &'static [&'static str], words: &'static [&'static str]) -> End {
    End { phases, words, cancelled: false, left: None }
}

/// What the guest does to its machine, done for it over HMP.
fn hmp(qmp: &mut Qmp, line: &str) -> Result<()> {
    qmp.execute("human-monitor-command", json!({"command-line": line})).map(drop)
}

fn wait_status(vm: &Vm, wanted: &str) -> Result<()> {
    let seen = wait_for(&format!("{wanted} on {}", vm.host_name()), SHORT, || {
        Ok((vm.qmp()?.status()? == wanted).then_some(()))
    });
    seen.with_context(|| format!("it is {:?}", vm.qmp().and_then(|mut qmp| qmp.status())))
}

/// That the guest stands still, by its own count.
fn stands_still(vm: &Vm) -> Result<()> {
    let before = vm.console()?.last();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let after = vm.console()?.last();
    ensure!(before == after, "the guest went on from {before:?} to {after:?}");
    Ok(())
}

fn notes(report: &Value) -> String {
    report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

/// Continues the guest, as its operator would, and all is as before.
fn goes_on(stage: &Stage) -> Result<()> {
    stage.source.qmp()?.query("cont")?;
    stage.is_as_before()
}

/// That the guest has arrived paused, and goes on when its operator continues it.
fn arrived_paused(stage: &Stage, report: &Value) -> Result<()> {
    ensure!(report["outcome"]["result"] == "moved" && report["paused"] == true, "{report}");
    ensure!(notes(report).contains("somebody paused VM web1"), "{report}");
    let states = (stage.source.qmp()?.status()?, stage.destination.qmp()?.status()?);
    ensure!(states == ("postmigrate".to_owned(), "paused".to_owned()), "{states:?}");
    stands_still(&stage.destination)?;
    ensure!(stage.destination.console()?.counts.is_empty(), "the guest has run on the destination");
    stage.copies.same_as_source(&stage.paths, &stage.source, &stage.destination)?;
    stage.is_clean()?;
    stage.destination.qmp()?.query("cont")?;
    stage.destination.wait_more(20).map(drop)
}

#[test]
fn a_guest_that_somebody_paused_stays_paused() -> Result<()> {
    with_lab("a_guest_that_somebody_paused_stays_paused", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        // Paused, then cancelled.
        let migration = stage.reach(Reach::Precopy)?;
        stage.source.qmp()?.query("stop")?;
        wait_for("the agent to take note", SHORT, || {
            Ok((migration.now(&stage.alpha)?["paused"] == true).then_some(()))
        })?;
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        End { cancelled: true, ..failed(&["precopy"], &["cancelled"]) }.fits(&report)?;
        wait_status(&stage.source, "paused")?;
        stands_still(&stage.source)?;
        goes_on(&stage)?;
        // Paused, and the agent is killed before it can have a hand in it.
        let migration = stage.reach(Reach::Mirror)?;
        stage.alpha.kill()?;
        stage.source.qmp()?.query("stop")?;
        stage.alpha.restart()?;
        stage.calm()?;
        failed(&["mirror"], &["restarted"]).fits(&migration.ended(&stage.alpha)?)?;
        wait_status(&stage.source, "paused")?;
        stands_still(&stage.source)?;
        goes_on(&stage)?;
        // Paused and continued: as if nothing had been.
        let migration = stage.reach(Reach::Mirror)?;
        let mut qmp = stage.source.qmp()?;
        qmp.query("stop")?;
        qmp.query("cont")?;
        drop(qmp);
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        migration.ended(&stage.alpha)?;
        stage.is_as_before()?;
        // Paused for good: it moves, and stays paused.
        let migration = stage.reach_with(Reach::Precopy, &["--keep-source"])?;
        stage.source.qmp()?.query("stop")?;
        stage.calm()?;
        arrived_paused(&stage, &migration.ended(&stage.alpha)?)
    })
}

#[test]
fn on_qemu_7_2_a_paused_guest_stays_paused_and_one_that_shut_down_stays_off() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, ..Plan::ORDINARY };
    with_lab("on_qemu_7_2_a_paused_guest_stays_paused", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        // Without -no-shutdown QEMU ends with its guest.
        let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
        let _ = hmp(&mut stage.source.qmp()?, POWER_DOWN);
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        failed(&["mirror"], &["the guest has shut down"]).fits(&report)?;
        not_tried_again(&report)?;
        stage.source.wait_ended()?;
        stage.destination.wait_ended()?;
        stage.source.boot()?;
        let migration = stage.reach_with(Reach::Mirror, &["--keep-source"])?;
        stage.source.qmp()?.query("stop")?;
        stage.calm()?;
        arrived_paused(&stage, &migration.ended(&stage.alpha)?)
    })
}

fn not_tried_again(report: &Value) -> Result<()> {
    ensure!(report["tries"]["number"] == 1, "it was tried again: {report}");
    ensure!(notes(report).contains("not tried again"), "{report}");
    Ok(())
}

#[test]
fn what_the_guest_and_its_operator_end_is_not_tried_again() -> Result<()> {
    let plan = Plan { extra: &["-no-shutdown", "-device", "pvpanic"], ..Plan::ORDINARY };
    with_lab("what_the_guest_and_its_operator_end_is_not_tried_again", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let again: &[&str] = &["--retry", "3"];
        let mut ends = |reach, act: &dyn Fn(&mut Qmp) -> Result<()>, end: End| -> Result<()> {
            let migration = stage.reach_with(reach, again)?;
            act(&mut stage.source.qmp()?)?;
            stage.calm()?;
            let report = migration.ended(&stage.alpha)?;
            end.fits(&report)?;
            not_tried_again(&report)
        };
        let cancel = |qmp: &mut Qmp| qmp.query("migrate_cancel").map(drop);
        ends(Reach::Precopy, &cancel, failed(&["precopy"], &["migrate_cancel", "source"]))?;
        let job = |qmp: &mut Qmp| {
            let jobs = qmp.query("query-block-jobs")?;
            qmp.execute("block-job-cancel", json!({"device": jobs[0]["device"], "force": true})).map(drop)
        };
        ends(Reach::Mirror, &job, failed(&["mirror"], &["somebody else cancelled the mirror", "disk"]))?;
        let panic = |qmp: &mut Qmp| hmp(qmp, PANIC);
        ends(Reach::Precopy, &panic, failed(&["precopy"], &["the guest has panicked"]))?;
        ensure!(stage.source.qmp()?.status()? == "guest-panicked", "{}", stage.source.qmp()?.status()?);
        goes_on(&stage)?;
        still_off(&mut stage)?;
        quit(&mut stage)
    })
}

/// A guest that has shut down is not started again by the roll-back; a reset does not end anything.
fn still_off(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
    hmp(&mut stage.source.qmp()?, POWER_DOWN)?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    failed(&["mirror"], &["the guest has shut down"]).fits(&report)?;
    not_tried_again(&report)?;
    ensure!(notes(&report).contains("VM web1 is in state shutdown"), "{report}");
    stands_still(&stage.source)?;
    ensure!(stage.source.qmp()?.status()? == "shutdown", "{}", stage.source.qmp()?.status()?);
    stage.destination.wait_ended()?;
    stage.is_clean()?;
    stage.source.quit()?;
    stage.source.boot()
}

/// The last of a stage.
fn quit(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
    let mut qmp = stage.source.qmp()?;
    qmp.query("system_reset")?;
    qmp.wait_event("RESET", LONG)?;
    migration.reach(&stage.alpha.socket(), "mirror", |_| true).context("after a reset of the guest")?;
    drop(qmp);
    stage.source.quit()?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    failed(&["mirror"], &["somebody ended the guest's QEMU", "quit"]).fits(&report)?;
    not_tried_again(&report)?;
    stage.destination.wait_ended()?;
    stage.is_clean()
}
