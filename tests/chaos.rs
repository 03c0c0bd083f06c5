//! Faults of every kind, in every phase, and after each one: the guest runs on exactly one host, by
//! its own word, nothing that it wrote is lost, nothing is left over, and its next migration succeeds.
//! `make chaos` plays as many as it is told and prints a table; `make test` plays a few.

// Of the stage of tests/failures.rs only this.
#[allow(unreachable_pub)]
#[path = "faults/gate.rs"]
mod gate;
mod injection;
mod support;

use anyhow::Result;
use injection::{chaos, plan, record};
use support::with_lab;

#[test]
fn faults_around_the_hand_over() -> Result<()> {
    with_lab("faults_around_the_hand_over", |lab| {
        let records = chaos::play(lab, &plan::subset())?;
        eprintln!("{}", record::table(&records));
        Ok(())
    })
}
