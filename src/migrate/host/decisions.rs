//! An operator's decision on its way from whoever asked for it to the task that may carry it out.
//!
//! ```text
//!          asker                     task of the migration
//!   Order::new ── waiting ──────────► claim ──► record ──► answer
//!                    │ deadline, or the asker is gone
//!                    ▼
//!                withdrawn            claim fails: nothing is done
//! ```
//! Claiming and withdrawing are one atomic step each, and only one of them succeeds. An order that
//! was withdrawn is never carried out. An order that was claimed may be on the disk: only the task's
//! answer says more.
//!
//! [`Decisions`] has what is open on this host: where orders go, and what they would decide.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use crate::migrate::handover::Side;

/// What became of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is on the disk.
    Taken,
    /// It surely is not, and never will be.
    Refused(String),
    /// It may be on the disk, now or after a restart.
    Unknown(String),
}

/// An operator's decision, not claimed yet.
#[derive(Debug)]
pub(crate) struct Order {
    side: Side,
    uid: Option<u32>,
    /// True once somebody has claimed or withdrawn it.
    settled: Arc<AtomicBool>,
    answer: oneshot::Sender<Decision>,
}

/// An order that nobody can withdraw any more.
#[derive(Debug)]
pub(crate) struct Claimed {
    pub(crate) side: Side,
    /// The caller's user, by the kernel's word.
    pub(crate) uid: Option<u32>,
    answer: oneshot::Sender<Decision>,
}

/// Whoever waits for an order's answer. Dropping it withdraws the order.
#[derive(Debug)]
pub(crate) struct Asker {
    settled: Arc<AtomicBool>,
    answered: oneshot::Receiver<Decision>,
}

impl Order {
    /// An order of the user `uid`, and the end that waits for its answer.
    pub(crate) fn new(side: Side, uid: Option<u32>) -> (Self, Asker) {
        let (answer, answered) = oneshot::channel();
        let settled = Arc::new(AtomicBool::new(false));
        (Self { side, uid, settled: Arc::clone(&settled), answer }, Asker { settled, answered })
    }

    /// Takes the order before anything is done about it; `None` if it was withdrawn.
    pub(crate) fn claim(self) -> Option<Claimed> {
        if self.settled.swap(true, SeqCst) {
            tracing::info!(side = ?self.side, uid = self.uid, "an operator's decision is void: nobody waits for it");
            return None;
        }
        Some(Claimed { side: self.side, uid: self.uid, answer: self.answer })
    }
}

impl Claimed {
    /// Says what became of it.
    pub(crate) fn answer(self, decision: Decision) {
        if self.answer.send(decision).is_err() {
            tracing::warn!(side = ?self.side, "whoever decided did not wait for the answer");
        }
    }
}

impl Asker {
    /// Waits `deadline` for the order to be claimed, and as long again for its answer.
    pub(crate) async fn wait(mut self, deadline: Duration) -> Decision {
        let unknown = |why: &str| Decision::Unknown(format!("the record of it was begun, and {why}"));
        for _ in 0..2 {
            match timeout(deadline, &mut self.answered).await {
                Ok(Ok(decision)) => return decision,
                Ok(Err(_)) if self.withdraw() => {
                    return Decision::Refused("the migration is no longer open to a decision".into());
                }
                Ok(Err(_)) => return unknown("the migration's task ended before it said how that went"),
                Err(_) if self.withdraw() => {
                    let after = deadline.as_secs();
                    return Decision::Refused(format!(
                        "the migration did not take it within {after} s; it was withdrawn"
                    ));
                }
                // Claimed: its record is being written.
                Err(_) => {}
            }
        }
        unknown(&format!("the disk did not say within {} s how that went", 2 * deadline.as_secs()))
    }

