//! The local API's vocabulary: paths and bodies of HTTP+JSON on the agent's unix socket.
//!
//! Both the agent and the command line use it, and nothing else of each other. Everything is
//! under [`VERSION`]; fields may be added, never renamed.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::migrate::Options;
use crate::migrate::handover::Side;
use crate::migrate::problem::{Accepted, Problem};
use crate::migrate::progress::Reconnecting;
use crate::migrate::recover::Case;
use crate::migrate::share::Weight;
use crate::migrate::vm_state::VmState;
use crate::rate::Rate;

/// The version that all paths begin with.
pub const VERSION: &str = "/v1";

/// `GET /v1/status`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Of the agent.
    pub version: String,
    /// Of this host.
    pub identity: String,
    /// When its certificate expires, in seconds since the epoch.
    pub certificate_not_after: i64,
    /// Live sessions with peers.
    pub sessions: Vec<SessionStatus>,
    /// Migrations that are not at their end.
    pub migrations_active: usize,
    /// Names of configured VMs.
    pub vms: Vec<String>,
    /// What the QEMU of each of them has of its guest on this host. The other hosts are not asked.
    #[serde(default)]
    pub vm_states: Vec<VmState>,
    /// Names of configured peers.
    pub peers: Vec<String>,
}

/// One session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The peer, as its certificate names it.
    pub peer: String,
    /// Its address.
    pub address: String,
    /// Whether this host dialed.
    pub dialed: bool,
    /// Cipher suite and key exchange.
    pub cipher: String,
    /// Seconds since it began.
    pub age_s: u64,
    /// Streams open now.
    pub streams: u64,
    /// Bytes of streams sent.
    pub sent_bytes: u64,
    /// Bytes of streams received.
    pub received_bytes: u64,
    /// Set while the session has no connection.
    #[serde(default)]
    pub reconnecting: Option<Reconnecting>,
}

/// `POST /v1/migrations`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The virtual machine.
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    /// How.
    #[serde(default)]
    pub options: Options,
}

/// `POST /v1/check`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// The virtual machine.
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    /// Warnings are problems.
    #[serde(default)]
    pub strict: bool,
    /// Kinds of problems that are only warnings.
    #[serde(default)]
    pub accept: BTreeSet<Accepted>,
}

/// The answer to [`CheckRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckReport {
    /// What was found; the migration is refused if the severity of one of them is `problem`.
    pub problems: Vec<Problem>,
}

/// `GET /v1/recover`, which only looks, and `POST /v1/recover`, which cleans up what it can.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recovery {
    /// What is not closed on this host; mostly nothing.
    pub cases: Vec<Case>,
}

/// What `/v1/recover` is asked with, behind a `?`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverQuery {
    /// Only this migration, or the try of one.
    #[serde(default)]
    pub id: Option<Uuid>,
    /// False: the other agents are not asked.
    #[serde(default)]
    pub peers: Option<bool>,
}

/// `POST /v1/recover/{id}`: an operator decides whose a virtual machine is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForceRequest {
    /// Seen from this host.
    pub force: Side,
    /// Seconds since the epoch. The decision is void when the agent gets to it later than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

/// `GET /v1/limits`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Of each configured peer.
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
    /// The migration.
    pub id: Uuid,
    /// The virtual machine.
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
    /// Null for no limit.
    pub limit_bytes_per_s: Option<Rate>,
}

/// `POST /v1/migrations/{id}/limit`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareRequest {
    /// Null for no limit; left out, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "said")]
    pub limit_bytes_per_s: Option<Option<Rate>>,
    /// Left out, it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Weight>,
}

/// A field that is there says something, also when it is null.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// Any answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
}

/// The path of one migration.
#[must_use]
pub fn migration_path(id: Uuid) -> String {
    format!("{VERSION}/migrations/{id}")
}

/// What is to be done when nobody knows whether an operator's decision was taken.
#[must_use]
pub fn unknown_remedy(id: Uuid) -> String {
    format!("ask again with `vmferry recover {id} --look`; do not decide the other way before you know")
}
