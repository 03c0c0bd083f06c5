//! Figures of a session and its streams, for whoever exports them. Plain numbers.

use std::num::NonZeroU64;
use std::time::Duration;

use super::Class;

/// Figures of a session. Counters run from its beginning, over all its connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes framed for sending, replays included.
    pub sent_bytes: u64,
    /// Frames sent, replays included.
    pub sent_frames: u64,
    /// Stream bytes sent, each once.
    pub sent_data_bytes: u64,
    pub received_bytes: u64,
    pub received_frames: u64,
    pub received_data_bytes: u64,
    pub batches: u64,
    pub acks_sent: u64,
    pub acks_received: u64,
    pub pings_sent: u64,
    pub credits_sent: u64,
    /// Smallest round trip of the last samples on this connection.
    pub rtt_min: Option<Duration>,
    /// Last round trip on this connection.
    pub rtt_last: Option<Duration>,
    /// Times that the session went on over a new connection.
    pub reconnects: u64,
    /// Time without a connection, up to now.
    pub away: Duration,
    pub replayed_bytes: u64,
    pub replayed_frames: u64,
    /// Memory of the replay log now.
    pub log_bytes: usize,
    /// Its highest value.
    pub log_bytes_max: usize,
    /// Frames in the replay log now.
    pub log_frames: usize,
    /// What bulk streams may send together in a second now.
    pub limit: Option<NonZeroU64>,
    /// What the peer may send in a second now.
    pub receive_limit: Option<NonZeroU64>,
    /// For how long limits have kept what could have been sent.
    pub held: Duration,
    /// Batches that ended because the replay log was full.
    pub log_stalls: u64,
    /// Times that a stream had data but no credit.
    pub credit_stalls: u64,
    /// Σ(advertised − consumed) now: what the peer may make us hold.
    pub credit_outstanding_bytes: u64,
    /// What is set aside for open streams now.
    pub credit_committed_bytes: u64,
    /// Bytes in send queues now.
    pub send_queued_bytes: usize,
    /// Received bytes that the local side has not asked for yet.
    pub recv_queued_bytes: usize,
    /// Bytes of an incomplete frame now.
    pub partial_bytes: usize,
    /// Events that nobody has asked for yet.
    pub events_queued: usize,
    /// Streams now, refused ones included.
    pub streams: usize,
    pub streams_opened: u64,
    /// Streams opened by the peer.
    pub streams_offered: u64,
    /// Streams that ended with a reset of either side.
    pub streams_reset: u64,
    /// Streams of the peer that were refused without asking: a limit, or an unknown class.
    pub streams_refused: u64,
}

/// Figures of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamStats {
    pub class: Class,
    pub weight: u16,
    pub sent_bytes: u64,
    /// Up to where the peer lets us send.
    pub send_limit_bytes: u64,
    /// Bytes that wait to be framed.
    pub send_queued_bytes: usize,
    pub received_bytes: u64,
    /// Bytes that the local side took.
    pub consumed_bytes: u64,
    /// Received bytes that the local side has not asked for yet.
    pub recv_queued_bytes: usize,
    /// Up to where we let the peer send.
    pub recv_limit_bytes: u64,
    /// The window that is aimed at.
    pub recv_window_bytes: u64,
    /// Times that there was data but no credit.
    pub credit_stalls: u64,
}
