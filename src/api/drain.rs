//! A host that is emptied.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Foretold, Problem};
pub use crate::drain::{AT_ONCE_MAX, DrainResult, Request as DrainRequest, Try as DrainTry};
use crate::drain::{Drain, Guest, GuestState, ORDER, PeerUse};

/// The drain that is under way, or the last one.
pub const DRAIN: &str = "/v1/drain";

/// Where a drain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrainStage {
    UnderWay,
    /// Nothing further is begun.
    Cancelling,
    Ended,
}

/// Where a VM of a drain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrainVmState {
    /// It is here, and its turn comes.
    Waiting,
    /// A migration that the drain has not begun has it.
    Busy,
    Moving,
    Moved,
    /// Handed over, and nobody knows yet whose it is.
    Undecided,
    /// It stays where it was.
    Stays,
}

/// One VM of a drain.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DrainVm {
    pub vm: String,
    /// Where it is.
    pub state: DrainVmState,
    /// Where it goes or is, by the peer's name in the configuration.
    pub peer: Option<String>,
    /// The migration that has it, or had it last.
    pub migration: Option<Uuid>,
    /// Why it stays, or is undecided.
    pub cause: Option<String>,
    /// It was moved, and something is left to clean up.
    pub left: bool,
    /// What its disks have together; none where its QEMU did not say.
    pub disk_bytes: Option<u64>,
    /// Migrations that did not move it.
    pub tries: Vec<DrainTry>,
}

/// A peer that VMs go to.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DrainPeer {
    /// Its name in the configuration.
    pub name: String,
    /// On their way to it.
    pub under_way: u64,
    /// Why it is asked only for VMs that no other peer is left for.
    pub set_aside: Option<String>,
}

/// The drain that is under way, or the last one: `GET /v1/drain`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Drain")]
pub struct DrainStatus {
    pub id: Uuid,
    pub stage: DrainStage,
    /// Set at the end.
    pub result: Option<DrainResult>,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Seconds since the epoch.
    pub ended_at: Option<i64>,
    /// How many at once, from this host and to each peer.
    pub at_once: u64,
    pub at_once_per_peer: u64,
    /// The order of the VMs, in words.
    pub order: String,
    /// In that order.
    pub vms: Vec<DrainVm>,
    /// In the order in which they are preferred.
    pub peers: Vec<DrainPeer>,
    /// What keeps it from going on.
    pub trouble: Option<String>,
    /// VMs that were on this host at its end, those that it was not asked to move included.
    pub here_at_end: Vec<String>,
}

/// What a drain would do: `POST /v1/drain/plan`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DrainPlan {
    /// How many at once, from this host and to each peer.
    pub at_once: u64,
    pub at_once_per_peer: u64,
    /// The order of the VMs, in words.
    pub order: String,
    /// In the order in which they would begin.
    pub vms: Vec<PlannedVm>,
    /// Those that would not be begun.
    pub stay: Vec<DrainVm>,
}

/// A VM that would be moved.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PlannedVm {
    pub vm: String,
    /// What its disks have together; none where its QEMU did not say.
    pub disk_bytes: Option<u64>,
    /// The peer that would take it; none if none would.
    pub to: Option<String>,
    /// What `check` says of each peer, up to the first that would take it.
    pub checks: Vec<PeerCheck>,
    /// What is to be expected of its migration, alone on the way; none if no peer would take it.
    #[serde(default)]
    pub foretold: Option<Foretold>,
}

/// What `check` says of a VM and a peer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PeerCheck {
    /// Its name in the configuration.
    pub peer: String,
    pub problems: Vec<Problem>,
}

impl From<Guest> for DrainVm {
    fn from(guest: Guest) -> Self {
        let last = guest.tries.last().map(|tried| tried.migration);
        let (state, peer, migration, cause, left) = match guest.state {
            GuestState::Waiting => (DrainVmState::Waiting, None, last, None, false),
            GuestState::Busy { migration } => (DrainVmState::Busy, None, Some(migration), None, false),
            GuestState::Moving { peer, migration } => {
                (DrainVmState::Moving, Some(peer), Some(migration), None, false)
            }
            GuestState::Moved { peer, migration, left } => {
                (DrainVmState::Moved, peer, Some(migration), None, left)
            }
            GuestState::Undecided { peer, migration, cause } => {
                (DrainVmState::Undecided, Some(peer), Some(migration), Some(cause), false)
            }
            GuestState::Stays { cause } => (DrainVmState::Stays, None, last, Some(cause), false),
        };
        let (vm, disk_bytes, tries) = (guest.vm, guest.disk_bytes, guest.tries);
        Self { vm, state, peer, migration, cause, left, disk_bytes, tries }
    }
}

impl DrainStatus {
    /// What there is to say of a drain.
    pub fn new(drain: Drain, trouble: Option<String>) -> Self {
        let stage = match drain.ended_at {
            Some(_) => DrainStage::Ended,
            None if drain.cancelled => DrainStage::Cancelling,
            None => DrainStage::UnderWay,
        };
        let peer = |peer: &PeerUse| DrainPeer {
            name: peer.name.clone(),
            under_way: drain.under_way_to(&peer.name) as u64,
            set_aside: peer.set_aside.clone(),
        };
        Self {
            id: drain.id,
            stage,
            result: drain.result(),
            began_at: drain.began_at,
            ended_at: drain.ended_at,
            at_once: drain.limits.at_once as u64,
            at_once_per_peer: drain.limits.per_peer as u64,
            order: ORDER.to_owned(),
            peers: drain.peers.iter().map(peer).collect(),
            vms: drain.guests.into_iter().map(DrainVm::from).collect(),
            trouble,
            here_at_end: drain.here_at_end,
        }
    }

    /// How many VMs are in a state.
    pub fn count(&self, state: DrainVmState) -> usize {
        self.vms.iter().filter(|vm| vm.state == state).count()
    }
}

impl DrainPlan {
    /// What a drain would do, with what was found of each VM.
    pub fn new(drain: Drain, found: Vec<(String, Vec<PeerCheck>, Option<Foretold>)>) -> Self {
        let size = |vm: &str| drain.guests.iter().find(|guest| guest.vm == vm).and_then(|g| g.disk_bytes);
        let planned = found.into_iter().map(|(vm, checks, foretold)| {
            let takes = |check: &&PeerCheck| !check.problems.iter().any(Problem::is_refusal);
            let to = checks.iter().find(takes).map(|check| check.peer.clone());
            PlannedVm { disk_bytes: size(&vm), to, checks, vm, foretold }
        });
        let vms: Vec<_> = planned.collect();
        let limits = drain.limits;
        let others = drain.guests.into_iter().filter(|guest| vms.iter().all(|vm| vm.vm != guest.vm));
        Self {
            at_once: limits.at_once as u64,
            at_once_per_peer: limits.per_peer as u64,
            order: ORDER.to_owned(),
            stay: others.map(DrainVm::from).collect(),
            vms,
        }
    }
}
