//! What shares and limits promise: seen on the batches that a session makes on a clock of the test's.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use vmferry_mux::mux::frame::{HEADER_LEN, Header, Kind};
use vmferry_mux::mux::{Batch, Class, Config, MigrationId, Open, Share, SharedLimit, StreamId, purpose};

use super::pair::{BULK, Pair, URGENT, content, wide};

const MIB: u64 = 1 << 20;
const ONE: MigrationId = [1; 16];
const OTHER: MigrationId = [2; 16];

/// The peer of these tests is silent.
fn patient() -> Config {
    let long = Duration::from_secs(3600);
    Config { dead_after: long, ack_stall_after: long, ..wide() }
}

fn of(migration: MigrationId, stream_purpose: u16) -> Open {
    Open { migration, purpose: stream_purpose, ..BULK }
}

/// Sends as much as may be sent, sleeping when the session says so, and keeps the streams full.
struct Sender {
    pair: Pair,
    full: Vec<StreamId>,
    sent: BTreeMap<StreamId, u64>,
}

impl Sender {
    fn new(opens: &[Open]) -> (Self, Vec<StreamId>) {
        let mut pair = Pair::new(patient());
        let ids: Vec<_> = opens.iter().map(|open| pair.open(*open)).collect();
        (Self { pair, full: ids.clone(), sent: BTreeMap::new() }, ids)
    }

    /// Runs for so long on a connection that takes `per_ms` bytes in a millisecond.
    fn run(&mut self, long: Duration, per_ms: u64) {
        let until = self.pair.now + long;
        let mut batch = Batch::default();
        while self.pair.now < until {
            self.refill();
            let session = &mut self.pair.dialer;
            session.handle_timeout(self.pair.now).unwrap();
            if session.poll_transmit(self.pair.now, &mut batch) {
                self.pair.now += Duration::from_nanos(batch.len_bytes() as u64 * 1_000_000 / per_ms);
                self.count(&batch);
            } else {
                let next = session.poll_timeout().unwrap();
                assert!(next > self.pair.now, "a deadline that has passed and lets nothing leave");
                self.pair.now = next.min(until);
            }
        }
    }

    fn refill(&mut self) {
        for id in &self.full {
            let stats = self.pair.dialer.stream_stats(*id).unwrap();
            if stats.send_queued_bytes < 256 << 10 {
                let offset = stats.sent_bytes + stats.send_queued_bytes as u64;
                self.pair.dialer.send(self.pair.now, *id, content(1, offset, 1 << 20)).unwrap();
            }
        }
    }

    fn count(&mut self, batch: &Batch) {
        for header in batch.parts().iter().map(|part| Header::decode(&part.header)) {
            if header.kind == Kind::Data.to_wire() {
                let bytes = HEADER_LEN as u64 + u64::from(header.len);
                *self.sent.entry(StreamId(header.stream)).or_default() += bytes;
            }
        }
    }

    fn take(&mut self) -> BTreeMap<StreamId, u64> {
        std::mem::take(&mut self.sent)
    }

    fn share(&mut self, migration: MigrationId, share: Share) {
        self.pair.dialer.set_share(migration, share);
    }

    fn limit(&self, bytes_per_s: u64) -> Option<SharedLimit> {
        NonZeroU64::new(bytes_per_s).map(|rate| SharedLimit::new(rate, self.pair.now))
    }
}

fn sum(sent: &BTreeMap<StreamId, u64>, ids: &[StreamId]) -> f64 {
    ids.iter().map(|id| sent.get(id).copied().unwrap_or_default() as f64).sum()
}

fn assert_within(value: f64, expected: f64, part: f64, what: &str) {
    assert!((value / expected - 1.0).abs() <= part, "{what}: {value} instead of {expected}");
}

const SECOND: Duration = Duration::from_secs(1);
/// A connection of 1 GiB/s.
const FAST: u64 = MIB;

#[test]
fn migrations_share_by_weight_however_many_streams_they_have() {
    let opens =
        [of(ONE, purpose::RAM), of(OTHER, purpose::RAM), of(OTHER, purpose::NBD), of(OTHER, purpose::NBD)];
    for weights in [(100, 300), (1, 3), (300, 900)] {
        let (mut sender, ids) = Sender::new(&opens);
        sender.share(ONE, Share { weight: weights.0, ..Share::default() });
        sender.share(OTHER, Share { weight: weights.1, ..Share::default() });
        sender.run(SECOND / 10, FAST);
        let sent = sender.take();
        assert_within(sum(&sent, &ids[1..]) / sum(&sent, &ids[..1]), 3.0, 0.02, "1 to 3");
        assert_within(sum(&sent, &ids[1..2]) / sum(&sent, &ids[2..3]), 1.0, 0.05, "streams of one migration");
    }
}

#[test]
fn who_comes_late_is_owed_nothing() {
    let (mut sender, ids) = Sender::new(&[of(ONE, purpose::RAM), of(OTHER, purpose::RAM)]);
    sender.full.truncate(1);
    sender.run(SECOND / 10, FAST);
    sender.take();
    sender.full = ids.clone();
    sender.run(SECOND / 10, FAST);
    let sent = sender.take();
    assert_within(sum(&sent, &ids[..1]), sum(&sent, &ids[1..]), 0.02, "the first and the late one");
}

