//! The link: session frames in order and without a gap, whatever becomes of connections.
//!
//! Each direction numbers its session frames 1, 2, 3, … implicitly. Sent frames stay in the
//! replay log until the peer has acknowledged them; after a new connection everything that it
//! has not seen is sent again from there. Knows no stream.

use std::collections::VecDeque;
use std::time::Instant;

use super::config::Config;
use super::frame::Frame;
use super::limit::earliest;

/// A peer's claim about what it has received cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer acknowledges {claimed}, but {acked} were acknowledged and {sent} sent")]
pub struct BadAck {
    claimed: u64,
    acked: u64,
    sent: u64,
}

/// Both directions' numbers, the replay log, and when to acknowledge.
#[derive(Debug)]
pub(super) struct Link {
    log: VecDeque<Frame>,
    log_bytes: usize,
    /// Number of the newest frame that the peer has acknowledged.
    acked: u64,
    /// Frames of the log that this connection has carried.
    carried: usize,
    /// Frames of the log that some earlier connection has carried.
    known: usize,
    /// When the oldest unacknowledged frame began to wait.
    waiting_since: Option<Instant>,
    rx_seq: u64,
    rx_unacked_frames: u64,
    rx_unacked_bytes: u64,
    ack_at: Option<Instant>,
    pub(super) replayed_bytes: u64,
    pub(super) replayed_frames: u64,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            log: VecDeque::new(),
            log_bytes: 0,
            acked: 0,
            carried: 0,
            known: 0,
            waiting_since: None,
            rx_seq: 0,
            rx_unacked_frames: 0,
            rx_unacked_bytes: 0,
            ack_at: None,
            replayed_bytes: 0,
            replayed_frames: 0,
        }
    }

    /// Takes a new frame into the log; it is carried by the connection at hand.
    pub(super) fn push(&mut self, frame: Frame, now: Instant) {
        debug_assert!(self.replay_done(), "new frames come after the replay");
        self.log_bytes += frame.len_bytes();
        self.log.push_back(frame);
        self.carried = self.log.len();
        self.known = self.log.len();
        self.waiting_since.get_or_insert(now);
    }

    /// Whether everything in the log has been carried by this connection.
    pub(super) fn replay_done(&self) -> bool {
        self.carried == self.log.len()
    }

    /// The next frame to send again.
    pub(super) fn replay_next(&mut self, now: Instant) -> Option<Frame> {
        let frame = self.log.get(self.carried)?.clone();
        if self.carried < self.known {
            self.replayed_frames += 1;
            self.replayed_bytes += frame.len_bytes() as u64;
        }
        self.carried += 1;
        self.waiting_since.get_or_insert(now);
        Some(frame)
    }

    /// Bytes in the log.
    pub(super) fn log_bytes(&self) -> usize {
        self.log_bytes
    }

    /// Since when the peer owes an acknowledgement.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since
    }

    /// The peer has everything up to `seq`.
    pub(super) fn on_ack(&mut self, seq: u64, now: Instant) -> Result<bool, BadAck> {
        let sent = self.acked + self.carried as u64;
        if seq < self.acked || seq > sent {
            return Err(BadAck { claimed: seq, acked: self.acked, sent });
        }
        let progress = seq > self.acked;
        self.trim(seq);
        if progress {
            self.waiting_since = (!self.log.is_empty()).then_some(now);
        }
        Ok(progress)
    }

    fn trim(&mut self, seq: u64) {
        for _ in self.acked..seq {
            if let Some(frame) = self.log.pop_front() {
                self.log_bytes -= frame.len_bytes();
                self.carried = self.carried.saturating_sub(1);
                self.known = self.known.saturating_sub(1);
            }
        }
        self.acked = seq;
    }

    /// The connection is gone.
    pub(super) fn on_disconnected(&mut self) {
        self.waiting_since = None;
        self.ack_at = None;
    }

    /// A new connection; the peer has everything up to `peer_rx_seq` from earlier ones.
    pub(super) fn on_reconnected(&mut self, peer_rx_seq: u64) -> Result<(), BadAck> {
        let sent = self.acked + self.log.len() as u64;
        if peer_rx_seq < self.acked || peer_rx_seq > sent {
            return Err(BadAck { claimed: peer_rx_seq, acked: self.acked, sent });
        }
        self.trim(peer_rx_seq);
        self.known = self.log.len();
        self.carried = 0;
        // Our own number went to the peer with the resumption.
        self.rx_unacked_frames = 0;
        self.rx_unacked_bytes = 0;
        Ok(())
    }

    /// A session frame of the peer's has been taken in whole.
    pub(super) fn on_received(&mut self, bytes: usize, at_once: bool, config: &Config, now: Instant) {
        self.rx_seq += 1;
        self.rx_unacked_frames += 1;
        self.rx_unacked_bytes += bytes as u64;
        let due = at_once
            || self.rx_unacked_frames >= config.ack_after_frames
            || self.rx_unacked_bytes >= config.ack_after_bytes;
        let at = if due { now } else { now + config.ack_delay };
        self.ack_at = earliest([self.ack_at, Some(at)]);
    }

    /// The number to acknowledge, if it is time to.
    pub(super) fn take_ack(&mut self, now: Instant) -> Option<u64> {
        self.ack_at.filter(|at| *at <= now)?;
        self.ack_at = None;
        self.rx_unacked_frames = 0;
        self.rx_unacked_bytes = 0;
        Some(self.rx_seq)
    }

    /// When an acknowledgement is due.
    pub(super) fn ack_at(&self) -> Option<Instant> {
        self.ack_at
    }

    /// Highest session frame received without a gap.
    pub(super) fn rx_seq(&self) -> u64 {
        self.rx_seq
    }
}
