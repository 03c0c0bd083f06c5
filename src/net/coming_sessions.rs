//! Sessions that peers have proved that they may have, and do not have yet: they count, so that many that are asked for
//! at the same moment are not more than there may be.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::identity::Identity;

/// How many of each peer.
#[derive(Debug, Clone, Default)]
pub(super) struct ComingSessions(Arc<Mutex<BTreeMap<Identity, usize>>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Coming {
    all: ComingSessions,
    peer: Identity,
}

impl ComingSessions {
    /// One more, unless as many are coming as `free` says that there may be.
    pub(super) fn one_more(&self, peer: &Identity, free: impl FnOnce() -> usize) -> Option<Coming> {
        let mut all = self.locked();
        let coming = all.entry(peer.clone()).or_default();
        // Looked at with the lock held: who has become a session meanwhile is in one of the two numbers.
        if *coming >= free() {
            return None;
        }
        *coming += 1;
        Some(Coming { all: self.clone(), peer: peer.clone() })
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Identity, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut all = self.all.locked();
        if let Some(coming) = all.get_mut(&self.peer) {
            *coming -= 1;
            if *coming == 0 {
                all.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_coming_than_there_may_be_and_one_that_has_come_gives_its_place_back() {
        let (all, bravo, charlie) =
            (ComingSessions::default(), "bravo".parse().unwrap(), "charlie".parse().unwrap());
        let two = [all.one_more(&bravo, || 2), all.one_more(&bravo, || 2)];
        assert!(two.iter().all(Option::is_some) && all.one_more(&bravo, || 2).is_none());
        assert!(all.one_more(&charlie, || 1).is_some(), "another peer");
        drop(two);
        assert!(all.one_more(&bravo, || 1).is_some());
        assert!(all.locked().is_empty());
    }
}
