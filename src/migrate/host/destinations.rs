//! How destinations that are under way are reached, by their migrations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::migrate::protocol::message::Request;
use crate::migrate::protocol::server::Control;
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;

/// How a destination that is under way is reached.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    pub(crate) peer: Identity,
    pub(crate) streams: mpsc::Sender<IncomingStream>,
    pub(crate) control: mpsc::Sender<(Control, Request)>,
}

/// All of them; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Destinations(Arc<Mutex<BTreeMap<Uuid, Incoming>>>);

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

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Uuid, Incoming>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.all.locked().remove(&self.migration);
    }
}
