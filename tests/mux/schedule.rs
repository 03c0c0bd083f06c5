//! What the scheduler promises: seen on the batches that it makes.

use std::collections::BTreeMap;
use std::time::Duration;

use vmferry_mux::mux::frame::{HEADER_LEN, Header, Kind, OPEN_LEN, RECORD_LEN};
use vmferry_mux::mux::{Batch, Class, Config, Event, Open, PerClass, RateLimit, StreamId};

use super::pair::{BULK, Pair, URGENT, content, events, take, wide};
use super::rng::Rng;

const MIB: u64 = 1 << 20;

/// Stream and payload length of each DATA frame, in order.
fn data_of(batch: &Batch) -> Vec<(StreamId, usize)> {
    let headers = batch.parts().iter().map(|part| Header::decode(&part.header));
    headers
        .filter(|header| header.kind == Kind::Data.to_wire())
        .map(|header| (StreamId(header.stream), header.len.into()))
        .collect()
}

fn open_all(pair: &mut Pair, opens: &[Open]) -> Vec<StreamId> {
    opens.iter().map(|open| pair.open(*open)).collect()
}

fn fill(pair: &mut Pair, id: StreamId, bytes: usize) {
    let sent = pair.dialer.stream_stats(id).unwrap();
    let offset = sent.sent_bytes + sent.send_queued_bytes as u64;
    pair.dialer.send(pair.now, id, content(id.0.into(), offset, bytes)).unwrap();
}

/// Makes batches while `refill` keeps the queues as it wants, and counts each stream's bytes.
fn shares(pair: &mut Pair, batches: usize, mut refill: impl FnMut(&mut Pair)) -> BTreeMap<StreamId, f64> {
    let mut batch = Batch::default();
    let mut bytes = BTreeMap::<StreamId, usize>::new();
    for _ in 0..batches {
        refill(pair);
        pair.now += Duration::from_millis(1);
        assert!(pair.dialer.poll_transmit(pair.now, &mut batch));
        for (id, len) in data_of(&batch) {
            *bytes.entry(id).or_default() += len;
        }
    }
    let all: usize = bytes.values().sum();
    bytes.into_iter().map(|(id, some)| (id, some as f64 / all as f64)).collect()
}

fn keep_full(pair: &mut Pair, ids: &[StreamId]) {
    for id in ids {
        if pair.dialer.stream_stats(*id).unwrap().send_queued_bytes < 256 << 10 {
            fill(pair, *id, 1 << 20);
        }
    }
}

fn close_to(share: f64, expected: f64) -> bool {
    (share - expected).abs() < 0.03
}

#[test]
fn urgent_data_waits_for_one_batch_at_most() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK, BULK, BULK, BULK, URGENT]);
    let (urgent, bulk) = ids.split_last().unwrap();
    let mut batch = Batch::default();
    for _ in 0..50 {
        keep_full(&mut pair, bulk);
        pair.dialer.poll_transmit(pair.now, &mut batch);
        fill(&mut pair, *urgent, 1000);
        pair.dialer.poll_transmit(pair.now, &mut batch);
        assert_eq!(data_of(&batch)[0], (*urgent, 1000));
    }
}

#[test]
fn weights_share_the_connection() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK, Open { weight: 48, ..BULK }]);
    let shared = shares(&mut pair, 500, |pair| keep_full(pair, &ids));
    assert!(close_to(shared[&ids[1]], 0.75), "{shared:?}");
    pair.dialer.set_priority(ids[0], Class::Bulk, 144);
    let shared = shares(&mut pair, 500, |pair| keep_full(pair, &ids));
    assert!(close_to(shared[&ids[1]], 0.25), "after the change: {shared:?}");
}

#[test]
fn a_priority_reaches_the_peer() {
    let mut pair = Pair::new(wide());
    let id = pair.open(BULK);
    pair.dialer.set_priority(id, Class::Urgent, 77);
    pair.exchange();
    let there = pair.acceptor.stream_stats(id).unwrap();
    assert_eq!((there.class, there.weight), (Class::Urgent, 77));
}

#[test]
fn many_streams_get_equal_shares() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK; 20]);
    let shared = shares(&mut pair, 500, |pair| keep_full(pair, &ids));
    for id in &ids {
        assert!((shared[id] - 0.05).abs() < 0.003, "{shared:?}");
    }
}

