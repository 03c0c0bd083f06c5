//! The lobby: connections whose peer has not proved its identity yet. Their number is bounded, and
//! whoever comes when it is full takes the place of the one that has waited longest: peers prove
//! themselves in milliseconds, so silent connections never keep one out. Knows no TLS.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// All places.
#[derive(Debug)]
pub(super) struct Lobby {
    /// Oldest first.
    places: Mutex<VecDeque<(u64, CancellationToken)>>,
    places_max: usize,
}

/// A place, held until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    lobby: Arc<Lobby>,
    number: u64,
    taken: CancellationToken,
}

impl Lobby {
    pub(super) fn new(places_max: usize) -> Arc<Self> {
        Arc::new(Self { places: Mutex::default(), places_max })
    }

    /// A place for one more; the oldest loses its own if there are too many.
    pub(super) fn enter(self: &Arc<Self>) -> Place {
        let mut places = self.locked();
        if places.len() >= self.places_max
            && let Some((_, oldest)) = places.pop_front()
        {
            oldest.cancel();
        }
        let number = places.back().map_or(0, |(last, _)| last.wrapping_add(1));
        let taken = CancellationToken::new();
        places.push_back((number, taken.clone()));
        Place { lobby: Arc::clone(self), number, taken }
    }

    fn locked(&self) -> MutexGuard<'_, VecDeque<(u64, CancellationToken)>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until somebody else has taken this place.
    pub(super) async fn taken(&self) {
        self.taken.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who lost its place has nothing to give back; its number may be somebody else's by now.
        if !self.taken.is_cancelled() {
            self.lobby.locked().retain(|(number, _)| *number != self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_who_leaves_frees_a_place() {
        let lobby = Lobby::new(2);
        let (first, second) = (lobby.enter(), lobby.enter());
        let third = lobby.enter();
        assert!(first.taken.is_cancelled() && !second.taken.is_cancelled() && !third.taken.is_cancelled());
        drop(first);
        assert_eq!(lobby.locked().len(), 2);
        drop(third);
        let fourth = lobby.enter();
        assert!(!second.taken.is_cancelled() && !fourth.taken.is_cancelled());
        assert_eq!(lobby.locked().len(), 2);
        drop((second, fourth));
        assert!(lobby.locked().is_empty());
    }
}
