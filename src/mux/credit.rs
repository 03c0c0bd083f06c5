//! Credit: how much the peer may send on each stream, and the budget that backs all of it (R3,
//! R4, R6). Knows no frames and no bytes.
//!
//! Every stream is *committed* at least the floor, so that it can always go on; the slots that
//! the peer may still open count as committed too. Only what lies
//! above may grow, and only while the sum stays within the budget.

use std::time::{Duration, Instant};

use super::Config;

/// Above this share of the budget windows shrink, in percent.
const PRESSURE_PERCENT: u64 = 80;

/// The session's receive budget.
#[derive(Debug)]
pub(super) struct Budget {
    total: u64,
    floor: u64,
    /// Slots that the peer may still open streams in.
    free_slots: u64,
    committed: u64,
    outstanding: u64,
}

impl Budget {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            total: config.budget_bytes,
            floor: config.credit_floor(),
            free_slots: u64::from(config.streams_max()),
            committed: 0,
            outstanding: 0,
        }
    }

    /// Σ(advertised − consumed).
    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    pub(super) fn has_slot(&self) -> bool {
        self.free_slots > 0
    }

    /// A stream of the peer's takes a slot; its floor is committed when its credit begins.
    pub(super) fn take_slot(&mut self) {
        debug_assert!(self.free_slots > 0);
        self.free_slots -= 1;
    }

    /// A stream is forgotten, and its slot free if it was one of the peer's.
    pub(super) fn retire(&mut self, credit: &RecvCredit, slot: bool) {
        credit.leave(self);
        self.free_slots += u64::from(slot);
        self.assert_invariants();
    }

    /// What may still be committed.
    pub(super) fn available(&self) -> u64 {
        self.total.saturating_sub(self.committed + self.free_slots * self.floor)
    }

    /// Whether a further local stream can have its floor.
    pub(super) fn has_floor(&self) -> bool {
        self.available() >= self.floor
    }

    fn under_pressure(&self) -> bool {
        self.committed + self.free_slots * self.floor > self.total / 100 * PRESSURE_PERCENT
    }

    fn assert_invariants(&self) {
        debug_assert!(self.outstanding <= self.committed, "credit without commitment: {self:?}");
        debug_assert!(
            self.committed + self.free_slots * self.floor <= self.total,
            "the budget is overcommitted: {self:?}"
        );
    }
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

    fn enter(&self, budget: &mut Budget) {
        budget.committed += self.committed();
        budget.outstanding += self.outstanding();
    }

    fn leave(&self, budget: &mut Budget) {
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
    pub(super) fn on_data(&mut self, now: Instant, len: u64, idle_after: Duration) -> bool {
        let Some(received) = self.received.checked_add(len).filter(|end| *end <= self.advertised) else {
            return false;
        };
        if now.saturating_duration_since(self.heard) > idle_after {
            self.window = self.floor;
        }
        self.heard = now;
        self.received = received;
        self.limited |= self.advertised - received < super::frame::PAYLOAD_MAX as u64;
        true
    }

    /// The local side took `bytes`; grows or shrinks the window at the end of an epoch.
    pub(super) fn on_consumed(
        &mut self,
        budget: &mut Budget,
        now: Instant,
        bytes: u64,
        growth_time: Duration,
    ) {
        let most = self.closed_at.unwrap_or(self.received);
        let consumed = (self.consumed + bytes).min(most);
        self.change(budget, |credit| credit.consumed = consumed);
        if self.closed_at.is_some() || self.consumed - self.epoch_consumed < self.window / 2 {
            return;
        }
        let fast = now.saturating_duration_since(self.epoch) < growth_time;
        if budget.under_pressure() {
            self.window = (self.window / 2).max(self.floor);
        } else if fast && self.limited {
            self.window = (self.window * 2).min(self.window_max);
        }
        self.epoch = now;
        self.epoch_consumed = self.consumed;
        self.limited = self.advertised == self.received;
    }

    /// The window becomes at least this, once both sides want the stream.
    pub(super) fn start(&mut self, budget: &mut Budget, window: u64) {
        self.window = self.window.max(window.min(self.window_max));
        self.grant(budget);
    }

    /// Whether it is worth telling the peer of more credit: a quarter of the window.
    pub(super) fn wants_grant(&self, budget: &Budget) -> bool {
        let target = self.target(budget);
        target - self.advertised > 0 && target - self.advertised >= (target - self.consumed) / 4
    }

    /// Raises what is advertised as far as window and budget allow, and returns it.
    pub(super) fn grant(&mut self, budget: &mut Budget) -> u64 {
        let target = self.target(budget);
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