#[test]
fn a_quiet_stream_goes_before_the_backlog() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK; 11]);
    let (quiet, busy) = ids.split_last().unwrap();
    let mut batch = Batch::default();
    for _ in 0..30 {
        keep_full(&mut pair, busy);
        // All busy streams have their turns, and the quiet one leaves the ring.
        for _ in 0..20 {
            pair.dialer.poll_transmit(pair.now, &mut batch);
        }
        keep_full(&mut pair, busy);
        fill(&mut pair, *quiet, 500);
        pair.dialer.poll_transmit(pair.now, &mut batch);
        assert!(
            data_of(&batch)[0] == (*quiet, 500) || data_of(&batch)[1] == (*quiet, 500),
            "{:?}",
            data_of(&batch)
        );
    }
}

#[test]
fn feeding_a_stream_little_by_little_wins_nothing() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK; 9]);
    let (sly, busy) = ids.split_last().unwrap();
    let shared = shares(&mut pair, 500, |pair| {
        keep_full(pair, busy);
        if pair.dialer.stream_stats(*sly).unwrap().send_queued_bytes == 0 {
            fill(pair, *sly, 16_000);
        }
    });
    // A ninth is fair; being quiet in between may win half as much again, not a turn each time.
    assert!(shared[sly] < 0.18, "{shared:?}");
}

#[test]
fn data_waits_for_the_opening_that_did_not_fit() {
    let config = Config {
        batch_bytes: 5 * RECORD_LEN,
        batch_bytes_fast: 5 * RECORD_LEN,
        max_streams: 3000,
        budget_bytes: 1 << 30,
        pending_open_max: 3000,
        opens: RateLimit { per_second: 200, burst: 12_000 },
        ..Config::default()
    };
    let mut pair = Pair::new(config);
    // A batch has room for all openings but the last, and for a few bytes of data.
    let opening = HEADER_LEN + OPEN_LEN;
    let fit = 5 * RECORD_LEN / opening;
    assert!((HEADER_LEN + 1..opening).contains(&(5 * RECORD_LEN % opening)));
    let ids: Vec<_> = (0..=fit).map(|_| pair.dialer.open(pair.now, BULK).unwrap()).collect();
    fill(&mut pair, ids[fit], 5);
    pair.exchange();
    let there = pair.acceptor.stream_stats(ids[fit]).unwrap();
    assert_eq!(there.received_bytes, 5);
}

#[test]
fn urgent_streams_cannot_starve_the_rest() {
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[URGENT, BULK]);
    // 64 KiB in a millisecond; the burst passes first.
    shares(&mut pair, 300, |pair| keep_full(pair, &ids));
    let shared = shares(&mut pair, 2000, |pair| keep_full(pair, &ids));
    assert!(close_to(shared[&ids[0]], 0.10), "{shared:?}");
}

#[test]
fn urgent_streams_alone_are_not_held_back() {
    let mut pair = Pair::new(wide());
    let id = pair.open(URGENT);
    let mut batch = Batch::default();
    for _ in 0..100 {
        keep_full(&mut pair, &[id]);
        assert!(pair.dialer.poll_transmit(pair.now, &mut batch));
        assert!(batch.len_bytes() > 60 * 1024);
    }
}

#[test]
fn a_stalled_reader_stops_only_its_own_stream() {
    let mut pair = Pair::new(Config::default());
    let ids = open_all(&mut pair, &[BULK; 3]);
    let stalled = ids[0];
    let mut received = BTreeMap::<StreamId, usize>::new();
    for _ in 0..400 {
        for id in &ids {
            if pair.dialer.send_capacity(*id) > 0 {
                fill(&mut pair, *id, 64 << 10);
            }
        }
        pair.exchange();
        events(&mut pair.acceptor);
        for id in &ids[1..] {
            *received.entry(*id).or_default() += take(&mut pair.acceptor, pair.now, *id).len();
        }
    }
    let held = pair.acceptor.stream_stats(stalled).unwrap();
    assert_eq!(held.consumed_bytes, 0);
    assert!(held.received_bytes <= MIB, "a reader that takes nothing holds {}", held.received_bytes);
    assert!(received.values().all(|bytes| *bytes > 20 << 20), "{received:?}");
    assert_eq!(pair.dialer.stream_stats(stalled).unwrap().credit_stalls, 1);
    // And it goes on where it was.
    let more = take(&mut pair.acceptor, pair.now, stalled).len();
    pair.exchange();
    assert!(pair.acceptor.recv(stalled).is_some(), "nothing after the first {more} bytes");
}

