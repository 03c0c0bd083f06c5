//! Limits and shares as operators set them: which there are, and what each change reaches.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use uuid::Uuid;

use super::Agent;
use super::registry::Entry;
use crate::api::{Limits, MigrationLimit, PeerLimit, ShareRequest};
use crate::migrate::journal::Role;
use crate::migrate::problem::Problem;
use crate::migrate::progress::Progress;
use crate::rate::Rate;

/// Limits by the names of peers in the configuration.
pub(super) type LimitsSet = BTreeMap<String, Option<Rate>>;

/// Why a migration's share cannot be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoShare {
    /// There is none with that id.
    Unknown,
    /// The other host sends.
    NotSource,
    /// It has ended.
    Ended,
}

impl Agent {
    /// All that there are.
    pub(super) fn limits(&self) -> Limits {
        let peers = self.host.config.peers.iter().map(|(name, peer)| PeerLimit {
            peer: name.clone(),
            limit_bytes_per_s: self.host.pool.limit(&peer.identity),
        });
        let migrations = self.registry.all().into_iter().filter(|p| p.outcome.is_none());
        Limits { peers: peers.collect(), migrations: migrations.filter_map(migration_limit).collect() }
    }

    /// Limits what is sent to a peer, over all migrations.
    pub(super) fn limit_peer(&self, name: &str, limit: Option<Rate>) -> Result<PeerLimit, Problem> {
        let (_, identity) = self.host.peer(name)?;
        self.host.pool.set_limit(&identity, limit);
        self.locked_limits().insert(name.into(), limit);
        Ok(PeerLimit { peer: name.into(), limit_bytes_per_s: limit })
    }

    /// Peers' limits that operators have set since the agent was started.
    pub(super) fn limits_set(&self) -> LimitsSet {
        self.locked_limits().clone()
    }

    /// What operators have set while the process before ran counts more than the configuration.
    pub(super) fn set_limits_again(&self, limits: LimitsSet) {
        for (name, limit) in limits {
            if self.limit_peer(&name, limit).is_err() {
                tracing::info!(peer = name, "no peer of this name any more: its limit is forgotten");
            }
        }
    }

    fn locked_limits(&self) -> std::sync::MutexGuard<'_, LimitsSet> {
        self.limits_set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what a migration may send.
    pub(super) fn share(&self, id: Uuid, request: ShareRequest) -> Result<MigrationLimit, NoShare> {
        let Entry { progress, share, .. } = self.registry.get(id).ok_or(NoShare::Unknown)?;
        let now = progress.now();
        if now.role != Role::Source {
            return Err(NoShare::NotSource);
        }
        let share = share.filter(|_| now.outcome.is_none()).ok_or(NoShare::Ended)?;
        share.change(|wish| {
            wish.limit_bytes_per_s = request.limit_bytes_per_s.unwrap_or(wish.limit_bytes_per_s);
            wish.weight = request.weight.unwrap_or(wish.weight);
        });
        migration_limit(progress.now()).ok_or(NoShare::Ended)
    }
}

fn migration_limit(progress: Progress) -> Option<MigrationLimit> {
    let wish = progress.share?;
    Some(MigrationLimit {
        id: progress.id,
        vm: progress.vm,
        peer: progress.peer,
        limit_bytes_per_s: wish.limit_bytes_per_s,
        weight: wish.weight,
        rate_bytes_per_s: progress.rate_bytes_per_s,
    })
}
