//! Where a migration is, and for how long its guest stands still.

use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use crate::migrate::model::phase::Phase;
use crate::migrate::model::progress::Downtime;

/// Between two looks at how far QEMU is.
const TICK: Duration = Duration::from_millis(250);

/// Where a migration is, and for how long its guest stands still.
pub(crate) struct Clock {
    pub(crate) phase: Phase,
    /// Since when the guest stands still.
    pub(crate) paused_at: Option<Instant>,
    pub(crate) downtime: Downtime,
    tick: Interval,
}

impl Clock {
    pub(crate) fn new(phase: Phase, downtime: Downtime, paused_at: Option<Instant>) -> Self {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Self { phase, paused_at, downtime, tick }
    }

    /// Waits for the next look.
    pub(crate) async fn tick(&mut self) {
        self.tick.tick().await;
    }

    /// Milliseconds for which the guest has stood still.
    pub(crate) fn paused_ms(&self) -> Option<u64> {
        self.paused_at.map(millis)
    }
}

/// Milliseconds since then.
pub(crate) fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}
