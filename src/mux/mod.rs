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

mod allowance;
mod assemble;
mod batch;
mod code;
mod config;
mod credit;
mod error;
pub mod frame;
mod groups;
pub mod hello;
mod limit;
mod liveness;
mod local;
mod log;
mod pace;
mod queue;
mod receipt;
mod receive;
mod ring;
mod schedule;
mod session;
mod share;
mod snapshot;
mod stats;
mod stream;
mod transmit;

pub use allowance::Allowance;
pub use batch::{Batch, Part};
pub use code::Code;
pub use config::{Config, PerClass, RateLimit};
pub use error::{OpenError, SessionError, StreamError};
pub use session::{Event, Session};
pub use share::{MigrationId, SHARE_WEIGHT_DEFAULT, Share};
pub use snapshot::Snapshot;
pub use stats::{Stats, StreamStats};

/// A stream's number in its session: odd when the dialer opened it, even when the acceptor did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

/// Which side of a session this is. It never changes: only the dialer dials again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Made the first connection.
    Dialer,
    /// Accepted it.
    Acceptor,
}

impl Role {
    fn first_id(self) -> u32 {
        match self {
            Self::Dialer => 1,
            Self::Acceptor => 2,
        }
    }

    fn peer(self) -> Self {
        match self {
            Self::Dialer => Self::Acceptor,
            Self::Acceptor => Self::Dialer,
        }
    }
}

/// How a stream is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Small and awaited: control and QMP. Before everything else, within a bounded share.
    Urgent,
    /// RAM, disks, files: weighted fair among themselves.
    Bulk,
}

impl Class {
    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u8 {
        match self {
            Self::Urgent => 0,
            Self::Bulk => 1,
        }
    }

    /// The class with this number on the wire.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Urgent),
            1 => Some(Self::Bulk),
            _ => None,
        }
    }
}

/// The ordinary weight of a bulk stream.
pub const WEIGHT_DEFAULT: u16 = 16;
/// Largest weight; a larger one counts as this.
pub const WEIGHT_MAX: u16 = 1024;

/// What a stream is for, as its opener tells the acceptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Open {
    /// One of [`purpose`]; an unknown one is the acceptor's to refuse with
    /// [`Code::Unsupported`].
    pub purpose: u16,
    /// How it is scheduled, at both ends.
    pub class: Class,
    /// Its share among bulk streams, 1 to [`WEIGHT_MAX`], [`WEIGHT_DEFAULT`] being ordinary.
    pub weight: u16,
    /// The migration that it belongs to; zero for none.
    pub migration: MigrationId,
    /// Which disk or RAM channel of that migration.
    pub channel: u16,
}

/// What streams are for (WIRE §3).
pub mod purpose {
    /// Requests and answers between the agents.
    pub const CONTROL: u16 = 1;
    /// A QEMU monitor.
    pub const QMP: u16 = 2;
    /// The main migration stream.
    pub const RAM: u16 = 3;
    /// A further migration channel (multifd, postcopy preempt).
    pub const RAM_CHANNEL: u16 = 4;
    /// One NBD connection.
    pub const NBD: u16 = 5;
    /// A file's contents.
    pub const FILE: u16 = 6;
}