    /// True when the order can no longer be carried out.
    fn withdraw(&self) -> bool {
        !self.settled.swap(true, SeqCst)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.withdraw();
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// Where orders go, by migration: those that may be decided by one.
    orders: BTreeMap<Uuid, mpsc::Sender<Order>>,
    /// What is open about migrations, in words.
    questions: BTreeMap<Uuid, String>,
    /// Migrations whose source hears that the guest is here, though they have not ended.
    runs: BTreeSet<Uuid>,
}

/// All that operators may decide on this host; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decisions(Arc<Mutex<Inner>>);

/// Orders about one migration. Dropped, there is nothing to decide about it any more.
#[derive(Debug)]
pub(crate) struct Orders {
    all: Decisions,
    migration: Uuid,
    receiver: mpsc::Receiver<Order>,
}

impl Decisions {
    /// Opens `migration` to operators' decisions.
    pub(crate) fn take_orders(&self, migration: Uuid) -> Orders {
        let (sender, receiver) = mpsc::channel(1);
        self.locked().orders.insert(migration, sender);
        Orders { all: self.clone(), migration, receiver }
    }

    /// Where an order about `migration` goes; `None` when there is nothing to decide.
    pub(crate) fn orders(&self, migration: Uuid) -> Option<mpsc::Sender<Order>> {
        self.locked().orders.get(&migration).cloned()
    }

    /// Something is open about `migration`: what, and what is done about it.
    pub(crate) fn open_question(&self, migration: Uuid, words: String) {
        self.locked().questions.insert(migration, words);
    }

    /// Nothing is open about it any more.
    pub(crate) fn answered(&self, migration: Uuid) {
        self.locked().questions.remove(&migration);
    }

    /// What is open about `migration`.
    pub(crate) fn question(&self, migration: Uuid) -> Option<String> {
        self.locked().questions.get(&migration).cloned()
    }

    /// Whether the source of `migration` hears that the guest is here.
    pub(crate) fn says_runs(&self, migration: Uuid) -> bool {
        self.locked().runs.contains(&migration)
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Orders {
    /// The source hears from now on that the guest is here.
    pub(crate) fn answer_runs(&self) {
        self.all.locked().runs.insert(self.migration);
    }

    /// The next order. Cancelling loses nothing.
    pub(crate) async fn recv(&mut self) -> Option<Order> {
        self.receiver.recv().await
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        let mut inner = self.all.locked();
        inner.orders.remove(&self.migration);
        inner.questions.remove(&self.migration);
        inner.runs.remove(&self.migration);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn an_order_that_nobody_took_in_time_is_void() {
        let (order, asker) = Order::new(Side::Here, Some(0));
        let Decision::Refused(why) = asker.wait(SOON).await else { panic!("not refused") };
        assert!(why.contains("withdrawn"), "{why}");
        assert!(order.claim().is_none(), "it was carried out after all");
    }

    #[tokio::test]
    async fn an_order_whose_asker_is_gone_is_void() {
        let (order, asker) = Order::new(Side::There, None);
        drop(asker);
        assert!(order.claim().is_none());
    }

    #[tokio::test]
    async fn what_was_claimed_and_not_answered_is_unknown() {
        let (order, asker) = Order::new(Side::Here, None);
        let claimed = order.claim().unwrap();
        let Decision::Unknown(why) = asker.wait(SOON).await else { panic!("it was said to be known") };
        assert!(why.contains("within"), "{why}");
        claimed.answer(Decision::Taken);
        let (order, asker) = Order::new(Side::Here, None);
        drop(order.claim().unwrap());
        assert!(matches!(asker.wait(SOON).await, Decision::Unknown(_)), "its task ended");
    }

    #[tokio::test]
    async fn an_answer_is_passed_on_and_a_lost_order_is_refused() {
        let (order, asker) = Order::new(Side::Here, None);
        order.claim().unwrap().answer(Decision::Taken);
        assert_eq!(asker.wait(SOON).await, Decision::Taken);
        let (order, asker) = Order::new(Side::Here, None);
        drop(order);
        assert!(matches!(asker.wait(SOON).await, Decision::Refused(_)));
    }
}
