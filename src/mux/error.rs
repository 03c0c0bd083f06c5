//! What can go wrong in a session, by who is to blame. Knows no state.

use std::time::Duration;

use super::{Code, StreamId};

/// Why a session cannot go on. It is not resumable after any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A malformed or forbidden frame.
    #[error("the peer broke the protocol: {what}")]
    Protocol {
        /// What it did.
        what: &'static str,
    },
    /// More data than credit.
    #[error("the peer sent more on stream {} than it had credit for", .stream.0)]
    Flow {
        /// The stream.
        stream: StreamId,
    },
    /// Bytes or frames were lost or doubled.
    #[error("the session lost its continuity: {what}")]
    Continuity {
        /// How it shows.
        what: &'static str,
    },
    /// A rate or count limit was passed.
    #[error("the peer passed a limit: {what}")]
    Abuse {
        /// Which.
        what: &'static str,
    },
    /// Nothing was received for too long. The connection is dead; the session may be suspended
    /// with [`Session::handle_disconnected`](super::Session::handle_disconnected) and resumed.
    #[error("nothing was received for {} ms", silent.as_millis())]
    Dead {
        /// For how long.
        silent: Duration,
    },
    /// The peer sends but does not acknowledge.
    #[error("the peer sends but has acknowledged nothing for {} ms", waited.as_millis())]
    AckStall {
        /// For how long.
        waited: Duration,
    },
}

impl SessionError {
    /// What to tell the peer in a GOAWAY.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Protocol { .. } => Code::Protocol,
            Self::Flow { .. } => Code::Flow,
            Self::Continuity { .. } => Code::Continuity,
            Self::Abuse { .. } => Code::Abuse,
            Self::Dead { .. } => Code::Timeout,
            Self::AckStall { .. } => Code::AckStall,
        }
    }

    /// Whether only the connection is lost, so that the session may be resumed on another.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        matches!(self, Self::Dead { .. })
    }
}

/// Why no stream was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// As many as the peer allows, or we do.
    #[error("all {max} streams of the session are in use")]
    Streams {
        /// The limit.
        max: u32,
    },
    /// Too many wait for the peer's answer.
    #[error("{max} streams wait for the peer's answer already")]
    Pending {
        /// The limit.
        max: usize,
    },
    /// Streams are opened too fast.
    #[error("streams are opened faster than the peer allows")]
    Rate,
    /// Either side has said GOAWAY, or the session failed.
    #[error("the session is ending")]
    GoingAway,
    /// All stream numbers were used.
    #[error("the session has used up its stream numbers")]
    Exhausted,
}

/// Why a stream does not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Unknown or forgotten.
    #[error("stream {} is not known", .0.0)]
    Unknown(StreamId),
    /// Finished or reset here, or ended by the peer.
    #[error("stream {} was ended: {}", .id.0, .code.name())]
    Ended {
        /// The stream.
        id: StreamId,
        /// How.
        code: Code,
    },
    /// Answered already, or not the peer's.
    #[error("stream {} does not wait for acceptance", .0.0)]
    NotOffered(StreamId),
    /// Not accepted yet.
    #[error("stream {} has not been accepted yet", .0.0)]
    NotAccepted(StreamId),
    /// Its send queue is full.
    #[error("the send queue of stream {} is full", .0.0)]
    Full(StreamId),
}
