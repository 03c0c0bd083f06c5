//! Emptying a host: which VM is moved when, and to whom. Owns the order, the limits and the durable record; knows
//! neither how a migration works nor how one is begun.
//!
//! ```text
//! request ─► drain      a pure machine: what is wanted next, what an end means
//!              │  └───► forecast   the same machine, played to its end
//!              └──────► record     the machine on the disk, written before what it wants is done
//! ```

mod forecast;
mod guest;
mod machine;
mod record;
mod request;

pub use forecast::forecast;
pub use guest::{Guest, GuestState, Try};
pub use machine::{After, Drain, DrainResult, End, Freed, Limits, ORDER, PeerUse, Wanted};
pub use record::{Record, RecordError};
pub use request::{AT_ONCE_MAX, AtOnce, AtOnceError, Patterns, Request, Targets, TargetsError};
