//! Replicas of VMs' disks.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `POST /v1/replicas/end`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EndReplicaRequest {
    pub vm: String,
    /// The peer's name in the agent's configuration.
    pub to: String,
    /// The images that were made for it go as well.
    #[serde(default)]
    pub images: bool,
}

/// A replica that was ended.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ReplicaEnd {
    /// What was to go and stays, in words.
    pub left: Vec<String>,
}
