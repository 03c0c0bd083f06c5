//! One fault of a migration that must fail, and how. After each one the guest runs on the source and
//! nothing is left, so that cases can follow one another on one stage in any order.

use std::time::Instant;

use anyhow::{Context, Result};

use super::fault::{Fault, Lasts};
use super::{End, Reach, Stage};
use crate::support::process::LONG;

/// One fault and how the migration must end.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    reach: Reach,
    fault: Option<Fault>,
    lasts: Lasts,
    end: End,
}

impl Case {
    /// `fault` hits a migration that is held at `reach`, and is repaired at once.
    pub fn new(fault: Fault, reach: Reach, end: End) -> Self {
        Self { reach, fault: Some(fault), lasts: Lasts::INSTANT, end }
    }

    /// It fails by what the stage is made of.
    pub fn by_itself(reach: Reach, end: End) -> Self {
        Self { reach, fault: None, lasts: Lasts::INSTANT, end }
    }

    /// What is broken is repaired when the source has said the migration's end.
    pub fn until_the_end(self) -> Self {
        Self { lasts: Lasts::UntilTheEnd(LONG), ..self }
    }

    /// The same, and the migration is held until it has ended.
    pub fn held(self) -> Self {
        Self { lasts: Lasts::Held(LONG), ..self }
    }

    /// Lets it happen, and judges what the migration and the guest make of it.
    ///
    /// # Errors
    /// Anything is not as it must be; the error names the case.
    pub fn play(&self, stage: &mut Stage) -> Result<()> {
        let since = Instant::now();
        let fault = self.fault.map_or_else(|| "by itself".to_owned(), |fault| fault.to_string());
        let name = format!("{fault}, {:?}", self.reach);
        self.play_inner(stage).with_context(|| format!("case {name:?}"))?;
        eprintln!("  {name:<58} {:>6.1} s", since.elapsed().as_secs_f64());
        Ok(())
    }

    fn play_inner(&self, stage: &mut Stage) -> Result<()> {
        let migration = stage.reach(self.reach)?;
        if let Some(fault) = self.fault {
            fault.inflict(stage, &migration, self.lasts, true).context("the fault itself")?;
        }
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
