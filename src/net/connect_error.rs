//! Why no session came about, whichever side asked for it: the cause, whether it may pass by itself, and
//! a metric's label.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::handshake::HandshakeError;
use super::handshake_failure::classify_handshake_error;
use super::identity::Identity;
use crate::mux::Code;
use crate::mux::hello::HelloError;

/// What a peer is told that has an identity of our authority, and is in no configuration here.
pub(super) const UNKNOWN_PEER: &str = "no peer with this identity is configured here";
/// What an agent is told whose identity another one has, that lives.
pub(super) const TWO_AGENTS: &str = "another agent with this identity is connected and lives; one of the two needs another \
                                     certificate";

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot resolve {address}; check the peer's `address` in the configuration")]
    Resolve { address: String, source: io::Error },
    #[error("cannot connect to {address}; is its agent running, and does the firewall pass this port?")]
    Connect { address: String, source: io::Error },
    /// TLS refused, on either side.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the connection ended before the peer said HELLO: {}", classify_handshake_error(.0))]
    BeforeHello(#[source] io::Error),
    #[error("the peer's first frame is not a HELLO of this protocol")]
    Hello(#[source] HelloError),
    #[error("the peer refused the session ({}){}{text}", code.name(), if text.is_empty() { "" } else { ": " })]
    Refused { code: Code, text: String },
    /// We said no to who has proved to be `peer`.
    #[error("{peer} was refused ({}): {why}", code.name())]
    Incompatible { peer: Identity, code: Code, why: &'static str },
    #[error("no answer from the peer within {} s", .0.as_secs())]
    Deadline(Duration),
    #[error("no randomness")]
    Random(#[source] getrandom::Error),
    #[error("the TLS connection gives no keying material to bind the session to")]
    Exporter(#[source] rustls::Error),
    #[error("the session to be resumed has ended here")]
    Gone,
    #[error("the session could not be started")]
    Start(#[source] io::Error),
    /// The peer has no address and no live session.
    #[error("{peer} is not connected, and its configuration has no `address` to dial")]
    NoAddress { peer: Identity },
    /// Too many connections have not proved their identity yet, and this one made room.
    #[error(
        "too many connections wait for their handshake, and this one has waited longest of those from there"
    )]
    TooManyUnauthenticated,
    /// Somebody else has dialed the same peer at the same time, with this end.
    #[error(transparent)]
    Shared(Arc<Self>),
}

impl ConnectError {
    /// Whether the peer knows nobody of this host's identity.
    pub fn is_stranger(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == Code::Auth,
            Self::Shared(e) => e.is_stranger(),
            _ => false,
        }
    }

    /// Whether one side has judged the other's certificate.
    pub fn is_distrust(&self) -> bool {
        match self {
            Self::Handshake(e) => !e.failure.may_pass(),
            Self::BeforeHello(e) => !classify_handshake_error(e).may_pass(),
            Self::Shared(e) => e.is_distrust(),
            _ => false,
        }
    }

    /// Whether dialing again later may succeed without anybody's doing.
    pub fn may_pass(&self) -> bool {
        if let Self::Shared(e) = self {
            return e.may_pass();
        }
        let decided = matches!(
            self,
            Self::Refused { code: Code::Auth | Code::Version | Code::Feature, .. }
                | Self::Incompatible { .. }
                | Self::Hello(_)
        );
        !decided && !self.is_distrust() && !matches!(self, Self::NoAddress { .. })
    }

    /// A bounded label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Handshake(e) => e.failure.label(),
            Self::BeforeHello(e) => classify_handshake_error(e).label(),
            Self::Hello(_) => "hello",
            Self::Refused { .. } => "refused",
            Self::Incompatible { why: UNKNOWN_PEER, .. } => "unknown_peer",
            Self::Incompatible { why: TWO_AGENTS, .. } => "two_agents",
            Self::Incompatible { code: Code::Auth, .. } => "wrong_proof",
            Self::Incompatible { .. } => "incompatible",
            Self::Deadline(_) => "no_answer",
            Self::Random(_) => "random",
            Self::Exporter(_) => "exporter",
            Self::Gone => "gone",
            Self::Start(_) => "start",
            Self::NoAddress { .. } => "no_address",
            Self::TooManyUnauthenticated => "too_many",
            Self::Shared(e) => e.label(),
        }
    }
}
