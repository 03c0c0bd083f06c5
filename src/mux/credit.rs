//! Credit: how much the peer may send on each stream, and the budget that backs all of it (R3,
//! R4, R6). Knows no frames and no bytes.
//!
//! Every stream is *committed* at least the floor, so that it can always go on, and so is every
//! slot in which either side may still open one. Only what lies above may grow, and only while
//! the sum stays within the budget.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Config;

/// Above this share of the budget windows shrink, in percent.
const PRESSURE_PERCENT: u64 = 80;

#[derive(Debug)]
struct Slots {
    local: u64,
    remote: u64,
}

impl Slots {
    fn of(&mut self, local: bool) -> &mut u64 {
        if local { &mut self.local } else { &mut self.remote }
    }
}

/// The session's receive budget.
#[derive(Debug)]
pub(super) struct Budget {
    total: u64,
    floor: u64,
    /// Slots in which streams may still be opened, here and by the peer.
    free: Slots,
    committed: u64,
    outstanding: u64,
    /// Σ of the windows that are aimed at.
    wanted: u64,
    streams: u64,
}

impl Budget {
    /// `peer_max`: streams that the peer lets us open.
    pub(super) fn new(config: &Config, peer_max: u32) -> Self {
        let remote = config.streams_max();
        Self {
            total: config.budget_bytes,
            floor: config.credit_floor(),
            free: Slots { local: remote.min(peer_max).into(), remote: remote.into() },
            committed: 0,
            outstanding: 0,
            wanted: 0,
            streams: 0,
        }
    }

    /// Σ(advertised − consumed).
    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    /// Whether the side may open a further stream.
    pub(super) fn has_slot(&mut self, local: bool) -> bool {
        *self.free.of(local) > 0
    }

    /// A stream takes a slot; its floor is committed when its credit begins.
    pub(super) fn take_slot(&mut self, local: bool) {
        debug_assert!(self.has_slot(local));
        *self.free.of(local) -= 1;
    }

    /// A stream is forgotten; its slot is free again if it had one.
    pub(super) fn retire(&mut self, credit: &RecvCredit, slot: bool, local: bool) {
        credit.leave(self);
        self.streams -= u64::from(slot);
        *self.free.of(local) += u64::from(slot);
        self.assert_invariants();
    }

    /// Set aside for free slots.
    fn reserved(&self) -> u64 {
        (self.free.local + self.free.remote) * self.floor
    }

    /// Committed to streams and to free slots.
    fn spoken_for(&self) -> u64 {
        self.committed + self.reserved()
    }

    /// What may still be committed.
    pub(super) fn available(&self) -> u64 {
        self.total.saturating_sub(self.spoken_for())
    }

    /// Whether the windows that are aimed at nearly fill the budget. What is outstanding would
    /// say less: it is low whenever a lot was just consumed.
    fn is_under_pressure(&self) -> bool {
        self.reserved() + self.wanted > self.total / 100 * PRESSURE_PERCENT
    }

    /// Whether a window may grow by so much.
    fn can_want(&self, more: u64) -> bool {
        self.reserved() + self.wanted + more <= self.total
    }

    /// The mean window: under pressure larger ones shrink and smaller ones may grow, so that
    /// they meet.
    fn mean_window(&self) -> u64 {
        self.wanted / self.streams.max(1)
    }

    fn assert_invariants(&self) {
        debug_assert!(self.outstanding <= self.committed, "credit without commitment: {self:?}");
        debug_assert!(self.spoken_for() <= self.total, "the budget is overcommitted: {self:?}");
    }
}

/// What of a stream's credit does not depend on a clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CreditState {
    advertised: u64,
    received: u64,
    consumed: u64,
    window: u64,
    window_max: u64,
    floor: u64,
    closed_at: Option<u64>,
}

