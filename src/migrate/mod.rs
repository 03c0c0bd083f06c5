//! One migration: plan, phases, journal, undo, both roles.
//!
//! ```text
//! source ──(control stream: message, link)──► destination
//!   │ examine, perform, undo                     │ exports, vm
//!   └── journal, phase, plan, progress ──────────┘
//! ```
//! `net` and `qemu` meet only here, through `OwnedFd`.

mod admission;
mod carried;
mod decide;
mod delta;
mod descriptors;
mod destination;
mod disks;
mod examine;
mod exports;
mod failure;
mod follow;
pub mod frozen;
mod given_up;
mod guest_watch;
pub mod handover;
pub mod handover_run;
mod host;
mod inventory;
pub mod journal;
mod last_words;
mod life;
mod link;
mod machine;
mod marked;
mod meanwhile;
pub mod message;
mod order;
mod patience;
mod perform;
pub mod phase;
pub mod plan;
pub mod problem;
pub mod progress;
mod reach;
mod reception;
pub mod recover;
mod request;
mod reserved;
mod retry;
mod router;
mod settings;
pub mod settle;
pub mod share;
mod source;
mod streams;
mod succession;
mod trial;
mod trouble;
mod undo;
mod vm;
pub mod vm_state;
mod witness;

pub use examine::check;
pub use failure::Failure;
pub use host::Host;
pub use request::{DowntimeLimit, DowntimeLimitError, Options, SourceRequest};
pub use retry::{Retry, RetryTooLarge, migrate};
pub use router::accept_streams;
pub use succession::{TakenUp, settle_stopped, take_up};
