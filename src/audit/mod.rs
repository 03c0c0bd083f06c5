//! The audit record: who asked what of this host, who its peers proved to be, what became of it. Lines are only
//! ever added, and each has the hash of the one before.
//!
//! ```text
//! everybody ─► keeper: a queue, a thread ─► files: append, sync, rotate ─► line: numbers and hashes
//!     refusals, peer_events, migration_lines: bounded   judge: what a record shows ─┘
//! ```
//!
//! Whoever records never waits for the disk, but where it asks to. A disk that takes nothing is said, counted and
//! tried again, and is no reason to stop anything else.
//!
//! **What a chain shows.** A line that was changed, removed, doubled or moved is found where it happened. Whoever
//! can write the files can also write all of them anew from some line on, or cut off their end: that shows only
//! against an *anchor*, a line's number and hash that is kept elsewhere. The head is in the agent's log, in its
//! status, and in the records of the peers that migrations went to and came from.

mod event;
mod files;
mod judge;
mod keeper;
mod line;
mod migration_lines;
mod peer_events;
mod refusals;

pub use event::{By, Compared, Event, Grant, Hashed, Step, Subject};
pub use files::{Limits, paths};
pub use judge::{Anchor, AnchorError, Report, head_of_peer, judge};
pub use keeper::{Audit, Figures};
pub use line::{Head, Kept, text_of};
pub use migration_lines::MigrationLines;
