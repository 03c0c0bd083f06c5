//! Grants: what this host has agreed to take from a peer, one for each migration that comes here, and how the
//! destination is reached that serves it.
//!
//! A grant is bound to this host (it is kept here and nowhere else), to the peer that asked for it, to the VM and
//! its disks (which the destination has), and to a deadline. Each data stream names its migration, and is let in
//! under that migration's grant or not at all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use uuid::Uuid;

use crate::migrate::protocol::message::Request;
use crate::migrate::protocol::server::Control;
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;
use crate::peer_refusals::Reason;

/// How a destination that is under way is reached.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    pub(crate) peer: Identity,
    /// From then on no stream is let in under the grant.
    pub(crate) until: Instant,
    pub(crate) streams: mpsc::Sender<IncomingStream>,
    pub(crate) control: mpsc::Sender<(Control, Request)>,
}

/// All of them; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Destinations {
    all: Arc<Mutex<BTreeMap<Uuid, Incoming>>>,
    places: Arc<Mutex<BTreeMap<Identity, Arc<Semaphore>>>>,
}

/// A destination that can be reached by its migration; dropped, it cannot.
#[derive(Debug)]
pub(crate) struct Registration {
    all: Destinations,
    migration: Uuid,
}

impl Destinations {
    pub(crate) fn register(&self, migration: Uuid, incoming: Incoming) -> Registration {
        self.locked().insert(migration, incoming);
        Registration { all: self.clone(), migration }
    }

    /// The destination of a migration that `peer` sends.
    pub(crate) fn of(&self, migration: Uuid, peer: &Identity) -> Option<Incoming> {
        self.locked().get(&migration).filter(|incoming| incoming.peer == *peer).cloned()
    }

    /// Where a data stream of `peer` goes to, by its migration's grant.
    /// Errors: why it goes nowhere.
    pub(crate) fn stream_of(&self, migration: Uuid, peer: &Identity) -> Result<Incoming, Reason> {
        match self.locked().get(&migration) {
            None => Err(Reason::NoGrant),
            Some(incoming) if incoming.peer != *peer => Err(Reason::AnothersGrant),
            Some(incoming) if Instant::now() >= incoming.until => Err(Reason::GrantOver),
            Some(incoming) => Ok(incoming.clone()),
        }
    }

    /// A place for one more VM of `peer`, of which `at_once` may be on their way; held until it is dropped.
    pub(crate) fn place(&self, peer: &Identity, at_once: usize) -> Option<OwnedSemaphorePermit> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let of_peer = places.entry(peer.clone()).or_insert_with(|| Arc::new(Semaphore::new(at_once)));
        Arc::clone(of_peer).try_acquire_owned().ok()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Uuid, Incoming>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.all.locked().remove(&self.migration);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_stream_has_its_own_migrations_grant_in_time_or_none() {
        let all = Destinations::default();
        let [bravo, charlie]: [Identity; 2] = ["bravo", "charlie"].map(|name| name.parse().unwrap());
        let (streams, _offered) = mpsc::channel(1);
        let (control, _controls) = mpsc::channel(1);
        let grant = |until| Incoming {
            peer: bravo.clone(),
            until,
            streams: streams.clone(),
            control: control.clone(),
        };
        let (now, [living, over, none]) = (Instant::now(), [1, 2, 3].map(Uuid::from_u128));
        let granted = all.register(living, grant(now + Duration::from_secs(600)));
        let _over = all.register(over, grant(now));
        let of = |migration, peer: &Identity| all.stream_of(migration, peer).map(drop);
        assert_eq!(of(living, &bravo), Ok(()));
        assert_eq!(of(living, &charlie), Err(Reason::AnothersGrant));
        assert_eq!(of(over, &bravo), Err(Reason::GrantOver));
        assert_eq!(of(over, &charlie), Err(Reason::AnothersGrant));
        assert_eq!(of(none, &bravo), Err(Reason::NoGrant));
        drop(granted);
        assert_eq!(of(living, &bravo), Err(Reason::NoGrant), "the migration has ended");
    }

    #[test]
    fn each_peer_has_its_number_of_places() {
        let all = Destinations::default();
        let [bravo, charlie]: [Identity; 2] = ["bravo", "charlie"].map(|name| name.parse().unwrap());
        let held = [all.place(&bravo, 2).unwrap(), all.place(&bravo, 2).unwrap()];
        assert!(all.place(&bravo, 2).is_none() && all.place(&charlie, 1).is_some());
        drop(held);
        assert!(all.place(&bravo, 2).is_some());
    }
}
