//! Credit that a receiver gives: absolute limits per stream, all of them backed by the
//! session's budget (WIRE §5). Knows no frame.

use std::time::{Duration, Instant};

/// A window grows while half of it is consumed faster than this, or twice the round trip.
const GROWTH_FLOOR: Duration = Duration::from_millis(1);
/// After this long without a byte a stream's future credit is the minimum again.
const IDLE: Duration = Duration::from_secs(10);

/// What the session may still promise to all its peers' streams.
#[derive(Debug)]
pub(super) struct Budget {
    total: u64,
    /// Sum of what is advertised and not yet consumed.
    promised: u64,
    /// Kept for streams that are not open yet: each may send its initial credit unasked.
    reserved: u64,
}

impl Budget {
    pub(super) fn new(total: u64, reserved: u64) -> Self {
        Self { total, promised: 0, reserved }
    }

    pub(super) fn promised(&self) -> u64 {
        self.promised
    }

    /// A stream opens: its initial credit leaves the reserve.
    pub(super) fn open(&mut self, initial: u64) {
        self.reserved = self.reserved.saturating_sub(initial);
        self.promised += initial;
    }

    /// A stream is forgotten: what it held returns, and a further one may open.
    pub(super) fn close(&mut self, outstanding: u64, initial: u64) {
        self.promised -= outstanding;
        self.reserved += initial;
    }

    fn consumed(&mut self, bytes: u64) {
        self.promised -= bytes;
    }

    /// As much of `wanted` as there is.
    fn promise(&mut self, wanted: u64) -> u64 {
        let free = self.total.saturating_sub(self.promised + self.reserved);
        let granted = wanted.min(free);
        self.promised += granted;
        granted
    }
}

/// One stream's credit, as its receiver keeps it.
#[derive(Debug)]
pub(super) struct Credit {
    /// Absolute offset up to which the peer may send.
    advertised: u64,
    consumed: u64,
    window: u64,
    initial: u64,
    window_max: u64,
    epoch: (Instant, u64),
    last: Instant,
}

impl Credit {
    pub(super) fn new(initial: u64, window_max: u64, now: Instant) -> Self {
        let window_max = window_max.max(initial);
        Self {
            advertised: initial,
            consumed: 0,
            window: initial,
            initial,
            window_max,
            epoch: (now, 0),
            last: now,
        }
    }

    pub(super) fn advertised(&self) -> u64 {
        self.advertised
    }

    /// What is promised and not yet consumed.
    pub(super) fn outstanding(&self) -> u64 {
        self.advertised - self.consumed
    }

    /// The local side took `bytes`; whether the peer should hear of new credit.
    pub(super) fn consume(
        &mut self,
        bytes: u64,
        rtt: Option<Duration>,
        budget: &mut Budget,
        now: Instant,
    ) -> bool {
        let bytes = bytes.min(self.outstanding());
        self.consumed += bytes;
        budget.consumed(bytes);
        self.adapt(rtt, now);
        self.renew(budget)
    }

    /// Advertises more where a quarter of the window is used up; also when budget came free.
    pub(super) fn renew(&mut self, budget: &mut Budget) -> bool {
        let wanted = self.window.saturating_sub(self.outstanding());
        if wanted < self.window / 4 {
            return false;
        }
        let granted = budget.promise(wanted);
        self.advertised += granted;
        granted > 0
    }

    fn adapt(&mut self, rtt: Option<Duration>, now: Instant) {
        if now.saturating_duration_since(self.last) > IDLE {
            self.window = self.initial;
            self.epoch = (now, self.consumed);
        }
        self.last = now;
        let (began, at) = self.epoch;
        if self.consumed - at < self.window / 2 {
            return;
        }
        let fast = now.saturating_duration_since(began) < rtt.unwrap_or_default().max(GROWTH_FLOOR) * 2;
        if fast {
            self.window = (self.window * 2).min(self.window_max);
        }
        self.epoch = (now, self.consumed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_stream_grows_to_its_cap_and_falls_back_when_idle() {
        let mut now = Instant::now();
        let mut budget = Budget::new(1 << 30, 0);
        let mut credit = Credit::new(1024, 64 * 1024, now);
        budget.open(1024);
        let mut received = 0;
        while credit.window < 64 * 1024 {
            let step = credit.outstanding();
            received += step;
            assert!(credit.consume(step, None, &mut budget, now));
            assert_eq!(budget.promised(), credit.outstanding());
            assert!(received < 1 << 20, "it must grow by doubling");
            now += Duration::from_micros(100);
        }
        now += IDLE * 2;
        credit.consume(credit.outstanding(), None, &mut budget, now);
        assert_eq!(credit.outstanding(), 1024);
    }

    #[test]
    fn a_slow_stream_keeps_its_window() {
        let mut now = Instant::now();
        let mut budget = Budget::new(1 << 30, 0);
        let mut credit = Credit::new(1024, 64 * 1024, now);
        budget.open(1024);
        for _ in 0..100 {
            now += Duration::from_millis(50);
            credit.consume(credit.outstanding(), Some(Duration::from_millis(1)), &mut budget, now);
        }
        assert_eq!(credit.window, 1024);
    }

    #[test]
    fn promises_never_pass_the_budget_and_return_when_it_is_free() {
        let now = Instant::now();
        let mut budget = Budget::new(4096, 0);
        let mut one = Credit::new(1024, 1 << 20, now);
        let mut two = Credit::new(1024, 1 << 20, now);
        budget.open(1024);
        budget.open(1024);
        one.window = 1 << 20;
        assert!(one.consume(1024, None, &mut budget, now));
        assert_eq!(budget.promised(), 4096);
        two.window = 1 << 20;
        two.consume(512, None, &mut budget, now);
        assert_eq!(budget.promised(), 4096);
        budget.close(one.outstanding(), 0);
        assert!(two.renew(&mut budget));
        assert_eq!((budget.promised(), two.outstanding()), (4096, 4096));
    }
}
