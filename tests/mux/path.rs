//! Windows on long paths: a link with a rate and a delay, on a clock of the test's.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmferry_mux::mux::{Batch, Config, Event, Open, StreamId, purpose};

use super::pair::{BULK, Pair, bytes_of, content, events, take};

const STEP: Duration = Duration::from_micros(500);
const MIB: u64 = 1 << 20;

/// One direction of the link.
#[derive(Default)]
struct Way {
    flying: VecDeque<(Instant, Vec<u8>)>,
    /// When the link has sent what it was given.
    free_at: Option<Instant>,
}

struct Path {
    pair: Pair,
    stream: StreamId,
    up: Way,
    down: Way,
    delay: Duration,
    per_second: u64,
    received: u64,
}

impl Path {
    fn new(open: Open, round_trip: Duration, per_second: u64) -> Self {
        let mut pair = Pair::new(Config { dead_after: Duration::from_secs(60), ..Config::default() });
        let stream = pair.dialer.open(pair.now, open).unwrap();
        Self {
            pair,
            stream,
            up: Way::default(),
            down: Way::default(),
            delay: round_trip / 2,
            per_second,
            received: 0,
        }
    }

    fn run(&mut self, long: Duration) -> u64 {
        let (until, before) = (self.pair.now + long, self.received);
        while self.pair.now < until {
            self.step();
            self.pair.now += STEP;
        }
        self.received - before
    }

    fn step(&mut self) {
        let now = self.pair.now;
        while self.pair.dialer.send_capacity(self.stream) > 0 {
            let stats = self.pair.dialer.stream_stats(self.stream).unwrap();
            let offset = stats.sent_bytes + stats.send_queued_bytes as u64;
            self.pair.dialer.send(now, self.stream, content(1, offset, 64 << 10)).unwrap();
        }
        let mut batch = Batch::default();
        for (way, session) in
            [(&mut self.up, &mut self.pair.dialer), (&mut self.down, &mut self.pair.acceptor)]
        {
            // A socket takes a little more than the link has sent.
            while way.free_at.is_none_or(|at| at <= now) && session.poll_transmit(now, &mut batch) {
                let from = way.free_at.map_or(now, |at| at.max(now - STEP));
                let time = Duration::from_nanos(batch.len_bytes() as u64 * 1_000_000_000 / self.per_second);
                way.free_at = Some(from + time);
                way.flying.push_back((from + time + self.delay, bytes_of(&batch)));
            }
        }
        for (way, session) in
            [(&mut self.up, &mut self.pair.acceptor), (&mut self.down, &mut self.pair.dialer)]
        {
            while way.flying.front().is_some_and(|(at, _)| *at <= now) {
                let (_, bytes) = way.flying.pop_front().unwrap();
                session.handle_input(now, &bytes).unwrap();
            }
            session.handle_timeout(now).unwrap();
        }
        self.received += take(&mut self.pair.acceptor, now, self.stream).len() as u64;
        events(&mut self.pair.dialer);
        for event in events(&mut self.pair.acceptor) {
            if let Event::Opened { id, .. } = event {
                self.pair.acceptor.accept(id).unwrap();
            }
        }
    }
}

#[test]
fn one_stream_fills_a_long_link() {
    for (stream_purpose, round_trip_ms, mib_per_s) in [
        (purpose::NBD, 1, 200),
        (purpose::NBD, 20, 200),
        (purpose::NBD, 50, 200),
        (purpose::NBD, 100, 120),
        (purpose::RAM, 100, 200),
    ] {
        let open = Open { purpose: stream_purpose, ..BULK };
        let mut path = Path::new(open, Duration::from_millis(round_trip_ms), mib_per_s * MIB);
        path.run(Duration::from_secs(2));
        let part = path.run(Duration::from_secs(1)) as f64 / (mib_per_s * MIB) as f64;
        assert!(part > 0.9, "{round_trip_ms} ms, {mib_per_s} MiB/s: {part:.2} of the link");
    }
}

#[test]
fn a_window_is_not_larger_than_its_path_needs() {
    let mut path = Path::new(BULK, Duration::from_millis(20), 50 * MIB);
    path.run(Duration::from_secs(3));
    let window = path.pair.acceptor.stream_stats(path.stream).unwrap().recv_window_bytes;
    // The path holds 1 MiB. Twice that would do; it grows up to four times, and once beyond.
    assert!((2 * MIB..=8 * MIB).contains(&window), "{window}");
}
