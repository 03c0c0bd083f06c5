//! Two sessions joined by nothing but byte vectors, for tests that need no faults.

use std::time::{Duration, Instant};

use bytes::Bytes;
use vmferry_mux::mux::hello::{self, Hello, Mode, Negotiated};
use vmferry_mux::mux::{
    Batch, Class, Config, Event, Name, Open, PerClass, Role, Session, StreamId, WEIGHT_DEFAULT, purpose,
};

/// A dialer and an acceptor.
pub(crate) struct Pair {
    pub(crate) dialer: Session,
    pub(crate) acceptor: Session,
    pub(crate) now: Instant,
}

/// An ordinary stream.
pub(crate) const BULK: Open = Open {
    purpose: purpose::RAM,
    class: Class::Bulk,
    weight: WEIGHT_DEFAULT,
    migration: [7; 16],
    channel: 0,
    name: Name::NONE,
};

/// A control stream.
pub(crate) const URGENT: Open = Open { purpose: purpose::CONTROL, class: Class::Urgent, ..BULK };

/// So much credit and log that only the scheduler decides.
pub(crate) fn wide() -> Config {
    Config {
        max_streams: 32,
        initial_credit: PerClass { urgent: 1 << 30, bulk: 1 << 30 },
        budget_bytes: 1 << 40,
        replay_cap_bytes: 1 << 40,
        send_queue_bytes_per_stream: 64 << 20,
        ..Config::default()
    }
}

/// What two agents with these limits agree on: for the dialer, for the acceptor.
pub(crate) fn agree(dialer: &Config, acceptor: &Config) -> (Negotiated, Negotiated) {
    let share = [1; 32];
    let ours = Hello::new(dialer, [1; 16], Mode::New { session_id: [9; 16], secret_share: share });
    let theirs = Hello::new(acceptor, [2; 16], Mode::Accepted { secret_share: share });
    (hello::negotiate(&ours, &theirs).unwrap(), hello::negotiate(&theirs, &ours).unwrap())
}

/// A session whose peer is the test itself.
pub(crate) fn lone(role: Role, config: Config, now: Instant) -> Session {
    let (negotiated, _) = agree(&config, &config);
    Session::new(role, config, &negotiated, now)
}

/// All bytes of a batch.
pub(crate) fn bytes_of(batch: &Batch) -> Vec<u8> {
    let mut out = Vec::with_capacity(batch.len_bytes());
    batch.io_slices().for_each(|slice| out.extend_from_slice(&slice));
    out
}

/// All that a session wants to send now. It must come to an end.
pub(crate) fn drain(session: &mut Session, now: Instant) -> Vec<u8> {
    let mut batch = Batch::default();
    let mut out = Vec::new();
    for batches in 0.. {
        assert!(batches < 100_000, "a session that never stops sending");
        if !session.poll_transmit(now, &mut batch) {
            break;
        }
        batch.io_slices().for_each(|slice| out.extend_from_slice(&slice));
    }
    out
}

/// All events now.
pub(crate) fn events(session: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| session.poll_event()).collect()
}

/// All received bytes of a stream, reported as consumed.
pub(crate) fn take(session: &mut Session, now: Instant, id: StreamId) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(chunk) = session.recv(id) {
        session.consumed(now, id, chunk.len() as u64);
        out.extend_from_slice(&chunk);
    }
    out
}

/// Bytes of a stream by offset, different for each stream and direction.
pub(crate) fn content(salt: u64, offset: u64, len: usize) -> Bytes {
    let byte = |o: u64| {
        let mixed = o.wrapping_mul(167) + (o >> 8).wrapping_mul(59) + (o >> 16).wrapping_mul(13);
        mixed.wrapping_add(salt.wrapping_mul(101)) as u8
    };
    (offset..offset + len as u64).map(byte).collect()
}

impl Pair {
    pub(crate) fn new(config: Config) -> Self {
        Self::with(config.clone(), config)
    }

    pub(crate) fn with(dialer: Config, acceptor: Config) -> Self {
        let now = Instant::now();
        let (ours, theirs) = agree(&dialer, &acceptor);
        Self {
            dialer: Session::new(Role::Dialer, dialer, &ours, now),
            acceptor: Session::new(Role::Acceptor, acceptor, &theirs, now),
            now,
        }
    }

    /// Moves bytes until neither side has anything to send.
    pub(crate) fn exchange(&mut self) {
        loop {
            let there = drain(&mut self.dialer, self.now);
            let back = drain(&mut self.acceptor, self.now);
            if there.is_empty() && back.is_empty() {
                return;
            }
            self.acceptor.handle_input(self.now, &there).unwrap();
            self.dialer.handle_input(self.now, &back).unwrap();
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.dialer.handle_timeout(self.now).unwrap();
        self.acceptor.handle_timeout(self.now).unwrap();
    }

    /// A stream that both sides want; events before it are dropped.
    pub(crate) fn open(&mut self, open: Open) -> StreamId {
        let id = self.dialer.open(self.now, open).unwrap();
        self.exchange();
        assert!(events(&mut self.acceptor).contains(&Event::Opened { id, open }));
        self.acceptor.accept(id).unwrap();
        self.exchange();
        assert!(events(&mut self.dialer).contains(&Event::Accepted { id }));
        id
    }

    /// Lets delayed ACKs go, so that nothing is left to acknowledge.
    pub(crate) fn settle(&mut self) {
        self.exchange();
        self.pass(Duration::from_millis(10));
        self.exchange();
    }

    /// Nothing is left of any stream.
    pub(crate) fn assert_empty(&self) {
        for session in [&self.dialer, &self.acceptor] {
            let stats = session.stats();
            assert_eq!(stats.streams, 0, "{stats:?}");
            assert_eq!(stats.log_bytes, 0, "{stats:?}");
            assert_eq!(stats.credit_committed_bytes, 0, "{stats:?}");
            assert_eq!(stats.send_queued_bytes + stats.recv_queued_bytes, 0, "{stats:?}");
        }
    }
}
