//! What a side may hold its peer to: the peer is one of ours, or opens streams as fast as it may.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use bytes::Bytes;
use vmferry_mux::mux::{
    Config, DEBT_REFUSED_BYTES, Event, Role, Session, SessionError, SharedLimit, StreamId,
};

use super::hostile::{data, open, reset};
use super::pair::{BULK, Pair, URGENT, content, drain, events, lone, take};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What passes without waiting: what each stream has before it is accepted, and a grant.
const INITIAL: u64 = 64 * KIB;

fn limit(pair: &Pair, per_second: u64) -> Option<SharedLimit> {
    NonZeroU64::new(per_second).map(|rate| SharedLimit::of_arrivals(rate, pair.now))
}

/// The dialer sends all that it may on these streams, the acceptor takes all of it at once. Time is that of the two
/// sessions' deadlines.
struct Flow {
    pair: Pair,
    ids: Vec<StreamId>,
    taken: BTreeMap<StreamId, u64>,
    chunk: Bytes,
}

impl Flow {
    fn new(per_second: u64, streams: usize) -> Self {
        let mut pair = Pair::new(Config::default());
        let limit = limit(&pair, per_second);
        pair.acceptor.set_receive_limit(limit);
        let ids = (0..streams).map(|_| pair.open(BULK)).collect();
        Self { pair, ids, taken: BTreeMap::new(), chunk: content(1, 0, 64 << 10) }
    }

    /// Returns what was taken.
    fn step(&mut self) -> u64 {
        let mut all = 0;
        for id in &self.ids {
            while self.pair.dialer.send_capacity(*id) > 0 {
                self.pair.dialer.send(self.pair.now, *id, self.chunk.clone()).unwrap();
            }
        }
        self.pair.exchange();
        for id in &self.ids {
            let mut len = 0;
            while let Some(chunk) = self.pair.acceptor.recv(*id) {
                len += chunk.len() as u64;
            }
            self.pair.acceptor.consumed(self.pair.now, *id, len);
            *self.taken.entry(*id).or_default() += len;
            all += len;
        }
        self.pair.exchange();
        all
    }

    /// Runs for so long; returns what was taken.
    fn run(&mut self, long: Duration) -> u64 {
        let before: u64 = self.taken.values().sum();
        let until = self.pair.now + long;
        while self.pair.now < until {
            let is_flowing = self.step() > 0;
            let pair = &mut self.pair;
            let next = [&pair.dialer, &pair.acceptor].map(|side| side.poll_timeout().unwrap());
            let next = if is_flowing { pair.now + Duration::from_micros(50) } else { next[0].min(next[1]) };
            pair.now = next.min(until);
            pair.dialer.handle_timeout(pair.now).unwrap();
            pair.acceptor.handle_timeout(pair.now).unwrap();
        }
        self.taken.values().sum::<u64>() - before
    }
}

#[test]
fn a_peer_is_held_to_its_rate_and_reaches_it_and_its_streams_take_turns() {
    const SECONDS: u64 = 8;
    for per_second in [64 * KIB, MIB, 150 * MIB] {
        for streams in [1, 3, 9] {
            let mut flow = Flow::new(per_second, streams);
            let (long, context) =
                (Duration::from_secs(SECONDS), format!("{streams} streams at {per_second}"));
            let taken = flow.run(long);
            let (allowed, free) = (SECONDS * per_second, streams as u64 * INITIAL);
            assert!(taken <= allowed + allowed / 50 + free, "{context}: {taken} of {allowed}");
            assert!(taken >= allowed - allowed / 20, "{context}: {taken} of {allowed}");
            let (least, most) = (flow.taken.values().min().unwrap(), flow.taken.values().max().unwrap());
            assert!(most - least <= allowed / 20 + 2 * INITIAL, "{context}: {:?}", flow.taken);
        }
    }
}

#[test]
fn what_is_awaited_is_not_behind_what_is_not() {
    let mut flow = Flow::new(MIB, 4);
    flow.run(Duration::from_secs(5));
    // A message that takes more than its stream has at first.
    let control = flow.pair.open(URGENT);
    flow.ids = vec![control];
    flow.run(Duration::from_secs(1));
    assert!(flow.taken[&control] >= 200 * KIB, "{}", flow.taken[&control]);
}

