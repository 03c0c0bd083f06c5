//! What can go wrong in a session, by who is to blame. Knows no state.

use std::time::Duration;

use super::{Code, StreamId};

/// Why a session cannot go on. It is not resumable after any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("the peer broke the protocol: {what}")]
    Protocol { what: &'static str },
    #[error("the peer sent more on stream {} than it had credit for", .stream.0)]
    Flow { stream: StreamId },
    #[error("the session lost its continuity: {what}")]
    Continuity { what: &'static str },
    #[error("the peer passed a limit: {what}")]
    Abuse { what: &'static str },
    /// Nothing was received for too long. The connection is dead; the session may be suspended
    /// with [`Session::handle_disconnected`](super::Session::handle_disconnected) and resumed.
    #[error("nothing was received for {} ms", silent.as_millis())]
    Dead { silent: Duration },
    #[error("the peer sends but has acknowledged nothing for {} ms", waited.as_millis())]
    AckStall { waited: Duration },
}

impl SessionError {
    /// What to tell the peer in a GOAWAY.
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
    pub fn is_resumable(&self) -> bool {
        matches!(self, Self::Dead { .. })
    }
}

/// Why no stream was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("all {max} streams of the session are in use")]
    Streams { max: u32 },
    /// Too many wait for the peer's answer.
    #[error("{max} streams wait for the peer's answer already")]
    Pending { max: usize },
    #[error("streams are opened faster than the peer allows")]
    Rate,
    #[error("the session is ending")]
    GoingAway,
    #[error("the session has used up its stream numbers")]
    Exhausted,
}

/// Why a stream does not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    #[error("stream {} is not known", .0.0)]
    Unknown(StreamId),
    #[error("stream {} was ended: {}", .id.0, .code.name())]
    Ended { id: StreamId, code: Code },
    #[error("stream {} does not wait for acceptance", .0.0)]
    NotOffered(StreamId),
    #[error("stream {} has not been accepted yet", .0.0)]
    NotAccepted(StreamId),
    #[error("the send queue of stream {} is full", .0.0)]
    Full(StreamId),
}
