//! The journal: the durable record of one migration on one host.
//!
//! One file per migration and role, one JSON record per line, each synced to disk before the
//! step that it announces is taken. Every line has a number and a checksum over all before it, so
//! that lines which were torn, doubled, moved or taken from elsewhere are found out. A torn last
//! line is what a crash leaves and is dropped; anything else that cannot be read is refused,
//! never guessed at, and never deleted. A file that ends within its first line tells of nothing:
//! nothing is done before that line is synced. A file has one writer at a time. Knows no QEMU.

mod ending;
mod error;
mod file;
mod folder;
mod line;
mod writers;

pub use ending::Ending;
pub use error::JournalError;
pub use file::{Journal, Unwritten};
pub(crate) use folder::is_later;
pub use folder::{
    HISTORY_MAX, Peeked, UNCONFIRMED_DAYS_MAX, UNCONFIRMED_MAX, migration_of, peek_all, prune,
    remove_unbegun, vm_of,
};
pub use line::Flaw;
pub(crate) use writers::is_written as is_in_use;

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::handover::{Ended, Known, Mark, Side};
use super::model::image::ImageStamp;
use super::model::phase::Phase;
use super::model::problem::Accepted;
pub use super::model::role::Role;
use super::model::witness::AgreedWitness;
use crate::qemu::{CapabilityStatus, MigrationParameters, Process, ProcessId, Unthrottled};

/// The format that this version writes. Format 1 had neither numbers nor checksums.
pub const FORMAT: u32 = 2;
/// The same with a witness, and the newest that is read: an agent that does not know of witnesses would start the
/// guest without asking, and refuses this by its number.
pub const FORMAT_WITH_WITNESS: u32 = 3;
const SUFFIX: &str = "journal";

/// A further try of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetryOf {
    /// The migration of the first.
    pub first: Uuid,
    /// Counted from one, so two at least.
    pub number: u32,
    /// What those before it left for it. In the header, so that there is no moment at which no
    /// open journal tells of it.
    #[serde(default)]
    pub kept: Vec<Undo>,
}

/// The first record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`] or [`FORMAT_WITH_WITNESS`] when it was written.
    pub format: u32,
    pub migration: Uuid,
    pub role: Role,
    pub vm: String,
    pub host: String,
    pub peer: String,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Nanoseconds within that second; none in journals of agents that did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began_ns: Option<u32>,
    /// Whether the guest ran when it began.
    pub running: bool,
    /// Source: its QEMU is to be left, paused for ever, when the guest has moved.
    #[serde(default)]
    pub keep_source: bool,
    /// Source: the migration whose further try this is, and which one; its first is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryOf>,
    /// The kinds of problems that the source's operator has accepted by name.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub accepted: BTreeSet<Accepted>,
}

impl Header {
    /// Whether it may have begun after `other`: migrations can follow each other within a second.
    pub(crate) fn may_be_later_than(&self, other: &Self) -> bool {
        match (self.began_ns, other.began_ns) {
            (Some(own), Some(others)) => (self.began_at, own) > (other.began_at, others),
            _ => self.began_at >= other.began_at,
        }
    }

    /// When it began.
    pub(crate) fn moment(&self) -> (i64, u32) {
        (self.began_at, self.began_ns.unwrap_or_default())
    }

    /// Tries follow each other within a second.
    fn order(&self) -> ((i64, u32), u32) {
        (self.moment(), self.retry.as_ref().map_or(1, |r| r.number))
    }
}

/// What a migration tells of itself when it begins.
#[derive(Debug)]
pub struct Beginning<'a> {
    pub vm: &'a str,
    pub running: bool,
    pub keep_source: bool,
    pub retry: Option<RetryOf>,
    pub accepted: BTreeSet<Accepted>,
    /// A witness is to be agreed on.
    pub witness: bool,
}

/// Something that was about to be made and has to go if the migration fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Undo {
    /// A descriptor under this name in the monitor.
    Fd(String),
    Node(String),
    Job(String),
    Bitmap {
        node: String,
        name: String,
    },
    /// Migration capabilities and parameters as they were.
    MigrationSettings {
        capabilities: Vec<CapabilityStatus>,
        /// The parameters that we know.
        parameters: MigrationParameters,
    },
    /// A QEMU process that we started.
    Qemu,
    NbdServer,
    Export(String),
    /// The guest's writes to a device were not limited, or not so much.
    Throttle(Unthrottled),
    /// Destination: an image that was not there.
    Image {
        path: PathBuf,
        /// Which file it is; none for one that is not finished and has a name that is nobody else's.
        made: Option<MadeFile>,
    },
    /// Destination: what a command was about to make, or has made.
    Volume(MadeVolume),
}

/// What a command makes at a path where nothing was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeVolume {
    pub disk: String,
    pub path: PathBuf,
    /// That the guest sees.
    pub bytes: u64,
    pub format: String,
    /// What there was when the command had ended well; none before.
    pub made: Option<MadeFile>,
}

/// What tells a file from one that takes its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFile {
    pub device: u64,
    pub inode: u64,
    /// When it was made, in nanoseconds since the epoch, where the file system knows.
    pub born_ns: Option<u64>,
}

