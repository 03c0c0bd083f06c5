//! Limits and shares as operators set them: which there are, and what each change reaches.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use super::registry::{Entry, Registry};
use crate::api::{Limits, MigrationLimit, PeerLimit, ShareRequest};
use crate::migrate::Host;
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
    NotSource,
    Ended,
}

/// Peers' limits that operators have set since the agent was started; the configuration has the rest.
#[derive(Debug, Default)]
pub(super) struct PeerLimits(Mutex<LimitsSet>);

impl PeerLimits {
    /// Limits what is sent to a peer, over all migrations.
    pub(super) fn limit(&self, host: &Host, name: &str, limit: Option<Rate>) -> Result<PeerLimit, Problem> {
        let identity = &host.peers.find(name)?.identity;
        host.pool.set_limit(identity, limit);
        self.locked().insert(name.into(), limit);
        Ok(PeerLimit { peer: name.into(), limit_bytes_per_s: limit })
    }

    /// All that were set.
    pub(super) fn set(&self) -> LimitsSet {
        self.locked().clone()
    }

    /// What operators have set while the process before ran counts more than the configuration.
    pub(super) fn restore(&self, host: &Host, limits: LimitsSet) {
        for (name, limit) in limits {
            if self.limit(host, &name, limit).is_err() {
                tracing::info!(peer = name, "no peer of this name any more: its limit is forgotten");
            }
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, LimitsSet> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All limits that there are.
pub(super) fn all(host: &Host, registry: &Registry) -> Limits {
    let peers = host.config.peers.iter().map(|(name, peer)| PeerLimit {
        peer: name.clone(),
        limit_bytes_per_s: host.pool.limit(&peer.identity),
    });
    let migrations = registry.all().into_iter().filter(|p| p.outcome.is_none());
    Limits { peers: peers.collect(), migrations: migrations.filter_map(migration_limit).collect() }
}

/// Changes what a migration may send.
pub(super) fn share(registry: &Registry, id: Uuid, request: ShareRequest) -> Result<MigrationLimit, NoShare> {
    let Entry { progress, share, .. } = registry.get(id).ok_or(NoShare::Unknown)?;
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
