//! Connections whose peer has not proved its identity yet. Their number is bounded, in all and for each
//! network, so that a flood pushes out itself first. Knows no TLS.
//!
//! ```text
//! TCP ──► silent: no whole ClientHello yet ──► speaking ──► proved, and out
//!              a socket and a little buffer        keys are exchanged
//! ```
//!
//! Who has proved an identity that is known here is no stranger: nobody takes its connection for a flood of
//! others, however long it waits until it has a session. Some are let out so at once; who comes beyond that waits
//! in its room, where it can be pushed out.
//!
//! Each of the two rooms has its own places: who says nothing takes none from who has spoken. When all places
//! of a room are taken, the network with the most of them loses its oldest one; one from which somebody has
//! proved an identity lately comes last. A peer needs its place among the silent for what its ClientHello is
//! behind TCP's last word, and its place among the speaking for a round trip.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio_util::sync::CancellationToken;

use super::identity::Identity;

/// Networks that are remembered because somebody there has proved an identity.
const PROVED_MAX: usize = 64;
/// Connections of known peers that wait in no room until they have a session, or none; and those of one peer.
const ADMITTED_MAX: usize = 64;
const ADMITTED_OF_ONE: usize = 16;

/// What counts as one place of origin: an IPv4 address, or the 64 bits of an IPv6 network, of which
/// one host may have all addresses (RFC 4291 §2.5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Network(IpAddr);

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => Self(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into()),
            v4 => Self(v4),
        }
    }
}

#[derive(Debug, Clone)]
struct Waiting {
    number: u64,
    from: Network,
    taken: CancellationToken,
}

/// How many places a room has, and how many of them may be one network's.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoomLimits {
    pub(super) places: usize,
    pub(super) of_one: usize,
}

#[derive(Debug)]
struct Room {
    limits: RoomLimits,
    /// Oldest first.
    waiting: VecDeque<Waiting>,
    of: BTreeMap<Network, usize>,
}

/// Networks from which somebody has proved an identity, each with when: a number that rises.
#[derive(Debug, Default)]
struct Proved(BTreeMap<Network, u64>);

impl Room {
    fn new(limits: RoomLimits) -> Self {
        Self { limits, waiting: VecDeque::new(), of: BTreeMap::new() }
    }

    /// Takes one more; somebody loses its place if there are too many.
    fn admit(&mut self, newcomer: Waiting, proved: &Proved) {
        let from = newcomer.from;
        if self.of.get(&from).is_some_and(|held| *held >= self.limits.of_one) {
            self.dismiss_oldest(from);
        }
        if self.waiting.len() >= self.limits.places
            && let Some(worst) = self.worst(from, proved)
        {
            self.dismiss_oldest(worst);
        }
        *self.of.entry(from).or_default() += 1;
        self.waiting.push_back(newcomer);
    }

    /// The network that is to make room for one from `newcomer`; of several the one that waits longest.
    fn worst(&self, newcomer: Network, proved: &Proved) -> Option<Network> {
        let rank = |(from, held): (&Network, &usize)| {
            (!proved.0.contains_key(from), held + usize::from(*from == newcomer))
        };
        let worst = self.of.iter().map(rank).max()?;
        let is_worst = |w: &&Waiting| self.of.get_key_value(&w.from).is_some_and(|of| rank(of) == worst);
        self.waiting.iter().find(is_worst).map(|w| w.from)
    }

    fn dismiss_oldest(&mut self, of: Network) {
        if let Some(at) = self.waiting.iter().position(|w| w.from == of)
            && let Some(dismissed) = self.remove(at)
        {
            dismissed.taken.cancel();
        }
    }

    fn leave(&mut self, number: u64) -> Option<Waiting> {
        let at = self.waiting.iter().position(|w| w.number == number)?;
        self.remove(at)
    }

    fn remove(&mut self, at: usize) -> Option<Waiting> {
        let removed = self.waiting.remove(at)?;
        if let Some(held) = self.of.get_mut(&removed.from) {
            *held -= 1;
            if *held == 0 {
                self.of.remove(&removed.from);
            }
        }
        Some(removed)
    }
}

impl Proved {
    fn note(&mut self, network: Network, at: u64) {
        self.0.insert(network, at);
        if self.0.len() > PROVED_MAX
            && let Some(oldest) = self.0.iter().min_by_key(|(_, at)| **at).map(|(network, _)| *network)
        {
            self.0.remove(&oldest);
        }
    }
}

#[derive(Debug)]
struct Rooms {
    silent: Room,
    speaking: Room,
    proved: Proved,
    entered: u64,
    /// Of those who have left the rooms, how many of each peer are still on their way.
    admitted: BTreeMap<Identity, usize>,
}

impl Rooms {
    /// Whether it was in one of them.
    fn leave(&mut self, number: u64) -> bool {
        self.silent.leave(number).or_else(|| self.speaking.leave(number)).is_some()
    }
}

/// All places.
#[derive(Debug)]
pub(super) struct PendingHandshakes(Mutex<Rooms>);

