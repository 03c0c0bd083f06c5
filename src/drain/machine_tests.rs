//! The machine of a drain: each rule by itself, and all of them under whatever may happen.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn drain(to: &[&str], at_once: usize, per_peer: usize, sizes: &[u64]) -> Drain {
    let request = serde_json::from_value(json!({ "to": to })).unwrap_or_else(|e| panic!("{e}"));
    let guests = sizes.iter().enumerate().map(|(n, size)| Guest::new(&format!("vm{n}"), Some(*size), true));
    Drain::new(Uuid::nil(), request, Limits { at_once, per_peer }, guests.collect(), 0)
}

/// Begins all that is wanted, under numbers from `next` on: who goes where.
fn begin_all(drain: &mut Drain, next: &mut u128) -> Vec<(String, String)> {
    let mut begun = Vec::new();
    while let Some(Wanted { vm, peer }) = drain.wanted() {
        let (vm, peer) = (vm.to_owned(), peer.to_owned());
        assert!(drain.begin(&vm, &peer, Uuid::from_u128(*next)));
        *next += 1;
        begun.push((vm, peer));
    }
    begun
}

fn stayed(after: After) -> End {
    End::Stayed { cause: "why".into(), after }
}

fn names(begun: &[(String, String)]) -> Vec<(&str, &str)> {
    begun.iter().map(|(vm, peer)| (vm.as_str(), peer.as_str())).collect()
}

fn state<'a>(drain: &'a Drain, vm: &str) -> &'a GuestState {
    drain.guests.iter().find(|guest| guest.vm == vm).map_or_else(|| panic!("no {vm}"), |guest| &guest.state)
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

#[test]
fn the_largest_go_first_to_the_peer_with_the_fewest_within_both_limits() {
    let mut one = drain(&["b", "c"], 3, 2, &[10, 30, 20, 20, 5]);
    let mut next = 0;
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm1", "b"), ("vm2", "c"), ("vm3", "b")]);
    one.ended(id(1), End::Moved { left: false });
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm0", "c")]);
    one.ended(id(0), End::Moved { left: false });
    one.ended(id(2), End::Moved { left: true });
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm4", "b")]);
    let mut narrow = drain(&["b"], 8, 1, &[1, 1]);
    assert_eq!(begin_all(&mut narrow, &mut 0).len(), 1, "one for each peer");
    let order: Vec<_> = forecast_of(&drain(&["b", "c"], 2, 1, &[1, 9, 4]));
    assert_eq!(order, ["vm1>b", "vm2>c", "vm0>c"], "c is free first");
}

fn forecast_of(drain: &Drain) -> Vec<String> {
    crate::drain::forecast(drain).into_iter().map(|(vm, peer)| format!("{vm}>{peer}")).collect()
}

/// What follows a migration that did not move its VM: another peer, or nothing.
#[test]
fn only_what_is_surely_as_it_was_is_tried_elsewhere() {
    for (after, expected) in [
        (After::Elsewhere, Some("c")),
        (After::PeerOut, Some("c")),
        (After::CutOff, Some("b")),
        (After::PeerFull, Some("b")),
        (After::Nowhere, None),
    ] {
        let mut one = drain(&["b", "c"], 4, 2, &[1]);
        begin_all(&mut one, &mut 0);
        one.ended(id(0), stayed(after));
        assert_eq!(one.wanted().map(|wanted| wanted.peer), expected, "{after:?}");
        assert_eq!(one.is_done(), expected.is_none(), "{after:?}");
    }
}

#[test]
fn what_is_ended_from_outside_again_and_again_counts_at_last() {
    for after in [After::CutOff, After::PeerFull] {
        let (mut one, mut next) = (drain(&["b", "c"], 4, 2, &[1]), 0);
        for expected in ["b", "b", "b", "b", "b", "b", "c"] {
            assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm0", expected)], "{after:?}");
            one.ended(id(next - 1), stayed(after));
        }
        assert!(one.is_done(), "{after:?}");
    }
}

#[test]
fn what_is_undecided_is_never_tried_elsewhere_however_it_ends() {
    let mut next = 0;
    for (end, moved) in [(End::Moved { left: false }, true), (stayed(After::Elsewhere), false)] {
        let mut one = drain(&["b", "c"], 4, 2, &[1]);
        begin_all(&mut one, &mut next);
        let migration = one.guests[0].migration().unwrap_or_default();
        one.ended(migration, End::Undecided { cause: "no word".into() });
        assert!(one.wanted().is_none() && one.is_done(), "nobody waits for it");
        one.ended(migration, end);
        assert!(one.wanted().is_none());
        assert_eq!(matches!(state(&one, "vm0"), GuestState::Moved { .. }), moved);
        assert_eq!(matches!(state(&one, "vm0"), GuestState::Stays { .. }), !moved);
    }
}

