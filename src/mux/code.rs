//! Codes: why a stream or a session ended, on the wire and for people. Knows no state.

/// Why a stream or a session ended (WIRE §8). Unknown numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// Stream: its user does not want it any more.
    Cancelled,
    /// Stream: the acceptor does not want it.
    Refused,
    /// Stream: the acceptor does not allow it.
    Denied,
    /// Stream: the acceptor does not know its purpose or class.
    Unsupported,
    /// Stream: the acceptor's local end could not be connected.
    ConnectFailed,
    /// Stream: a local socket or file failed.
    IoError,
    /// Stream: a limit was reached.
    Limit,
    /// Stream: its session ended.
    SessionLost,
    /// Stream: it was not accepted in time.
    Timeout,
    /// Stream: the acceptor knows no target of its name.
    NoTarget,
    /// Stream: the target's socket is not there.
    TargetAbsent,
    /// Stream: nobody listens at the target.
    TargetRefused,
    /// Stream: the target did not take the connection in time.
    TargetTimeout,
    /// Stream: what must be there beside the target is not.
    TargetAlone,
    /// Session: no version in common.
    Version,
    /// Session: a required feature is not offered.
    Feature,
    /// Session: malformed or forbidden frames.
    Protocol,
    /// Session: more data than credit.
    Flow,
    /// Session: bytes or frames lost or doubled.
    Continuity,
    /// Session: a rate limit was passed.
    Abuse,
    /// Session: the one to resume is not known.
    NoSession,
    /// Session: identity or proof refused.
    Auth,
    /// Session: ended in order.
    Shutdown,
    /// Session: the peer sends but does not acknowledge.
    AckStall,
    /// Session: a defect of our own.
    Internal,
    /// A number that this version does not know.
    Other(u32),
}

const KNOWN: [(u32, Code, &str); 25] = [
    (1, Code::Cancelled, "cancelled"),
    (2, Code::Refused, "refused"),
    (3, Code::Denied, "denied"),
    (4, Code::Unsupported, "unsupported"),
    (5, Code::ConnectFailed, "connect_failed"),
    (6, Code::IoError, "io_error"),
    (7, Code::Limit, "limit"),
    (8, Code::SessionLost, "session_lost"),
    (9, Code::Timeout, "timeout"),
    (10, Code::NoTarget, "no_target"),
    (11, Code::TargetAbsent, "target_absent"),
    (12, Code::TargetRefused, "target_refused"),
    (13, Code::TargetTimeout, "target_timeout"),
    (14, Code::TargetAlone, "target_alone"),
    (32, Code::Version, "version"),
    (33, Code::Feature, "feature"),
    (34, Code::Protocol, "protocol"),
    (35, Code::Flow, "flow"),
    (36, Code::Continuity, "continuity"),
    (37, Code::Abuse, "abuse"),
    (38, Code::NoSession, "no_session"),
    (39, Code::Auth, "auth"),
    (40, Code::Shutdown, "shutdown"),
    (41, Code::AckStall, "ack_stall"),
    (42, Code::Internal, "internal"),
];

impl Code {
    /// The number on the wire.
    pub fn to_wire(self) -> u32 {
        match self {
            Self::Other(number) => number,
            known => KNOWN.iter().find(|(_, code, _)| *code == known).map_or(0, |(n, ..)| *n),
        }
    }

    /// The code with this number on the wire.
    pub fn from_wire(number: u32) -> Self {
        KNOWN.iter().find(|(n, ..)| *n == number).map_or(Self::Other(number), |(_, code, _)| *code)
    }

    /// A bounded label for logs and metrics.
    pub fn name(self) -> &'static str {
        KNOWN.iter().find(|(_, code, _)| *code == self).map_or("other", |(.., name)| *name)
    }
}
