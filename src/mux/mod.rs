//! The session protocol, sans-I/O: frames, streams, credit, scheduling, the replay log. Bytes,
//! std and data that serde can carry: no socket, no clock (time is an argument), no TLS, no randomness.
//!
//! A [`Session`] outlives its connections. Bytes and time go in (`handle_*`), batches, deadlines
//! and events come out (`poll_*`), streams are named by [`StreamId`]:
//!
//! ```text
//!   local socket → send() → SendQueue ─┐ schedule     ┌→ Batch → TLS record → peer
//!                                      ├─ transmit ───┤
//!   credit, resets, opens → control ───┘              └→ ReplayLog, until the peer's ACK
//!
//!   peer → handle_input() → frame → receive ─┬→ RecvQueue → recv() → local socket → consumed()
//!                                            └→ Event                                  │
//!                                      CREDIT ←────────────────────────────────────────┘
//! ```
//!
//! Reading never waits for writing, and never for a stream: what a stream may hold is bounded by
//! the credit that it was given, and the sum of that by the session's budget.

mod ack_state;
mod assemble;
mod batch;
mod code;
mod config;
mod credit;
mod deficit_round_robin;
mod error;
mod fair_queue;
pub mod frame;
pub mod hello;
mod inflow;
mod liveness;
mod local;
mod open;
mod pacer;
mod queue;
mod receive;
mod replay_log;
mod schedule;
mod session;
mod share;
mod shared_limit;
mod snapshot;
mod stats;
mod stream;
mod token_bucket;
mod transmit;

pub use batch::{Batch, Part};
pub use code::Code;
pub use config::{Config, PerClass, RateLimit};
pub use error::{OpenError, SessionError, StreamError};
pub use open::{
    Class, MigrationId, NAME_BYTES_MAX, Name, Open, Role, StreamId, WEIGHT_DEFAULT, WEIGHT_MAX, purpose,
};
pub use session::{Event, Session};
pub use share::{SHARE_WEIGHT_DEFAULT, Share};
pub use shared_limit::{DEBT_REFUSED_BYTES, SharedLimit};
pub use snapshot::Snapshot;
pub use stats::{Stats, StreamStats};
