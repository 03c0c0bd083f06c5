//! The session protocol, sans-I/O: frames, streams, credit, scheduling, the replay log. Bytes
//! and std only: no socket, no clock, no TLS.
//!
//! ```text
//!  user ─ send ─► Stream queues ─► scheduler ─► Link (replay log) ─► Batch ─► TLS
//!  user ◄ recv ── Stream slabs ◄── session  ◄── Link (numbers)   ◄── Assembler ◄─ TLS
//! ```
//! In: `handle_*`. Out: `poll_*`. Time is an argument. A peer's bytes can end the session with
//! an error, never the process.

mod code;
mod config;
mod credit;
pub mod frame;
pub mod hello;
mod limit;
mod link;
mod schedule;
mod session;
mod stats;
mod stream;

use std::io::IoSlice;

pub use code::Code;
pub use config::{Class, Config};
pub use link::BadAck;
pub use schedule::WEIGHT_DEFAULT;
pub use session::Session;
pub use stats::Stats;

use frame::Frame;

/// What a stream is for (WIRE §3).
pub mod purpose {
    /// Requests and replies of two agents.
    pub const CONTROL: u16 = 1;
    /// A QMP monitor.
    pub const QMP: u16 = 2;
    /// The RAM stream.
    pub const RAM: u16 = 3;
    /// A further channel of it.
    pub const RAM_CHANNEL: u16 = 4;
    /// A disk's NBD traffic.
    pub const NBD: u16 = 5;
    /// A file.
    pub const FILE: u16 = 6;
}

/// Which side dialed. Its streams have odd numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// This side dialed.
    Dialer,
    /// The other did.
    Acceptor,
}

/// A stream's number in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

/// What a stream is opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// See [`purpose`].
    pub purpose: u16,
    /// How urgently its bytes are sent, both ways.
    pub class: Class,
    /// Its share among bulk streams, both ways; 16 is ordinary.
    pub weight: u16,
    /// The migration that it belongs to.
    pub migration: [u8; 16],
    /// Which of the migration's streams it is.
    pub channel: u16,
}

/// Something that a user of the session should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The peer opens a stream: answer with `accept` or `refuse`.
    Opened {
        /// The stream.
        id: StreamId,
        /// What for.
        open: Open,
    },
    /// The peer accepted our stream.
    Accepted {
        /// The stream.
        id: StreamId,
    },
    /// There is something to `recv`.
    Readable {
        /// The stream.
        id: StreamId,
    },
    /// There is room to `send` again.
    Writable {
        /// The stream.
        id: StreamId,
    },
    /// The peer sends no more; what came before can still be received.
    Finished {
        /// The stream.
        id: StreamId,
    },
    /// The peer takes no more.
    Stopped {
        /// The stream.
        id: StreamId,
        /// Why.
        code: Code,
    },
    /// The stream was ended, both ways, by the peer or by a deadline.
    Reset {
        /// The stream.
        id: StreamId,
        /// Why.
        code: Code,
    },
    /// The stream is forgotten.
    Closed {
        /// The stream.
        id: StreamId,
    },
    /// The peer opens and accepts no further streams.
    GoAway {
        /// Why.
        code: Code,
        /// In its words.
        text: String,
    },
}

/// Why a stream cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// As many are open as the limits allow.
    #[error("{0} streams are open, as many as both sides allow")]
    TooMany(usize),
    /// The numbers are used up.
    #[error("the session has no further stream numbers")]
    Exhausted,
    /// The session is ending.
    #[error("the session is ending")]
    GoingAway,
}

/// Why a stream does not do as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It is not there (any more).
    #[error("the stream has ended")]
    Ended,
}

/// Why a session has to end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The peer sent a frame that is too long.
    #[error("the peer broke the protocol")]
    TooLong(#[from] frame::TooLong),
    /// The peer sent more than it was allowed to.
    #[error("the peer exceeded the credit of stream {0}")]
    Flow(u32),
    /// Bytes of a stream were lost or doubled.
    #[error("stream {stream} is at {expected}, the peer goes on at {got}")]
    Continuity {
        /// The stream.
        stream: u32,
        /// Its offset here.
        expected: u64,
        /// The peer's.
        got: u64,
    },
    /// The peer acknowledged what cannot be.
    #[error("the peer's acknowledgements are wrong")]
    BadAck(#[from] BadAck),
    /// Too many frames that are cheap to send.
    #[error("the peer sends too many {0} frames")]
    Abuse(&'static str),
    /// Nothing came for too long.
    #[error("nothing was heard of the peer for {0} ms")]
    Dead(u128),
    /// The peer sends but does not acknowledge.
    #[error("the peer acknowledged nothing for {0} s")]
    AckStall(u64),
}

impl SessionError {
    /// The code to tell the peer.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Protocol(_) | Self::TooLong(_) => Code::Protocol,
            Self::Flow(_) => Code::Flow,
            Self::Continuity { .. } | Self::BadAck(_) => Code::Continuity,
            Self::Abuse(_) => Code::Abuse,
            Self::Dead(_) => Code::Timeout,
            Self::AckStall(_) => Code::AckStall,
        }
    }
}

/// Frames to be sealed and written together.
#[derive(Debug, Default)]
pub struct Batch {
    parts: Vec<Frame>,
    len: usize,
}

impl Batch {
    /// Bytes on the wire, before TLS.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Headers and payloads in order, for one vectored write.
    pub fn io_slices(&self) -> impl Iterator<Item = IoSlice<'_>> {
        self.parts
            .iter()
            .flat_map(|f| [IoSlice::new(&f.header), IoSlice::new(&f.payload)])
            .filter(|s| !s.is_empty())
    }

    /// The frames.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.parts
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    fn push(&mut self, frame: Frame) {
        self.len += frame.len_bytes();
        self.parts.push(frame);
    }
}
