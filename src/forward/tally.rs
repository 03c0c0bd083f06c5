//! What has become of forwarded connections, in numbers: of each forwarding and target, and of each label
//! of the metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::mux::Code;

/// Which end of forwarded connections is on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Programs of this host connect to a forwarding.
    Forward,
    /// Peers are connected to a target.
    Target,
}

impl Side {
    /// A label for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Target => "target",
        }
    }
}

/// The label of all that is not in the configuration.
pub(super) const DYNAMIC: &str = "dynamic";

/// Counts since the beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Connections that were carried, at their end or not.
    pub opened: u64,
    /// Bytes that local programs have sent.
    pub sent_bytes: u64,
    /// Bytes that local programs were sent.
    pub received_bytes: u64,
    /// Times that what a local program had sent waited for the other side to take more.
    pub stalls: u64,
    /// Connections that came to nothing, by reason.
    pub failed: BTreeMap<String, u64>,
}

impl Totals {
    /// Both together.
    pub(super) fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.sent_bytes += other.sent_bytes;
        self.received_bytes += other.received_bytes;
        self.stalls += other.stalls;
        for (reason, count) in &other.failed {
            *self.failed.entry(reason.clone()).or_default() += count;
        }
    }
}

/// Counts of what has ended, or come to nothing.
#[derive(Debug, Default)]
pub(super) struct Tally {
    opened: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    stalls: AtomicU64,
    failed: Mutex<BTreeMap<String, u64>>,
}

impl Tally {
    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    pub(super) fn failed(&self, reason: Code) {
        *self.locked().entry(reason.name().to_owned()).or_default() += 1;
    }

    /// A connection has ended that has moved so much.
    pub(super) fn moved(&self, moved: Moved) {
        self.sent_bytes.fetch_add(moved.sent_bytes, Relaxed);
        self.received_bytes.fetch_add(moved.received_bytes, Relaxed);
        self.stalls.fetch_add(moved.stalls, Relaxed);
    }

    /// What an earlier process had counted.
    pub(super) fn restore(&self, totals: &Totals) {
        self.opened.fetch_add(totals.opened, Relaxed);
        self.moved(Moved {
            sent_bytes: totals.sent_bytes,
            received_bytes: totals.received_bytes,
            stalls: totals.stalls,
        });
        let mut failed = self.locked();
        for (reason, count) in &totals.failed {
            *failed.entry(reason.clone()).or_default() += count;
        }
    }

    /// All of it.
    pub(super) fn totals(&self) -> Totals {
        Totals {
            opened: self.opened.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            stalls: self.stalls.load(Relaxed),
            failed: self.locked().clone(),
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one connection has moved.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    pub(super) stalls: u64,
}

/// The tallies of all labels. There is one for each forwarding and target of the configuration, one for all
/// that is dynamic, and one for what was never let in.
#[derive(Debug, Default)]
pub(super) struct Labels(Mutex<BTreeMap<(Side, String), Arc<Tally>>>);

impl Labels {
    pub(super) fn of(&self, side: Side, label: &str) -> Arc<Tally> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry((side, label.to_owned())).or_default())
    }

    pub(super) fn all(&self) -> BTreeMap<(Side, String), Totals> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(key, tally)| (key.clone(), tally.totals())).collect()
    }
}
