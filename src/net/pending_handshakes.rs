//! Connections whose peer has not proved its identity yet. Their number is bounded, in all and for each
//! network, so that a flood pushes out itself first. Knows no TLS.
//!
//! When all places are taken, the network with the most places loses its oldest one. A network from which
//! somebody has proved an identity lately comes last. Peers prove themselves in milliseconds.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Networks that are remembered because somebody there has proved an identity.
const PROVED_MAX: usize = 64;

/// What counts as one place of origin: an IPv4 address, or the 64 bits of an IPv6 network, of which
/// one host may have all addresses (RFC 4291 §2.5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network(IpAddr);

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => Self(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into()),
            v4 => Self(v4),
        }
    }
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    from: Network,
    taken: CancellationToken,
}

#[derive(Debug, Default)]
struct Places {
    /// Oldest first.
    waiting: VecDeque<Waiting>,
    /// The latest last.
    proved: VecDeque<Network>,
    entered: u64,
}

impl Places {
    fn of(&self, network: Network) -> usize {
        self.waiting.iter().filter(|w| w.from == network).count()
    }

    /// The oldest place of those that are to make room for one from `newcomer`.
    fn to_leave(&self, newcomer: Network) -> Option<usize> {
        let held = |from: Network| self.of(from) + usize::from(from == newcomer);
        let rank = |w: &Waiting| (!self.proved.contains(&w.from), held(w.from));
        let worst = self.waiting.iter().map(rank).max()?;
        self.waiting.iter().position(|w| rank(w) == worst)
    }

    fn leave(&mut self, at: Option<usize>) {
        if let Some(left) = at.and_then(|at| self.waiting.remove(at)) {
            left.taken.cancel();
        }
    }
}

/// All places.
#[derive(Debug)]
pub(super) struct PendingHandshakes {
    places: Mutex<Places>,
    places_max: usize,
    of_one_max: usize,
}

/// A place, held until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    pending: Arc<PendingHandshakes>,
    number: u64,
    from: Network,
    taken: CancellationToken,
}

impl PendingHandshakes {
    /// With so many places, and so many of them for one network.
    pub(super) fn new(places_max: usize, of_one_max: usize) -> Arc<Self> {
        Arc::new(Self { places: Mutex::default(), places_max, of_one_max })
    }

    /// A place for one more; somebody loses its own if there are too many.
    pub(super) fn enter(self: &Arc<Self>, from: IpAddr) -> Place {
        let from = Network::from(from);
        let mut places = self.locked();
        if places.of(from) >= self.of_one_max {
            let oldest = places.waiting.iter().position(|w| w.from == from);
            places.leave(oldest);
        }
        if places.waiting.len() >= self.places_max {
            let at = places.to_leave(from);
            places.leave(at);
        }
        let number = places.entered;
        places.entered = number.wrapping_add(1);
        let taken = CancellationToken::new();
        places.waiting.push_back(Waiting { number, from, taken: taken.clone() });
        Place { pending: Arc::clone(self), number, from, taken }
    }

    fn locked(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until somebody else has taken this place.
    pub(super) async fn taken(&self) {
        self.taken.cancelled().await;
    }

    /// Whoever came has proved to be somebody that is known here.
    pub(super) fn proved(&self) {
        let mut places = self.pending.locked();
        places.proved.retain(|network| *network != self.from);
        places.proved.push_back(self.from);
        if places.proved.len() > PROVED_MAX {
            places.proved.pop_front();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who lost its place has nothing to give back.
        if !self.taken.is_cancelled() {
            self.pending.locked().waiting.retain(|w| w.number != self.number);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lost(places: &[&Place]) -> Vec<bool> {
        places.iter().map(|p| p.taken.is_cancelled()).collect()
    }

    #[test]
    fn the_oldest_makes_room_and_who_leaves_frees_a_place() {
        let pending = PendingHandshakes::new(2, 2);
        let ip = "10.0.0.1".parse().unwrap();
        let (first, second) = (pending.enter(ip), pending.enter(ip));
        let third = pending.enter(ip);
        assert_eq!(lost(&[&first, &second, &third]), [true, false, false]);
        drop(first);
        assert_eq!(pending.locked().waiting.len(), 2);
        drop(third);
        let fourth = pending.enter(ip);
        assert_eq!(lost(&[&second, &fourth]), [false, false]);
        assert_eq!(pending.locked().waiting.len(), 2);
        drop((second, fourth));
        assert!(pending.locked().waiting.is_empty());
    }

    #[test]
    fn a_flood_from_one_network_pushes_out_only_itself() {
        let pending = PendingHandshakes::new(8, 4);
        let honest = pending.enter("10.0.0.1".parse().unwrap());
        let stranger: Vec<IpAddr> = (0..500).map(|n| format!("2001:db8::{n:x}").parse().unwrap()).collect();
        let flood: Vec<Place> = stranger.iter().map(|ip| pending.enter(*ip)).collect();
        assert!(!honest.taken.is_cancelled());
        assert_eq!(flood.iter().filter(|p| !p.taken.is_cancelled()).count(), 4, "one network's share");
        // IPv4 that comes over an IPv6 listener is IPv4.
        let flood: Vec<Place> = (0..500).map(|_| pending.enter("::ffff:10.0.0.9".parse().unwrap())).collect();
        assert!(!honest.taken.is_cancelled());
        assert!(flood.iter().filter(|p| !p.taken.is_cancelled()).count() <= 4);
        assert_eq!(pending.locked().waiting.len(), 8);
    }

    #[test]
    fn a_flood_from_everywhere_spares_where_peers_have_proved_themselves() {
        let pending = PendingHandshakes::new(8, 4);
        let peer: IpAddr = "10.0.0.1".parse().unwrap();
        pending.enter(peer).proved();
        let honest = pending.enter(peer);
        let flood: Vec<Place> =
            (0..500u32).map(|n| pending.enter(IpAddr::from((0x0b00_0000 + n).to_be_bytes()))).collect();
        assert!(!honest.taken.is_cancelled());
        assert_eq!(flood.iter().filter(|p| !p.taken.is_cancelled()).count(), 7);
        for n in 0..1000u32 {
            pending.enter(IpAddr::from((0x0c00_0000 + n).to_be_bytes())).proved();
        }
        assert_eq!(pending.locked().proved.len(), PROVED_MAX);
    }
}
