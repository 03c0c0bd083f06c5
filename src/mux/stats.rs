//! Figures of a session: plain numbers that the agent exports.

use std::time::Duration;

/// A session's figures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Bytes of streams sent, without headers and repetitions.
    pub sent_bytes: u64,
    /// Bytes of streams received.
    pub received_bytes: u64,
    /// Frames sent, all types.
    pub sent_frames: u64,
    /// Frames received, all types.
    pub received_frames: u64,
    /// Streams open now.
    pub open_streams: usize,
    /// Bytes queued by users and not yet framed.
    pub queued_bytes: usize,
    /// Bytes received and not yet handed out.
    pub held_bytes: usize,
    /// Bytes framed and not yet acknowledged by the peer.
    pub replay_log_bytes: usize,
    /// Frames sent again after a new connection.
    pub replayed_frames: u64,
    /// Bytes sent again after a new connection.
    pub replayed_bytes: u64,
    /// Credit advertised and not yet consumed, all streams.
    pub promised_bytes: u64,
    /// Times that a stream had bytes to send and no credit.
    pub credit_stalls: u64,
    /// Times that the replay log was full.
    pub log_stalls: u64,
    /// Shortest round trip seen lately.
    pub rtt_min: Option<Duration>,
    /// Newest round trip.
    pub rtt_last: Option<Duration>,
}
