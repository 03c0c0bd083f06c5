//! Lives of streams and sessions, step by step: openings, ends, deadlines, windows.

use std::time::Duration;

use bytes::Bytes;
use vmferry_mux::mux::{
    Code, Config, Event, OpenError, PerClass, Role, Session, SessionError, StreamError, StreamId,
};

use super::pair::{BULK, Pair, URGENT, content, drain, events, lone, take};

const MS: Duration = Duration::from_millis(1);

#[test]
fn each_direction_ends_by_itself() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.dialer.send(pair.now, id, content(1, 0, 5000)).unwrap();
    pair.dialer.finish(id);
    pair.exchange();
    assert_eq!(events(&mut pair.acceptor), [Event::Readable { id }, Event::Finished { id }]);
    assert_eq!(take(&mut pair.acceptor, pair.now, id), content(1, 0, 5000));
    pair.acceptor.send(pair.now, id, content(2, 0, 70_000)).unwrap();
    pair.acceptor.finish(id);
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [Event::Readable { id }, Event::Finished { id }]);
    assert_eq!(events(&mut pair.acceptor), [Event::Closed { id }]);
    assert_eq!(take(&mut pair.dialer, pair.now, id), content(2, 0, 70_000));
    assert_eq!(events(&mut pair.dialer), [Event::Closed { id }]);
    pair.settle();
    pair.assert_empty();
}

#[test]
fn data_and_end_may_come_before_the_answer() {
    let mut pair = Pair::new(Config::default());
    let id = pair.dialer.open(pair.now, BULK).unwrap();
    pair.dialer.send(pair.now, id, content(1, 0, 100)).unwrap();
    pair.dialer.finish(id);
    pair.exchange();
    assert_eq!(events(&mut pair.acceptor), [Event::Opened { id, open: BULK }]);
    assert_eq!(pair.acceptor.recv(id), None, "nothing is handed out before the answer");
    assert_eq!(pair.acceptor.send(pair.now, id, content(2, 0, 1)), Err(StreamError::NotAccepted(id)));
    pair.acceptor.accept(id).unwrap();
    assert_eq!(events(&mut pair.acceptor), [Event::Readable { id }, Event::Finished { id }]);
    assert_eq!(pair.acceptor.accept(id), Err(StreamError::NotOffered(id)));
}

#[test]
fn a_refusal_carries_its_code() {
    let mut pair = Pair::new(Config::default());
    let id = pair.dialer.open(pair.now, BULK).unwrap();
    pair.dialer.send(pair.now, id, content(1, 0, 100)).unwrap();
    pair.exchange();
    pair.acceptor.refuse(id, Code::Denied);
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [Event::Reset { id, code: Code::Denied }, Event::Closed { id }]);
    assert_eq!(events(&mut pair.acceptor), [Event::Opened { id, open: BULK }, Event::Closed { id }]);
    pair.settle();
    pair.assert_empty();
}

#[test]
fn a_stop_ends_one_direction_only() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.dialer.send(pair.now, id, content(1, 0, 100_000)).unwrap();
    pair.exchange();
    pair.acceptor.stop(id, Code::IoError);
    assert_eq!(pair.acceptor.recv(id), None, "what was received is dropped");
    pair.exchange();
    events(&mut pair.acceptor);
    assert_eq!(events(&mut pair.dialer), [Event::Stopped { id, code: Code::IoError }]);
    let ended = pair.dialer.send(pair.now, id, content(1, 0, 1)).unwrap_err();
    assert_eq!(ended, StreamError::Ended { id, code: Code::IoError });
    pair.acceptor.send(pair.now, id, content(2, 0, 3000)).unwrap();
    pair.acceptor.finish(id);
    pair.exchange();
    assert_eq!(take(&mut pair.dialer, pair.now, id), content(2, 0, 3000));
    pair.settle();
    pair.assert_empty();
}

#[test]
fn a_reset_ends_both_and_drops_what_waits() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.dialer.send(pair.now, id, content(1, 0, 200_000)).unwrap();
    pair.acceptor.send(pair.now, id, content(2, 0, 200_000)).unwrap();
    pair.exchange();
    events(&mut pair.dialer);
    pair.dialer.reset(id, Code::Cancelled);
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [Event::Closed { id }]);
    let seen = events(&mut pair.acceptor);
    assert_eq!(seen, [Event::Reset { id, code: Code::Cancelled }, Event::Closed { id }]);
    pair.settle();
    pair.assert_empty();
}

