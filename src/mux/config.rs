//! Limits of a session, each with its name (WIRE §4, §5, §8).

use std::time::Duration;

/// How urgently a stream's bytes are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Small and waited for: control.
    Urgent,
    /// Everything else, fair by weight.
    Bulk,
}

impl Class {
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Urgent => 1,
            Self::Bulk => 3,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Urgent),
            3 => Some(Self::Bulk),
            _ => None,
        }
    }
}

/// A session's limits. The default is the protocol's proposal.
#[derive(Debug, Clone)]
pub struct Config {
    /// Streams open at once that the peer opened, and that we open.
    pub max_streams: u32,
    /// Streams that the peer opened and nobody has answered yet.
    pub pending_open_max: usize,
    /// Bytes that a stream may send before the receiver has said anything.
    pub initial_credit_bytes: u32,
    /// Largest window of an urgent stream.
    pub urgent_window_max_bytes: u64,
    /// Largest window of a bulk stream.
    pub bulk_window_max_bytes: u64,
    /// Sum over all streams of what is advertised and not yet consumed.
    pub budget_bytes: u64,
    /// Bytes sent and not yet acknowledged; at the cap bulk pauses.
    pub replay_cap_bytes: usize,
    /// Of the cap, what only urgent streams and session control may use.
    pub replay_reserve_bytes: usize,
    /// Bytes queued per stream before its user has to wait.
    pub send_queue_bytes: usize,
    /// Bytes sealed at once.
    pub batch_bytes: usize,
    /// Received bytes after which an acknowledgement is due.
    pub ack_after_bytes: u64,
    /// Received frames after which an acknowledgement is due.
    pub ack_after_frames: u64,
    /// Time after which an acknowledgement is due.
    pub ack_delay: Duration,
    /// A ping goes out after this long with nothing received.
    pub ping_after: Duration,
    /// The connection is dead after this long with nothing received.
    pub dead_after: Duration,
    /// No acknowledgement for this long although the peer sends: it is broken.
    pub ack_stall_after: Duration,
    /// How long an opened stream may wait for its answer.
    pub open_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            pending_open_max: 64,
            initial_credit_bytes: 64 * 1024,
            urgent_window_max_bytes: 256 * 1024,
            bulk_window_max_bytes: 32 * 1024 * 1024,
            budget_bytes: 256 * 1024 * 1024,
            replay_cap_bytes: 64 * 1024 * 1024,
            replay_reserve_bytes: 1024 * 1024,
            send_queue_bytes: 256 * 1024,
            batch_bytes: 64 * 1024,
            ack_after_bytes: 256 * 1024,
            ack_after_frames: 64,
            ack_delay: Duration::from_millis(5),
            ping_after: Duration::from_secs(1),
            dead_after: Duration::from_secs(5),
            ack_stall_after: Duration::from_secs(30),
            open_deadline: Duration::from_secs(30),
        }
    }
}
