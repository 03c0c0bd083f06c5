//! The agent as a whole, and which VMs run on its host.

use serde::{Deserialize, Serialize};

use super::{Reconnecting, VmState};

/// `GET /v1/status`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub identity: String,
    /// When its certificate expires, in seconds since the epoch.
    pub certificate_not_after: i64,
    pub sessions: Vec<SessionStatus>,
    /// Migrations that are not at their end.
    pub migrations_active: usize,
    pub vms: Vec<String>,
    /// What the QEMU of each of them has of its guest on this host. The other hosts are not asked.
    #[serde(default)]
    pub vm_states: Vec<VmState>,
    pub peers: Vec<String>,
    /// None from an agent that keeps none.
    #[serde(default)]
    pub audit: Option<AuditStatus>,
    /// None from an agent that has none.
    #[serde(default)]
    pub sandbox: Option<SandboxStatus>,
}

/// `GET /v1/names`: what this host knows by a name, without a question to anybody: for completions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Names {
    pub vms: Vec<String>,
    pub peers: Vec<String>,
}

/// What the agent has taken from itself, in words: `on: …` or `off: …`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxStatus {
    pub landlock: String,
    pub seccomp: String,
}

/// The audit record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditStatus {
    pub folder: String,
    /// The last line's number and hash: an anchor for `vmferry audit verify`.
    pub head: String,
    /// Events that were never written.
    pub lost: u64,
    /// Why it takes no lines now.
    pub failing: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The peer, as its certificate names it.
    pub peer: String,
    pub address: String,
    pub dialed: bool,
    /// Cipher suite and key exchange.
    pub cipher: String,
    /// Seconds since it began.
    pub age_s: u64,
    pub streams: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Set while the session has no connection.
    #[serde(default)]
    pub reconnecting: Option<Reconnecting>,
}
