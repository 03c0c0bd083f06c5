//! One stream: what it has to send, what it has received, and how far each direction is.
//! Knows its own two directions and nothing of the session.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::Open;
use super::code::Code;
use super::config::Class;
use super::credit::Credit;

/// Received bytes are collected in buffers of at most this size, so that the consumer gets few
/// and large ones.
const SLAB_BYTES: usize = 64 * 1024;
/// Chunks shorter than this are copied, so that a few bytes do not pin a large buffer.
const COPY_BELOW_BYTES: usize = 2 * 1024;

/// The direction from here to the peer.
#[derive(Debug, Default)]
pub(super) struct Sending {
    chunks: VecDeque<Bytes>,
    queued: usize,
    /// Offset of the next byte to frame.
    pub(super) offset: u64,
    /// The peer takes bytes up to here.
    pub(super) limit: u64,
    pub(super) fin_wanted: bool,
    /// No byte follows any more: FIN or RESET has been framed.
    pub(super) finished: bool,
    /// The user has been told that it must wait.
    pub(super) full: bool,
}

impl Sending {
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    pub(super) fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        self.queued += data.len();
        let small = data.len() < COPY_BELOW_BYTES;
        self.chunks.push_back(if small { Bytes::copy_from_slice(&data) } else { data });
    }

    pub(super) fn discard(&mut self) {
        self.chunks.clear();
        self.queued = 0;
    }

    /// Whether bytes or the FIN could be framed now.
    pub(super) fn is_ready(&self) -> bool {
        !self.finished && (self.has_credit() || (self.queued == 0 && self.fin_wanted))
    }

    fn has_credit(&self) -> bool {
        self.queued > 0 && self.offset < self.limit
    }

    /// Whether only the peer's credit is missing.
    pub(super) fn is_stalled(&self) -> bool {
        !self.finished && self.queued > 0 && self.offset >= self.limit
    }

    /// Takes at most `max` bytes that lie together and that the peer's credit covers.
    pub(super) fn take(&mut self, max: usize) -> Option<Bytes> {
        if !self.has_credit() {
            return None;
        }
        let credit = usize::try_from(self.limit - self.offset).unwrap_or(usize::MAX);
        let front = self.chunks.front_mut()?;
        let taken = front.split_to(front.len().min(max).min(credit));
        if front.is_empty() {
            self.chunks.pop_front();
        }
        self.queued -= taken.len();
        self.offset += taken.len() as u64;
        Some(taken)
    }
}

/// The direction from the peer to here.
#[derive(Debug)]
pub(super) struct Receiving {
    slabs: VecDeque<BytesMut>,
    pub(super) held: usize,
    /// Offset of the next byte expected.
    pub(super) offset: u64,
    pub(super) credit: Credit,
    /// No byte follows any more: FIN or RESET has come.
    pub(super) finished: bool,
    /// Nobody here wants what comes.
    pub(super) discarding: bool,
}

impl Receiving {
    pub(super) fn new(credit: Credit) -> Self {
        Self { slabs: VecDeque::new(), held: 0, offset: 0, credit, finished: false, discarding: false }
    }

    /// Takes in a payload; its one copy on the way.
    pub(super) fn push(&mut self, payload: &[u8]) {
        self.offset += payload.len() as u64;
        if self.discarding {
            return;
        }
        self.held += payload.len();
        match self.slabs.back_mut() {
            Some(slab) if slab.capacity() - slab.len() >= payload.len() => slab.extend_from_slice(payload),
            _ => {
                // A lone small payload must not cost a whole slab.
                let room = if self.slabs.is_empty() && payload.len() < COPY_BELOW_BYTES {
                    payload.len()
                } else {
                    SLAB_BYTES
                };
                let mut slab = BytesMut::with_capacity(room);
                slab.extend_from_slice(payload);
                self.slabs.push_back(slab);
            }
        }
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let slab = self.slabs.pop_front()?;
        self.held -= slab.len();
        Some(slab.freeze())
    }

    pub(super) fn discard(&mut self) {
        self.discarding = true;
        self.slabs.clear();
        self.held = 0;
    }
}

/// How far the opening is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// We opened it; the peer has not answered.
    Opening,
    /// The peer opened it; our user has not answered.
    Offered,
    /// Both sides use it.
    Open,
}

/// A stream of a session.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) open: Open,
    pub(super) state: State,
    pub(super) since: Instant,
    pub(super) sending: Sending,
    pub(super) receiving: Receiving,
    /// Frames that are state, not queue: each is sent at most once, with what is true then.
    pub(super) want_open: bool,
    pub(super) want_accept: bool,
    pub(super) want_credit: bool,
    pub(super) want_stop: Option<Code>,
    pub(super) want_reset: Option<Code>,
    pub(super) want_prio: bool,
    /// A RESET has gone either way: nothing is delivered any more.
    pub(super) is_reset: bool,
    /// In which of the scheduler's lists it is.
    pub(super) scheduled: bool,
    pub(super) in_control: bool,
    pub(super) deficit: i64,
    pub(super) readable_told: bool,
    pub(super) credit_stalls: u64,
}

impl Stream {
    pub(super) fn new(open: Open, state: State, limit: u64, credit: Credit, now: Instant) -> Self {
        Self {
            open,
            state,
            since: now,
            sending: Sending { limit, ..Sending::default() },
            receiving: Receiving::new(credit),
            want_open: state == State::Opening,
            want_accept: false,
            want_credit: false,
            want_stop: None,
            want_reset: None,
            want_prio: false,
            is_reset: false,
            scheduled: false,
            in_control: false,
            deficit: 0,
            readable_told: false,
            credit_stalls: 0,
        }
    }

    pub(super) fn class(&self) -> Class {
        self.open.class
    }

    /// Nothing follows in either direction, nothing is wanted of it, and our user knows it.
    pub(super) fn is_over(&self) -> bool {
        self.sending.finished
            && self.receiving.finished
            && self.state != State::Offered
            && self.want_reset.is_none()
            && self.receiving.held == 0
    }

    /// Whether a control frame is due.
    pub(super) fn wants_control(&self) -> bool {
        self.want_open
            || self.want_accept
            || self.want_credit
            || self.want_stop.is_some()
            || self.want_reset.is_some()
            || self.want_prio
    }
}
