//! A monitor that is lost, drowned, silent or taken away while its QEMU lives, in each phase: the guest
//! goes on, the migration too where it can, and nobody is told that a QEMU has ended which has not.
//!
//! Where the connection is cut by QEMU itself (`yank`), the agent knows QEMU's process. Behind a proxy
//! it does not: then nothing is known of QEMU but what its monitor says.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::faults::proxy::Proxy;
use crate::faults::{End, Migration, Plan, Reach, Stage};
use crate::support::process::{SHORT, signal_pid, wait_for};
use crate::support::{Agent, Version, Vm, with_lab};

/// An event that the agent has no use for, one that it queues, and one that no QEMU sends.
const EVENTS: [&str; 3] = [
    r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": "ready"}}"#,
    r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_EXPORT_DELETED", "data": {"id": "x"}}"#,
    r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "OF_TOMORROW", "data": {}}"#,
];

fn flood(proxy: &Proxy) -> Result<()> {
    EVENTS.iter().try_for_each(|event| proxy.say(&format!("{event}\r\n").repeat(10_000)))
}

/// How often the agent has said this.
fn said(agent: &Agent, words: &str) -> Result<usize> {
    Ok(std::fs::read_to_string(agent.log())?.matches(words).count())
}

/// Does something that costs the agent its monitor, and waits until it has that again.
fn lose(agent: &Agent, how: impl FnOnce() -> Result<()>) -> Result<()> {
    const BACK: &str = "monitor answers again";
    let before = said(agent, BACK)?;
    how()?;
    wait_for(
        "the agent to reach the monitor again",
        SHORT,
        || Ok((said(agent, BACK)? > before).then_some(())),
    )
}

/// A QEMU cuts its agent's connection.
fn yank(agent: &Agent, vm: &Vm) -> Result<()> {
    let agents = json!({"instances": [{"type": "chardev", "id": "agent"}]});
    lose(agent, || vm.qmp()?.execute("yank", agents).map(drop))
}

fn leftovers(report: &Value) -> String {
    report["outcome"]["leftovers"].to_string()
}

fn moved(report: &Value) -> Result<()> {
    ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
    Ok(())
}

fn recover(agent: &Agent) -> Result<(i32, String)> {
    let outcome = agent.vmferry(&["recover"])?;
    Ok((outcome.code, format!("{}{}", outcome.stdout, outcome.stderr)))
}

#[test]
fn a_monitor_that_qemu_cuts_is_reached_again_in_every_phase() -> Result<()> {
    with_lab("a_monitor_that_qemu_cuts_is_reached_again_in_every_phase", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.begin()?;
        for reach in [Reach::Mirror, Reach::Precopy, Reach::Switchover] {
            stage.bring_to(reach, &migration)?;
            yank(&stage.alpha, &stage.source).with_context(|| format!("the source's in {reach:?}"))?;
            let of_destination = yank(&stage.bravo, &stage.destination);
            of_destination.with_context(|| format!("the destination's in {reach:?}"))?;
        }
        stage.calm()?;
        moved(&migration.ended(&stage.alpha)?)?;
        stage.is_moved()
    })
}

#[test]
fn a_monitor_that_qemu_7_2_cuts_is_reached_again() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, ..Plan::ORDINARY };
    with_lab("a_monitor_that_qemu_7_2_cuts_is_reached_again", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let migration = stage.begin()?;
        stage.bring_to(Reach::Mirror, &migration)?;
        yank(&stage.alpha, &stage.source)?;
        yank(&stage.bravo, &stage.destination)?;
        stage.calm()?;
        moved(&migration.ended(&stage.alpha)?)?;
        stage.is_moved()
    })
}

/// What QEMU's event of a finished mirror looks like.
fn completed(job: &Value) -> String {
    json!({"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_JOB_COMPLETED",
           "data": {"type": "mirror", "device": job["device"], "len": 1, "offset": 1, "speed": 0}})
    .to_string()
}

/// A flood of events, garbage and cuts in three phases, and the guest moves. So it does if the mirrors' ends
/// are told after they were asked for, as may be after a restart.
#[test]
fn a_monitor_that_is_drowned_or_garbled_costs_nothing() -> Result<()> {
    with_lab("a_monitor_that_is_drowned_or_garbled_costs_nothing", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let proxy = Proxy::before(&stage.source.agent_monitor())?;
        let migration = stage.begin()?;
        let mut mirrors = Value::Null;
        for reach in [Reach::Mirror, Reach::Precopy, Reach::Switchover] {
            stage.bring_to(reach, &migration)?;
            if reach == Reach::Mirror {
                mirrors = stage.source.qmp()?.query("query-block-jobs")?;
            }
            flood(&proxy)?;
            lose(&stage.alpha, || proxy.say("} not QMP {\r\n"))?;
            lose(&stage.alpha, || {
                proxy.cut();
                Ok(())
            })?;
            flood(&proxy)?;
        }
        stage.bring_to(Reach::Device, &migration)?;
        let mirrors = mirrors.as_array().context("no jobs")?;
        ensure!(mirrors.len() == 2, "{mirrors:?}");
        mirrors.iter().try_for_each(|job| proxy.say(&format!("{}\r\n", completed(job))))?;
        stage.calm()?;
        moved(&migration.ended(&stage.alpha)?)?;
        proxy.leave()?;
        stage.is_moved()
    })
}

