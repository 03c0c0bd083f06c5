//! The hand-over, proved: both machines are explored against each other over every loss,
//! duplication and reordering of messages, every crash, loss of power and failing disk. The guest
//! never runs twice, never belongs to nobody, and can always be decided over. The exploration is
//! proved as well: machines with a mistake each are found out.

#![allow(clippy::expect_used, unreachable_pub)]

#[path = "handover/explore.rs"]
mod explore;
#[path = "handover/mutants.rs"]
mod mutants;
#[path = "handover/table.rs"]
mod table;
#[path = "handover/world.rs"]
mod world;

use explore::explore;
use mutants::Mutant;

/// Fewer would mean that the world has become a smaller one.
const STATES_MIN: usize = 100_000;

#[test]
fn never_two_never_none_always_decidable() {
    let explored = explore(Mutant::None);
    println!(
        "hand-over: {} states, {} transitions, {} of the states decided",
        explored.states, explored.transitions, explored.decided
    );
    assert!(explored.wrong.is_none(), "{}", explored.wrong.unwrap_or_default());
    assert!(explored.states >= STATES_MIN, "only {} states", explored.states);
}

#[test]
fn every_mistake_is_found() {
    let missed: Vec<Mutant> = Mutant::ALL
        .into_iter()
        .filter(|mutant| {
            let explored = explore(*mutant);
            let wrong = explored.wrong.unwrap_or_default();
            println!("{mutant:?} after {} states: {wrong}\n", explored.states);
            wrong.is_empty()
        })
        .collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn the_table() {
    table::compare();
}