#[test]
fn a_slot_is_free_only_when_the_local_side_is_done() {
    let mut pair = Pair::new(Config::default());
    let held = pair.open(BULK);
    pair.dialer.send(pair.now, held, content(1, 0, 10_000)).unwrap();
    let unanswered = pair.dialer.open(pair.now, BULK).unwrap();
    pair.exchange();
    let chunk = pair.acceptor.recv(held).unwrap();
    pair.dialer.reset(held, Code::Cancelled);
    pair.dialer.reset(unanswered, Code::Cancelled);
    pair.exchange();
    assert_eq!(pair.dialer.stats().streams, 0);
    assert_eq!(pair.acceptor.stats().streams, 2, "the local side still holds a chunk and an offer");
    pair.acceptor.consumed(pair.now, held, chunk.len() as u64);
    let ended = pair.acceptor.accept(unanswered).unwrap_err();
    assert_eq!(ended, StreamError::Ended { id: unanswered, code: Code::Cancelled });
    pair.settle();
    pair.assert_empty();
}

#[test]
fn an_unanswered_stream_times_out_but_not_while_suspended() {
    let mut pair = Pair::new(Config::default());
    let id = pair.dialer.open(pair.now, BULK).unwrap();
    for _ in 0..20 {
        pair.exchange();
        pair.pass(Duration::from_secs(1));
    }
    pair.dialer.handle_disconnected(pair.now);
    pair.acceptor.handle_disconnected(pair.now);
    assert_eq!((pair.dialer.poll_timeout(), pair.acceptor.poll_timeout()), (None, None));
    pair.pass(Duration::from_secs(600));
    let (ours, theirs) = (pair.dialer.rx_seq(), pair.acceptor.rx_seq());
    pair.dialer.handle_reconnected(pair.now, theirs).unwrap();
    pair.acceptor.handle_reconnected(pair.now, ours).unwrap();
    for _ in 0..9 {
        pair.exchange();
        pair.pass(Duration::from_secs(1));
    }
    assert_eq!(events(&mut pair.dialer), []);
    pair.exchange();
    pair.pass(Duration::from_secs(1));
    pair.exchange();
    let expected = [Event::Reset { id, code: Code::Timeout }, Event::Closed { id }];
    assert_eq!(events(&mut pair.dialer), expected);
    pair.acceptor.refuse(id, Code::Refused);
    pair.settle();
    pair.assert_empty();
}

#[test]
fn a_farewell_lets_streams_finish_and_no_new_ones_begin() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.acceptor.go_away(Code::Shutdown, "bye\u{1b}[31m");
    let crossing = pair.dialer.open(pair.now, BULK).unwrap();
    pair.exchange();
    let seen = events(&mut pair.dialer);
    let text = "bye\u{fffd}[31m".to_owned();
    assert!(seen.contains(&Event::GoAway { code: Code::Shutdown, text }), "{seen:?}");
    assert!(seen.contains(&Event::Reset { id: crossing, code: Code::Refused }), "{seen:?}");
    assert_eq!(pair.dialer.open(pair.now, BULK), Err(OpenError::GoingAway));
    assert_eq!(pair.acceptor.open(pair.now, BULK), Err(OpenError::GoingAway));
    assert!(!pair.acceptor.is_drained());
    pair.dialer.finish(id);
    pair.acceptor.finish(id);
    pair.settle();
    assert!(pair.acceptor.is_drained() && pair.dialer.is_drained());
    pair.assert_empty();
}

#[test]
fn a_farewell_is_said_again_on_a_new_connection() {
    let mut pair = Pair::new(Config::default());
    pair.acceptor.go_away(Code::Shutdown, "");
    drain(&mut pair.acceptor, pair.now);
    pair.acceptor.handle_reconnected(pair.now, 0).unwrap();
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [Event::GoAway { code: Code::Shutdown, text: String::new() }]);
}

#[test]
fn a_detached_connection_is_known_as_such() {
    let mut pair = Pair::new(Config::default());
    pair.dialer.detach();
    pair.exchange();
    assert!(pair.acceptor.is_detached_by_peer() && !pair.dialer.is_detached_by_peer());
}

#[test]
fn openings_are_limited_by_count_pending_and_rate() {
    let config = Config { max_streams: 3, ..Config::default() };
    let mut pair = Pair::with(Config::default(), config);
    let ids: Vec<_> = (0..3).map(|_| pair.open(BULK)).collect();
    assert_eq!(pair.dialer.open(pair.now, BULK), Err(OpenError::Streams { max: 3 }));
    pair.dialer.reset(ids[0], Code::Cancelled);
    pair.exchange();
    pair.open(BULK);

    let mut pair = Pair::new(Config { pending_open_max: 5, ..Config::default() });
    (0..5).for_each(|_| assert!(pair.dialer.open(pair.now, BULK).is_ok()));
    assert_eq!(pair.dialer.open(pair.now, BULK), Err(OpenError::Pending { max: 5 }));

    let mut pair = Pair::new(Config::default());
    let mut opened = 0;
    while let Ok(id) = pair.dialer.open(pair.now, BULK) {
        opened += 1;
        pair.exchange();
        pair.acceptor.refuse(id, Code::Refused);
        pair.exchange();
    }
    assert_eq!(opened, 256);
    assert_eq!(pair.dialer.open(pair.now, BULK), Err(OpenError::Rate));
    pair.pass(20 * MS);
    assert!(pair.dialer.open(pair.now, BULK).is_ok());
}

