//! Faults of every kind, in every phase, and after each one: the guest runs on exactly one host, by
//! its own word, nothing that it wrote is lost, nothing is left over, and its next migration succeeds.
//! `make chaos` plays as many as it is told and prints a table; `make test` plays a few.

use crate::faults::chaos::rng::number_from_env;
use crate::faults::chaos::{self, plan, record};
use anyhow::{Context, Result};

/// `make chaos` sets it, and how many injections there are to be.
const SEED: &str = "CHAOS_SEED";
const INJECTIONS: &str = "CHAOS_INJECTIONS";
/// Where the table goes.
const TABLE: &str = "CHAOS_TABLE";

#[test]
fn faults_around_the_hand_over() -> Result<()> {
    let records = chaos::play("faults_around_the_hand_over", &plan::subset())?;
    println!("{}", record::table(&records));
    chaos::as_promised(&records)
}

#[test]
#[ignore = "takes the better part of an hour: make chaos"]
fn faults_drawn_from_a_seed() -> Result<()> {
    let number = |name| number_from_env(name).with_context(|| format!("{name} is not set"));
    let (seed, count) = (number(SEED)?, number(INJECTIONS)?);
    println!("seed {seed}, {count} injections");
    let drawn = chaos::drawn("faults_drawn_from_a_seed", seed, usize::try_from(count)?);
    let (records, table) = drawn.context(format!("seed {seed}"))?;
    println!("{table}");
    if let Some(path) = std::env::var_os(TABLE) {
        std::fs::write(path, table)?;
    }
    chaos::as_promised(&records)
}
