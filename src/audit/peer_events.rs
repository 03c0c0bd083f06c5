//! What a known peer makes the record grow by: sessions that begin, end and come back. So many at once are recorded
//! of each peer, then one in a while; the rest is counted. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Events of one peer that are recorded at once.
const AT_ONCE: u32 = 60;
/// After so long there is one more.
const ONE_MORE_AFTER: Duration = Duration::from_secs(60);

/// Of one peer.
#[derive(Debug)]
struct Bucket {
    left: u32,
    /// Up to when it has been filled.
    filled: Instant,
    further: u64,
}

/// Of all peers that have had a session: those of the configuration.
#[derive(Debug, Default)]
pub(super) struct PeerEvents(BTreeMap<String, Bucket>);

impl PeerEvents {
    /// Whether one more of this peer is to be recorded.
    pub(super) fn is_recorded(&mut self, peer: &str, now: Instant) -> bool {
        let new = || Bucket { left: AT_ONCE, filled: now, further: 0 };
        let bucket = self.0.entry(peer.to_owned()).or_insert_with(new);
        while bucket.left < AT_ONCE && now.saturating_duration_since(bucket.filled) >= ONE_MORE_AFTER {
            bucket.left += 1;
            bucket.filled += ONE_MORE_AFTER;
        }
        if bucket.left == AT_ONCE {
            bucket.filled = now;
        }
        let left = bucket.left.checked_sub(1);
        match left {
            Some(left) => bucket.left = left,
            None => bucket.further += 1,
        }
        left.is_some()
    }

    /// How many of each peer were not; begins to count anew.
    pub(super) fn take(&mut self) -> Vec<(String, u64)> {
        let taken = self.0.iter_mut().map(|(peer, of)| (peer.clone(), std::mem::take(&mut of.further)));
        taken.filter(|(_, further)| *further > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peers_sessions_are_so_many_lines_and_a_number() {
        let (mut events, now) = (PeerEvents::default(), Instant::now());
        let recorded = (0..10_000).filter(|_| events.is_recorded("charlie", now)).count();
        assert_eq!(recorded, AT_ONCE as usize);
        assert!(events.is_recorded("bravo", now), "another peer");
        assert_eq!(events.take(), [("charlie".to_owned(), 10_000 - u64::from(AT_ONCE))]);
        assert!(events.take().is_empty());
        let later = now + ONE_MORE_AFTER;
        let recorded = (0..10).filter(|_| events.is_recorded("charlie", later)).count();
        assert_eq!(recorded, 1, "one more in a while, also where the rest was summed up");
        let recorded =
            (0..500).filter(|_| events.is_recorded("charlie", later + 1000 * ONE_MORE_AFTER)).count();
        assert_eq!(recorded, AT_ONCE as usize, "not more than at once");
    }
}
