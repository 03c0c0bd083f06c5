//! A drain as a machine: which migration is wanted next, and what follows from the end of one. Pure: its caller
//! begins migrations, and writes the machine to the disk before.
//!
//! A VM goes to the first peer in the order of the request that has the fewest of this drain's on their way and a
//! free place. One that did not move is tried at the next peer only if it is surely where it was; no peer is tried
//! twice. A peer that could not be reached at all is asked only for VMs that no other peer is left for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::guest::{Guest, GuestState, Try};
use super::request::Request;

/// The order of the VMs, for people.
pub const ORDER: &str =
    "the largest disks first, so that what takes longest does not begin last; then by name";

/// How often a VM's migration may be ended from outside before that counts as a try.
const CUT_OFF_MAX: u32 = 5;

/// How many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// From this host.
    pub at_once: usize,
    /// To each peer.
    pub per_peer: usize,
}

/// A peer that VMs go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerUse {
    pub name: String,
    /// How many it takes at once, by what it has said; none while it has not refused one for that.
    pub takes: Option<usize>,
    /// Why it could not be reached, or takes nothing at all.
    pub set_aside: Option<String>,
}

/// A migration that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted<'a> {
    pub vm: &'a str,
    pub peer: &'a str,
}

/// What may follow a migration that did not move its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The VM is surely where it was: another peer may take it.
    Elsewhere,
    /// The same, and no other VM would have got there.
    PeerOut,
    /// The same, and the peer takes no more at once.
    PeerFull,
    /// The same, and it was ended from outside: by a restart of this agent, or for a check of the VM. It may be begun
    /// again as it was.
    CutOff,
    /// Nothing: it is not sure that the VM is as it was, or it is not to move.
    Nowhere,
}

/// How a migration of the drain's ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Moved { left: bool },
    Stayed { cause: String, after: After },
    Undecided { cause: String },
}

/// What became of a VM that somebody else's migration had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freed {
    Here,
    Moved,
    /// It never came, or nobody knows where it is.
    NotHere {
        cause: String,
    },
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrainResult {
    /// All VMs of the selection are elsewhere.
    Moved,
    /// They are, and something is left to clean up.
    Left,
    /// Some stay.
    Incomplete,
    Cancelled,
    /// Of at least one nobody knows yet whose it is.
    Undecided,
}

impl DrainResult {
    pub const ALL: [Self; 5] = [Self::Moved, Self::Left, Self::Incomplete, Self::Cancelled, Self::Undecided];

    /// For metrics and people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Left => "left",
            Self::Incomplete => "incomplete",
            Self::Cancelled => "cancelled",
            Self::Undecided => "undecided",
        }
    }
}

/// A drain.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Drain {
    pub id: Uuid,
    pub request: Request,
    pub limits: Limits,
    /// Seconds since the epoch.
    pub began_at: i64,
    pub ended_at: Option<i64>,
    pub cancelled: bool,
    /// In the order in which they go.
    pub guests: Vec<Guest>,
    /// In the order in which they are preferred.
    pub peers: Vec<PeerUse>,
    /// VMs that are on this host at the drain's end.
    pub here_at_end: Vec<String>,
}

impl Drain {
    /// One that has not begun to move anything.
    pub fn new(id: Uuid, request: Request, limits: Limits, mut guests: Vec<Guest>, now: i64) -> Self {
        guests.sort_by(|a, b| b.disk_bytes.cmp(&a.disk_bytes).then_with(|| a.vm.cmp(&b.vm)));
        let peer = |name: &String| PeerUse { name: name.clone(), takes: None, set_aside: None };
        let peers = request.to.names().iter().map(peer).collect();
        let (ended_at, cancelled, here_at_end) = (None, false, Vec::new());
        Self { id, request, limits, began_at: now, ended_at, cancelled, guests, peers, here_at_end }
    }

