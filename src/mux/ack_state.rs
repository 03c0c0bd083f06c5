//! What to acknowledge: the number of the last frame received, and when the peer should hear of it. Knows
//! no frame contents.

use std::time::Instant;

use super::Config;
use super::frame::HEADER_LEN;

/// Counts numbered frames and decides when an ACK is due (WIRE §4).
#[derive(Debug, Default)]
pub(super) struct AckState {
    rx_seq: u64,
    told: u64,
    bytes: usize,
    since: Option<Instant>,
    due: bool,
}

impl AckState {
    /// Goes on after this number, which the peer is told when there is a connection.
    pub(super) fn resumed(rx_seq: u64) -> Self {
        Self { rx_seq, told: rx_seq, ..Self::default() }
    }

    pub(super) fn rx_seq(&self) -> u64 {
        self.rx_seq
    }

    /// A numbered frame arrived whole.
    pub(super) fn on_frame(&mut self, now: Instant, payload_len: usize, ack_now: bool, config: &Config) {
        self.rx_seq += 1;
        self.bytes += HEADER_LEN + payload_len;
        self.since.get_or_insert(now);
        let frames = self.rx_seq - self.told;
        self.due |= ack_now || self.bytes >= config.ack_bytes || frames >= u64::from(config.ack_frames);
    }

    /// When to call [`AckState::on_timeout`].
    pub(super) fn deadline(&self, config: &Config) -> Option<Instant> {
        self.since.filter(|_| !self.due).map(|since| since + config.ack_delay)
    }

    pub(super) fn on_timeout(&mut self, now: Instant, config: &Config) {
        self.due |= self.deadline(config).is_some_and(|deadline| deadline <= now);
    }

    /// The number to acknowledge: when it is due, or when it costs nothing because something
    /// else is sent anyway.
    pub(super) fn take(&mut self, in_passing: bool) -> Option<u64> {
        if self.told == self.rx_seq || !(self.due || in_passing) {
            return None;
        }
        self.settle();
        Some(self.rx_seq)
    }

    /// The peer knows all, as after a reconnection, where both sides say it.
    pub(super) fn settle(&mut self) {
        *self = Self { rx_seq: self.rx_seq, told: self.rx_seq, ..Self::default() };
    }
}
