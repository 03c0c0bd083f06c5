//! What the peer may send in a second, as this side holds it to it: by the credit that it is given. Knows
//! streams by their numbers only.
//!
//! What a stream may receive before it is accepted costs no credit: it is counted as it arrives, and what follows
//! waits the longer. Over any time the peer sends no more than the rate allows, what was granted before, and
//! [`DEBT_MAX_BYTES`], of which what is beyond [`DEBT_REFUSED_BYTES`] is dropped.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Instant;

use super::frame::RECORD_LEN;
use super::shared_limit::{DEBT_MAX_BYTES, DEBT_REFUSED_BYTES, Draw};
use super::{SessionError, SharedLimit, StreamId};

/// A grant is what may come in a part of a second, so that streams take turns.
const GRANTS_PER_SECOND: u64 = 50;
/// Each stream's window has room for it.
const GRANT_MAX_BYTES: u64 = 1 << 20;

/// The session's part in the limit on what its peer sends.
#[derive(Debug, Default)]
pub(super) struct Inflow {
    draw: Option<Draw>,
    /// Streams that are to be given credit, in the order of their turns, each once.
    waiting: VecDeque<StreamId>,
    /// The first of them was told that it may ask.
    called: bool,
}

impl Inflow {
    /// Another limit, or the same one at another rate. Returns whom nothing keeps waiting any more.
    pub(super) fn set(&mut self, limit: Option<SharedLimit>) -> VecDeque<StreamId> {
        Draw::renew(&mut self.draw, limit);
        self.called = false;
        if self.draw.is_some() { VecDeque::new() } else { std::mem::take(&mut self.waiting) }
    }

    pub(super) fn limit(&self) -> Option<NonZeroU64> {
        self.draw.as_ref().map(Draw::per_second)
    }

    /// What may be granted to this stream now; none: it is called when it may ask again. `waits` is its mark of
    /// being in the queue.
    pub(super) fn may_grant(&mut self, now: Instant, id: StreamId, waits: &mut bool) -> Option<u64> {
        let Some(draw) = &mut self.draw else { return Some(u64::MAX) };
        let is_next = self.waiting.front().is_none_or(|first| *first == id);
        self.called &= !is_next;
        if is_next && draw.is_ready(now) {
            self.waiting.pop_front();
            *waits = false;
            return Some(grant_bytes(draw.per_second()));
        }
        if !std::mem::replace(waits, true) {
            self.waiting.push_back(id);
        }
        None
    }

    /// The stream has no use for credit any more.
    pub(super) fn leave(&mut self, id: StreamId) {
        self.called &= self.waiting.front() != Some(&id);
        self.waiting.retain(|other| *other != id);
    }

    /// Credit was given.
    pub(super) fn granted(&mut self, now: Instant, bytes: u64) {
        if let Some(draw) = &mut self.draw {
            draw.charge(usize::try_from(bytes).unwrap_or(usize::MAX), now);
        }
    }

    /// Bytes have come that cost no credit.
    /// Errors: they are far more than the peer may send.
    pub(super) fn arrived(&mut self, now: Instant, bytes: u64) -> Result<(), SessionError> {
        if bytes > 0 {
            self.granted(now, bytes);
        }
        match &self.draw {
            Some(draw) if bytes > 0 && draw.debt_bytes(now) >= DEBT_MAX_BYTES => {
                Err(SessionError::Abuse { what: "far more bytes than the limit on what it may send" })
            }
            _ => Ok(()),
        }
    }

    /// Whether the peer has sent so much more than it may that it may open no stream.
    pub(super) fn is_overdrawn(&self, now: Instant) -> bool {
        self.draw.as_ref().is_some_and(|draw| draw.debt_bytes(now) >= DEBT_REFUSED_BYTES)
    }

    /// When the first one that waits may ask.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let draw = self.draw.as_ref().filter(|_| !self.called && !self.waiting.is_empty())?;
        Some(draw.ready_at())
    }

    /// Who may ask now.
    pub(super) fn on_timeout(&mut self, now: Instant) -> Option<StreamId> {
        self.deadline().filter(|deadline| *deadline <= now)?;
        self.called = true;
        self.waiting.front().copied()
    }

    /// All that wait.
    pub(super) fn waiting(&self) -> impl Iterator<Item = StreamId> {
        self.waiting.iter().copied()
    }
}

fn grant_bytes(per_second: NonZeroU64) -> u64 {
    (per_second.get() / GRANTS_PER_SECOND).clamp(RECORD_LEN as u64, GRANT_MAX_BYTES)
}