    /// The migration to begin now, if there is one.
    pub fn wanted(&self) -> Option<Wanted<'_>> {
        if self.cancelled || self.ended_at.is_some() || self.under_way() >= self.limits.at_once {
            return None;
        }
        let waiting = self.guests.iter().filter(|guest| guest.state == GuestState::Waiting);
        waiting.into_iter().find_map(|guest| Some(Wanted { vm: &guest.vm, peer: self.peer_for(guest)? }))
    }

    /// The wanted migration is about to begin. Whether there is such a VM, and it waits.
    pub fn begin(&mut self, vm: &str, peer: &str, migration: Uuid) -> bool {
        let waiting =
            self.guests.iter_mut().find(|guest| guest.vm == vm && guest.state == GuestState::Waiting);
        let Some(guest) = waiting else { return false };
        guest.state = GuestState::Moving { peer: peer.to_owned(), migration };
        true
    }

    /// A migration of the drain's has ended, or is undecided. One that it does not know changes nothing.
    pub fn ended(&mut self, migration: Uuid, end: End) {
        let Some(at) = self.guests.iter().position(|guest| guest.migration() == Some(migration)) else {
            return;
        };
        let (peer, was_undecided) = match &self.guests[at].state {
            GuestState::Moving { peer, .. } => (peer.clone(), false),
            GuestState::Undecided { peer, .. } => (peer.clone(), true),
            _ => return,
        };
        let state = match end {
            End::Moved { left } => GuestState::Moved { peer: Some(peer), migration, left },
            End::Undecided { cause } => GuestState::Undecided { peer, migration, cause },
            // Once it had been handed over: nobody tries that again unasked.
            End::Stayed { cause, after } => {
                let after = if was_undecided { After::Nowhere } else { after };
                return self.stayed(at, Try { peer, migration, cause }, after);
            }
        };
        self.guests[at].state = state;
    }

    fn stayed(&mut self, at: usize, tried: Try, after: After) {
        let (name, others) =
            (tried.peer.clone(), self.under_way_to(&tried.peer) - usize::from(self.is_moving(at)));
        let guest = &mut self.guests[at];
        let counts = match after {
            // The number of ours that it takes is known now.
            After::PeerFull if others > 0 => false,
            // With none of ours there it is others who have its places, for as long as that is.
            After::CutOff | After::PeerFull => {
                guest.cut_off += 1;
                guest.cut_off > CUT_OFF_MAX
            }
            After::Elsewhere | After::PeerOut | After::Nowhere => true,
        };
        let cause = tried.cause.clone();
        if counts {
            guest.tries.push(tried);
        }
        guest.state = match after {
            After::Nowhere => GuestState::Stays { cause: cause.clone() },
            _ if self.cancelled => GuestState::Stays { cause: "the drain was cancelled".into() },
            _ => GuestState::Waiting,
        };
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.name == name) {
            match after {
                After::PeerOut => peer.set_aside = Some(cause),
                After::PeerFull if others > 0 => peer.takes = Some(others),
                _ => {}
            }
        }
        self.give_up_at(at);
    }

    /// One that waits and has no peer left stays.
    fn give_up_at(&mut self, at: usize) {
        let guest = &self.guests[at];
        let left = self.peers.iter().any(|peer| !guest.has_tried(&peer.name));
        if guest.state == GuestState::Waiting && !left {
            let cause = match &guest.tries[..] {
                [one] => one.cause.clone(),
                several => format!(
                    "none of {} peers took it, the last one: {}",
                    several.len(),
                    several.last().map_or("", |last| last.cause.as_str())
                ),
            };
            self.guests[at].state = GuestState::Stays { cause };
        }
    }

    /// The migration of somebody else's that had a VM has ended.
    pub fn freed(&mut self, migration: Uuid, freed: Freed) {
        let state = GuestState::Busy { migration };
        let Some(guest) = self.guests.iter_mut().find(|guest| guest.state == state) else { return };
        guest.state = match freed {
            Freed::Here if self.cancelled => GuestState::Stays { cause: "the drain was cancelled".into() },
            Freed::Here => GuestState::Waiting,
            Freed::Moved => GuestState::Moved { peer: None, migration, left: false },
            Freed::NotHere { cause } => GuestState::Stays { cause },
        };
    }

    /// Nothing further is begun. The migrations of the drain's that are to be rolled back, if they can be.
    pub fn cancel(&mut self) -> Vec<Uuid> {
        self.cancelled = true;
        for guest in &mut self.guests {
            if matches!(guest.state, GuestState::Waiting | GuestState::Busy { .. }) {
                guest.state = GuestState::Stays { cause: "the drain was cancelled".into() };
            }
        }
        self.moving().map(|(_, migration)| migration).collect()
    }

    /// Nothing waits, and nothing is waited for but what is undecided.
    pub fn is_done(&self) -> bool {
        let open = |guest: &Guest| {
            matches!(guest.state, GuestState::Waiting | GuestState::Busy { .. } | GuestState::Moving { .. })
        };
        !self.guests.iter().any(open)
    }

    /// How it has ended; none before.
    pub fn result(&self) -> Option<DrainResult> {
        self.ended_at?;
        let has = |is_it: fn(&GuestState) -> bool| self.count(is_it) > 0;
        Some(match () {
            () if has(|state| matches!(state, GuestState::Undecided { .. })) => DrainResult::Undecided,
            () if self.cancelled => DrainResult::Cancelled,
            () if has(|state| matches!(state, GuestState::Stays { .. })) => DrainResult::Incomplete,
            () if has(|state| matches!(state, GuestState::Moved { left: true, .. })) => DrainResult::Left,
            () => DrainResult::Moved,
        })
    }

    /// Its migrations that are on their way, each with its VM.
    pub fn moving(&self) -> impl Iterator<Item = (&str, Uuid)> {
        self.guests.iter().filter_map(|guest| match &guest.state {
            GuestState::Moving { migration, .. } => Some((guest.vm.as_str(), *migration)),
            _ => None,
        })
    }

    /// How many VMs are in a state.
    pub fn count(&self, is_it: impl Fn(&GuestState) -> bool) -> usize {
        self.guests.iter().filter(|guest| is_it(&guest.state)).count()
    }

    fn under_way(&self) -> usize {
        self.moving().count()
    }

    fn is_moving(&self, at: usize) -> bool {
        matches!(self.guests[at].state, GuestState::Moving { .. })
    }

    /// On their way to a peer.
    pub fn under_way_to(&self, name: &str) -> usize {
        self.count(|state| matches!(state, GuestState::Moving { peer, .. } if peer == name))
    }

    /// Where a VM goes now; none if it has to wait.
    fn peer_for(&self, guest: &Guest) -> Option<&str> {
        let left = || self.peers.iter().filter(|peer| !guest.has_tried(&peer.name));
        let all_aside = left().all(|peer| peer.set_aside.is_some());
        let fits = left().filter(|peer| all_aside || peer.set_aside.is_none());
        let has_place = |peer: &&PeerUse| {
            let most = peer.takes.map_or(self.limits.per_peer, |takes| takes.min(self.limits.per_peer));
            self.under_way_to(&peer.name) < most
        };
        let fewest = fits.filter(has_place).min_by_key(|peer| self.under_way_to(&peer.name));
        fewest.map(|peer| peer.name.as_str())
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