/// A place, held until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    pending: Arc<PendingHandshakes>,
    number: u64,
    from: Network,
    taken: CancellationToken,
    admitted: OnceLock<Identity>,
}

impl PendingHandshakes {
    pub(super) fn new(silent: RoomLimits, speaking: RoomLimits) -> Arc<Self> {
        let (silent, speaking) = (Room::new(silent), Room::new(speaking));
        let proved = Proved::default();
        Arc::new(Self(Mutex::new(Rooms { silent, speaking, proved, entered: 0, admitted: BTreeMap::new() })))
    }

    /// A place for one more that has not said anything yet.
    pub(super) fn enter(self: &Arc<Self>, from: IpAddr) -> Place {
        let from = Network::from(from);
        let mut rooms = self.locked();
        let Rooms { silent, proved, entered, .. } = &mut *rooms;
        let (number, taken) = (*entered, CancellationToken::new());
        *entered = number.wrapping_add(1);
        silent.admit(Waiting { number, from, taken: taken.clone() }, proved);
        Place { pending: Arc::clone(self), number, from, taken, admitted: OnceLock::new() }
    }

    fn locked(&self) -> MutexGuard<'_, Rooms> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until somebody else has taken this place.
    pub(super) async fn taken(&self) {
        self.taken.cancelled().await;
    }

    /// Whoever came has said what it wants: a whole ClientHello.
    pub(super) fn spoke(&self) {
        let mut rooms = self.pending.locked();
        let Rooms { silent, speaking, proved, .. } = &mut *rooms;
        if let Some(waiting) = silent.leave(self.number) {
            speaking.admit(waiting, proved);
        }
    }