/// The monitor goes while the guest is paused for the switchover, and comes back when all is over:
/// for `recover`, for an agent that is restarted, and in time for the roll-back and a further try.
#[test]
fn a_guest_whose_monitor_was_lost_in_the_pause_runs_again() -> Result<()> {
    with_lab("a_guest_whose_monitor_was_lost_in_the_pause_runs_again", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        lost_in_the_pause(&mut stage)?;
        let (code, text) = recover(&stage.alpha)?;
        ensure!(code == 0, "{code}: {text}");
        stage.is_as_before().context("after `recover`")?;

        lost_in_the_pause(&mut stage)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        wait_for("the guest to run again", SHORT, || {
            Ok((stage.source.qmp()?.status()? == "running").then_some(()))
        })?;
        stage.is_as_before().context("after a restart")?;

        let proxy = Proxy::before(&stage.source.agent_monitor())?;
        let migration = stage.reach_with(Reach::Switchover, &["--retry", "1", "--keep-source"])?;
        proxy.be_silent(true);
        proxy.cut();
        let reach = |phase: &str| migration.reach(&stage.alpha.socket(), phase, |_| true).map(drop);
        reach("roll-back")?;
        ensure!(stage.source.qmp()?.status()? != "running", "the guest was to be paused");
        proxy.be_silent(false);
        stage.calm()?;
        stage.pause_at_once_in_try(&migration, 2)?;
        let report = migration.ended(&stage.alpha)?;
        moved(&report)?;
        ensure!(report["notes"].to_string().contains("could not be reached for"), "{report}");
        proxy.leave()?;
        stage.is_moved()
    })
}

/// Ends a migration in the pause by taking its monitor away, which is there again at the end.
fn lost_in_the_pause(stage: &mut Stage) -> Result<()> {
    let mut proxy = Proxy::before(&stage.source.agent_monitor())?;
    let migration = stage.reach(Reach::Switchover)?;
    proxy.end();
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    let end = End::failed(&["switchover"], &["QEMU", "reached"]).leaves("web1");
    end.fits(&report)?;
    let left = leftovers(&report);
    ensure!(left.contains("is not known") && !left.contains("nowhere"), "{left}");
    ensure!(stage.source.is_running() && stage.source.qmp()?.status()? != "running", "it was to be paused");
    let (code, text) = recover(&stage.alpha)?;
    ensure!(code != 0 && text.contains("is not known"), "{code}: {text}");
    proxy.leave()
}

/// The monitor goes when the guest has been handed over. The old QEMU, which lives and is paused, is
/// named, and ended when it can be reached again.
#[test]
fn an_old_qemu_that_cannot_be_reached_is_named_and_ended_later() -> Result<()> {
    with_lab("an_old_qemu_that_cannot_be_reached_is_named_and_ended_later", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let mut proxy = Proxy::before(&stage.source.agent_monitor())?;
        let migration = stage.reach(Reach::HandOver)?;
        proxy.end();
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        let left = leftovers(&report);
        ensure!(left.contains("never continue it") && left.contains("is not known"), "{left}");
        ensure!(stage.source.qmp()?.status()? == "postmigrate");
        let (code, text) = recover(&stage.alpha)?;
        ensure!(code != 0 && text.contains("never continue it"), "{code}: {text}");
        proxy.leave()?;
        let (code, text) = recover(&stage.alpha)?;
        ensure!(code == 0, "{code}: {text}");
        stage.source.wait_ended()?;
        crate::support::proof::guest_continued(&stage.source, &stage.destination)?;
        stage.is_clean()
    })
}

/// A QEMU that stands still for longer than any one command may take: said to be slow, waited for,
/// and cleaned up whole.
#[test]
fn a_qemu_that_stands_still_is_slow_and_not_dead() -> Result<()> {
    with_lab("a_qemu_that_stands_still_is_slow_and_not_dead", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let pid = stage.source.pid().context("the guest's QEMU")?;
        let migration = stage.reach(Reach::Mirror)?;
        signal_pid(pid, Signal::SIGSTOP)?;
        let slow = |migration: &Migration| -> Result<Option<String>> {
            Ok(migration.now(&stage.alpha)?["slow"].as_str().map(str::to_owned))
        };
        let words = wait_for("QEMU to be called slow", SHORT, || slow(&migration))?;
        ensure!(words.contains("slow") && words.contains("has not answered for"), "{words}");
        migration.cancel(&stage.alpha)?;
        // For longer than one command of a clean-up once could take.
        std::thread::sleep(Duration::from_secs(11));
        let now = migration.now(&stage.alpha)?;
        ensure!(now["outcome"].is_null() && now["phase"] == "roll-back", "it was to wait for QEMU: {now}");
        ensure!(slow(&migration)?.is_some_and(|later| later != words), "it was to be shown: {now}");
        signal_pid(pid, Signal::SIGCONT)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        let end = End::cancelled(&["mirror"]);
        end.fits(&report)?;
        ensure!(report["slow"].is_null(), "{report}");
        stage.is_as_before()?;
        stage.moves()
    })
}
