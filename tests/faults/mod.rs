//! Faults of a migration, and the stage that they happen on: two hosts with agents, one guest, and
//! ways to bring a migration to any phase and hold it there. A case is one fault; after each one the
//! guest must run on the source and nothing may be left, so that any order of cases can follow.

// Each user of the stage has its own part of it.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod cut;
pub mod gate;
pub mod hurt;
pub mod migration;
pub mod proxy;
pub mod stage;

pub use migration::{End, Migration};
pub use stage::{Plan, Stage};

use anyhow::{Context, Result};

/// Where a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The destination starts its QEMU.
    Prepare,
    /// Every disk's copy is under way.
    Mirror,
    /// The RAM's copy is under way and never gets done.
    Precopy,
    /// The guest is paused and its disks lag seconds behind.
    Switchover,
    /// The guest is paused and the rest of its RAM takes seconds.
    Device,
    /// Handed over; the destination's `before_start` command is at work.
    HandOver,
}

/// One fault and how the migration must end.
pub struct Case {
    /// For the log.
    pub name: &'static str,
    /// Where it hits.
    pub reach: Reach,
    /// What happens. Whatever it breaks it repairs, as an operator would, before it returns.
    pub fault: fn(&mut Stage, &Migration) -> Result<()>,
    /// The end that the source must report.
    pub end: End,
}

impl Case {
    /// Lets it happen, and judges what the migration and the guest make of it.
    ///
    /// # Errors
    /// Anything is not as it must be; the error names the case.
    pub fn play(&self, stage: &mut Stage) -> Result<()> {
        let since = std::time::Instant::now();
        self.play_inner(stage).with_context(|| format!("case {:?}", self.name))?;
        eprintln!("  {:<58} {:>6.1} s", self.name, since.elapsed().as_secs_f64());
        Ok(())
    }

    fn play_inner(&self, stage: &mut Stage) -> Result<()> {
        let migration = stage.reach(self.reach)?;
        (self.fault)(stage, &migration).context("the fault itself")?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        self.end.fits(&report)?;
        stage.is_as_before().with_context(|| format!("after {report}"))
    }
}

/// Plays cases one after the other on one stage; the guest lives through all of them.
///
/// # Errors
/// Those of the first case that fails.
pub fn play_all(stage: &mut Stage, cases: &[Case]) -> Result<()> {
    cases.iter().try_for_each(|case| case.play(stage))
}
