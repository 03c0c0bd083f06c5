//! Which frames a peer may send only so often, because they are cheap to send.

use std::time::Instant;

use super::Config;
use super::limit::TokenBucket;

/// Buckets against frames that are cheap to send.
#[derive(Debug)]
pub(super) struct Guards {
    pub(super) opens: TokenBucket,
    pub(super) resets: TokenBucket,
    pub(super) pings: TokenBucket,
    pub(super) noops: TokenBucket,
}

impl Guards {
    pub(super) fn new(config: &Config, now: Instant) -> Self {
        Self {
            opens: TokenBucket::new(config.opens, now),
            resets: TokenBucket::new(config.resets, now),
            pings: TokenBucket::new(config.pings, now),
            noops: TokenBucket::new(config.noops, now),
        }
    }

    pub(super) fn fill(&mut self, now: Instant) {
        for bucket in [&mut self.opens, &mut self.resets, &mut self.pings, &mut self.noops] {
            bucket.fill(now);
        }
    }
}
