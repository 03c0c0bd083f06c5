//! What is not closed on this host, and an operator's decision about it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Case, Side};

/// What is not closed on this host: `GET /v1/recover`, which only looks, and `POST /v1/recover`, which cleans up what it
/// can.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Recovery {
    /// What is not closed on this host; mostly nothing.
    pub cases: Vec<Case>,
}

/// What `/v1/recover` is asked with, behind a `?`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverQuery {
    /// Only this migration, or the try of one.
    #[serde(default)]
    pub id: Option<Uuid>,
    /// False: the other agents are not asked.
    #[serde(default)]
    pub peers: Option<bool>,
}

/// An operator decides whose a virtual machine is: `POST /v1/recover/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForceRequest {
    /// Seen from this host.
    pub force: Side,
    /// Seconds since the epoch. The decision is void when the agent gets to it later than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}
