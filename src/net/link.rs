//! A session's link to its peer: the connection, or the want of one, and why it ended.
//!
//! ```text
//!   connected ──connection lost (resumable cause)──► away ──nothing in time, or refused──► ended: Lost
//!       │  ▲                                          │
//!       │  └──────────────── resumed ─────────────────┘
//!       └── closed here, by the peer, or by an error of the protocol ──► ended
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connect_error::ConnectError;
use super::connection::ConnectionInfo;
use crate::mux::{self, Code};

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum EndCause {
    #[error("the connection failed")]
    Io(#[source] std::io::Error),
    #[error("the TLS connection failed")]
    Tls(#[source] rustls::Error),
    #[error("the peer closed the connection")]
    PeerClosed,
    #[error("the session failed")]
    Session(#[source] mux::SessionError),
    #[error("the peer dialed again")]
    Replaced,
    /// The peer's certificate has expired since it was shown.
    #[error("the peer has to prove itself again")]
    Outdated,
    #[error("the connection was lost and not replaced within {} s{}", after.as_secs(), refused(refusal))]
    Lost {
        after: Duration,
        /// Why the peer would have none.
        refusal: Option<Box<ConnectError>>,
        source: Box<EndCause>,
    },
    /// The connection was lost as others before it, over which nothing had moved.
    #[error("{words}")]
    Stuck { words: String, source: Box<EndCause> },
    /// It goes on in another process.
    #[error("the agent's process changed")]
    Frozen,
    #[error("{}", closed(.0))]
    Closed(Code),
}

fn closed(code: &Code) -> String {
    match code {
        // Only the pool closes with it: a new process of the peer's has come (`Pool::adopt`).
        Code::NoSession => "the peer's agent was started anew, without what it had before".into(),
        code => format!("closed here: {}", code.name()),
    }
}

fn refused(refusal: &Option<Box<ConnectError>>) -> String {
    refusal.as_ref().map(|e| format!(" ({e})")).unwrap_or_default()
}

impl EndCause {
    /// Whether only the connection is lost, so that the session may go on over another.
    pub fn is_resumable(&self) -> bool {
        match self {
            Self::Io(_) | Self::Tls(_) | Self::PeerClosed | Self::Replaced | Self::Outdated => true,
            Self::Session(error) => error.is_resumable(),
            Self::Lost { .. } | Self::Stuck { .. } | Self::Frozen | Self::Closed(_) => false,
        }
    }

    /// A bounded label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "io",
            Self::Tls(_) => "tls",
            Self::PeerClosed => "peer_closed",
            Self::Session(_) => "session",
            Self::Replaced => "replaced",
            Self::Outdated => "outdated",
            Self::Lost { .. } => "lost",
            Self::Stuck { .. } => "stuck",
            Self::Frozen => "frozen",
            Self::Closed(code) => code.name(),
        }
    }
}

/// A session without a connection.
#[derive(Debug, Clone)]
pub struct Away {
    pub since: Instant,
    /// When it ends if there is none by then.
    pub until: Instant,
    /// How the connection was lost, in words.
    pub cause: String,
}

/// A session's connection, or the want of one.
#[derive(Debug, Clone)]
pub struct LinkState {
    /// Set while there is none.
    pub away: Option<Away>,
    /// The connection; the last one while there is none.
    pub connection: Arc<ConnectionInfo>,
}

/// A session's end and its last figures.
#[derive(Debug)]
pub struct SessionEnd {
    pub cause: EndCause,
    pub stats: mux::Stats,
}
