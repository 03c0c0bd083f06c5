//! The connections of one forwarding, or to one target: how many there may be, their pumps, and what they
//! have moved.
//!
//! ```text
//! enter ─► Place ─┬─ begin ─► carried by a pump ─┬─► ended by either side, or with its session
//!                 └─ dropped: came to nothing    ├─► cut by `end`
//!                                                └─► frozen, for another process
//! ```
//! A session that ends takes its pumps with it, and with them every local socket.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::CONNECTIONS_MAX;
use super::tally::{Moved, Tally, Totals};
use crate::mux::{Code, StreamId};
use crate::net::pump::{FrozenPump, Pump, PumpCounters, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::net::stream_owner::SessionId;

/// A connection that is carried.
#[derive(Debug)]
struct Carried {
    session: Session,
    stream: StreamId,
    pump: Pump,
    /// What an earlier process has counted of it.
    before: Moved,
    /// As looked at last.
    stalls: u64,
}

impl Carried {
    fn moved(&self) -> Moved {
        moved(self.pump.counters(), self.before, self.stalls)
    }
}

fn moved(counters: &PumpCounters, before: Moved, stalls: u64) -> Moved {
    Moved {
        sent_bytes: counters.sent_bytes.load(Relaxed).saturating_sub(before.sent_bytes),
        received_bytes: counters.received_bytes.load(Relaxed).saturating_sub(before.received_bytes),
        stalls,
    }
}

#[derive(Debug, Default)]
struct Slots {
    /// None while it is not carried yet.
    all: BTreeMap<u64, Option<Carried>>,
    next: u64,
    /// There are to be no more.
    is_over: bool,
}

/// The connections of one forwarding, or to one target; clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Connections(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    slots: Mutex<Slots>,
    own: Tally,
    label: Arc<Tally>,
}

/// A connection that has stopped between two bytes.
#[derive(Debug)]
pub(super) struct StoppedConnection {
    pub(super) session: SessionId,
    pub(super) pump: FrozenPump,
}

impl Connections {
    /// None yet; what becomes of them counts for `label`, too.
    pub(super) fn new(label: Arc<Tally>) -> Self {
        Self(Arc::new(Inner { slots: Mutex::default(), own: Tally::default(), label }))
    }

    /// A place for one more, of those that its peer may have.
    pub(super) fn enter(&self, of_peer: &Arc<Semaphore>) -> Result<Place, Code> {
        let of_peer = Arc::clone(of_peer).try_acquire_owned().map_err(|_| Code::Limit)?;
        let mut slots = self.0.locked();
        if slots.is_over {
            return Err(Code::Denied);
        }
        if slots.all.len() >= CONNECTIONS_MAX {
            return Err(Code::Limit);
        }
        let number = slots.next;
        slots.next += 1;
        slots.all.insert(number, None);
        Ok(Place { inner: Arc::clone(&self.0), number, of_peer: Some(of_peer) })
    }

    /// A connection came to nothing.
    pub(super) fn failed(&self, reason: Code) {
        self.0.own.failed(reason);
        self.0.label.failed(reason);
    }

    /// How many there are, those that are not carried yet included.
    pub(super) fn open(&self) -> usize {
        self.0.locked().all.len()
    }

    /// Whether there are to be no more.
    pub(super) fn is_over(&self) -> bool {
        self.0.locked().is_over
    }

    /// Asks how often each has stalled.
    pub(super) async fn look(&self) {
        let carried: Vec<_> = {
            let slots = self.0.locked();
            let carried = slots.all.iter().filter_map(|(n, carried)| Some((*n, carried.as_ref()?)));
            carried.map(|(n, c)| (n, c.session.clone(), c.stream)).collect()
        };
        for (number, session, stream) in carried {
            if let Some(stalls) = session.stalls(stream).await
                && let Some(Some(carried)) = self.0.locked().all.get_mut(&number)
            {
                carried.stalls = stalls;
            }
        }
    }

    /// All that was counted, of those that are carried now, too.
    pub(super) fn totals(&self) -> Totals {
        let mut totals = self.0.own.totals();
        totals.add(&self.carried());
        totals
    }

