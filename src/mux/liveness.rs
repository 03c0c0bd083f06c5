//! Liveness: pings, the round-trip time, and when a silent connection is dead. Any byte received
//! is a sign of life (R7). Knows no frames.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Config, SessionError};

/// Samples over which the smallest round trip is taken.
const RTT_SAMPLES: usize = 16;

/// The state of one connection's liveness.
#[derive(Debug)]
pub(super) struct Liveness {
    heard: Instant,
    pinged: Option<Instant>,
    ping_due: bool,
    /// The ping on its way: its value and when it left.
    outstanding: Option<(u64, Instant)>,
    count: u64,
    pong: Option<u64>,
    samples: VecDeque<Duration>,
    ack_progress: Instant,
}

impl Liveness {
    /// For a new connection; its round-trip time is measured at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            heard: now,
            pinged: None,
            ping_due: true,
            outstanding: None,
            count: 0,
            pong: None,
            samples: VecDeque::new(),
            ack_progress: now,
        }
    }

    /// The session goes on over another connection.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Self { count: self.count, ..Self::new(now) };
    }

    pub(super) fn on_input(&mut self, now: Instant) {
        self.heard = now;
    }

    /// A PING is to be answered; only the latest is kept (R1).
    pub(super) fn on_ping(&mut self, value: u64) {
        self.pong = Some(value);
    }

    /// True if it answers our ping.
    pub(super) fn on_pong(&mut self, now: Instant, value: u64) -> bool {
        let Some((_, left)) = self.outstanding.filter(|(expected, _)| *expected == value) else {
            return false;
        };
        self.outstanding = None;
        if self.samples.len() == RTT_SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(now.saturating_duration_since(left));
        true
    }

    /// The peer acknowledged something new, or nothing is left to acknowledge.
    pub(super) fn on_ack_progress(&mut self, now: Instant) {
        self.ack_progress = now;
    }

    pub(super) fn take_pong(&mut self) -> Option<u64> {
        self.pong.take()
    }

    pub(super) fn take_ping(&mut self, now: Instant) -> Option<u64> {
        if !std::mem::take(&mut self.ping_due) {
            return None;
        }
        self.count += 1;
        self.pinged = Some(now);
        self.outstanding = Some((self.count, now));
        Some(self.count)
    }

    pub(super) fn rtt_min(&self) -> Option<Duration> {
        self.samples.iter().min().copied()
    }

    pub(super) fn rtt_last(&self) -> Option<Duration> {
        self.samples.back().copied()
    }

    pub(super) fn pings(&self) -> u64 {
        self.count
    }

    /// When to call [`Liveness::on_timeout`].
    pub(super) fn deadline(&self, log_empty: bool, config: &Config) -> Instant {
        let dead = self.heard + config.dead_after;
        let ping = self.ping_deadline(config).unwrap_or(dead);
        let stall = if log_empty { dead } else { self.ack_progress + config.ack_stall_after };
        dead.min(ping).min(stall)
    }

    fn ping_deadline(&self, config: &Config) -> Option<Instant> {
        if self.ping_due {
            return None;
        }
        self.pinged.map(|pinged| pinged + config.ping_interval())
    }

    /// Errors: the connection is dead, or the peer does not acknowledge.
    pub(super) fn on_timeout(
        &mut self,
        now: Instant,
        log_empty: bool,
        config: &Config,
    ) -> Result<(), SessionError> {
        let silent = now.saturating_duration_since(self.heard);
        if silent >= config.dead_after {
            return Err(SessionError::Dead { silent });
        }
        let waited = now.saturating_duration_since(self.ack_progress);
        if !log_empty && waited >= config.ack_stall_after {
            return Err(SessionError::AckStall { waited });
        }
        self.ping_due |= self.ping_deadline(config).is_some_and(|deadline| deadline <= now);
        Ok(())
    }
}
