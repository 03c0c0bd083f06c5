//! The hand-over: who owns the guest, as two state machines, one for each side. Pure.
//!
//! It is the one place where a guest could run twice or be lost between two hosts, so it is kept
//! apart from everything that it decides over: no I/O, no clock, no tokio, no QEMU, no network.
//! What happens comes in as an input, what is to be done comes out as effects, and the agent does
//! nothing about ownership that is not an effect: [`super::handover_run`] carries them out.
//! `tests/handover/tests.rs` explores both machines against each other, exhaustively, over every
//! loss, crash and failing disk.
//!
//! ```text
//!            source                               destination
//!   ours ──complete──► handing-over               waiting ──loaded──► loaded
//!     │                 │   │    │                   │ abort, timer,    │ start
//!     │ fail     failed │   │    │ durable           │ trouble          ▼
//!     ▼                 ▼   │    ▼      ──start──►   │               beginning
//!    back ◄── taking-back   │  asking                │    not durable │   │ durable
//!     ▲         ▲  never-ran│◄─┘  │ runs             ▼ ◄──────────────┘   ▼
//!     │ durable └────────── │ ────┘               giving-up ◄─refused─ starting
//!     │ or surely not       ▼      ▼                 │ proved            │ ran, or may have
//!     └────────────────── doubt   noting             ▼                   ▼
//!                                   ▼             never-ran             runs
//!                                 moved
//! ```
//!
//! **What is on the disk.** A write ends in one of three ways ([`Written`]). One that is in doubt
//! has neither surely happened nor surely not: after a crash the record may be there. And what a
//! process *reads* after a crash is in doubt as well, because the page cache shows records that
//! were never synced. So every restart begins by writing anew the record that it is about to rely
//! on: durable, or failed without a trace, it proves that what was read is on the disk.
//!
//! **Decisions.** An operator may decide at either host, at any moment in which its machine waits for the other, and
//! the other host may come back with a journal of its own. So a side whose QEMU is gone, with which nothing can be
//! lost by waiting, does not take the guest for its own by its own word: a source in *missing* asks the destination, a
//! destination in *claiming* the source. A side whose QEMU lives goes on as its journal says.
//!
//! **Witness.** Both sides may have agreed on a third that keeps one word for the migration ([`Word`]), for when one of
//! the two hosts is lost. The destination lets the guest run only once the word is that it has taken the guest. So a
//! source that has handed over and hears nothing may take it itself: whoever comes second is told, and gives it up.
//!
//! **Rules.** The source says *start* only when its `handed-over` is surely on the disk, and lets
//! its guest run only when that is surely not there, or a later `never-ran` of its own is, or the
//! destination has said *never-ran*. The destination runs the guest only when its `starting` is
//! surely on the disk, and says *never-ran* only when that is surely not there (a restart reads a
//! journal without it as never-ran) or a later `never-ran` is. What was once said stays true.

mod destination;
mod register;
mod source;

pub use destination::{Destination, DestinationEffect, DestinationInput, DestinationState, Ran};
pub use register::{Answer, Move, Word};
pub use source::{Source, SourceEffect, SourceInput, SourceState};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a write to the journal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Written {
    /// It is on the disk, and so is everything before it.
    Durable,
    /// It is surely not on the disk, and everything before it surely is.
    Failed,
    /// Nobody knows whether it is there after a crash.
    InDoubt,
}

/// A record that the hand-over turns on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    /// Source: the guest is the destination's from here on.
    HandedOver,
    /// Destination: the guest is about to be started.
    Starting,
    /// The guest runs, or has run, at the destination.
    Runs,
    /// The guest never ran at the destination and never will.
    NeverRan,
    /// Destination: the source knows how it ended.
    Confirmed,
    /// An operator has decided it.
    Forced(Side),
}

/// Which host, seen from the one that is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The virtual machine belongs to this host.
    Here,
    /// The virtual machine belongs to the other host.
    There,
}

/// What the source asks of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ask {
    /// Start the guest. Said only under a durable `handed-over`.
    Start,
    /// Never start it.
    Abort,
    /// What has become of it?
    Settle,
    /// The source durably knows how it ended.
    Confirmed,
}

/// What has become of a migration at the destination. The first two are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// The guest was started here.
    Runs,
    /// The guest never ran here and never will under this migration.
    NeverRan,
    /// The guest is loaded and paused; `start` would start it.
    Loaded,
    /// Nothing is decided: the guest is not whole here yet, or the journal cannot be written.
    Open,
}

/// What a journal says of the hand-over when a process reads it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Known {
    /// [`Mark::HandedOver`].
    pub handed_over: bool,
    /// [`Mark::Starting`].
    pub starting: bool,
    /// [`Mark::Runs`].
    pub runs: bool,
    /// [`Mark::NeverRan`].
    pub never_ran: bool,
    /// [`Mark::Forced`]; the last one.
    pub forced: Option<Side>,
    /// It is closed: the guest has moved, or has not. Written only once that was sure.
    pub ended: Option<Ended>,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// The guest is the destination's.
    Moved,
    /// The guest is the source's.
    Stayed,
}

impl Ended {
    /// What the destination says of it.
    pub fn fate(self) -> Fate {
        match self {
            Self::Moved => Fate::Runs,
            Self::Stayed => Fate::NeverRan,
        }
    }
}

/// An input that cannot come in this state: a mistake of the caller's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the hand-over has no step for {input} in state {state}")]
pub struct Illegal {
    state: String,
    input: String,
}

impl Illegal {
    fn new(state: &impl std::fmt::Debug, input: &impl std::fmt::Debug) -> Self {
        Self { state: format!("{state:?}"), input: format!("{input:?}") }
    }
}
