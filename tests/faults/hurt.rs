//! The faults themselves. Each breaks one thing, and repairs it as far as an operator would.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::cut::{Cut, cut_stream};
use super::{Migration, Stage};
use crate::support::process::{SHORT, run};

/// An agent that is told to stop must be gone within this time, whatever it is at.
const STOPS_WITHIN: Duration = Duration::from_secs(60);

/// An operator cancels it.
pub fn cancel(stage: &mut Stage, migration: &Migration) -> Result<()> {
    migration.cancel(&stage.alpha)
}

/// An operator cancels it while the destination's QEMU is being started, which then goes on.
pub fn cancel_before_the_start(stage: &mut Stage, migration: &Migration) -> Result<()> {
    migration.cancel(&stage.alpha)?;
    stage.start.open();
    Ok(())
}

/// The destination's QEMU is killed.
pub fn kill_destination_qemu(stage: &mut Stage, _: &Migration) -> Result<()> {
    stage.destination.kill()
}

/// The stream of a disk is cut at the source.
pub fn cut_disk_at_source(stage: &mut Stage, _: &Migration) -> Result<()> {
    cut_stream(&stage.alpha, &stage.source, &stage.disk_streams[0], Cut::Disk)
}

/// The stream of a disk is cut at the destination.
pub fn cut_disk_at_destination(stage: &mut Stage, _: &Migration) -> Result<()> {
    cut_stream(&stage.bravo, &stage.destination, &stage.disk_streams[1], Cut::Disk)
}

/// The RAM's stream is cut at the source.
pub fn cut_ram_at_source(stage: &mut Stage, _: &Migration) -> Result<()> {
    cut_stream(&stage.alpha, &stage.source, &stage.disk_streams[0], Cut::Ram)
}

/// The RAM's stream is cut at the destination.
pub fn cut_ram_at_destination(stage: &mut Stage, _: &Migration) -> Result<()> {
    cut_stream(&stage.bravo, &stage.destination, &stage.disk_streams[1], Cut::Ram)
}

/// The destination's agent crashes and is started again once the source has given up.
pub fn kill_destination_agent(stage: &mut Stage, migration: &Migration) -> Result<()> {
    stage.bravo.kill()?;
    migration.ended(&stage.alpha)?;
    stage.bravo.restart()
}

/// The source's agent crashes and is started again.
pub fn kill_source_agent(stage: &mut Stage, _: &Migration) -> Result<()> {
    stage.alpha.kill()?;
    stage.alpha.restart()
}

/// Both agents crash; the source's comes back first.
pub fn kill_both_agents(stage: &mut Stage, _: &Migration) -> Result<()> {
    stage.bravo.kill()?;
    stage.alpha.kill()?;
    stage.alpha.restart()?;
    stage.bravo.restart()
}

/// The source's agent is told to stop.
pub fn stop_source_agent(stage: &mut Stage, _: &Migration) -> Result<()> {
    let since = std::time::Instant::now();
    stage.alpha.terminate()?;
    ensure!(since.elapsed() < STOPS_WITHIN, "the agent took {:?} to stop", since.elapsed());
    stage.alpha.restart()
}

/// The destination's agent is told to stop.
pub fn stop_destination_agent(stage: &mut Stage, _: &Migration) -> Result<()> {
    stage.bravo.terminate()?;
    stage.bravo.restart()
}

/// The disk with the source's journal is full from now on, and has room again at the end.
pub fn fill_journal(stage: &mut Stage, migration: &Migration) -> Result<()> {
    fn state(stage: &Stage) -> Result<&crate::support::Volume> {
        stage.state.as_ref().map(|volumes| &volumes[0]).context("this stage has no small state folders")
    }
    state(stage)?.fill()?;
    stage.calm()?;
    migration.ended(&stage.alpha)?;
    state(stage)?.empty()
}

/// The source's journal takes no further record until the migration has ended.
pub fn freeze_source_journal(stage: &mut Stage, migration: &Migration) -> Result<()> {
    let folder = stage.alpha.host().dir.clone();
    freeze(stage, migration, &folder.join(format!("state/migrations/{}.source.journal", migration.id)))
}

/// The destination's journal takes no further record until the migration has ended.
pub fn freeze_destination_journal(stage: &mut Stage, migration: &Migration) -> Result<()> {
    let folder = stage.bravo.host().dir.clone();
    freeze(stage, migration, &folder.join(format!("state/migrations/{}.destination.journal", migration.id)))
}

fn freeze(stage: &mut Stage, migration: &Migration, journal: &Path) -> Result<()> {
    let immutable = |flag: &str| run(Command::new("chattr").arg(flag).arg(journal), SHORT).map(drop);
    immutable("+i")?;
    stage.calm()?;
    let ended = migration.ended(&stage.alpha);
    immutable("-i")?;
    ended.map(drop)
}

/// Nothing but what the stage itself has: a destination's disk that is too small, say.
pub fn nothing(_: &mut Stage, _: &Migration) -> Result<()> {
    Ok(())
}
