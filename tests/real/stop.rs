//! An agent that is told to stop waits for what ends, and for nothing else: a question that nobody
//! answers is the next process's, and so is a source that is away.

use anyhow::{Result, ensure};

use crate::faults::{Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, with_lab};

/// The agent's own word when it gave up waiting.
const GAVE_UP: &str = "did not end in time";

fn stops_in_order(agent: &mut Agent) -> Result<()> {
    agent.terminate()?;
    let log = std::fs::read_to_string(agent.log())?;
    ensure!(log.contains("the agent ends") && !log.contains(GAVE_UP), "it waited in vain: {log}");
    Ok(())
}

#[test]
fn a_source_that_nobody_answers_is_left_to_the_next_process() -> Result<()> {
    with_lab("a_source_that_nobody_answers_is_left_to_the_next_process", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::HandOver)?;
        stage.bravo.kill()?;
        stops_in_order(&mut stage.alpha)?;
        stage.alpha.restart()?;
        let now = migration.now(&stage.alpha)?;
        ensure!(now["phase"] == "hand-over" && now["outcome"].is_null(), "{now}");
        let listed = stage.alpha.vmferry(&["list"])?;
        ensure!(listed.stdout.contains("hand-over"), "{listed:?}");
        stage.calm()?;
        stage.bravo.restart()?;
        stage.has_moved(&migration)
    })
}

#[test]
fn a_destination_whose_source_is_away_does_not_wait_for_it() -> Result<()> {
    with_lab("a_destination_whose_source_is_away_does_not_wait_for_it", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::HandOver)?;
        stage.alpha.kill()?;
        stage.calm()?;
        wait_for("the guest to run at the destination", LONG, || {
            Ok(stage.destination.console()?.last().map(drop))
        })?;
        wait_for("the end of the session", SHORT, || {
            let status = stage.bravo.api("/v1/status")?;
            Ok(field(&status, "/sessions")?.as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        stops_in_order(&mut stage.bravo)?;
        stage.bravo.restart()?;
        stage.alpha.restart()?;
        stage.has_moved(&migration)
    })
}