#[test]
fn one_limit_covers_ram_and_disks_together() {
    let opens = [of(ONE, purpose::RAM), of(ONE, purpose::NBD), of(ONE, purpose::NBD)];
    for rate in [MIB, 100 * MIB] {
        let (mut sender, ids) = Sender::new(&opens);
        let limit = sender.limit(rate);
        sender.share(ONE, Share { limit, ..Share::default() });
        for _ in 0..3 {
            sender.run(SECOND, FAST);
            let sent = sender.take();
            assert_within(sum(&sent, &ids), rate as f64, 0.02, "a second's bytes");
            assert_within(sum(&sent, &ids[..1]), rate as f64 / 3.0, 0.05, "the RAM's part");
        }
        let held = sender.pair.dialer.stats().held;
        assert!(held > SECOND * 2 && held < SECOND * 3, "it was kept for {held:?}");
    }
}

#[test]
fn a_limit_that_changes_counts_at_once() {
    let (mut sender, ids) = Sender::new(&[of(ONE, purpose::RAM), of(ONE, purpose::NBD)]);
    sender.run(SECOND / 10, FAST);
    sender.take();
    let shared_limit = sender.limit(300 * MIB);
    for rate in [10 * MIB, 200 * MIB, MIB] {
        shared_limit.iter().for_each(|a| a.set(NonZeroU64::new(rate).unwrap(), sender.pair.now));
        sender.share(ONE, Share { limit: shared_limit.clone(), ..Share::default() });
        for _ in 0..10 {
            sender.run(SECOND / 10, FAST);
            let tenth = sum(&sender.take(), &ids);
            assert_within(tenth, rate as f64 / 10.0, 0.2, "the bytes of a tenth of a second");
        }
    }
    sender.share(ONE, Share::default());
    sender.run(SECOND / 10, FAST);
    assert_within(sum(&sender.take(), &ids), 100.0 * MIB as f64, 0.02, "without a limit");
}

#[test]
fn the_session_s_limit_is_shared_by_weight_and_one_s_own_is_kept_within_it() {
    let (mut sender, ids) = Sender::new(&[of(ONE, purpose::RAM), of(OTHER, purpose::RAM)]);
    let limit = sender.limit(100 * MIB);
    sender.pair.dialer.set_limit(limit);
    sender.share(OTHER, Share { weight: 300, ..Share::default() });
    sender.run(SECOND, FAST);
    let sent = sender.take();
    assert_within(sum(&sent, &ids), 100.0 * MIB as f64, 0.02, "both");
    assert_within(sum(&sent, &ids[1..]), 75.0 * MIB as f64, 0.02, "three quarters");
    let limit = sender.limit(10 * MIB);
    sender.share(OTHER, Share { weight: 300, limit, ahead: false });
    sender.run(SECOND, FAST);
    let sent = sender.take();
    assert_within(sum(&sent, &ids), 100.0 * MIB as f64, 0.02, "both, one limited");
    assert_within(sum(&sent, &ids[1..]), 10.0 * MIB as f64, 0.02, "the limited one");
}

#[test]
fn whose_guest_stands_still_goes_ahead_with_its_ram_first() {
    let opens = [of(ONE, purpose::RAM), of(OTHER, purpose::NBD), of(OTHER, purpose::RAM)];
    let (mut sender, ids) = Sender::new(&opens);
    sender.share(OTHER, Share { ahead: true, ..Share::default() });
    sender.run(SECOND / 10, FAST);
    let sent = sender.take();
    assert_within(sum(&sent, &ids[1..]), sum(&sent, &ids), 0.01, "all goes to the one that waits");
    assert!(sum(&sent, &ids[2..]) > 0.98 * sum(&sent, &ids), "its RAM first: {sent:?}");
    sender.share(OTHER, Share::default());
    sender.run(SECOND / 10, FAST);
    let sent = sender.take();
    assert_within(sum(&sent, &ids[..1]), sum(&sent, &ids[1..]), 0.05, "it pays nothing back");
    assert_within(sum(&sent, &ids[1..2]), sum(&sent, &ids[2..]), 0.05, "disks and RAM in turns again");
}

#[test]
fn no_limit_keeps_what_is_urgent() {
    let (mut sender, ids) = Sender::new(&[of(ONE, purpose::RAM), Open { migration: ONE, ..URGENT }]);
    sender.full.truncate(1);
    let limit = sender.limit(MIB);
    sender.pair.dialer.set_limit(limit);
    let limit = sender.limit(MIB);
    sender.share(ONE, Share { limit, ..Share::default() });
    sender.run(SECOND, FAST);
    for n in 0..20 {
        sender.pair.dialer.send(sender.pair.now, ids[1], content(2, n * 500, 500)).unwrap();
        let mut batch = Batch::default();
        assert!(sender.pair.dialer.poll_transmit(sender.pair.now, &mut batch), "it waits for a limit");
        let headers = batch.parts().iter().map(|part| Header::decode(&part.header));
        let first = headers.into_iter().find(|header| header.kind == Kind::Data.to_wire());
        assert_eq!(first.map(|header| (header.stream, header.len)), Some((ids[1].0, 500)));
        sender.run(Duration::from_millis(3), FAST);
    }
    assert_eq!(sender.pair.dialer.stream_stats(ids[1]).unwrap().class, Class::Urgent);
}
