//! `vmferry recover` with real QEMUs: what is undecided is shown with what both hosts know, an
//! operator's decision is taken and journalled, and a journal that is not believed keeps its VM.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::faults::{End, Migration, Plan, Reach, Stage};
use crate::support::pair::journals;
use crate::support::process::{SHORT, run_any, wait_for};
use crate::support::{Agent, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The source says that it is undecided soon after the last answer is missed.
const UNDECIDED_WITHIN: Duration = Duration::from_secs(90);

fn recover(agent: &Agent, words: &[&str]) -> Result<(i32, String)> {
    let outcome = agent.vmferry(&[&["recover"], words].concat())?;
    Ok((outcome.code, format!("{}{}", outcome.stdout, outcome.stderr)))
}

fn undecided(stage: &Stage, migration: &Migration) -> Result<()> {
    wait_for("the source to say that it is undecided", UNDECIDED_WITHIN, || {
        Ok((migration.now(&stage.alpha)?["outcome"]["result"] == "undecided").then_some(()))
    })
}

/// The whole host of the destination is lost at the hand-over, before its guest ran.
#[test]
fn an_operator_decides_when_the_destination_is_lost() -> Result<()> {
    with_lab("an_operator_decides_when_the_destination_is_lost", |lab| {
        let mut stage = Stage::set_up(lab, Plan { undecided_s: 3, rate: 60, ..Plan::ORDINARY })?;
        let (code, text) = recover(&stage.alpha, &[])?;
        ensure!(code == 0 && text.contains("nothing is open"), "{code}: {text}");
        let migration = stage.reach(Reach::HandOver)?;
        let (code, text) = recover(&stage.bravo, &["--look"])?;
        ensure!(code == 0 && text.contains("under way") && text.contains("starting"), "{code}: {text}");
        let (code, text) = recover(&stage.alpha, &[&migration.id, "--force", "here", "--yes"])?;
        ensure!(code == 1 && text.contains("not undecided"), "nothing is open yet: {code}: {text}");
        stage.bravo.kill()?;
        stage.destination.kill()?;
        stage.calm()?;
        undecided(&stage, &migration)?;
        let (code, text) = recover(&stage.alpha, &[])?;
        ensure!(code == 4, "{code}: {text}");
        for word in ["UNDECIDED", "handed-over", "cannot be reached", "not known", "--force here|there"] {
            ensure!(text.contains(word), "{word} is missing: {text}");
        }
        let id = migration.id.clone();
        let (code, text) = recover(&stage.alpha, &[&id, "--force", "here"])?;
        ensure!(code == 2 && text.contains("--yes"), "without a word of assent: {code}: {text}");
        ensure!(stage.source.qmp()?.status()? != "running");
        let (code, text) = recover(&stage.alpha, &[&id, "--force", "here", "--yes"])?;
        ensure!(text.contains("decided: web1 is this host's"), "{code}: {text}");
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "failed", "{report}");
        ensure!(stage.source.qmp()?.status()? == "running");
        stage.source.wait_more(20)?;
        let forced: Vec<Value> = journals(&stage.alpha)?.concat();
        let forced =
            forced.iter().find_map(|line| line["record"].get("forced")).context("no record of it")?;
        ensure!(forced["side"] == "here" && forced["uid"] == 0 && forced["at"].is_i64(), "{forced}");
        let (code, text) = recover(&stage.alpha, &[])?;
        ensure!(code == 0, "{code}: {text}");
        Ok(())
    })
}

/// The source's agent was restarted, and hears nothing of a destination whose `before_start` is at work. That
/// host has begun to start the guest, and says so to whoever asks: an operator cannot decide against it.
#[test]
fn a_decision_is_not_taken_against_the_other_hosts_word() -> Result<()> {
    with_lab("a_decision_is_not_taken_against_the_other_hosts_word", |lab| {
        let mut stage = Stage::set_up(lab, Plan { undecided_s: 1, rate: 60, ..Plan::ORDINARY })?;
        let migration = stage.reach(Reach::HandOver)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        undecided(&stage, &migration)?;
        let (code, text) = recover(&stage.alpha, &[&migration.id, "--force", "here", "--yes"])?;
        ensure!(code == 1, "{code}: {text}");
        for word in ["the decision was not taken", "says of VM web1: starting", "run twice"] {
            ensure!(text.contains(word), "{word} is missing: {text}");
        }
        ensure!(stage.source.qmp()?.status()? != "running");
        let records: Vec<Value> = journals(&stage.alpha)?.concat();
        ensure!(records.iter().all(|line| line["record"].get("forced").is_none()), "{records:?}");
        stage.calm()?;
        stage.has_moved(&migration)
    })
}

/// The destination's agent dies while its start command waits: the next agent ends that command, before
/// it has started a QEMU that nobody waits for any more.
#[test]
fn the_start_command_of_a_dead_agent_is_ended() -> Result<()> {
    with_lab("the_start_command_of_a_dead_agent_is_ended", |lab| {
        let mut stage = Stage::set_up(lab, Plan { rate: 60, ..Plan::ORDINARY })?;
        let migration = stage.reach(Reach::Prepare)?;
        let script = stage.start().script().to_owned();
        let waits = || anyhow::Ok(run_any(Command::new("pgrep").arg("-f").arg(&script), SHORT)?.code == 0);
        stage.bravo.kill()?;
        ensure!(waits()?, "its start command was to outlive it");
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["prepare"], &["session", "bravo"]).fits(&report)?;
        stage.bravo.restart()?;
        wait_for("the end of the start command", SHORT, || Ok((!waits()?).then_some(())))?;
        let (code, text) = recover(&stage.bravo, &[])?;
        ensure!(code == 0, "{code}: {text}");
        stage.calm()?;
        stage.is_as_before()?;
        ensure!(stage.destination.starts() == 0, "a QEMU was started for nobody");
        stage.moves()
    })
}

#[test]
fn a_journal_that_is_not_believed_keeps_its_vm() -> Result<()> {
    with_lab("a_journal_that_is_not_believed_keeps_its_vm", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::Mirror)?;
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        migration.ended(&stage.alpha)?;
        let folder = stage.alpha.host().dir.join("state/migrations");
        let path = folder.join(format!("{}.source.journal", migration.id));
        let good = fs::read_to_string(&path)?;
        let damaged = good.replacen("mirror", "mirrow", 1);
        ensure!(damaged != good);
        stage.alpha.kill()?;
        fs::write(&path, &damaged)?;
        stage.alpha.restart()?;
        let (code, text) = recover(&stage.alpha, &[])?;
        let named =
            text.contains("NOT BELIEVED") && text.contains("web1") && text.contains("damaged in line");
        ensure!(code == 4 && named, "{code}: {text}");
        let outcome = stage.alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        let text = format!("{}{}", outcome.stdout, outcome.stderr);
        ensure!(outcome.code == 1 && text.contains("cannot be known") && text.contains("recover"), "{text}");
        ensure!(fs::read_to_string(&path)? == damaged, "it was changed");
        fs::rename(&path, folder.join("away"))?;
        let (code, text) = wait_for("the VM to be free", SHORT, || {
            let found = recover(&stage.alpha, &[])?;
            Ok((found.0 == 0).then_some(found))
        })?;
        ensure!(code == 0, "{text}");
        stage.moves()
    })
}
