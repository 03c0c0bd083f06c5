//! Migrations at rest: what one process of an agent leaves to the next. Plain data, with local
//! sockets beside it in a list of descriptors. Knows no encoding and how nothing is done.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::migrate::guest::inventory::Inventory;
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::handover;
use crate::migrate::journal::RetryOf;
use crate::migrate::model::image::Image;
use crate::migrate::model::label::Label;
use crate::migrate::model::options::Options;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::plan::CopiedDisk;
use crate::migrate::model::progress::{Downtime, Outcome, Progress};
use crate::migrate::protocol::message::{Export, Offer, Prepared, Started};
use crate::migrate::transfer::disk::delta::LeftCopy;
use crate::migrate::transfer::disk::frozen::{FrozenCopy, freeze_changes};
use crate::migrate::transfer::disk::tracking::Tracking;
use crate::migrate::transfer::frozen::{FrozenControl, FrozenData, StoppedControl, StoppedData, settle_data};
use crate::net::stream_owner::{Descriptors, OwnedStream, StreamOwner};

/// All migrations that an agent leaves.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FrozenMigrations {
    /// Those of which this host is the source.
    pub(crate) sources: Vec<FrozenSource>,
    /// Those that come to it.
    pub(crate) destinations: Vec<FrozenDestination>,
    /// Those of which this host is the source, between two tries. A version that does not know them settles what they
    /// have left by its journal.
    #[serde(default)]
    pub(crate) waiting: Vec<FrozenWait>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenSource {
    pub(crate) id: Uuid,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) options: Options,
    pub(crate) progress: Progress,
    pub(crate) phase: Phase,
    /// Always there once the sessions have stopped.
    pub(crate) control: Option<FrozenControl>,
    pub(crate) data: Vec<FrozenData>,
    /// Streams that had ended and whose end nobody had looked at.
    pub(crate) ended: Vec<Label>,
    pub(crate) disks: Vec<CopiedDisk>,
    #[serde(default)]
    pub(crate) inventory: Option<Inventory>,
    /// Which try it is of several.
    pub(crate) retry: Option<RetryOf>,
    pub(crate) tracking: Tracking,
    /// The disks of which only changes are copied; none of one whose copy has not begun. A version that does not know
    /// them rolls the migration back.
    #[serde(default)]
    pub(crate) changes: BTreeMap<String, Option<FrozenCopy>>,
    /// Whether all mirrors had completed well: their jobs may be off QEMU's list. Of a version before, not known.
    #[serde(default)]
    pub(crate) completed: bool,
    pub(crate) grant: Option<Prepared>,
    pub(crate) loaded: bool,
    pub(crate) downtime: Downtime,
    /// For how long the guest had stood still.
    pub(crate) paused_ms: Option<u64>,
}

/// A migration that waits for a further try.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenWait {
    /// Of the first try.
    pub(crate) id: Uuid,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) options: Options,
    pub(crate) progress: Progress,
    /// Of the try that is waited for.
    pub(crate) number: u32,
    /// How the one before ended.
    pub(crate) failed: Outcome,
    pub(crate) held: Option<FrozenHeld>,
    /// How long it is waited for yet.
    pub(crate) wait: Duration,
}

/// What a try has left for the next one, under its open journal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenHeld {
    pub(crate) migration: Uuid,
    pub(crate) outcome: Outcome,
    pub(crate) tracking: Tracking,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenDestination {
    pub(crate) id: Uuid,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) progress: Progress,
    /// None when the source was lost.
    pub(crate) control: Option<FrozenControl>,
    pub(crate) data: Vec<FrozenData>,
    pub(crate) exports: Vec<Export>,
    pub(crate) images: Vec<Image>,
    /// The NBD server's socket, in the list of descriptors.
    pub(crate) nbd: Option<usize>,
    /// Our end of the RAM stream's socket while its stream has not been opened.
    pub(crate) ram: Option<usize>,
    pub(crate) incoming: bool,
    pub(crate) handover: handover::Destination,
    pub(crate) granted: Option<(Offer, Prepared)>,
    pub(crate) said_started: Option<Started>,
    /// The unit with which QEMU was started, if we started it.
    pub(crate) started: Option<Option<String>>,
    /// How long its grant still goes. None from an agent whose grants have no deadline.
    #[serde(default)]
    pub(crate) grant_left: Option<Duration>,
}

