//! One migration: its plan, its phases, its journal, its hand-over, both roles.
//!
//! ```text
//! router, serve, settle,               what begins, ends or goes on with migrations
//! recover, replicas, handoff
//!   source, destination                the two roles
//!   checks                             what would keep a migration from going well
//!   host                               what all migrations of one agent share
//!   protocol, transfer                 what agents say to each other; how bytes move
//!   guest                              a QEMU of this host
//!   journal, handover                  the durable record; whose the guest is
//!   model                              plain words, no I/O
//! ```
//! Imports point downwards. `net` and `qemu` meet only here, through `OwnedFd`.

mod checks;
mod decide;
mod destination;
mod guest;
mod handoff;
pub mod handover;
pub mod handover_run;
mod host;
pub mod journal;
mod model;
mod protocol;
pub mod recover;
pub mod replicas;
mod router;
mod serve;
pub mod settle;
mod source;
mod transfer;

pub use handoff::{FrozenMigrations, TakenUp, go_on, settle_stopped, take_up};
pub use host::{Host, WitnessFigures, known_vms, running_qemu, vm_state};
pub use model::disk_choice::{DiskChoice, DisksAtOnce, DisksAtOnceError};
pub use model::in_band::{InBand, InBandError};
pub use model::incremental::Incremental;
pub use model::options::{DowntimeLimit, DowntimeLimitError, Options, Retry, RetryTooLarge};
pub use model::sample::{DiskSample, DiskSampleError};
pub use model::{leftover, phase, plan, prediction, problem, progress, timeline};
pub use protocol::message;
pub use router::accept_streams;
pub use source::examine::check;
pub use source::failure::Failure;
pub use source::outlook::outlook;
pub use source::request::SourceRequest;
pub use source::retry::migrate;
pub use transfer::bandwidth;