    /// What those that are carried now have moved.
    pub(super) fn carried(&self) -> Totals {
        let slots = self.0.locked();
        let mut totals = Totals::default();
        for carried in slots.all.values().flatten() {
            let Moved { sent_bytes, received_bytes, stalls } = carried.moved();
            totals.add(&Totals { sent_bytes, received_bytes, stalls, ..Totals::default() });
        }
        totals
    }

    /// Goes on counting where an earlier process has stopped.
    pub(super) fn restore(&self, totals: &Totals) {
        self.0.own.restore(totals);
    }

    /// Cuts all, and lets no more in.
    pub(super) fn end(&self) {
        let cut = {
            let mut slots = self.0.locked();
            slots.is_over = true;
            std::mem::take(&mut slots.all)
        };
        // A pump that is dropped is cut; that must not be done with the slots locked.
        cut.values().flatten().for_each(|carried| self.0.tell(carried.moved()));
    }

    /// Stops all between two bytes, for another process.
    pub(super) async fn freeze(&self) -> Vec<StoppedConnection> {
        let all = std::mem::take(&mut self.0.locked().all);
        let mut stopped = Vec::new();
        for carried in all.into_values().flatten() {
            let (session, counters) = (carried.session.id(), Arc::clone(carried.pump.counters()));
            let frozen = carried.pump.freeze().await;
            self.0.tell(moved(&counters, carried.before, carried.stalls));
            stopped.extend(frozen.map(|pump| StoppedConnection { session, pump }));
        }
        stopped
    }
}

impl Inner {
    fn locked(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, moved: Moved) {
        self.own.moved(moved);
        self.label.moved(moved);
    }

    /// A pump has ended, or its session has.
    fn ended(&self, number: u64) {
        let ended = self.locked().all.remove(&number);
        if let Some(carried) = ended.flatten() {
            self.tell(carried.moved());
        }
    }
}

/// One of the connections that there may be. Dropped before it is carried, it came to nothing.
#[derive(Debug)]
pub(super) struct Place {
    inner: Arc<Inner>,
    number: u64,
    of_peer: Option<OwnedSemaphorePermit>,
}

/// Tells of a pump's end: also if its session takes it along without a word.
struct EndNote {
    inner: Arc<Inner>,
    number: u64,
    _of_peer: Option<OwnedSemaphorePermit>,
}

impl Drop for EndNote {
    fn drop(&mut self) {
        self.inner.ended(self.number);
    }
}

impl Place {
    /// Carries the connection from now on.
    pub(super) fn begin(mut self, session: &Session, local: OwnedFd, stream: Stream) {
        self.inner.own.opened();
        self.inner.label.opened();
        self.carry(session, local, stream, PumpState::default(), Moved::default());
    }

    /// Goes on carrying one of an earlier process.
    pub(super) fn go_on(mut self, session: &Session, local: OwnedFd, stream: Stream, state: PumpState) {
        let (sent_bytes, received_bytes) = state.moved();
        let before = Moved { sent_bytes, received_bytes, stalls: 0 };
        self.carry(session, local, stream, state, before);
    }

    fn carry(&mut self, session: &Session, local: OwnedFd, stream: Stream, state: PumpState, before: Moved) {
        let (inner, number) = (Arc::clone(&self.inner), self.number);
        let note = EndNote { inner: Arc::clone(&inner), number, _of_peer: self.of_peer.take() };
        // The slot is the note's from here on.
        self.number = u64::MAX;
        let id = stream.id();
        // The note is told at once if the session has ended: the slots must not be locked here.
        let pump = Pump::resume(session.runtime(), local, stream, state, move |_| drop(note));
        let carried = Carried { session: session.clone(), stream: id, pump, before, stalls: 0 };
        let gone = {
            let mut slots = inner.locked();
            match slots.all.get_mut(&number) {
                Some(slot) => {
                    *slot = Some(carried);
                    None
                }
                None => Some(carried),
            }
        };
        // It has ended meanwhile, or all are cut.
        if let Some(carried) = gone {
            inner.tell(carried.moved());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.locked().all.remove(&self.number);
    }
}