    /// Whoever came has proved to be `who`, that is known here.
    pub(super) fn proved(&self, who: &Identity) {
        let mut rooms = self.pending.locked();
        let now = rooms.entered;
        rooms.proved.note(self.from, now);
        let of_one = rooms.admitted.get(who).copied().unwrap_or(0);
        let in_all: usize = rooms.admitted.values().sum();
        if in_all < ADMITTED_MAX && of_one < ADMITTED_OF_ONE && rooms.leave(self.number) {
            rooms.admitted.insert(who.clone(), of_one + 1);
            let _ = self.admitted.set(who.clone());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who lost its place has nothing to give back.
        if self.taken.is_cancelled() {
            return;
        }
        let mut rooms = self.pending.locked();
        let Some(who) = self.admitted.get() else {
            rooms.leave(self.number);
            return;
        };
        match rooms.admitted.get_mut(who) {
            Some(of_one) if *of_one > 1 => *of_one -= 1,
            _ => drop(rooms.admitted.remove(who)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::pool::{SILENT, SPEAKING};
    use super::*;

    fn bravo() -> Identity {
        "bravo".parse().unwrap()
    }

    fn lost(places: &[&Place]) -> Vec<bool> {
        places.iter().map(|p| p.taken.is_cancelled()).collect()
    }

    fn small(places: usize, of_one: usize) -> Arc<PendingHandshakes> {
        let limits = RoomLimits { places, of_one };
        PendingHandshakes::new(limits, limits)
    }

    fn left(places: &[Place]) -> usize {
        places.iter().filter(|p| !p.taken.is_cancelled()).count()
    }

    #[test]
    fn the_oldest_makes_room_and_who_leaves_frees_a_place() {
        let pending = small(2, 2);
        let ip = "10.0.0.1".parse().unwrap();
        let (first, second) = (pending.enter(ip), pending.enter(ip));
        let third = pending.enter(ip);
        assert_eq!(lost(&[&first, &second, &third]), [true, false, false]);
        drop(first);
        assert_eq!(pending.locked().silent.waiting.len(), 2);
        drop(third);
        let fourth = pending.enter(ip);
        assert_eq!(lost(&[&second, &fourth]), [false, false]);
        assert_eq!(pending.locked().silent.waiting.len(), 2);
        second.spoke();
        assert_eq!(pending.locked().speaking.waiting.len(), 1);
        drop((second, fourth));
        let rooms = pending.locked();
        assert!(rooms.silent.waiting.is_empty() && rooms.speaking.waiting.is_empty());
        assert!(rooms.silent.of.is_empty() && rooms.speaking.of.is_empty());
    }

    #[test]
    fn a_flood_from_one_network_pushes_out_only_itself() {
        let pending = small(8, 4);
        let honest = pending.enter("10.0.0.1".parse().unwrap());
        let stranger: Vec<IpAddr> = (0..500).map(|n| format!("2001:db8::{n:x}").parse().unwrap()).collect();
        let flood: Vec<Place> = stranger.iter().map(|ip| pending.enter(*ip)).collect();
        assert!(!honest.taken.is_cancelled());
        assert_eq!(left(&flood), 4, "one network's share");
        // IPv4 that comes over an IPv6 listener is IPv4.
        let flood: Vec<Place> = (0..500).map(|_| pending.enter("::ffff:10.0.0.9".parse().unwrap())).collect();
        assert!(!honest.taken.is_cancelled());
        assert!(left(&flood) <= 4);
        assert_eq!(pending.locked().silent.waiting.len(), 8);
    }

    #[test]
    fn a_flood_from_everywhere_spares_where_peers_have_proved_themselves() {
        let pending = small(8, 4);
        let peer: IpAddr = "10.0.0.1".parse().unwrap();
        pending.enter(peer).proved(&bravo());
        let honest = pending.enter(peer);
        let flood: Vec<Place> =
            (0..500u32).map(|n| pending.enter(IpAddr::from((0x0b00_0000 + n).to_be_bytes()))).collect();
        assert!(!honest.taken.is_cancelled());
        assert_eq!(left(&flood), 7);
        for n in 0..1000u32 {
            pending.enter(IpAddr::from((0x0c00_0000 + n).to_be_bytes())).proved(&bravo());
        }
        assert_eq!(pending.locked().proved.0.len(), PROVED_MAX);
    }

    #[test]
    fn who_has_proved_an_identity_is_pushed_out_by_nobody() {
        let pending = PendingHandshakes::new(SILENT, SPEAKING);
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let admit = |who: &str| {
            let place = pending.enter(ip);
            place.spoke();
            place.proved(&who.parse().unwrap());
            place
        };
        let flood = || {
            let one = |_| {
                let place = pending.enter(ip);
                place.spoke();
                place
            };
            drop((0..1000).map(one).collect::<Vec<_>>());
        };
        let honest = admit("bravo");
        flood();
        assert!(!honest.taken.is_cancelled());
        // Known peers that come without end have so many places, and are strangers to the room beyond that.
        let many: Vec<Place> = (0..200).map(|_| admit("charlie")).collect();
        let other = admit("bravo");
        flood();
        assert_eq!(left(&many), ADMITTED_OF_ONE);
        assert!(!honest.taken.is_cancelled() && !other.taken.is_cancelled(), "another peer has its own");
        drop((other, many));
        let many: Vec<Place> = (0..200).map(|n| admit(&format!("peer{n}"))).collect();
        flood();
        assert_eq!(left(&many), ADMITTED_MAX - 1);
        assert!(!honest.taken.is_cancelled());
        drop((honest, many));
        let next = admit("charlie");
        flood();
        assert!(!next.taken.is_cancelled(), "who goes makes room");
        drop(next);
        let rooms = pending.locked();
        assert!(
            rooms.silent.waiting.is_empty() && rooms.speaking.waiting.is_empty() && rooms.admitted.is_empty()
        );
    }

    #[test]
    fn who_says_nothing_takes_no_place_from_who_has_spoken() {
        let pending = small(8, 8);
        let ip = "10.0.0.1".parse().unwrap();
        let honest = pending.enter(ip);
        honest.spoke();
        let flood: Vec<Place> = (0..10_000).map(|_| pending.enter(ip)).collect();
        assert!(!honest.taken.is_cancelled());
        // And who speaks does not keep the silent out.
        flood.iter().for_each(Place::spoke);
        let next = pending.enter(ip);
        assert!(!next.taken.is_cancelled());
    }

    /// Handshakes from the flood's own network, in virtual time: a ClientHello half a round trip after TCP's
    /// last word, the proof a whole one after that. `speaks`: the flood says a ClientHello at once.
    fn honest_left(per_second: u64, round_trip_ms: u64, speaks: bool) -> usize {
        const HONEST: usize = 24;
        let pending = PendingHandshakes::new(SILENT, SPEAKING);
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let (mut flood, mut honest, mut proved) = (VecDeque::new(), VecDeque::new(), 0);
        for ms in 0..5000 {
            for _ in 0..per_second / 1000 + u64::from(ms % 1000 < per_second % 1000) {
                let place = pending.enter(ip);
                if speaks {
                    place.spoke();
                }
                flood.push_back(place);
            }
            // Who floods holds on to its connections until they are closed for it.
            flood.retain(|place: &Place| !place.taken.is_cancelled());
            if ms % 200 == 0 && ms / 200 < HONEST as u64 {
                honest.push_back((ms, pending.enter(ip)));
            }
            honest.retain(|(began, place): &(u64, Place)| {
                let age = ms - began;
                if !place.taken.is_cancelled() && age == round_trip_ms / 2 {
                    place.spoke();
                }
                proved += usize::from(!place.taken.is_cancelled() && age == round_trip_ms * 3 / 2);
                age < round_trip_ms * 3 / 2
            });
        }
        proved
    }

    #[test]
    fn honest_handshakes_outlast_a_flood_from_their_own_address_at_50_ms() {
        for per_second in [700, 2000] {
            for speaks in [false, true] {
                assert_eq!(
                    honest_left(per_second, 50, speaks),
                    24,
                    "{per_second} a second, speaks: {speaks}"
                );
            }
        }
        // The promise has an end; this one is far beyond it.
        assert_eq!(honest_left(20_000, 100, true), 0);
    }
}