/// The receiving side of one stream's credit.
#[derive(Debug)]
pub(super) struct RecvCredit {
    advertised: u64,
    received: u64,
    consumed: u64,
    window: u64,
    window_max: u64,
    floor: u64,
    /// Set when no more data will be kept: consumption up to here is still awaited.
    closed_at: Option<u64>,
    epoch: Instant,
    epoch_consumed: u64,
    /// The sender came to the end of its credit in this epoch.
    limited: bool,
    heard: Instant,
}

impl RecvCredit {
    /// Credit for a new stream: `initial` is told to the peer already or with the next frame.
    pub(super) fn new(budget: &mut Budget, initial: u64, window_max: u64, now: Instant) -> Self {
        let floor = budget.floor;
        let credit = Self {
            advertised: initial.min(floor),
            received: 0,
            consumed: 0,
            window: floor,
            window_max,
            floor,
            closed_at: None,
            epoch: now,
            epoch_consumed: 0,
            limited: false,
            heard: now,
        };
        credit.enter(budget);
        budget.streams += 1;
        budget.assert_invariants();
        credit
    }

    /// Credit that was told to the peer for a stream that is refused: nothing is kept of it.
    pub(super) fn refused(initial: u64, now: Instant) -> Self {
        Self {
            advertised: initial,
            received: 0,
            consumed: 0,
            window: 0,
            window_max: 0,
            floor: 0,
            closed_at: Some(0),
            epoch: now,
            epoch_consumed: 0,
            limited: false,
            heard: now,
        }
    }

    pub(super) fn state(&self) -> CreditState {
        CreditState {
            advertised: self.advertised,
            received: self.received,
            consumed: self.consumed,
            window: self.window,
            window_max: self.window_max,
            floor: self.floor,
            closed_at: self.closed_at,
        }
    }

    /// Credit that another process has given; `counted`: the stream occupies a slot.
    pub(super) fn from_state(budget: &mut Budget, state: CreditState, counted: bool, now: Instant) -> Self {
        let credit = Self {
            advertised: state.advertised,
            received: state.received,
            consumed: state.consumed,
            window: state.window,
            window_max: state.window_max,
            floor: state.floor,
            closed_at: state.closed_at,
            epoch: now,
            epoch_consumed: state.consumed,
            limited: false,
            heard: now,
        };
        credit.enter(budget);
        budget.streams += u64::from(counted);
        credit
    }

