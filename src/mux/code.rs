//! Codes that say why a stream or a session ended (WIRE §8).

/// Why a stream or a session ended. Numbers are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    /// The user of the stream gave it up.
    Cancelled,
    /// Nobody is there for it.
    Refused,
    /// The peer may not.
    Denied,
    /// The purpose is unknown.
    Unsupported,
    /// The local end could not be connected.
    ConnectFailed,
    /// The local end failed.
    IoError,
    /// A limit was reached.
    Limit,
    /// The session ended under it.
    SessionLost,
    /// A deadline passed.
    Timeout,
    /// No common version.
    Version,
    /// A required feature is missing.
    Feature,
    /// The protocol was broken.
    Protocol,
    /// Credit was exceeded.
    Flow,
    /// Bytes were lost or doubled.
    Continuity,
    /// Too much of something cheap to send.
    Abuse,
    /// The session is not known.
    NoSession,
    /// The identity or its proof was not accepted.
    Auth,
    /// The agent stops.
    Shutdown,
    /// Acknowledgements stood still.
    AckStall,
    /// A mistake of ours.
    Internal,
    /// A code of a later version.
    Other(u32),
}

const TABLE: [(Code, u32, &str); 20] = [
    (Code::Cancelled, 1, "cancelled"),
    (Code::Refused, 2, "refused"),
    (Code::Denied, 3, "denied"),
    (Code::Unsupported, 4, "unsupported"),
    (Code::ConnectFailed, 5, "connect_failed"),
    (Code::IoError, 6, "io_error"),
    (Code::Limit, 7, "limit"),
    (Code::SessionLost, 8, "session_lost"),
    (Code::Timeout, 9, "timeout"),
    (Code::Version, 32, "version"),
    (Code::Feature, 33, "feature"),
    (Code::Protocol, 34, "protocol"),
    (Code::Flow, 35, "flow"),
    (Code::Continuity, 36, "continuity"),
    (Code::Abuse, 37, "abuse"),
    (Code::NoSession, 38, "no_session"),
    (Code::Auth, 39, "auth"),
    (Code::Shutdown, 40, "shutdown"),
    (Code::AckStall, 41, "ack_stall"),
    (Code::Internal, 42, "internal"),
];

impl Code {
    /// The wire's number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Other(number) => number,
            known => TABLE.iter().find(|(c, _, _)| *c == known).map_or(0, |(_, n, _)| *n),
        }
    }

    /// The code of a number; one that this version does not know stays what it is.
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        TABLE.iter().find(|(_, n, _)| *n == number).map_or(Self::Other(number), |(c, _, _)| *c)
    }

    /// A bounded label for logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        TABLE.iter().find(|(c, _, _)| *c == self).map_or("other", |(_, _, name)| *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_its_own_and_comes_back() {
        for (code, number, name) in TABLE {
            assert_eq!(Code::from_number(number), code);
            assert_eq!((code.number(), code.name()), (number, name));
        }
        assert_eq!(Code::from_number(4711), Code::Other(4711));
        assert_eq!(Code::Other(4711).number(), 4711);
    }
}