#[test]
fn another_rate_counts_from_then_on_and_none_lifts_it() {
    let mut flow = Flow::new(MIB, 2);
    flow.run(Duration::from_secs(5));
    for per_second in [4 * MIB, MIB / 2] {
        let again = limit(&flow.pair, per_second);
        flow.pair.acceptor.set_receive_limit(again);
        flow.run(Duration::from_secs(1));
        let taken = flow.run(Duration::from_secs(10));
        let allowed = 10 * per_second;
        assert!((allowed * 19 / 20..allowed * 21 / 20 + INITIAL).contains(&taken), "{taken} at {per_second}");
    }
    assert_eq!(flow.pair.acceptor.stats().receive_limit.unwrap().get(), MIB / 2);
    flow.pair.acceptor.set_receive_limit(None);
    assert!(flow.run(Duration::from_millis(100)) > 10 * MIB, "it goes on at once, without a deadline");
}

#[test]
fn a_stream_that_waits_goes_on_in_another_process() {
    let mut flow = Flow::new(MIB, 3);
    flow.run(Duration::from_secs(5));
    let pair = &mut flow.pair;
    while pair.acceptor.poll_event().is_some() {}
    let acceptor = std::mem::replace(&mut pair.acceptor, lone(Role::Acceptor, Config::default(), pair.now));
    let snapshot = acceptor.into_snapshot(pair.now);
    pair.dialer.handle_disconnected(pair.now);
    pair.acceptor = Session::from_snapshot(Config::default(), snapshot, pair.now);
    let again = limit(pair, MIB);
    pair.acceptor.set_receive_limit(again);
    let (ours, theirs) = (pair.dialer.rx_seq(), pair.acceptor.rx_seq());
    pair.dialer.handle_reconnected(pair.now, theirs).unwrap();
    pair.acceptor.handle_reconnected(pair.now, ours).unwrap();
    let before = flow.taken.clone();
    let taken = flow.run(Duration::from_secs(10));
    assert!((10 * MIB * 19 / 20..11 * MIB).contains(&taken), "{taken}");
    assert!(flow.ids.iter().all(|id| flow.taken[id] > before[id] + 2 * MIB), "{before:?} {:?}", flow.taken);
}

/// A peer that opens a stream, sends what may be sent before it is accepted, ends it, and begins again. What came of
/// it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Churned {
    arrived: u64,
    refused: usize,
    streams: u64,
    error: Option<SessionError>,
}

/// A hundred and fifty streams in a second: honest agents open fewer, and more are cut off anyway.
fn churn(per_second: u64, seconds: u64) -> Churned {
    let mut pair = Pair::new(Config::default());
    let limit = limit(&pair, per_second);
    pair.acceptor.set_receive_limit(limit);
    let mut churned = Churned::default();
    while churned.streams < seconds * 150 && churned.error.is_none() {
        let id = StreamId(2 * churned.streams as u32 + 1);
        churned.streams += 1;
        pair.now += Duration::from_nanos(1_000_000_000 / 150);
        let mut bytes = open(id.0);
        (0..4).for_each(|n| bytes.extend(data(id.0, n * 16 * KIB, 16 << 10)));
        let heard = pair.acceptor.handle_input(pair.now, &bytes);
        churned.error = heard.err();
        for event in events(&mut pair.acceptor) {
            if let Event::Opened { id, .. } = event {
                pair.acceptor.accept(id).unwrap();
            }
        }
        let taken = take(&mut pair.acceptor, pair.now, id).len() as u64;
        churned.arrived += taken;
        churned.refused += usize::from(taken == 0);
        if churned.error.is_none() {
            pair.acceptor.handle_input(pair.now, &reset(id.0, INITIAL)).unwrap();
            drain(&mut pair.acceptor, pair.now);
        }
    }
    churned
}

#[test]
fn new_streams_bring_no_more_than_the_rate_and_who_goes_on_loses_the_session() {
    for per_second in [64 * KIB, MIB, 4 * MIB] {
        let churned = churn(per_second, 60);
        let seconds = churned.streams.div_ceil(150);
        let allowed = seconds * per_second + DEBT_REFUSED_BYTES + INITIAL;
        assert!(churned.arrived <= allowed, "{churned:?} at {per_second}");
        assert!(churned.refused > 100, "{churned:?}");
        let error = churned.error.unwrap();
        assert!(matches!(error, SessionError::Abuse { what } if what.contains("limit")), "{error:?}");
    }
    let honest = churn(20 * MIB, 20);
    assert_eq!((honest.arrived, honest.refused, honest.error), (20 * 150 * INITIAL, 0, None));
}
