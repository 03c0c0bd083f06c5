//! Token buckets against frames that are cheap to send and costly to serve (WIRE R11).

use std::time::{Duration, Instant};

/// Allows `per_second` on average and `burst` at once.
#[derive(Debug)]
pub(super) struct TokenBucket {
    tokens: f64,
    per_second: f64,
    burst: f64,
    at: Instant,
}

impl TokenBucket {
    pub(super) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let (per_second, burst) = (f64::from(per_second), f64::from(burst));
        Self { tokens: burst, per_second, burst, at: now }
    }

    /// Takes a token; false when there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = now.max(self.at);
        self.tokens = (self.tokens + elapsed.as_secs_f64() * self.per_second).min(self.burst);
        let granted = self.tokens >= 1.0;
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

/// The buckets of one session (WIRE §8).
#[derive(Debug)]
pub(super) struct Buckets {
    pub(super) open: TokenBucket,
    pub(super) end: TokenBucket,
    pub(super) ping: TokenBucket,
    pub(super) no_op: TokenBucket,
}

impl Buckets {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            open: TokenBucket::new(200, 1024, now),
            end: TokenBucket::new(200, 2048, now),
            ping: TokenBucket::new(10, 64, now),
            no_op: TokenBucket::new(1000, 1024, now),
        }
    }
}

/// Smallest of several moments, each of which may be absent.
pub(super) fn earliest(moments: impl IntoIterator<Item = Option<Instant>>) -> Option<Instant> {
    moments.into_iter().flatten().min()
}

/// The shortest round trip seen lately; older ones are forgotten so that a changed route counts.
#[derive(Debug, Default)]
pub(super) struct MinRtt {
    min: Option<(Duration, Instant)>,
    pub(super) last: Option<Duration>,
}

/// How long a shortest round trip is believed.
const RTT_MEMORY: Duration = Duration::from_secs(60);

impl MinRtt {
    pub(super) fn sample(&mut self, rtt: Duration, now: Instant) {
        self.last = Some(rtt);
        let keep = self.min.is_some_and(|(min, at)| min <= rtt && now - at < RTT_MEMORY);
        if !keep {
            self.min = Some((rtt, now));
        }
    }

    pub(super) fn min(&self) -> Option<Duration> {
        self.min.map(|(rtt, _)| rtt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10, 3, start);
        let taken = (0..5).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, 3);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..5).filter(|_| bucket.take(later)).count(), 2);
        assert!(!bucket.take(start), "a clock that goes back gives nothing");
    }
}
