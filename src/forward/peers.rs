//! The peers that connections are carried to and from: their sessions, and how much of a session forwarded
//! connections may use, so that migrations always have room.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::limits::{OPENS_APART, OPENS_AT_ONCE, PEER_CONNECTIONS_MAX, UNANSWERED_MAX};
use crate::config::PeerConfig;
use crate::net::connect_error::ConnectError;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::session::Session;

/// When the next connection may be begun.
#[derive(Debug, Default)]
struct Pace {
    /// When all that were begun would be over, had each waited for the one before.
    until: Option<Instant>,
}

impl Pace {
    /// Begins one: how long it has to wait.
    fn take(&mut self, now: Instant) -> Duration {
        let until = self.until.map_or(now, |until| until.max(now));
        self.until = Some(until + OPENS_APART);
        until.saturating_duration_since(now).saturating_sub(OPENS_APART * (OPENS_AT_ONCE - 1))
    }
}

/// What forwarded connections may use of the sessions with one peer.
#[derive(Debug)]
pub(super) struct Bounds {
    /// Connections to it.
    pub(super) outgoing: Arc<Semaphore>,
    /// Connections from it.
    pub(super) incoming: Arc<Semaphore>,
    /// Connections to it that it has not answered.
    pub(super) unanswered: Arc<Semaphore>,
    pace: Mutex<Pace>,
}

impl Default for Bounds {
    fn default() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self {
            outgoing: places(PEER_CONNECTIONS_MAX),
            incoming: places(PEER_CONNECTIONS_MAX),
            unanswered: places(UNANSWERED_MAX),
            pace: Mutex::default(),
        }
    }
}

impl Bounds {
    /// Waits until a further connection may be begun.
    pub(super) async fn pace(&self) {
        let wait = self.pace.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

/// All peers, by their names in the configuration.
#[derive(Debug)]
pub(super) struct Peers {
    configured: BTreeMap<String, PeerConfig>,
    pool: Arc<Pool>,
    bounds: Mutex<BTreeMap<Identity, Arc<Bounds>>>,
}

impl Peers {
    pub(super) fn new(configured: BTreeMap<String, PeerConfig>, pool: Arc<Pool>) -> Self {
        Self { configured, pool, bounds: Mutex::default() }
    }

    pub(super) fn find(&self, name: &str) -> Option<&PeerConfig> {
        self.configured.get(name)
    }

    /// What the configuration calls a peer.
    pub(super) fn name_of(&self, identity: &Identity) -> Option<&str> {
        self.configured.iter().find(|(_, peer)| peer.identity == *identity).map(|(name, _)| name.as_str())
    }

    /// What may be used of the sessions with a configured peer.
    pub(super) fn bounds(&self, identity: &Identity) -> Arc<Bounds> {
        let mut all = self.bounds.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(identity.clone()).or_default())
    }

    /// A session with that peer, in the next of its lanes.
    pub(super) async fn lane(&self, peer: &PeerConfig) -> Result<Session, ConnectError> {
        let address = peer.address.as_deref();
        let first = self.pool.session(&peer.identity, address).await?;
        Ok(self.pool.lane(&first, address).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_begun_at_once_and_the_others_one_after_the_other() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        for n in 0..OPENS_AT_ONCE {
            assert_eq!(pace.take(now), Duration::ZERO, "{n}");
        }
        assert_eq!(pace.take(now), OPENS_APART);
        assert_eq!(pace.take(now), OPENS_APART * 2);
        assert_eq!(pace.take(now + OPENS_APART * 3), Duration::ZERO);
        let later = now + OPENS_APART * 1000;
        assert_eq!(pace.take(later), Duration::ZERO, "what was not used is not saved up beyond that");
        for _ in 1..OPENS_AT_ONCE {
            pace.take(later);
        }
        assert_eq!(pace.take(later), OPENS_APART);
    }
}
