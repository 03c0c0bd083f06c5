//! How many control streams each peer may have here at once, over all its sessions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::net::identity::Identity;

/// Of a peer that may send virtual machines here: one for each that is on its way, and questions.
const STREAMS_MAX: usize = 256;
/// Of one that may send none: it has only questions.
const QUESTIONS_MAX: usize = 16;

/// The places of all peers that are in the configuration.
#[derive(Debug, Default)]
pub(crate) struct ControlStreams(Mutex<BTreeMap<Identity, Arc<Semaphore>>>);

impl ControlStreams {
    /// A place for one more, held until it is dropped. `may_send`: the peer may send virtual machines here.
    pub(crate) fn place(&self, peer: &Identity, may_send: bool) -> Option<OwnedSemaphorePermit> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let most = if may_send { STREAMS_MAX } else { QUESTIONS_MAX };
        let places = all.entry(peer.clone()).or_insert_with(|| Arc::new(Semaphore::new(most)));
        Arc::clone(places).try_acquire_owned().ok()
    }
}
