//! What may be sent in a second, and changes of it.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use super::{Rate, Weight};

/// What may be sent in a second: `GET /v1/limits`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Of each configured peer.
    pub peers: Vec<PeerLimit>,
    /// Of each migration under way of which this host is the source.
    pub migrations: Vec<MigrationLimit>,
}

/// What this host may send to a peer, over all migrations.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PeerLimit {
    /// Its name in the configuration.
    pub peer: String,
    /// None for no limit.
    pub limit_bytes_per_s: Option<Rate>,
}

/// What a migration may send.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
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

/// What may be sent to a peer in a second: `POST /v1/peers/{name}/limit`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerLimitRequest {
    /// None for no limit.
    pub limit_bytes_per_s: Option<Rate>,
}

/// What a migration or a forwarding may send: `POST /v1/migrations/{id}/limit`, `POST /v1/forwards/{id}/limit`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShareRequest {
    /// Null for no limit; left out, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "said")]
    #[schemars(with = "Option<Rate>")]
    pub limit_bytes_per_s: Option<Option<Rate>>,
    /// Left out, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Weight>,
}

/// A field that is there says something, also when it is null.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}