#[test]
fn every_stream_can_be_ended_at_once() {
    // An agent that shuts down resets all of them: that is no abuse, nor are the answers.
    let mut pair = Pair::new(Config::default());
    let mut ids = Vec::new();
    while ids.len() < 1024 {
        match pair.dialer.open(pair.now, BULK) {
            Ok(id) => ids.push(id),
            Err(_) => pair.pass(20 * MS),
        }
        pair.exchange();
        for event in events(&mut pair.acceptor) {
            if let Event::Opened { id, .. } = event {
                pair.acceptor.accept(id).unwrap();
            }
        }
    }
    for id in &ids {
        pair.dialer.stop(*id, Code::Cancelled);
        pair.acceptor.stop(*id, Code::Cancelled);
    }
    pair.exchange();
    for id in &ids {
        pair.dialer.reset(*id, Code::Cancelled);
        pair.acceptor.reset(*id, Code::Cancelled);
    }
    pair.settle();
    pair.assert_empty();
}

fn deadline(session: &Session, now: std::time::Instant) -> Duration {
    session.poll_timeout().unwrap() - now
}

#[test]
fn silence_is_asked_about_and_then_is_death() {
    let start = std::time::Instant::now();
    let mut session = lone(Role::Dialer, Config::default(), start);
    assert!(!drain(&mut session, start).is_empty(), "the round trip is measured at once");
    assert_eq!(deadline(&session, start), Duration::from_secs(1));
    for second in 1..5 {
        let now = start + Duration::from_secs(second);
        session.handle_timeout(now).unwrap();
        assert_eq!(drain(&mut session, now).len(), 16, "a PING after {second} s");
        assert!(deadline(&session, now) > Duration::ZERO);
    }
    let now = start + Duration::from_secs(5);
    let dead = session.handle_timeout(now).unwrap_err();
    assert_eq!(dead, SessionError::Dead { silent: Duration::from_secs(5) });
    assert!(dead.is_resumable());
    session.handle_reconnected(now, 0).unwrap();
    session.handle_timeout(now + MS).unwrap();
}

#[test]
fn an_impatient_session_asks_before_it_gives_up() {
    let start = std::time::Instant::now();
    let config = Config { dead_after: Duration::from_millis(900), ..Config::default() };
    let mut session = lone(Role::Dialer, config, start);
    drain(&mut session, start);
    assert_eq!(deadline(&session, start), Duration::from_millis(300));
}

#[test]
fn a_timeout_that_cannot_be_sent_does_not_come_again() {
    let start = std::time::Instant::now();
    let mut session = lone(Role::Dialer, Config::default(), start);
    // The socket is full: nothing is taken from the session.
    for ms in [0, 1000, 1001, 2000] {
        let now = start + ms * MS;
        session.handle_timeout(now).unwrap();
        assert!(deadline(&session, now) > MS, "busy loop after {ms} ms");
    }
}

#[test]
fn a_peer_that_never_acknowledges_is_found_out() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.settle();
    pair.dialer.send(pair.now, id, content(1, 0, 10)).unwrap();
    drain(&mut pair.dialer, pair.now);
    for _ in 0..29 {
        pair.now += Duration::from_secs(1);
        pair.dialer.handle_input(pair.now, &PONG).unwrap();
        pair.dialer.handle_timeout(pair.now).unwrap();
        drain(&mut pair.dialer, pair.now);
    }
    pair.now += Duration::from_secs(1);
    pair.dialer.handle_input(pair.now, &PONG).unwrap();
    let stalled = pair.dialer.handle_timeout(pair.now).unwrap_err();
    assert_eq!(stalled.code(), Code::AckStall);
    assert!(!stalled.is_resumable());
}

const PONG: [u8; 16] = [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn acks_come_late_alone_and_early_in_company() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.settle();
    let before = pair.acceptor.stats().acks_sent;
    pair.dialer.send(pair.now, id, content(1, 0, 10)).unwrap();
    pair.exchange();
    assert_eq!(pair.acceptor.stats().acks_sent, before, "alone it waits");
    assert_eq!(deadline(&pair.acceptor, pair.now), 5 * MS);
    pair.pass(5 * MS);
    pair.exchange();
    assert_eq!(pair.acceptor.stats().acks_sent, before + 1);
    pair.dialer.send(pair.now, id, content(1, 10, 10)).unwrap();
    pair.exchange();
    pair.acceptor.send(pair.now, id, content(2, 0, 10)).unwrap();
    pair.exchange();
    assert_eq!(pair.acceptor.stats().acks_sent, before + 2);
    assert_eq!(pair.dialer.stats().log_bytes, 0);
}