/// Sends batches one every `each`, of one stream that always has more and two that have little.
fn batches(each: Duration, mut look: impl FnMut(&Batch)) {
    let mut rng = Rng::new(3);
    let mut pair = Pair::new(wide());
    let ids = open_all(&mut pair, &[BULK, BULK, URGENT]);
    let mut batch = Batch::default();
    for _ in 0..300 {
        keep_full(&mut pair, &ids[..1]);
        for id in &ids[1..] {
            let len = rng.size(3000);
            fill(&mut pair, *id, len);
        }
        pair.now += each;
        pair.dialer.poll_transmit(pair.now, &mut batch);
        look(&batch);
    }
}

#[test]
fn a_fast_connection_gets_whole_records_and_long_frames() {
    let mut full = 0;
    batches(Duration::from_millis(1), |batch| {
        assert_eq!(batch.len_bytes(), 64 << 10);
        full += batch.parts().iter().filter(|part| part.payload.len() > 3 * RECORD_LEN).count();
    });
    assert!(full > 150, "only {full} long frames");
}

#[test]
fn where_a_record_takes_time_no_frame_is_longer() {
    batches(Duration::from_millis(10), |batch| {
        for part in batch.parts() {
            assert!(HEADER_LEN + part.payload.len() <= RECORD_LEN);
        }
    });
}

#[test]
fn a_full_log_pauses_bulk_but_not_control_and_an_ack_goes_on() {
    // Only the sender's wish brings an ACK.
    let config = Config {
        replay_cap_bytes: 1 << 20,
        replay_reserve_bytes: 128 << 10,
        ack_bytes: usize::MAX,
        ack_frames: u32::MAX,
        ..wide()
    };
    let mut pair = Pair::new(config);
    let ids = open_all(&mut pair, &[BULK, URGENT]);
    pair.settle();
    fill(&mut pair, ids[0], 4 << 20);
    let lost = super::pair::drain(&mut pair.dialer, pair.now);
    let stats = pair.dialer.stats();
    assert!(stats.log_bytes <= (1 << 20) - (128 << 10) && lost.len() > 800 << 10, "{stats:?}");
    assert!(stats.log_stalls > 0);
    fill(&mut pair, ids[1], 1000);
    let mut batch = Batch::default();
    assert!(pair.dialer.poll_transmit(pair.now, &mut batch), "the reserve is not kept");
    assert_eq!(data_of(&batch), [(ids[1], 1000)]);
    // The frames have been received; the receiver's ACK is all that comes back.
    pair.acceptor.handle_input(pair.now, &lost).unwrap();
    let back = super::pair::drain(&mut pair.acceptor, pair.now);
    assert!(!back.is_empty(), "a sender with a full log asked for an ACK and got none");
    pair.dialer.handle_input(pair.now, &back).unwrap();
    assert!(pair.dialer.poll_transmit(pair.now, &mut batch), "the ACK wakes nobody");
    assert!(data_of(&batch).iter().any(|(id, _)| *id == ids[0]));
}

#[test]
fn a_full_queue_reports_when_there_is_room() {
    let start_credit = PerClass { urgent: 64 << 10, bulk: 64 << 10 };
    let mut pair = Pair::new(Config { start_credit, ..Config::default() });
    let id = pair.open(BULK);
    while pair.dialer.send_capacity(id) > 0 {
        fill(&mut pair, id, 100 << 10);
    }
    assert!(pair.dialer.send(pair.now, id, content(0, 0, 1)).is_err());
    events(&mut pair.dialer);
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [], "there is no credit, so no room");
    take(&mut pair.acceptor, pair.now, id);
    pair.exchange();
    assert_eq!(events(&mut pair.dialer), [Event::Writable { id }]);
}
