//! Token buckets: against frames that are cheap to send and costly to serve, and for the urgent
//! class's share. Knows no frames.

use std::time::{Duration, Instant};

use super::RateLimit;

const NANOS: i128 = 1_000_000_000;

/// A token bucket on an injected clock. Starts full.
#[derive(Debug)]
pub(super) struct TokenBucket {
    limit: RateLimit,
    /// In billionths of a token, so that slow refills are not rounded away.
    level: i128,
    at: Instant,
}

impl TokenBucket {
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        Self { limit, level: i128::from(limit.burst) * NANOS, at: now }
    }

    /// Changes the rate from now on.
    pub(super) fn set_rate(&mut self, per_second: u64, now: Instant) {
        self.refill(now);
        self.limit.per_second = per_second;
    }

    /// Takes one token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        if self.level < NANOS {
            return false;
        }
        self.level -= NANOS;
        true
    }

    /// Whether there is at least one token.
    pub(super) fn has_any(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.level >= NANOS
    }

    /// Takes `tokens`, into debt if need be, which is never more than `debt_max`.
    pub(super) fn charge(&mut self, tokens: u64, debt_max: u64) {
        let level = self.level - i128::from(tokens) * NANOS;
        self.level = level.max(-i128::from(debt_max) * NANOS);
    }

    /// Fills it, as after a reconnection: frames that were paced arrive together then.
    pub(super) fn fill(&mut self, now: Instant) {
        self.level = i128::from(self.limit.burst) * NANOS;
        self.at = now;
    }

    fn refill(&mut self, now: Instant) {
        let elapsed: Duration = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let gained = i128::from(self.limit.per_second)
            .saturating_mul(i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX));
        let full = i128::from(self.limit.burst) * NANOS;
        self.level = self.level.saturating_add(gained).min(full);
    }
}
