//! One stream: two directions with their states, queues and credit. Knows no other stream and no
//! frame: what it wants to say is state, which `transmit` turns into frames (R1).

use std::time::Instant;

use super::credit::{Budget, RecvCredit};
use super::deficit_round_robin::Turn;
use super::queue::{RecvQueue, SendQueue};
use super::{Code, Open, StreamId, StreamStats};

/// Who waits for whose answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// We opened it, the peer has not answered.
    Opening {
        /// Until when it may.
        deadline: Instant,
    },
    /// The peer opened it, the local side has not answered.
    Offered,
    /// Both want it.
    Established,
    /// The peer opened it and was refused without asking; the local side never hears of it.
    RefusedUnasked,
}

/// What becomes of the direction that we send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SendState {
    /// Data may be queued.
    Open,
    /// FIN follows the queue.
    Finishing,
    /// RESET is to be sent; `abort` ends the other direction, too.
    Resetting {
        /// Why.
        code: Code,
        /// Ends both.
        abort: bool,
    },
    /// FIN or RESET was sent.
    Done,
}

/// What becomes of the direction that we receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecvState {
    /// Data may arrive.
    Open,
    /// The peer's FIN arrived.
    Finished,
    /// The peer's RESET arrived.
    Reset,
}

/// Frames other than DATA, FIN and RESET that wait to be sent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Control {
    pub(super) open: bool,
    pub(super) accept: bool,
    pub(super) credit: bool,
    pub(super) prio: bool,
    pub(super) stop: Option<Code>,
    /// The stream is in the session's list of streams with control frames.
    pub(super) listed: bool,
}

/// The direction that we send.
#[derive(Debug)]
pub(super) struct SendSide {
    pub(super) state: SendState,
    pub(super) queue: SendQueue,
    /// Bytes framed.
    pub(super) offset: u64,
    /// Up to where the peer lets us send.
    pub(super) limit: u64,
    /// The local side met a full queue and wants to hear when there is room.
    pub(super) starved: bool,
    /// There is data but no credit.
    pub(super) stalled: bool,
    pub(super) stalls: u64,
    /// How the direction ended for the local side, once it must not send any more.
    pub(super) ended: Option<Code>,
}

/// The direction that we receive.
#[derive(Debug)]
pub(super) struct RecvSide {
    pub(super) state: RecvState,
    pub(super) queue: RecvQueue,
    pub(super) credit: RecvCredit,
    /// Bytes handed to the local side.
    pub(super) handed: u64,
    /// The local side does not want more: what arrives is dropped.
    pub(super) given_up: bool,
    /// A Readable event waits.
    pub(super) announced: bool,
    /// It waits until the limit on what arrives has credit for it.
    pub(super) waits: bool,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: StreamId,
    pub(super) open: Open,
    pub(super) phase: Phase,
    pub(super) send: SendSide,
    pub(super) recv: RecvSide,
    pub(super) turn: Turn,
    pub(super) control: Control,
    /// It occupies one of its opener's slots.
    pub(super) slot: bool,
    /// Opened here.
    pub(super) local: bool,
    /// The peer has accepted or reset what was opened here.
    pub(super) answered: bool,
    /// The peer asked us to stop before the local side had accepted.
    pub(super) stopped: Option<Code>,
    /// The local side reset it and hears no more but that it is forgotten.
    pub(super) local_reset: bool,
}

impl Stream {
    pub(super) fn new(id: StreamId, open: Open, phase: Phase, limit: u64, credit: RecvCredit) -> Self {
        Self {
            id,
            open,
            phase,
            send: SendSide {
                state: SendState::Open,
                queue: SendQueue::default(),
                offset: 0,
                limit,
                starved: false,
                stalled: false,
                stalls: 0,
                ended: None,
            },
            recv: RecvSide {
                state: RecvState::Open,
                queue: RecvQueue::default(),
                credit,
                handed: 0,
                given_up: false,
                announced: false,
                waits: false,
            },
            turn: Turn::new(open.class, open.migration, open.weight),
            control: Control::default(),
            slot: false,
            local: matches!(phase, Phase::Opening { .. }),
            answered: false,
            stopped: None,
            local_reset: false,
        }
    }

    /// Whether DATA or FIN could be sent now.
    pub(super) fn is_ready(&self) -> bool {
        match self.send.state {
            SendState::Open => !self.send.queue.is_empty() && self.send_credit() > 0,
            SendState::Finishing => self.send.queue.is_empty() || self.send_credit() > 0,
            SendState::Resetting { .. } | SendState::Done => false,
        }
    }

    pub(super) fn send_credit(&self) -> u64 {
        self.send.limit.saturating_sub(self.send.offset)
    }

    /// Whether control frames wait.
    pub(super) fn has_control(&self) -> bool {
        let Control { open, accept, credit, prio, stop, .. } = self.control;
        let resetting = matches!(self.send.state, SendState::Resetting { .. });
        open || accept || credit || prio || stop.is_some() || resetting
    }

    /// Ends what we send with a RESET, unless its end was sent already.
    pub(super) fn reset_send(&mut self, code: Code, abort: bool) {
        self.send.queue.clear();
        self.send.ended.get_or_insert(code);
        self.send.starved = false;
        match self.send.state {
            SendState::Done => {}
            SendState::Resetting { code, abort: before } => {
                self.send.state = SendState::Resetting { code, abort: abort || before };
            }
            SendState::Open | SendState::Finishing => {
                self.send.state = SendState::Resetting { code, abort };
            }
        }
    }

    /// Drops what was received and will be.
    pub(super) fn give_up(&mut self, budget: &mut Budget) {
        self.recv.given_up = true;
        self.recv.queue.clear();
        self.control.credit = false;
        let consumed = self.recv.credit.consumed();
        self.recv.credit.close(budget, consumed);
    }

    /// Whether both directions are final and the local side has nothing left to do.
    pub(super) fn is_over(&self) -> bool {
        let settled = self.recv.given_up || (self.recv.queue.is_empty() && self.recv.credit.is_settled());
        self.send.state == SendState::Done
            && self.recv.state != RecvState::Open
            && settled
            && self.phase != Phase::Offered
    }

    pub(super) fn stats(&self) -> StreamStats {
        StreamStats {
            class: self.turn.class,
            weight: self.turn.weight,
            sent_bytes: self.send.offset,
            send_limit_bytes: self.send.limit,
            send_queued_bytes: self.send.queue.len(),
            received_bytes: self.recv.credit.received(),
            consumed_bytes: self.recv.credit.consumed(),
            recv_queued_bytes: self.recv.queue.len(),
            recv_limit_bytes: self.recv.credit.advertised(),
            recv_window_bytes: self.recv.credit.window(),
            credit_stalls: self.send.stalls,
        }
    }
}
