//! The scheduler: which stream sends the next frame. Strict for the urgent class within a bounded
//! share, then streams that were quiet, then deficit round robin by weight (WIRE §6). Knows no
//! frames, no credit: a stream that cannot send leaves its ring and comes back with
//! [`Scheduler::wake`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::frame::RECORD_LEN;
use super::limit::TokenBucket;
use super::{Class, Config, StreamId, WEIGHT_MAX};

/// Bytes of a turn for each unit of weight: 16 KiB for the ordinary weight.
const QUANTUM_PER_WEIGHT: i64 = 1024;
/// Time over which the rate is measured that the urgent share is a tenth of.
const RATE_PERIOD: Duration = Duration::from_millis(100);

/// A stream as the scheduler sees it; kept with the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) class: Class,
    weight: u16,
    deficit: i64,
    listed: bool,
}

impl Turn {
    pub(super) fn new(class: Class, weight: u16) -> Self {
        Self { class, weight: clamp(weight), deficit: 0, listed: false }
    }

    pub(super) fn weight(&self) -> u16 {
        self.weight
    }

    fn quantum(&self) -> i64 {
        QUANTUM_PER_WEIGHT * i64::from(self.weight)
    }
}

fn clamp(weight: u16) -> u16 {
    weight.clamp(1, WEIGHT_MAX)
}

/// What the scheduler asks of the streams.
pub(super) trait Backlog {
    /// The stream's turn; `None` when it is forgotten.
    fn turn(&mut self, id: StreamId) -> Option<&mut Turn>;
    /// Whether it could send something now.
    fn is_ready(&self, id: StreamId) -> bool;
}

/// Streams of one class with something to send. A listed stream may have become unable to: it
/// leaves when its turn comes.
#[derive(Debug, Default)]
struct Ring {
    fresh: VecDeque<StreamId>,
    old: VecDeque<StreamId>,
}

impl Ring {
    fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.old.is_empty()
    }

    fn remove(&mut self, id: StreamId) {
        self.fresh.retain(|other| *other != id);
        self.old.retain(|other| *other != id);
    }

    /// The stream whose turn it is (fq_codel's two lists, RFC 8290 §4.2). It stays at the head.
    fn head(&mut self, streams: &mut impl Backlog) -> Option<StreamId> {
        loop {
            let is_fresh = !self.fresh.is_empty();
            let list = if is_fresh { &mut self.fresh } else { &mut self.old };
            let id = *list.front()?;
            let ready = streams.is_ready(id);
            let Some(turn) = streams.turn(id) else {
                list.pop_front();
                continue;
            };
            if ready && turn.deficit > 0 {
                return Some(id);
            }
            list.pop_front();
            // A fresh stream that has nothing left goes through the old list once: it cannot
            // stay in front by sending little by little.
            let passes_old = is_fresh && !self.old.is_empty();
            if !ready && !passes_old {
                turn.listed = false;
                continue;
            }
            if turn.deficit <= 0 {
                turn.deficit += turn.quantum();
            }
            self.old.push_back(id);
        }
    }
}

/// Chooses streams.
#[derive(Debug)]
pub(super) struct Scheduler {
    urgent: Ring,
    bulk: Ring,
    share: TokenBucket,
    share_min: u64,
    measured: Instant,
    measured_bytes: u64,
}

impl Scheduler {
    pub(super) fn new(config: &Config, now: Instant) -> Self {
        Self {
            urgent: Ring::default(),
            bulk: Ring::default(),
            share: TokenBucket::new(config.urgent, now),
            share_min: config.urgent.per_second,
            measured: now,
            measured_bytes: 0,
        }
    }

    /// Whether any stream is listed.
    pub(super) fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.bulk.is_empty()
    }

    fn ring(&mut self, class: Class) -> &mut Ring {
        match class {
            Class::Urgent => &mut self.urgent,
            Class::Bulk => &mut self.bulk,
        }
    }

    /// A stream can send. `fresh`: it had nothing to send before, rather than no credit.
    pub(super) fn wake(&mut self, id: StreamId, turn: &mut Turn, fresh: bool) {
        if std::mem::replace(&mut turn.listed, true) {
            return;
        }
        turn.deficit = turn.quantum();
        let ring = self.ring(turn.class);
        if fresh {
            ring.fresh.push_back(id);
        } else {
            ring.old.push_back(id);
        }
    }

    /// A stream's class or weight changes, from its next turn on.
    pub(super) fn change(&mut self, id: StreamId, turn: &mut Turn, class: Class, weight: u16) {
        turn.weight = clamp(weight);
        if turn.class == class {
            return;
        }
        self.forget(id, turn);
        turn.class = class;
    }

    /// A stream leaves.
    pub(super) fn forget(&mut self, id: StreamId, turn: &mut Turn) {
        if std::mem::take(&mut turn.listed) {
            self.ring(turn.class).remove(id);
        }
    }

    /// The stream to send next. `bulk_allowed`: whether bulk may send at all.
    pub(super) fn next(
        &mut self,
        now: Instant,
        streams: &mut impl Backlog,
        bulk_allowed: bool,
    ) -> Option<StreamId> {
        if self.share.has_any(now)
            && let Some(id) = self.urgent.head(streams)
        {
            return Some(id);
        }
        let bulk = if bulk_allowed { self.bulk.head(streams) } else { None };
        bulk.or_else(|| self.urgent.head(streams))
    }

    /// A stream has sent a frame of this length.
    pub(super) fn charge(&mut self, turn: &mut Turn, bytes: usize) {
        turn.deficit -= bytes as i64;
        if turn.class == Class::Urgent {
            // The debt is small: what urgent streams send while nobody else wants to is free.
            self.share.charge(bytes as u64, RECORD_LEN as u64);
        }
    }

    /// A batch of this length leaves; measures the rate.
    pub(super) fn on_batch(&mut self, now: Instant, bytes: usize) {
        self.measured_bytes += bytes as u64;
        let elapsed = now.saturating_duration_since(self.measured);
        if elapsed < RATE_PERIOD {
            return;
        }
        let per_second = u128::from(self.measured_bytes) * 1_000_000_000 / elapsed.as_nanos();
        let tenth = u64::try_from(per_second / 10).unwrap_or(u64::MAX);
        self.share.set_rate(tenth.max(self.share_min), now);
        self.measured = now;
        self.measured_bytes = 0;
    }
}
