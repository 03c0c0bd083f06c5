//! The replay log: every numbered frame until the peer has acknowledged it. Knows no streams.
//!
//! Nothing is ever evicted: when the log is full, sending waits for the peer's ACK (R8).

use std::collections::VecDeque;

use bytes::Bytes;

use super::frame::{FRAME_LEN_MAX, HEADER_LEN, Header, PAYLOAD_MAX};
use super::{Config, SessionError};

/// What an entry occupies beside its payload.
const ENTRY_COST: usize = 64;
/// Smallest cap: a few full frames beside the reserve.
const CAP_MIN: usize = 4 * FRAME_LEN_MAX;

/// A numbered frame that was sent.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) header: Header,
    pub(super) payload: Bytes,
}

impl Entry {
    fn cost(&self) -> usize {
        cost(self.payload.len())
    }
}

/// What a frame with this payload length occupies in the log.
pub(super) fn cost(payload_len: usize) -> usize {
    ENTRY_COST + payload_len
}

/// Frames `acked + 1 ..= acked + entries.len()`.
#[derive(Debug)]
pub(super) struct ReplayLog {
    entries: VecDeque<Entry>,
    acked: u64,
    /// The last number that left on the current connection.
    sent: u64,
    bytes: usize,
    bytes_max: usize,
    cap: usize,
    reserve: usize,
}

impl ReplayLog {
    pub(super) fn new(config: &Config) -> Self {
        let (cap, reserve) = (config.replay_cap_bytes.max(CAP_MIN), config.reserve_bytes());
        Self { entries: VecDeque::new(), acked: 0, sent: 0, bytes: 0, bytes_max: 0, cap, reserve }
    }

    /// The highest acknowledged number and the frames after it.
    pub(super) fn into_parts(self) -> (u64, VecDeque<Entry>) {
        (self.acked, self.entries)
    }

    /// A log that another process has kept. Nothing of it has left on this connection yet.
    pub(super) fn from_parts(config: &Config, acked: u64, entries: VecDeque<Entry>) -> Self {
        let mut log = Self::new(config);
        log.bytes = entries.iter().map(Entry::cost).sum();
        // It was within its owner's cap, which may have been another.
        log.cap = log.cap.max(log.bytes);
        log.bytes_max = log.bytes;
        (log.acked, log.sent, log.entries) = (acked, acked, entries);
        log
    }

    /// The number of the last frame made.
    pub(super) fn tx_seq(&self) -> u64 {
        self.acked + self.entries.len() as u64
    }

    /// The number of the first frame in the log.
    pub(super) fn unacknowledged(&self) -> Option<u64> {
        (!self.is_empty()).then(|| self.acked + 1)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    pub(super) fn frames(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the peer should acknowledge at once.
    pub(super) fn is_half_full(&self) -> bool {
        self.bytes > self.cap / 2
    }

    /// Whether a full bulk frame fits.
    pub(super) fn has_bulk_room(&self) -> bool {
        self.fits(PAYLOAD_MAX + self.reserve)
    }

    /// Whether a full frame of an urgent stream fits.
    pub(super) fn has_urgent_room(&self) -> bool {
        self.fits(PAYLOAD_MAX)
    }

    /// Whether a frame with this payload length fits.
    pub(super) fn fits(&self, payload_len: usize) -> bool {
        self.bytes + cost(payload_len) <= self.cap
    }

    /// Keeps a frame that leaves now. Everything before it must have left.
    pub(super) fn push(&mut self, header: Header, payload: Bytes) {
        debug_assert!(!self.is_replaying(), "a new frame overtakes the replay");
        let entry = Entry { header, payload };
        self.bytes += entry.cost();
        self.bytes_max = self.bytes_max.max(self.bytes);
        debug_assert!(self.bytes <= self.cap, "the replay log is over its cap");
        self.entries.push_back(entry);
        self.sent = self.tx_seq();
    }

    /// Whether frames of an earlier connection wait to be sent again.
    pub(super) fn is_replaying(&self) -> bool {
        self.sent < self.tx_seq()
    }

    /// The next frame to send again, if its whole length is at most `room`.
    pub(super) fn replay_next(&mut self, room: usize) -> Option<Entry> {
        let index = usize::try_from(self.sent - self.acked).ok()?;
        let entry = self.entries.get(index).filter(|e| HEADER_LEN + e.payload.len() <= room)?;
        self.sent += 1;
        Some(entry.clone())
    }

    /// The peer has everything up to `seq`. True if that is news.
    /// Errors: it cannot have that, or had more before.
    pub(super) fn on_ack(&mut self, seq: u64) -> Result<bool, SessionError> {
        if seq < self.acked {
            return Err(SessionError::Continuity { what: "an ACK went backwards" });
        }
        if seq > self.sent {
            return Err(SessionError::Continuity { what: "an ACK for a frame that was not sent" });
        }
        Ok(self.trim(seq))
    }

    /// A new connection, over which the peer says that it has everything up to `seq`.
    /// Errors: it cannot have that, or had more before.
    pub(super) fn rewind(&mut self, seq: u64) -> Result<(), SessionError> {
        if seq < self.acked || seq > self.tx_seq() {
            return Err(SessionError::Continuity { what: "the peer resumes at an impossible frame" });
        }
        self.trim(seq);
        self.sent = seq;
        Ok(())
    }

    fn trim(&mut self, seq: u64) -> bool {
        let before = self.acked;
        while self.acked < seq {
            let Some(entry) = self.entries.pop_front() else { break };
            self.bytes -= entry.cost();
            self.acked += 1;
        }
        debug_assert!(!self.entries.is_empty() || self.bytes == 0);
        self.acked > before
    }
}
