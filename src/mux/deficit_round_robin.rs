//! Deficit round robin by weight, with a list for streams that were quiet (fq_codel's two lists,
//! RFC 8290 §4.2). Knows no frames, no credit: a stream that cannot send leaves its list and comes
//! back with [`DeficitRoundRobin::wake`].

use std::collections::VecDeque;

use super::{Class, MigrationId, StreamId, WEIGHT_MAX};

/// Bytes of a turn for each unit of weight: 16 KiB for the ordinary weight.
const QUANTUM_PER_WEIGHT: i64 = 1024;

/// A stream as the scheduler sees it; kept with the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) class: Class,
    /// The migration that the stream belongs to.
    pub(super) migration: MigrationId,
    pub(super) weight: u16,
    deficit: i64,
    pub(super) listed: bool,
}

impl Turn {
    pub(super) fn new(class: Class, migration: MigrationId, weight: u16) -> Self {
        Self { class, migration, weight: clamp_weight(weight), deficit: 0, listed: false }
    }

    pub(super) fn charge(&mut self, bytes: usize) {
        self.deficit -= bytes as i64;
    }

    fn quantum(&self) -> i64 {
        QUANTUM_PER_WEIGHT * i64::from(self.weight)
    }
}

pub(super) fn clamp_weight(weight: u16) -> u16 {
    weight.clamp(1, WEIGHT_MAX)
}

/// What the scheduler asks of the streams.
pub(super) trait Backlog {
    /// The stream's turn; `None` when it is forgotten.
    fn turn(&mut self, id: StreamId) -> Option<&mut Turn>;
    /// Whether it could send something now.
    fn is_ready(&self, id: StreamId) -> bool;
}

/// Streams with something to send. A listed stream may have become unable to: it leaves when its
/// turn comes.
#[derive(Debug, Default)]
pub(super) struct DeficitRoundRobin {
    fresh: VecDeque<StreamId>,
    old: VecDeque<StreamId>,
}

impl DeficitRoundRobin {
    pub(super) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.old.is_empty()
    }

    /// Lists a stream that is not listed. `fresh`: it had nothing to send before, rather than no
    /// credit.
    pub(super) fn wake(&mut self, id: StreamId, turn: &mut Turn, fresh: bool) {
        turn.listed = true;
        turn.deficit = turn.quantum();
        if fresh {
            self.fresh.push_back(id);
        } else {
            self.old.push_back(id);
        }
    }

    pub(super) fn remove(&mut self, id: StreamId) {
        self.fresh.retain(|other| *other != id);
        self.old.retain(|other| *other != id);
    }

    /// The stream whose turn it is. It stays at the head.
    pub(super) fn head(&mut self, streams: &mut impl Backlog) -> Option<StreamId> {
        loop {
            let is_fresh = !self.fresh.is_empty();
            let list = if is_fresh { &mut self.fresh } else { &mut self.old };
            let id = *list.front()?;
            let ready = streams.is_ready(id);
            let Some(turn) = streams.turn(id) else {
                list.pop_front();
                continue;
            };
            if ready && turn.deficit > 0 {
                return Some(id);
            }
            list.pop_front();
            // A fresh stream that has nothing left goes through the old list once: it cannot
            // stay in front by sending little by little.
            let passes_old = is_fresh && !self.old.is_empty();
            if !ready && !passes_old {
                turn.listed = false;
                continue;
            }
            if turn.deficit <= 0 {
                turn.deficit += turn.quantum();
            }
            self.old.push_back(id);
        }
    }
}
