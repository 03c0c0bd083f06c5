//! The scheduler: which stream sends the next frame. Strict for the urgent class within a bounded
//! share, then, within the session's limit, migrations by their shares and their streams in turns
//! (WIRE §6). Knows no frames and no credit.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::deficit_round_robin::{Backlog, DeficitRoundRobin, Turn, clamp_weight};
use super::fair_queue::FairQueue;
use super::frame::FRAME_LEN_MAX;
use super::shared_limit::Draw;
use super::token_bucket::TokenBucket;
use super::{Class, Config, MigrationId, Share, SharedLimit, StreamId};

/// Time over which the rate is measured that the urgent share is a tenth of.
const RATE_PERIOD: Duration = Duration::from_millis(100);

/// Chooses streams.
#[derive(Debug)]
pub(super) struct Scheduler {
    urgent: DeficitRoundRobin,
    bulk: FairQueue,
    draw: Option<Draw>,
    /// Whether bulk waits for nothing but a limit.
    held: bool,
    /// For how long limits have kept what could have been sent.
    held_for: Duration,
    urgent_part: TokenBucket,
    urgent_min: u64,
    measured: Instant,
    measured_bytes: u64,
    per_second: u64,
}

impl Scheduler {
    pub(super) fn new(config: &Config, now: Instant) -> Self {
        Self {
            urgent: DeficitRoundRobin::default(),
            bulk: FairQueue::default(),
            draw: None,
            held: false,
            held_for: Duration::ZERO,
            urgent_part: TokenBucket::new(config.urgent, now),
            urgent_min: config.urgent.per_second,
            measured: now,
            measured_bytes: 0,
            per_second: 0,
        }
    }

    /// Whether any stream is listed.
    pub(super) fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.bulk.is_empty()
    }

    /// Whether something will probably be sent at once.
    pub(super) fn has_work(&self) -> bool {
        !self.is_empty() && !self.held
    }

    /// Limits all bulk streams together, from the next frame on.
    pub(super) fn set_limit(&mut self, limit: Option<SharedLimit>) {
        Draw::renew(&mut self.draw, limit);
    }

    /// The session's limit.
    pub(super) fn limit(&self) -> Option<NonZeroU64> {
        self.draw.as_ref().map(Draw::per_second)
    }

    /// Another share for a migration, from the next frame on.
    pub(super) fn set_share(&mut self, migration: MigrationId, share: Share) {
        self.bulk.change(migration, share);
    }

    /// For how long limits have kept what could have been sent.
    pub(super) fn held_for(&self) -> Duration {
        self.held_for
    }

    /// When something may be sent that only waits for a limit.
    pub(super) fn deadline(&self) -> Option<Instant> {
        if !self.held {
            return None;
        }
        self.draw.as_ref().map(Draw::ready_at).max(self.bulk.ready_at())
    }

    /// Time has passed: what was waited for is looked at with the next frame.
    pub(super) fn on_timeout(&mut self, now: Instant) {
        self.held &= self.deadline().is_some_and(|deadline| deadline > now);
    }

    /// A stream can send. `fresh`: it had nothing to send before, rather than no credit.
    pub(super) fn wake(&mut self, id: StreamId, turn: &mut Turn, fresh: bool) {
        if turn.listed {
            return;
        }
        match turn.class {
            Class::Urgent => self.urgent.wake(id, turn, fresh),
            Class::Bulk => self.bulk.wake(id, turn, fresh),
        }
    }

    /// A stream's class or weight changes, from its next turn on.
    pub(super) fn change(&mut self, id: StreamId, turn: &mut Turn, class: Class, weight: u16) {
        turn.weight = clamp_weight(weight);
        if turn.class == class {
            return;
        }
        self.forget(id, turn);
        turn.class = class;
    }

    /// A stream leaves.
    pub(super) fn forget(&mut self, id: StreamId, turn: &mut Turn) {
        if std::mem::take(&mut turn.listed) {
            match turn.class {
                Class::Urgent => self.urgent.remove(id),
                Class::Bulk => self.bulk.remove(id, turn.migration),
            }
        }
    }

    /// The stream to send next. `bulk_allowed`: whether bulk may send at all.
    pub(super) fn next(
        &mut self,
        now: Instant,
        streams: &mut impl Backlog,
        bulk_allowed: bool,
    ) -> Option<StreamId> {
        self.held = false;
        if self.urgent_part.has_any(now)
            && let Some(id) = self.urgent.head(streams)
        {
            return Some(id);
        }
        let bulk = if bulk_allowed { self.next_bulk(now, streams) } else { None };
        bulk.or_else(|| self.urgent.head(streams))
    }

    fn next_bulk(&mut self, now: Instant, streams: &mut impl Backlog) -> Option<StreamId> {
        let id = self.bulk.head(now, streams);
        let may = id.is_some() && self.draw.as_mut().is_none_or(|draw| draw.is_ready(now));
        self.held = !may && !self.bulk.is_empty();
        id.filter(|_| may)
    }

    /// A stream has sent a frame of this length.
    pub(super) fn charge(&mut self, turn: &mut Turn, bytes: usize, now: Instant) {
        turn.charge(bytes);
        let session = self.charge_session(bytes, now);
        if turn.class == Class::Urgent {
            // The debt is small: what urgent streams send while nobody else wants to is free.
            self.urgent_part.charge(bytes as u64, FRAME_LEN_MAX as u64);
        } else {
            self.held_for += session.max(self.bulk.charge(turn.migration, bytes, now));
        }
    }

    /// So much is sent without having waited for its turn, or is sent again. Returns for how long
    /// the session's limit had been waited for.
    pub(super) fn charge_session(&mut self, bytes: usize, now: Instant) -> Duration {
        self.draw.as_mut().map(|draw| draw.charge(bytes, now)).unwrap_or_default()
    }

    /// Bytes per second that left lately.
    pub(super) fn rate(&self) -> u64 {
        self.per_second
    }

    /// At which of them a stream may count: what is urgent has a tenth, a migration no more than its
    /// limit.
    pub(super) fn rate_of(&self, turn: &Turn) -> u64 {
        match turn.class {
            Class::Urgent => self.per_second / 10,
            Class::Bulk => self
                .bulk
                .limit_of(turn.migration)
                .map_or(self.per_second, |limit| limit.get().min(self.per_second)),
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
        self.per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
        let tenth = self.per_second / 10;
        self.urgent_part.set_rate(tenth.max(self.urgent_min), now);
        self.measured = now;
        self.measured_bytes = 0;
    }
}
