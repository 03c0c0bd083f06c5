//! What a known peer makes the record grow by: sessions that begin, end and come back, and migrations that come to
//! nothing. So many at once are recorded of each peer, then one in a while; the rest is counted. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Events of one peer that are recorded at once.
const AT_ONCE: u32 = 60;
/// After so long there is one more session's event.
pub(super) const ONE_SESSION_IN: Duration = Duration::from_secs(60);
/// After so long there is one more migration: twenty VMs that are replicated every five minutes are all recorded.
pub(super) const ONE_MIGRATION_IN: Duration = Duration::from_secs(10);

/// Of one peer.
#[derive(Debug)]
struct Bucket {
    left: u32,
    /// Up to when it has been filled.
    filled: Instant,
    further: u64,
}

/// Of one kind, and of all peers that have made any: those of the configuration.
#[derive(Debug)]
pub(super) struct PeerEvents {
    buckets: BTreeMap<String, Bucket>,
    one_more_in: Duration,
}

impl PeerEvents {
    pub(super) fn new(one_more_in: Duration) -> Self {
        Self { buckets: BTreeMap::new(), one_more_in }
    }

    /// Whether one more of this peer is to be recorded.
    pub(super) fn is_recorded(&mut self, peer: &str, now: Instant) -> bool {
        let new = || Bucket { left: AT_ONCE, filled: now, further: 0 };
        let bucket = self.buckets.entry(peer.to_owned()).or_insert_with(new);
        while bucket.left < AT_ONCE && now.saturating_duration_since(bucket.filled) >= self.one_more_in {
            bucket.left += 1;
            bucket.filled += self.one_more_in;
        }
        if bucket.left == AT_ONCE {
            bucket.filled = now;
        }
        let left = bucket.left.checked_sub(1);
        bucket.left = left.unwrap_or(0);
        left.is_some()
    }

    /// One more of this peer was not recorded.
    pub(super) fn count(&mut self, peer: &str) {
        if let Some(bucket) = self.buckets.get_mut(peer) {
            bucket.further += 1;
        }
    }

    /// How many of each peer were not; begins to count anew.
    pub(super) fn take(&mut self) -> Vec<(String, u64)> {
        let taken = self.buckets.iter_mut().map(|(peer, of)| (peer.clone(), std::mem::take(&mut of.further)));
        taken.filter(|(_, further)| *further > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(events: &mut PeerEvents, times: usize, now: Instant) -> usize {
        let mut recorded = 0;
        for _ in 0..times {
            match events.is_recorded("charlie", now) {
                true => recorded += 1,
                false => events.count("charlie"),
            }
        }
        recorded
    }

    #[test]
    fn one_peers_sessions_are_so_many_lines_and_a_number() {
        let (mut events, now) = (PeerEvents::new(ONE_SESSION_IN), Instant::now());
        assert_eq!(recorded(&mut events, 10_000, now), AT_ONCE as usize);
        assert!(events.is_recorded("bravo", now), "another peer");
        assert_eq!(events.take(), [("charlie".to_owned(), 10_000 - u64::from(AT_ONCE))]);
        assert!(events.take().is_empty());
        let later = now + ONE_SESSION_IN;
        assert_eq!(
            recorded(&mut events, 10, later),
            1,
            "one more in a while, also where the rest was summed up"
        );
        let much_later = later + 1000 * ONE_SESSION_IN;
        assert_eq!(recorded(&mut events, 500, much_later), AT_ONCE as usize, "not more than at once");
    }
}
