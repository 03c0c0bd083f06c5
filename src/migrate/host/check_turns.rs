//! Whose turn it is to have a virtual machine checked for a peer: one check at a time for each, and a pause after
//! it that is as long, so that others get at the machine however often one peer asks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};

use crate::net::identity::Identity;

/// How long a check waits for others of the same peer and machine.
const TURN_DEADLINE: Duration = Duration::from_secs(20);
/// Longest pause after one.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// QEMUs that are started for the checks of one peer at once, of whatever virtual machines.
const STARTS_AT_ONCE: usize = 2;
/// How long a check waits for a start: each takes as long as QEMU does.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A peer and a machine.
type Both = (Identity, String);
type Turns = BTreeMap<Both, Arc<tokio::sync::Mutex<()>>>;

/// The turns of all peers and of the virtual machines that they may send, for as long as somebody has one or waits:
/// a pattern in the configuration stands for machines of any number.
#[derive(Debug, Clone, Default)]
pub(crate) struct CheckTurns {
    turns: Arc<Mutex<Turns>>,
    /// Of the configuration's peers.
    starts: Arc<Mutex<BTreeMap<Identity, Arc<Semaphore>>>>,
}

/// A turn, until its pause is over.
#[derive(Debug)]
pub(crate) struct Turn {
    held: Option<OwnedMutexGuard<()>>,
    since: Instant,
    of: Both,
    all: CheckTurns,
}

impl CheckTurns {
    /// Waits for a turn; none when that takes too long. `vm` is one of the configuration.
    pub(crate) async fn turn(&self, peer: &Identity, vm: &str) -> Option<Turn> {
        self.turn_within(TURN_DEADLINE, peer, vm).await
    }

    async fn turn_within(&self, deadline: Duration, peer: &Identity, vm: &str) -> Option<Turn> {
        let of = (peer.clone(), vm.to_owned());
        let of_both = Arc::clone(self.locked().entry(of.clone()).or_default());
        let held = timeout(deadline, of_both.lock_owned()).await.ok();
        let turn = Turn { held, since: Instant::now(), of, all: self.clone() };
        turn.held.is_some().then_some(turn)
    }

    /// Waits until a QEMU may be started for a check of this peer, which is one of the configuration; none when that
    /// takes too long.
    pub(crate) async fn start(&self, peer: &Identity) -> Option<OwnedSemaphorePermit> {
        self.start_within(START_DEADLINE, peer).await
    }

    async fn start_within(&self, deadline: Duration, peer: &Identity) -> Option<OwnedSemaphorePermit> {
        let of_peer = {
            let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(Semaphore::new(STARTS_AT_ONCE));
            Arc::clone(starts.entry(peer.clone()).or_insert_with(new))
        };
        timeout(deadline, of_peer.acquire_owned()).await.ok()?.ok()
    }

    fn locked(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        let mut all = self.all.locked();
        // Others get hold of it with this lock only.
        if all.get(&self.of).is_some_and(|of_both| Arc::strong_count(of_both) == 1) {
            all.remove(&self.of);
        }
    }
}

impl Turn {
    /// Waits for as long as the turn has taken.
    pub(crate) async fn pause(&self) {
        sleep(self.since.elapsed().min(PAUSE_MAX)).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_checks_in_a_loop_leaves_half_of_the_time_to_others() {
        let (turns, peer) = (CheckTurns::default(), "bravo".parse().unwrap());
        let (begin, mut busy) = (Instant::now(), Duration::ZERO);
        for _ in 0..5 {
            let turn = turns.turn(&peer, "web1").await.unwrap();
            sleep(Duration::from_millis(20)).await;
            busy += turn.since.elapsed();
            // The peer itself does not get at it in the pause.
            let again = turns.turn_within(Duration::from_millis(10), &peer, "web1");
            let (again, ()) = tokio::join!(again, turn.pause());
            assert!(again.is_none());
        }
        assert!(busy * 2 <= begin.elapsed(), "{busy:?} of {:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn each_machine_has_turns_of_its_own() {
        let (turns, peer) = (CheckTurns::default(), "bravo".parse().unwrap());
        let held = turns.turn(&peer, "web1").await;
        assert!(held.is_some() && turns.turn(&peer, "web2").await.is_some());
        assert!(turns.turn_within(Duration::ZERO, &peer, "web1").await.is_none());
        drop(held);
        assert!(turns.turn_within(Duration::ZERO, &peer, "web1").await.is_some());
    }

    #[tokio::test]
    async fn few_are_started_at_once_for_one_peer() {
        let (turns, peer) = (CheckTurns::default(), "bravo".parse().unwrap());
        let soon = Duration::from_millis(10);
        let (first, second) = (turns.start_within(soon, &peer).await, turns.start_within(soon, &peer).await);
        assert!(first.is_some() && second.is_some());
        assert!(turns.start_within(soon, &peer).await.is_none());
        assert!(
            turns.start_within(soon, &"charlie".parse().unwrap()).await.is_some(),
            "another's are its own"
        );
        drop(first);
        assert!(turns.start_within(soon, &peer).await.is_some());
    }

    /// A pattern stands for machines of any number: a peer that may send them all cannot make the agent grow.
    #[tokio::test]
    async fn nothing_is_kept_of_turns_that_are_over() {
        let (turns, peer) = (CheckTurns::default(), "bravo".parse().unwrap());
        for n in 0..100 {
            let held = turns.turn(&peer, &format!("web{n}")).await;
            let waits = turns.turn_within(Duration::from_millis(1), &peer, &format!("web{n}")).await;
            assert!(held.is_some() && waits.is_none() && turns.locked().len() == 1, "{n}");
        }
        assert!(turns.locked().is_empty());
    }
}
