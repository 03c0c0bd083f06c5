//! The hand-over, proved: both machines are explored against each other over every loss,
//! duplication and reordering of messages, every crash, loss of power and failing disk, and over what
//! operators decide: rightly over a host that does not come back, rightly or not at any moment over one that may. The
//! same with a witness, of which the moves are lost or late, and with one that forgets.
//! The guest never runs twice, never belongs to nobody, and can always be decided over; after a decision that was
//! wrong only what its operator was told may be: after "here" anything, after "there" that the guest is lost. The
//! exploration is proved as well: machines and interpreters with a mistake each are found out.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here is a failure of the test"
)]

mod disk;
mod explore;
mod model;
mod mutants;
mod table;
mod witness;
mod world;

use explore::explore;
use mutants::Mutant;
use world::Scope;

/// Fewer would mean that the world has become a smaller one.
const STATES_MIN: usize = 1_600_000;
const STATES_OF_DECISIONS_MIN: usize = 1_100_000;
const STATES_WITH_A_WITNESS_MIN: usize = 1_000_000;

fn never_two_never_none_always_decidable(scope: Scope, states_min: usize) {
    let explored = explore(Mutant::None, scope);
    println!(
        "hand-over, {scope:?}: {} states, {} transitions, {} of the states decided",
        explored.states, explored.transitions, explored.decided
    );
    assert!(explored.wrong.is_none(), "{}", explored.wrong.unwrap_or_default());
    assert!(explored.states >= states_min, "only {} states", explored.states);
}

#[test]
fn never_two_never_none_always_decidable_with_failing_disks() {
    never_two_never_none_always_decidable(Scope::Disks, STATES_MIN);
}

#[test]
fn never_two_never_none_always_decidable_whatever_operators_decide() {
    never_two_never_none_always_decidable(Scope::Decisions, STATES_OF_DECISIONS_MIN);
}

#[test]
fn never_two_never_none_always_decidable_with_a_witness() {
    never_two_never_none_always_decidable(Scope::Witness, STATES_WITH_A_WITNESS_MIN);
}

/// Each takes minutes, and up to 1.5 GiB: `cargo test -p vmferry-handover -- --ignored --test-threads=1`.
mod everything {
    use super::*;

    #[test]
    #[ignore = "minutes, and up to 1.3 GiB: docs/witness.md has the command"]
    fn what_is_said_to_the_witness_comes_late() {
        never_two_never_none_always_decidable(Scope::LateWitness, 15_000_000);
    }

    #[test]
    #[ignore = "minutes, and up to 1.3 GiB: docs/witness.md has the command"]
    fn the_witness_forgets() {
        never_two_never_none_always_decidable(Scope::ForgetfulWitness, 2_900_000);
    }

    #[test]
    #[ignore = "minutes, and up to 1.3 GiB: docs/witness.md has the command"]
    fn there_is_a_witness_and_disks_fail() {
        never_two_never_none_always_decidable(Scope::WitnessAndDisks, 6_800_000);
    }

    #[test]
    #[ignore = "minutes, and up to 1.3 GiB: docs/witness.md has the command"]
    fn there_is_a_witness_and_operators_decide() {
        never_two_never_none_always_decidable(Scope::WitnessAndDecisions, 9_300_000);
    }
}

#[test]
fn every_mistake_is_found() {
    let missed: Vec<Mutant> = Mutant::ALL
        .into_iter()
        .filter(|mutant| {
            let explored = explore(*mutant, mutant.scope());
            let wrong = explored.wrong.unwrap_or_default();
            println!("{mutant:?} after {} states: {wrong}\n", explored.states);
            wrong.is_empty()
        })
        .collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// The write of the hand-over fails, it cannot be taken back, the destination cannot be told, and the
/// source's agent crashes. What the next one reads decides, and the guest has run nowhere by then.
#[test]
fn four_failures_at_once_run_nothing_twice() {
    use vmferry_handover::handover::Fate;
    use vmferry_handover::handover::{
        Ask, Known, Mark, Source, SourceEffect as Effect, SourceInput as Input, Written,
    };
    let mut source = Source::new();
    let mut effects = source.step(Input::Complete { witness: false }).expect("it is whole");
    assert_eq!(effects, [Effect::Write(Mark::HandedOver)]);
    for tried in [Mark::NeverRan, Mark::NeverRan] {
        effects = source.step(Input::Written(Written::InDoubt)).expect("a write ends");
        if let [Effect::Ask(Ask::Abort)] = effects[..] {
            // It is lost. The guest stays paused until the disk works.
            effects = source.step(Input::Again).expect("it tries again");
        }
        assert_eq!(effects, [Effect::Write(tried)], "the guest must not run before this is on the disk");
    }
    // The crash. The record is there: then the guest is the destination's, unless it never ran there.
    let (mut source, effects) = Source::restarted(Known { handed_over: true, ..Known::default() });
    assert_eq!(effects, [Effect::Write(Mark::HandedOver)]);
    assert_eq!(source.step(Input::Written(Written::Durable)).expect("written"), [Effect::Ask(Ask::Settle)]);
    assert_eq!(source.step(Input::Heard(Fate::Loaded)).expect("asked"), [Effect::Ask(Ask::Start)]);
    // It is not there: then nothing runs before it is proved that nobody will ever read it.
    let (mut source, effects) = Source::restarted(Known::default());
    assert_eq!(effects, [Effect::Write(Mark::NeverRan)]);
    let effects = source.step(Input::Written(Written::Durable)).expect("written");
    assert_eq!(effects, [Effect::Resume, Effect::Ask(Ask::Abort)]);
    // A source that takes that doubt for a failure runs the guest twice, and is found out.
    let wrong = explore(Mutant::SourceDoubtIsFailure, Scope::Disks).wrong.expect("the hole");
    assert!(wrong.contains("in doubt"), "{wrong}");
}

#[test]
fn the_table() {
    table::compare();
}