    pub(super) fn advertised(&self) -> u64 {
        self.advertised
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn consumed(&self) -> u64 {
        self.consumed
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }

    /// Σ's summand: what may still arrive or be held.
    fn outstanding(&self) -> u64 {
        self.closed_at.unwrap_or(self.advertised).saturating_sub(self.consumed)
    }

    /// The floor stays committed until the stream is forgotten: its slot is taken so long.
    fn committed(&self) -> u64 {
        self.outstanding().max(self.floor)
    }

    fn wanted(&self) -> u64 {
        match self.closed_at {
            Some(_) => self.committed(),
            None => self.committed().max(self.window),
        }
    }

    fn enter(&self, budget: &mut Budget) {
        budget.wanted += self.wanted();
        budget.committed += self.committed();
        budget.outstanding += self.outstanding();
    }

    fn leave(&self, budget: &mut Budget) {
        budget.wanted -= self.wanted();
        budget.committed -= self.committed();
        budget.outstanding -= self.outstanding();
    }

    fn change(&mut self, budget: &mut Budget, change: impl FnOnce(&mut Self)) {
        self.leave(budget);
        change(self);
        self.enter(budget);
        debug_assert!(self.consumed <= self.received || self.closed_at.is_some());
        debug_assert!(self.received <= self.advertised);
        budget.assert_invariants();
    }

    /// Data arrived. False if the peer had no credit for it.
    pub(super) fn on_data(
        &mut self,
        budget: &mut Budget,
        now: Instant,
        len: u64,
        idle_after: Duration,
    ) -> bool {
        let Some(received) = self.received.checked_add(len).filter(|end| *end <= self.advertised) else {
            return false;
        };
        if now.saturating_duration_since(self.heard) > idle_after {
            self.change(budget, |credit| credit.window = credit.floor);
        }
        self.heard = now;
        self.received = received;
        self.limited |= self.advertised - received < super::frame::RECORD_LEN as u64;
        true
    }

    /// The local side took `bytes`; grows or shrinks the window at the end of an epoch.
    ///
    /// Half a window consumed within two round trips means that the window is less than four times
    /// what the path holds (as in QUIC's usual tuning): it may be what keeps the sender back. On a
    /// short path a round trip under load is far above the smallest one; there a sender that is
    /// seen at the end of its credit is believed for [`Config::growth_time_min`].
    pub(super) fn on_consumed(
        &mut self,
        budget: &mut Budget,
        now: Instant,
        bytes: u64,
        (two_round_trips, growth_time_min): (Duration, Duration),
    ) {
        let most = self.closed_at.unwrap_or(self.received);
        let consumed = (self.consumed + bytes).min(most);
        self.change(budget, |credit| credit.consumed = consumed);
        if self.closed_at.is_some() || self.consumed - self.epoch_consumed < self.window / 2 {
            return;
        }
        let elapsed = now.saturating_duration_since(self.epoch);
        let too_small = elapsed < two_round_trips || (self.limited && elapsed < growth_time_min);
        let window = self.next_window(budget, too_small);
        self.change(budget, |credit| credit.window = window);
        self.epoch = now;
        self.epoch_consumed = self.consumed;
        self.limited = self.advertised == self.received;
    }

    fn next_window(&self, budget: &Budget, too_small: bool) -> u64 {
        let twice = (self.window * 2).min(self.window_max);
        if budget.is_under_pressure() && self.window > budget.mean_window() {
            (self.window / 2).max(self.floor)
        } else if too_small && budget.can_want(twice - self.window) {
            twice
        } else {
            self.window
        }
    }

    /// The window becomes at least this, if the budget has it, once both sides want the stream. It is granted at
    /// once, unless that has to wait for its turn.
    pub(super) fn start(&mut self, budget: &mut Budget, window: u64, grants_wait: bool) {
        let window = self.window.max(window.min(self.window_max));
        if budget.can_want(window - self.window) {
            self.change(budget, |credit| credit.window = window);
        }
        if !grants_wait {
            self.grant(budget, u64::MAX);
        }
    }

    /// Whether it is worth telling the peer of more credit: a quarter of the window.
    pub(super) fn wants_grant(&self, budget: &Budget) -> bool {
        let target = self.target(budget);
        target - self.advertised > 0 && target - self.advertised >= (target - self.consumed) / 4
    }

    /// Raises what is advertised as far as window and budget allow, by `most` at most, and returns it.
    pub(super) fn grant(&mut self, budget: &mut Budget, most: u64) -> u64 {
        let target = self.target(budget).min(self.advertised.saturating_add(most));
        self.change(budget, |credit| credit.advertised = target);
        target
    }

    /// At least the floor, at most the window, above the floor only what the budget has.
    fn target(&self, budget: &Budget) -> u64 {
        if self.closed_at.is_some() {
            return self.advertised;
        }
        let backed = self.consumed + self.committed() + budget.available();
        (self.consumed + self.window).min(backed).max(self.advertised)
    }

    /// No more data will be kept; what was handed out up to `at` is still to be consumed.
    pub(super) fn close(&mut self, budget: &mut Budget, at: u64) {
        let at = self.closed_at.map_or(at, |before| before.min(at));
        self.change(budget, |credit| credit.closed_at = Some(at));
    }

    /// Whether the local side has taken all that it is to take.
    pub(super) fn is_settled(&self) -> bool {
        self.closed_at.is_some_and(|at| self.consumed >= at)
    }
}
