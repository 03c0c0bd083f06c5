//! When a phase has waited for too long. The time without a connection does not count.

use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;

/// A wait with a deadline.
pub(crate) struct Waiting {
    deadline: Duration,
    left: Duration,
    at: Instant,
}

impl Waiting {
    pub(crate) fn new(deadline: Duration) -> Self {
        Self { deadline, left: deadline, at: Instant::now() }
    }

    pub(crate) fn check(&mut self, what: &str, is_away: bool) -> Result<(), Failure> {
        let since = std::mem::replace(&mut self.at, Instant::now()).elapsed();
        if !is_away {
            self.left = self.left.saturating_sub(since);
        }
        if self.left.is_zero() { Err(Failure::stalled(what, self.deadline)) } else { Ok(()) }
    }
}

/// Notices when nothing moves.
pub(crate) struct Stall {
    deadline: Duration,
    bytes: u64,
    since: Instant,
}

impl Stall {
    pub(crate) fn new(deadline: Duration) -> Self {
        Self { deadline, bytes: 0, since: Instant::now() }
    }

    pub(crate) fn check(&mut self, what: &str, bytes: u64, idle: bool) -> Result<(), Failure> {
        if bytes != self.bytes || idle {
            (self.bytes, self.since) = (bytes, Instant::now());
        }
        if self.since.elapsed() < self.deadline {
            return Ok(());
        }
        Err(Failure::stalled(what, self.deadline))
    }
}