impl FrozenMigrations {
    /// Whether there is nothing to leave.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the guest of one may run only once a witness was asked.
    pub fn have_a_witness(&self) -> bool {
        let granted = |source: &FrozenSource| source.grant.as_ref().is_some_and(|grant| grant.witness);
        self.sources.iter().any(granted)
            || self.destinations.iter().any(|destination| destination.handover.has_witness())
    }

    /// Whether a guest of this host stands still meanwhile.
    pub fn has_paused(&self) -> bool {
        self.sources.iter().any(|source| source.paused_ms.is_some())
    }

    /// Counts the time from the end of the process before to now.
    pub fn have_stood(&mut self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let paused = self.sources.iter_mut().filter_map(|source| source.paused_ms.as_mut());
        paused.for_each(|paused| *paused = paused.saturating_add(ms));
        let grants = self.destinations.iter_mut().filter_map(|there| there.grant_left.as_mut());
        let waits = self.waiting.iter_mut().map(|waiting| &mut waiting.wait);
        grants.chain(waits).for_each(|left| *left = left.saturating_sub(time));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sources.len() + self.destinations.len() + self.waiting.len()
    }

    /// The migrations, by their numbers.
    pub fn ids(&self) -> impl Iterator<Item = Uuid> {
        let under_way = self.sources.iter().map(|s| s.id).chain(self.destinations.iter().map(|d| d.id));
        under_way.chain(self.waiting.iter().map(|w| w.id))
    }
}

impl StreamOwner for FrozenMigrations {
    fn streams(&mut self) -> Box<dyn Iterator<Item = &mut OwnedStream> + '_> {
        let of_sources = self.sources.iter_mut().map(|s| (&mut s.control, &mut s.data));
        let of_destinations = self.destinations.iter_mut().map(|d| (&mut d.control, &mut d.data));
        Box::new(of_sources.chain(of_destinations).flat_map(|(control, data)| {
            let control = control.iter_mut().map(|c| &mut c.place);
            control.chain(data.iter_mut().map(|d| &mut d.place))
        }))
    }
}

/// A migration that has stopped; its sessions have not.
#[derive(Debug)]
pub(crate) enum Stopped {
    Source(Box<StoppedSource>),
    Destination(Box<StoppedDestination>),
    Waiting(Box<FrozenWait>),
}

#[derive(Debug)]
pub(crate) struct StoppedSource {
    pub(crate) frozen: FrozenSource,
    pub(crate) control: StoppedControl,
    pub(crate) data: Vec<StoppedData>,
    pub(crate) changes: BTreeMap<String, Option<LeftCopy>>,
}

#[derive(Debug)]
pub(crate) struct StoppedDestination {
    pub(crate) frozen: FrozenDestination,
    pub(crate) control: Option<StoppedControl>,
    pub(crate) data: Vec<StoppedData>,
    pub(crate) nbd: Option<NbdServer>,
    pub(crate) ram: Option<OwnedFd>,
}

impl Stopped {
    /// Its sessions have stopped as well: leaves it with the others.
    pub(crate) fn settle(self, left: &mut FrozenMigrations, fds: &mut Descriptors) {
        match self {
            Self::Source(stopped) => {
                let StoppedSource { mut frozen, control, data, changes } = *stopped;
                frozen.changes = freeze_changes(changes, fds);
                frozen.control = Some(control.settle());
                frozen.data = settle_data(data, fds);
                left.sources.push(frozen);
            }
            Self::Destination(stopped) => {
                let StoppedDestination { mut frozen, control, data, nbd, ram } = *stopped;
                frozen.control = control.map(StoppedControl::settle);
                frozen.data = settle_data(data, fds);
                frozen.nbd = nbd.and_then(NbdServer::into_socket).map(|socket| fds.add(socket));
                frozen.ram = ram.map(|ram| fds.add(ram));
                left.destinations.push(frozen);
            }
            Self::Waiting(frozen) => left.waiting.push(*frozen),
        }
    }
}
