//! The migrations of a session with something to send, and which of them sends next: those whose
//! guest stands still first, then the one that has had least for its weight (start-time fair
//! queueing), none beyond its limit. Knows no frames and no credit.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::deficit_round_robin::{Backlog, DeficitRoundRobin, Turn};
use super::shared_limit::Draw;
use super::{MigrationId, Share, StreamId};

/// Virtual time of a byte at weight 1. Fine enough that no weight rounds it away.
const TIME_PER_BYTE: u128 = 1 << 16;

/// A place in the order: those ahead, then by what they have had.
type Place = (bool, u128, MigrationId);

#[derive(Debug, Default)]
struct Group {
    share: Share,
    draw: Option<Draw>,
    ring: DeficitRoundRobin,
    /// What it has had for its weight.
    time: u128,
    /// Its place, while it has one; without, it is parked or has nothing to send.
    place: Option<Place>,
}

impl Group {
    fn has_own_share(&self) -> bool {
        self.share != Share::default()
    }
}

/// The migrations with something to send, in their order.
#[derive(Debug, Default)]
pub(super) struct FairQueue {
    all: BTreeMap<MigrationId, Group>,
    order: BTreeSet<Place>,
    /// Those that wait for their limit.
    parked: Vec<MigrationId>,
    /// The virtual time of the group that sent last: who comes back begins here.
    clock: u128,
}

impl FairQueue {
    /// Whether no stream is listed.
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty() && self.parked.is_empty()
    }

    /// When the first may send; `None` if that is now as far as they are concerned.
    pub(super) fn ready_at(&self) -> Option<Instant> {
        if !self.order.is_empty() {
            return None;
        }
        let parked = self.parked.iter().filter_map(|key| self.all.get(key)?.draw.as_ref());
        parked.map(Draw::ready_at).min()
    }

    /// What a migration is limited to, in bytes per second.
    pub(super) fn limit_of(&self, key: MigrationId) -> Option<NonZeroU64> {
        self.all.get(&key)?.draw.as_ref().map(Draw::per_second)
    }

    /// A stream that is not listed can send.
    pub(super) fn wake(&mut self, id: StreamId, turn: &mut Turn, fresh: bool) {
        let key = turn.migration;
        let group = self.all.entry(key).or_default();
        let was_empty = group.ring.is_empty();
        group.ring.wake(id, turn, fresh);
        if was_empty && group.place.is_none() && !self.parked.contains(&key) {
            group.time = group.time.max(self.clock);
            self.list(key);
        }
    }

    /// A listed stream leaves.
    pub(super) fn remove(&mut self, id: StreamId, key: MigrationId) {
        if let Some(group) = self.all.get_mut(&key) {
            group.ring.remove(id);
        }
    }

    /// Another share, from the next frame on.
    pub(super) fn change(&mut self, key: MigrationId, share: Share) {
        let clock = self.clock;
        let group = self.all.entry(key).or_default();
        Draw::renew(&mut group.draw, share.limit.clone());
        if group.share.ahead != share.ahead {
            // What it had while it went ahead is no debt.
            group.time = clock;
        }
        group.share = share;
        self.unlist(key);
        self.parked.retain(|other| *other != key);
        self.list(key);
    }

    /// The stream to send next, which stays where it is.
    pub(super) fn head(&mut self, now: Instant, streams: &mut impl Backlog) -> Option<StreamId> {
        self.unpark(now);
        while let Some(&(_, _, key)) = self.order.first() {
            let Some(group) = self.all.get_mut(&key) else {
                self.order.pop_first();
                continue;
            };
            let Some(id) = group.ring.head(streams) else {
                self.unlist(key);
                self.forget_if_idle(key);
                continue;
            };
            if group.draw.as_mut().is_none_or(|draw| draw.is_ready(now)) {
                return Some(id);
            }
            self.unlist(key);
            self.parked.push(key);
        }
        None
    }

    /// A stream of this migration has sent so much. Returns for how long its limit had kept it.
    pub(super) fn charge(&mut self, key: MigrationId, bytes: usize, now: Instant) -> Duration {
        let Some(group) = self.all.get_mut(&key) else { return Duration::ZERO };
        if !group.share.ahead {
            self.clock = self.clock.max(group.time);
        }
        group.time += bytes as u128 * TIME_PER_BYTE / u128::from(group.share.weight.max(1));
        let waited = group.draw.as_mut().map(|draw| draw.charge(bytes, now)).unwrap_or_default();
        if group.place.is_some() {
            self.unlist(key);
            self.list(key);
        }
        waited
    }

    fn unpark(&mut self, now: Instant) {
        let mut at = 0;
        while let Some(key) = self.parked.get(at).copied() {
            let draw = self.all.get_mut(&key).and_then(|group| group.draw.as_mut());
            if draw.is_none_or(|draw| draw.is_ready(now)) {
                self.parked.swap_remove(at);
                self.list(key);
            } else {
                at += 1;
            }
        }
    }

    fn list(&mut self, key: MigrationId) {
        let Some(group) = self.all.get_mut(&key) else { return };
        if group.ring.is_empty() {
            return self.forget_if_idle(key);
        }
        let place = (!group.share.ahead, group.time, key);
        group.place = Some(place);
        self.order.insert(place);
    }

    fn unlist(&mut self, key: MigrationId) {
        if let Some(place) = self.all.get_mut(&key).and_then(|group| group.place.take()) {
            self.order.remove(&place);
        }
    }

    /// Nothing is kept of a migration of which nothing is to be known.
    fn forget_if_idle(&mut self, key: MigrationId) {
        if self.all.get(&key).is_some_and(|g| g.ring.is_empty() && g.place.is_none() && !g.has_own_share()) {
            self.all.remove(&key);
        }
    }
}