impl MadeFile {
    pub fn of(file: &Metadata) -> Self {
        let born = file.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        Self { device: file.dev(), inode: file.ino(), born_ns: born.map(|born| born.as_nanos() as u64) }
    }
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// The first line.
    Begun(Header),
    /// The next step makes this.
    Undo(Undo),
    /// The QEMU on this host that it is about.
    Qemu(ProcessId),
    /// A phase has been entered.
    Phase(Phase),
    /// Somebody has paused or continued the guest since it began: whether it is to run where it ends
    /// up.
    ToRun { running: bool },
    /// Source: the guest is the destination's from here on. Destination: never written.
    HandedOver,
    /// Destination: the guest is about to be started.
    Starting,
    /// Destination: the guest runs. Source: the destination said so.
    Runs,
    /// Destination: the guest never ran and never will. Source: the destination said so, or
    /// the hand-over was never reached.
    NeverRan,
    /// Destination: how a try that was undone left the disks.
    #[serde(rename = "witness")]
    ImageStamp(ImageStamp),
    /// Both sides have agreed on a witness, which is asked from the hand-over on.
    WitnessAgreed(AgreedWitness),
    /// Nothing is open any more.
    Ended(Ending),
    /// Destination: the source durably knows how it ended, and never asks again.
    Confirmed,
    /// What was left to clean up when it ended is gone by now.
    Cleaned,
    /// An operator has decided whose the virtual machine is.
    Forced {
        /// Seen from this host.
        side: Side,
        /// The caller's user, by the kernel's word.
        uid: Option<u32>,
        /// Seconds since the epoch.
        at: i64,
    },
}

impl Record {
    /// The record of a mark; `None` for one that needs more than the mark says.
    pub fn of(mark: Mark) -> Option<Self> {
        Some(match mark {
            Mark::HandedOver => Self::HandedOver,
            Mark::Starting => Self::Starting,
            Mark::Runs => Self::Runs,
            Mark::NeverRan => Self::NeverRan,
            Mark::Confirmed => Self::Confirmed,
            Mark::Forced(_) => return None,
        })
    }
}

/// What a journal says so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// Its first record.
    pub header: Header,
    /// What was about to be made, in order.
    pub undo: Vec<Undo>,
    /// See [`Record::Qemu`]: the last one that is known.
    pub qemu: Option<ProcessId>,
    pub phase: Phase,
    /// The last one before a roll-back: what failed, if it failed.
    pub reached: Phase,
    /// See [`Record::ToRun`]; the last one.
    pub to_run: Option<bool>,
    pub handed_over: bool,
    pub starting: bool,
    pub runs: bool,
    pub never_ran: bool,
    pub image_stamp: Option<ImageStamp>,
    pub ended: Option<Ending>,
    pub confirmed: bool,
    pub cleaned: bool,
    /// See [`Record::Forced`]; the last one.
    pub forced: Option<Side>,
    /// See [`Record::WitnessAgreed`].
    pub witness: Option<AgreedWitness>,
}

impl Past {
    fn new(header: Header) -> Self {
        let undo = header.retry.as_ref().map_or_else(Vec::new, |r| r.kept.clone());
        Self {
            header,
            undo,
            qemu: None,
            phase: Phase::Begin,
            reached: Phase::Begin,
            to_run: None,
            handed_over: false,
            starting: false,
            runs: false,
            never_ran: false,
            image_stamp: None,
            ended: None,
            confirmed: false,
            cleaned: false,
            forced: None,
            witness: None,
        }
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Begun(_) => {}
            Record::Undo(undo) => self.undo.push(undo),
            Record::Qemu(id) => self.qemu = Some(id),
            Record::Phase(phase) => {
                self.phase = phase;
                if phase != Phase::RollBack {
                    self.reached = phase;
                }
            }
            Record::ToRun { running } => self.to_run = Some(running),
            Record::HandedOver => self.handed_over = true,
            Record::Starting => self.starting = true,
            Record::Runs => self.runs = true,
            Record::NeverRan => self.never_ran = true,
            Record::ImageStamp(stamp) => self.image_stamp = Some(stamp),
            Record::Ended(ending) => self.ended = Some(ending),
            Record::Confirmed => self.confirmed = true,
            Record::Cleaned => self.cleaned = true,
            Record::Forced { side, .. } => self.forced = Some(side),
            Record::WitnessAgreed(witness) => self.witness = Some(witness),
        }
    }

    /// Whether it has come as far as to a QEMU: to one that it starts, or that it finds.
    pub fn came_to_a_qemu(&self) -> bool {
        let is_beside = |undo: &Undo| matches!(undo, Undo::Image { .. } | Undo::Volume(_));
        self.qemu.is_some() || !self.undo.iter().all(is_beside)
    }

    /// Whether `process` is the QEMU that it is about; so it is taken to be where one of the two is
    /// not known.
    pub fn is_of(&self, process: &Process) -> bool {
        match (&self.qemu, process.id()) {
            (Some(then), Some(now)) => then == now,
            _ => true,
        }
    }

    /// Whether `process` is surely that QEMU.
    pub fn is_surely_of(&self, process: &Process) -> bool {
        self.qemu.is_some() && self.qemu.as_ref() == process.id()
    }

    /// Whether the guest is to run where it ends up: nobody has paused it, or somebody continued it.
    pub fn running(&self) -> bool {
        self.to_run.unwrap_or(self.header.running)
    }

    /// Whether it ended with the guest at the destination.
    pub fn has_moved(&self) -> bool {
        matches!(self.ended, Some(Ending::Moved { .. }))
    }

    /// What the hand-over's machines need of it.
    pub fn known(&self) -> Known {
        let ended = self.ended.as_ref().map(|_| if self.has_moved() { Ended::Moved } else { Ended::Stayed });
        Known {
            handed_over: self.handed_over,
            starting: self.starting,
            runs: self.runs,
            never_ran: self.never_ran,
            forced: self.forced,
            ended,
        }
    }

    /// What was left to clean up when it ended, and still is.
    pub fn left(&self) -> &[String] {
        self.ended.as_ref().filter(|_| !self.cleaned).map_or(&[], Ending::leftovers)
    }

    /// Whether the guest should run here since, and was not seen to.
    pub fn guest_stands(&self) -> bool {
        self.ended.as_ref().is_some_and(Ending::guest_stands)
    }
}
