//! The agent as a whole, and which VMs run on its host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reconnecting, VmState};

/// The agent: `GET /v1/status`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Of the agent.
    pub version: String,
    /// Of this host, as its certificate names it.
    pub identity: String,
    /// When its certificate expires, in seconds since the epoch.
    pub certificate_not_after: i64,
    /// Live sessions with peers.
    pub sessions: Vec<SessionStatus>,
    /// Migrations that are not at their end.
    pub migrations_active: usize,
    /// The same of libvirt's own, in both roles.
    #[serde(default)]
    pub libvirt_migrations_active: usize,
    /// Names of configured VMs.
    pub vms: Vec<String>,
    /// What the QEMU of each of them has of its guest on this host. The other hosts are not asked.
    #[serde(default)]
    pub vm_states: Vec<VmState>,
    /// Names of configured peers.
    pub peers: Vec<String>,
    /// None from an agent that keeps none.
    #[serde(default)]
    pub audit: Option<AuditStatus>,
    /// None from an agent that has none.
    #[serde(default)]
    pub sandbox: Option<SandboxStatus>,
}

/// What this host knows by a name, without a question to anybody: `GET /v1/names`, for completions.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct Names {
    /// `[vm.NAME]` in the configuration.
    pub vms: Vec<String>,
    /// `[peer.NAME]` in the configuration.
    pub peers: Vec<String>,
}

/// What the agent has taken from itself, in words: `on: …` or `off: …`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Sandbox")]
pub struct SandboxStatus {
    /// And what it may still do, or why.
    pub landlock: String,
    /// And what is refused, or why.
    pub seccomp: String,
}

/// The audit record.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Audit")]
pub struct AuditStatus {
    /// Where it is.
    pub folder: String,
    /// The last line's number and hash: an anchor for `vmferry audit verify`.
    pub head: String,
    /// Events that were never written.
    pub lost: u64,
    /// Why it takes no lines now.
    pub failing: Option<String>,
}

/// What two agents share.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Session")]
pub struct SessionStatus {
    /// The peer, as its certificate names it.
    pub peer: String,
    /// The peer's, with its port.
    pub address: String,
    /// Whether this host dialed.
    pub dialed: bool,
    /// Cipher suite and key exchange.
    pub cipher: String,
    /// Seconds since it began.
    pub age_s: u64,
    /// Open now.
    pub streams: u64,
    /// Of streams, as is what was received.
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Set while the session has no connection.
    #[serde(default)]
    pub reconnecting: Option<Reconnecting>,
}
