//! What may be sent in a second, and changes of it.

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use super::{Rate, Weight};

/// `GET /v1/limits`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub peers: Vec<PeerLimit>,
    /// Of each migration under way of which this host is the source.
    pub migrations: Vec<MigrationLimit>,
}

/// What this host may send to a peer, over all migrations.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerLimit {
    /// Its name in the configuration.
    pub peer: String,
    /// None for no limit.
    pub limit_bytes_per_s: Option<Rate>,
}

/// What a migration may send.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationLimit {
    pub id: Uuid,
    pub vm: String,
    /// The destination, as its certificate names it.
    pub peer: String,
    /// None for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    /// Its part among the migrations to that host.
    pub weight: Weight,
    /// What it sends and receives now.
    pub rate_bytes_per_s: u64,
}

/// `POST /v1/peers/{name}/limit`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerLimitRequest {
    pub limit_bytes_per_s: Option<Rate>,
}

/// `POST /v1/migrations/{id}/limit`, `POST /v1/forwards/{id}/limit`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareRequest {
    /// Null for no limit; left out, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "said")]
    pub limit_bytes_per_s: Option<Option<Rate>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Weight>,
}

/// A field that is there says something, also when it is null.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}