#[test]
fn a_peer_that_is_out_is_asked_when_no_other_is_left_and_a_full_one_gets_fewer() {
    let mut one = drain(&["b", "c"], 8, 3, &[4, 3, 2, 1]);
    let mut next = 0;
    assert_eq!(
        names(&begin_all(&mut one, &mut next)),
        [("vm0", "b"), ("vm1", "c"), ("vm2", "b"), ("vm3", "c")]
    );
    one.ended(id(0), stayed(After::PeerOut));
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm0", "c")]);
    // The last peer of this one is that which is out.
    one.ended(id(1), stayed(After::Elsewhere));
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm1", "b")]);
    one.ended(id(3), stayed(After::PeerFull));
    assert_eq!(one.wanted(), None, "c takes one at once, and has vm0");
    one.ended(id(4), End::Moved { left: false });
    assert_eq!(names(&begin_all(&mut one, &mut next)), [("vm3", "c")]);
}

#[test]
fn a_cancelled_drain_begins_nothing_and_tells_what_to_roll_back() {
    let mut one = drain(&["b"], 2, 2, &[3, 2, 1]);
    one.guests.push(Guest::new("other", None, true).busy(id(99)));
    begin_all(&mut one, &mut 0);
    assert_eq!(one.cancel(), [id(0), id(1)]);
    assert!(one.wanted().is_none() && !one.is_done());
    one.ended(id(0), stayed(After::CutOff));
    one.ended(id(1), End::Moved { left: false });
    one.freed(id(99), Freed::Here);
    assert!(one.is_done());
    assert_eq!(one.count(|state| matches!(state, GuestState::Stays { .. })), 3);
    assert_eq!(one.count(|state| matches!(state, GuestState::Moved { .. })), 1);
}

#[test]
fn a_vm_in_somebody_elses_migration_has_its_turn_after_that() {
    for (freed, waits) in [
        (Freed::Here, true),
        (Freed::Moved, false),
        (Freed::NotHere { cause: "it never came".into() }, false),
    ] {
        let mut one = drain(&["b"], 2, 2, &[]);
        one.guests.push(Guest::new("other", None, true).busy(id(7)));
        assert!(one.wanted().is_none() && !one.is_done());
        one.freed(id(7), freed);
        assert_eq!(one.wanted().is_some(), waits);
    }
}

fn any_end() -> impl Strategy<Value = End> {
    prop_oneof![
        3 => Just(End::Moved { left: false }),
        1 => Just(End::Undecided { cause: "no word".into() }),
        6 => prop_oneof![
            Just(After::Elsewhere),
            Just(After::PeerOut),
            Just(After::PeerFull),
            Just(After::CutOff),
            Just(After::Nowhere),
        ]
        .prop_map(stayed),
    ]
}

proptest! {
    /// Whatever ends how: the limits hold, no VM is in two migrations, none is begun again once it has moved, is
    /// undecided or stays, none has a peer twice, and all of it ends.
    #[test]
    fn whatever_happens_it_ends_within_its_limits(
        sizes in prop::collection::vec(0_u64..9, 0..9),
        peers in 1_usize..4,
        at_once in 1_usize..5,
        per_peer in 1_usize..4,
        ends in prop::collection::vec((any::<prop::sample::Index>(), any_end()), 600),
        restart in any::<u64>(),
    ) {
        let to = ["b", "c", "d"];
        let mut one = drain(&to[..peers], at_once, per_peer, &sizes);
        let mut next = 0;
        for (step, (which, end)) in ends.into_iter().enumerate() {
            let closed: Vec<_> = one.guests.iter().map(|guest| guest.state.clone()).collect();
            begin_all(&mut one, &mut next);
            for (guest, before) in one.guests.iter().zip(closed) {
                let is_closed = !matches!(before, GuestState::Waiting | GuestState::Moving { .. });
                prop_assert!(!is_closed || guest.state == before, "begun again: {before:?}");
            }
            let moving: Vec<_> = one.moving().map(|(_, migration)| migration).collect();
            prop_assert!(moving.len() <= at_once);
            for peer in &to[..peers] {
                prop_assert!(one.under_way_to(peer) <= per_peer);
            }
            if moving.is_empty() {
                prop_assert!(one.is_done(), "it stands still: {one:?}");
                break;
            }
            one.ended(*which.get(&moving), end);
            // The machine is what is on the disk, and nothing else.
            if (restart >> (step % 64)) & 1 == 1 {
                let text = serde_json::to_vec(&one).map_err(|e| TestCaseError::fail(e.to_string()))?;
                one = serde_json::from_slice(&text).map_err(|e| TestCaseError::fail(e.to_string()))?;
            }
        }
        prop_assert!(one.is_done());
        for guest in &one.guests {
            let mut tried: Vec<_> = guest.tries.iter().map(|tried| &tried.peer).collect();
            let all = tried.len();
            tried.sort();
            tried.dedup();
            prop_assert_eq!(tried.len(), all, "a peer was tried twice");
        }
    }
}