#[test]
fn the_round_trip_is_measured() {
    let mut pair = Pair::new(Config::default());
    for ms in [30, 10, 20] {
        let there = drain(&mut pair.dialer, pair.now);
        pair.now += ms * MS;
        pair.acceptor.handle_input(pair.now, &there).unwrap();
        let back = drain(&mut pair.acceptor, pair.now);
        pair.dialer.handle_input(pair.now, &back).unwrap();
        pair.pass(Duration::from_secs(1));
    }
    assert_eq!(pair.dialer.stats().rtt_min, Some(10 * MS));
    assert_eq!(pair.dialer.stats().rtt_last, Some(20 * MS));
}

static CHUNK: [u8; 64 << 10] = [7; 64 << 10];

/// Moves data for so many rounds of a millisecond; the reader takes at most `reads` bytes a round.
fn flow(pair: &mut Pair, id: StreamId, rounds: usize, reads: usize) -> u64 {
    let mut taken = 0;
    let mut waiting = 0;
    for _ in 0..rounds {
        while pair.dialer.send_capacity(id) > 0 {
            pair.dialer.send(pair.now, id, Bytes::from_static(&CHUNK)).unwrap();
            let there = drain(&mut pair.dialer, pair.now);
            pair.acceptor.handle_input(pair.now, &there).unwrap();
        }
        pair.pass(MS);
        while waiting < reads {
            let Some(chunk) = pair.acceptor.recv(id) else { break };
            waiting += chunk.len();
        }
        let now = waiting.min(reads);
        waiting -= now;
        taken += now as u64;
        pair.acceptor.consumed(pair.now, id, now as u64);
        pair.exchange();
    }
    taken
}

fn window(pair: &Pair, id: StreamId) -> u64 {
    pair.acceptor.stream_stats(id).unwrap().recv_window_bytes
}

#[test]
fn a_window_grows_to_its_cap_while_it_limits() {
    for (open, cap) in [(BULK, 64 << 20), (URGENT, 256 << 10)] {
        let mut pair = Pair::new(Config::default());
        let id = pair.open(open);
        flow(&mut pair, id, 40, usize::MAX);
        assert_eq!(window(&pair, id), cap, "{open:?}");
    }
}

#[test]
fn a_slow_reader_gets_no_larger_window() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    let taken = flow(&mut pair, id, 1000, 10_000);
    assert_eq!(taken, 10_000_000);
    assert_eq!(window(&pair, id), 1 << 20);
    let held = pair.acceptor.stats();
    assert!(held.credit_outstanding_bytes <= 1 << 20, "{held:?}");
}

#[test]
fn an_idle_stream_begins_small_again() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    flow(&mut pair, id, 20, usize::MAX);
    assert!(window(&pair, id) > 4 << 20);
    for _ in 0..11 {
        pair.pass(Duration::from_secs(1));
        pair.exchange();
    }
    pair.dialer.send(pair.now, id, content(1, 0, 10)).unwrap();
    pair.exchange();
    assert_eq!(window(&pair, id), 64 << 10);
}

#[test]
fn windows_share_the_budget_and_every_stream_goes_on() {
    let config = Config {
        max_streams: 8,
        initial_credit: PerClass { urgent: 64 << 10, bulk: 64 << 10 },
        budget_bytes: 4 << 20,
        ..Config::default()
    };
    let mut pair = Pair::new(config);
    let ids: Vec<_> = (0..8).map(|_| pair.open(BULK)).collect();
    for _ in 0..30 {
        for id in &ids {
            assert!(flow(&mut pair, *id, 3, usize::MAX) > 64 << 10, "stream {} starves", id.0);
            let stats = pair.acceptor.stats();
            assert!(stats.credit_committed_bytes <= 4 << 20, "{stats:?}");
        }
    }
    assert!(ids.iter().any(|id| window(&pair, *id) > 64 << 10), "no window ever grows");
}

#[test]
fn a_large_window_makes_room_for_a_later_stream() {
    let config = Config { max_streams: 8, budget_bytes: 6 << 20, ..Config::default() };
    let mut pair = Pair::new(config);
    let first = pair.open(BULK);
    flow(&mut pair, first, 100, usize::MAX);
    let alone = window(&pair, first);
    let second = pair.open(BULK);
    for _ in 0..100 {
        flow(&mut pair, first, 1, usize::MAX);
        flow(&mut pair, second, 1, usize::MAX);
    }
    let both = [first, second].map(|id| window(&pair, id));
    assert_eq!(alone, 4 << 20);
    assert!(both[0] <= 2 * both[1] && both[1] <= 2 * both[0], "{alone} alone, then {both:?}");
}
