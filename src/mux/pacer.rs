//! A budget in bytes per second: when the next byte may leave. Knows no frames.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

const NANOS: i128 = 1_000_000_000;
/// What may be saved up while nothing waits, as time at the full rate.
const SAVED_IDLE: Duration = Duration::from_millis(10);
/// The same while something waits: a timer that comes late must not cost any of the rate.
const SAVED_LATE: Duration = Duration::from_millis(200);
/// What may be owed, as time at the full rate: replays and urgent frames do not wait.
const OWED: Duration = Duration::from_secs(1);

/// A rate that may be changed at any time. The sum over any time `t` of what it lets pass is at
/// most `rate * (t + 10 ms)` and one frame, what went without asking aside.
#[derive(Debug)]
pub(super) struct Pacer {
    per_second: NonZeroU64,
    /// In billionths of a byte, so that slow refills are not rounded away.
    level: i128,
    at: Instant,
    /// Since when somebody waits for it.
    waiting: Option<Instant>,
    /// What may be owed at least, whatever the rate.
    owed_min: i128,
}

impl Pacer {
    pub(super) fn new(per_second: NonZeroU64, now: Instant) -> Self {
        Self { per_second, level: 0, at: now, waiting: None, owed_min: 0 }
    }

    /// The same, and so many bytes may be owed at least, whatever the rate.
    pub(super) fn owing(self, bytes: u64) -> Self {
        Self { owed_min: i128::from(bytes) * NANOS, ..self }
    }

    /// Another rate from now on. What was owed at the old one is forgotten.
    pub(super) fn change(&mut self, per_second: NonZeroU64, now: Instant) {
        self.refill(now);
        self.per_second = per_second;
        self.level = self.level.clamp(0, self.worth(SAVED_IDLE));
    }

    pub(super) fn per_second(&self) -> NonZeroU64 {
        self.per_second
    }

    /// Whether a frame may leave now; if not, the caller waits until [`Pacer::ready_at`].
    pub(super) fn is_ready(&mut self, now: Instant) -> bool {
        self.refill(now);
        let ready = self.level > 0;
        if !ready {
            self.waiting.get_or_insert(now);
        }
        ready
    }

    /// When a frame may leave, if nothing else does before.
    pub(super) fn ready_at(&self) -> Instant {
        let missing = (1 - self.level).max(0);
        let rate = i128::from(self.per_second.get());
        let nanos = u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX);
        self.at + Duration::from_nanos(nanos)
    }

    /// So much has left. Returns for how long it had been waited for.
    pub(super) fn charge(&mut self, bytes: usize, now: Instant) -> Duration {
        let owed = self.worth(OWED).max(self.owed_min);
        self.level = (self.level - bytes as i128 * NANOS).max(-owed);
        self.waiting.take().map(|since| now.saturating_duration_since(since)).unwrap_or_default()
    }

    /// What is owed now.
    pub(super) fn debt_bytes(&mut self, now: Instant) -> u64 {
        self.refill(now);
        u64::try_from(-self.level / NANOS).unwrap_or(0)
    }

    fn worth(&self, time: Duration) -> i128 {
        i128::from(self.per_second.get()) * time.as_nanos() as i128
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let most = self.worth(if self.waiting.is_some() { SAVED_LATE } else { SAVED_IDLE });
        self.level = self.level.max((self.level + self.worth(elapsed)).min(most));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const RATE: u64 = 100 * 1024 * 1024;
    const FRAME: usize = 16 * 1024;

    fn pacer(now: Instant) -> Pacer {
        Pacer::new(NonZeroU64::new(RATE).unwrap(), now)
    }

    /// Sends what may be sent, waking `late` after each time that it may.
    fn run(pacer: &mut Pacer, from: Instant, to: Instant, late: impl Fn(usize) -> Duration) -> usize {
        let (mut now, mut sent, mut waits) = (from, 0, 0);
        while now < to {
            if pacer.is_ready(now) {
                pacer.charge(FRAME, now);
                sent += FRAME;
            } else {
                waits += 1;
                now = pacer.ready_at() + late(waits);
            }
        }
        sent
    }

    #[test]
    fn the_rate_is_kept_whatever_the_timer_does() {
        let begin = Instant::now();
        for late in [0, 1, 5, 30] {
            let mut pacer = pacer(begin);
            let sent = run(&mut pacer, begin, begin + Duration::from_secs(4), |n| {
                Duration::from_millis(if n % 3 == 0 { late } else { 0 })
            });
            let ratio = sent as f64 / (4 * RATE) as f64;
            assert!((0.98..1.02).contains(&ratio), "{late} ms late: {ratio}");
        }
    }

    #[test]
    fn an_idle_second_does_not_become_a_burst() {
        let begin = Instant::now();
        let mut pacer = pacer(begin);
        pacer.is_ready(begin + Duration::from_millis(1));
        let later = begin + Duration::from_secs(5);
        let sent = run(&mut pacer, later, later + Duration::from_millis(100), |_| Duration::ZERO);
        assert!(sent as f64 <= RATE as f64 * 0.111, "{sent} bytes in a tenth of a second");
    }

    #[test]
    fn another_rate_counts_at_once() {
        let begin = Instant::now();
        let mut pacer = pacer(begin);
        run(&mut pacer, begin, begin + Duration::from_secs(1), |_| Duration::ZERO);
        let then = begin + Duration::from_secs(1);
        pacer.change(NonZeroU64::new(RATE / 10).unwrap(), then);
        let sent = run(&mut pacer, then, then + Duration::from_secs(1), |_| Duration::ZERO);
        let ratio = sent as f64 / (RATE / 10) as f64;
        assert!((0.98..1.02).contains(&ratio), "{ratio}");
    }

    #[test]
    fn what_does_not_wait_is_paid_for_afterwards_within_bounds() {
        let begin = Instant::now();
        let mut pacer = pacer(begin);
        pacer.charge(64 << 20, begin);
        let sent = run(&mut pacer, begin, begin + Duration::from_secs(1), |_| Duration::ZERO);
        let all = (64 << 20) + sent;
        assert!((0.98..1.02).contains(&(all as f64 / RATE as f64)), "{all}");
        pacer.charge(1 << 40, begin + Duration::from_secs(1));
        assert!(pacer.ready_at() <= begin + Duration::from_millis(2001), "a debt of an hour");
    }
}
