//! Which stream sends next: urgent before all, then streams that were idle, then the rest in
//! deficit round robin by weight (WIRE §6). Holds ids and nothing of the streams themselves.

use std::collections::VecDeque;

use super::StreamId;
use super::config::Class;

/// Bytes that a stream of weight 16 may send per round.
const QUANTUM_BYTES: i64 = 16 * 1024;
/// The weight of ordinary streams.
pub const WEIGHT_DEFAULT: u16 = 16;

/// Bytes per round for a weight.
pub(super) fn quantum(weight: u16) -> i64 {
    QUANTUM_BYTES * i64::from(weight.max(1)) / i64::from(WEIGHT_DEFAULT)
}

/// The lists. A stream is in at most one of them; it leaves when it has nothing to send.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    /// Streams with control frames due: opens, credit, ends.
    pub(super) control: VecDeque<StreamId>,
    pub(super) urgent: VecDeque<StreamId>,
    /// Bulk streams that had nothing to send until now: a reply does not wait for a round.
    pub(super) sparse: VecDeque<StreamId>,
    pub(super) ring: VecDeque<StreamId>,
}

impl Scheduler {
    /// A stream has something to send again.
    pub(super) fn wake(&mut self, id: StreamId, class: Class) {
        match class {
            Class::Urgent => self.urgent.push_back(id),
            Class::Bulk => self.sparse.push_back(id),
        }
    }

    /// Whether bulk streams wait.
    pub(super) fn bulk_waits(&self) -> bool {
        !self.sparse.is_empty() || !self.ring.is_empty()
    }

    /// The bulk stream whose turn it is, and whether it comes from the sparse list.
    pub(super) fn next_bulk(&mut self) -> Option<(StreamId, bool)> {
        match self.sparse.pop_front() {
            Some(id) => Some((id, true)),
            None => self.ring.pop_front().map(|id| (id, false)),
        }
    }
}
