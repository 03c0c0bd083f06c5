//! Dials that are under way: one at a time to each peer, so that two migrations which begin together
//! share a session; none waits for a dial to another peer. Who has waited for a dial that failed
//! shares its failure, and does not dial in turn. Knows no socket.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use super::connect_error::ConnectError;
use super::identity::Identity;

/// How the dials to one peer have ended.
#[derive(Debug, Default)]
struct Ended {
    dials: u64,
    /// Of the last one; none when it has succeeded.
    failure: Option<Arc<ConnectError>>,
}

#[derive(Debug, Default)]
struct Slot {
    under_way: Arc<tokio::sync::Mutex<()>>,
    ended: Mutex<Ended>,
}

impl Slot {
    fn ended(&self) -> std::sync::MutexGuard<'_, Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The dials to all peers. Identities come from the configuration, which bounds their number.
#[derive(Debug, Default)]
pub(super) struct SingleFlight(Mutex<BTreeMap<Identity, Arc<Slot>>>);

/// The right to dial a peer, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    slot: Arc<Slot>,
    _alone: OwnedMutexGuard<()>,
}

impl SingleFlight {
    /// Waits until nobody else dials `peer`.
    /// Errors: that of a dial which ended meanwhile.
    pub(super) async fn turn(&self, peer: &Identity) -> Result<Turn, ConnectError> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(peer.clone()).or_default())
        };
        let dials = slot.ended().dials;
        let alone = Arc::clone(&slot.under_way).lock_owned().await;
        let failure = {
            let ended = slot.ended();
            ended.failure.clone().filter(|_| ended.dials != dials)
        };
        match failure {
            Some(failure) => Err(ConnectError::Shared(failure)),
            None => Ok(Turn { slot, _alone: alone }),
        }
    }
}

impl Turn {
    /// Tells those who wait how the dial has ended.
    pub(super) fn end<T>(self, dialed: Result<T, ConnectError>) -> Result<T, ConnectError> {
        let mut ended = self.slot.ended();
        ended.dials += 1;
        match dialed {
            Ok(done) => {
                ended.failure = None;
                Ok(done)
            }
            Err(e) => {
                let failure = Arc::new(e);
                ended.failure = Some(Arc::clone(&failure));
                Err(ConnectError::Shared(failure))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn peers_do_not_wait_for_each_other_and_who_waited_shares_a_failure() {
        let dials = Arc::new(SingleFlight::default());
        let (bravo, charlie): (Identity, Identity) = ("bravo".parse().unwrap(), "charlie".parse().unwrap());
        let first = dials.turn(&bravo).await.unwrap();
        // Would wait for ever if turns were shared.
        let other = dials.turn(&charlie).await.unwrap();
        let waiting = tokio::spawn({
            let (dials, bravo) = (Arc::clone(&dials), bravo.clone());
            async move { dials.turn(&bravo).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let own = first.end(Err::<(), _>(ConnectError::Gone)).unwrap_err();
        let shared = waiting.await.unwrap().unwrap_err();
        for e in [own, shared] {
            assert!(matches!(&e, ConnectError::Shared(e) if matches!(**e, ConnectError::Gone)), "{e}");
            assert_eq!(e.label(), "gone");
        }
        // Who comes later dials anew.
        dials.turn(&bravo).await.unwrap().end(Ok(())).unwrap();
        drop(other);
    }
}
