//! Forwarded sockets, and what peers may be connected to.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{LocalSocket, Rate, ShareRequest, SocketMode, TargetName, VERSION, Weight};
use crate::forward::{ForwardingStatus, ShareChange, Spec, TargetStatus, Totals};

/// Forwarded sockets, and what peers may be connected to: `GET /v1/forwards`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Forwards {
    /// Those of the configuration first.
    pub forwards: Vec<Forward>,
    /// What peers may be connected to on this host: those of the configuration first.
    pub targets: Vec<Target>,
}

/// A socket of this host, and where its connections go: `POST /v1/forwards`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardRequest {
    /// A unix socket's absolute path, or a loopback address with its port.
    pub listen: LocalSocket,
    /// The peer, by its name in the configuration.
    pub to: String,
    /// Its name at the peer.
    pub target: TargetName,
    /// Its part of what is sent to the peer.
    #[serde(default)]
    pub weight: Weight,
    /// None for no limit.
    #[serde(default)]
    pub limit_bytes_per_s: Option<Rate>,
    /// Goes before all that is not, within a bounded share.
    #[serde(default)]
    pub urgent: bool,
    /// Of a unix socket: a name or a number; the agent's if left out.
    #[serde(default)]
    pub owner: Option<String>,
    /// The same for its group.
    #[serde(default)]
    pub group: Option<String>,
    /// Of a unix socket, in octal.
    #[serde(default)]
    pub mode: SocketMode,
}

/// A forwarding.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Forward {
    pub id: Uuid,
    /// Its name in the configuration; none of one that was added.
    pub name: Option<String>,
    #[serde(flatten)]
    pub spec: ForwardRequest,
    /// It accepts connections.
    pub listening: bool,
    /// A unix socket's file is the one that the agent made. If not, programs connect to somebody else.
    pub intact: bool,
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// What peers may be connected to.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Target {
    /// `[target.NAME]`, in which a `*` may be.
    pub name: String,
    /// Its socket, with `{}` where the name has a `*`.
    pub connect: String,
    /// Peers in the configuration; of a granted one the peer's identity.
    pub from: Vec<String>,
    /// For how long a granted one may still be used; none of one in the configuration.
    pub granted_for_s: Option<u64>,
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// What has become of its connections.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Traffic {
    /// Open now.
    pub connections: u64,
    /// Carried since the beginning.
    pub opened: u64,
    /// By programs of this host, to the peer.
    pub sent_bytes: u64,
    /// By the peer, to programs of this host.
    pub received_bytes: u64,
    /// Times that what was to be sent waited for the other side to take more.
    pub stalls: u64,
    /// Those that came to nothing, by reason.
    pub failed: BTreeMap<String, u64>,
}

impl Traffic {
    fn new(open: usize, totals: Totals) -> Self {
        let Totals { opened, sent_bytes, received_bytes, stalls, failed } = totals;
        Self { connections: open as u64, opened, sent_bytes, received_bytes, stalls, failed }
    }
}

impl From<ForwardRequest> for Spec {
    fn from(request: ForwardRequest) -> Self {
        let ForwardRequest { listen, to, target, weight, limit_bytes_per_s, urgent, owner, group, mode } =
            request;
        Self { listen, to, target, weight, limit_bytes_per_s, urgent, owner, group, mode }
    }
}

impl From<Spec> for ForwardRequest {
    fn from(spec: Spec) -> Self {
        let Spec { listen, to, target, weight, limit_bytes_per_s, urgent, owner, group, mode } = spec;
        Self { listen, to, target, weight, limit_bytes_per_s, urgent, owner, group, mode }
    }
}

impl From<ForwardingStatus> for Forward {
    fn from(status: ForwardingStatus) -> Self {
        let ForwardingStatus { id, name, spec, is_listening, is_intact, open, totals } = status;
        let traffic = Traffic::new(open, totals);
        Self { id, name, spec: spec.into(), listening: is_listening, intact: is_intact, traffic }
    }
}

impl From<TargetStatus> for Target {
    fn from(status: TargetStatus) -> Self {
        let TargetStatus { name, connect, from, granted_for_s, open, totals } = status;
        Self { name, connect, from, granted_for_s, traffic: Traffic::new(open, totals) }
    }
}

impl From<ShareRequest> for ShareChange {
    fn from(request: ShareRequest) -> Self {
        let ShareRequest { limit_bytes_per_s, weight } = request;
        Self { limit_bytes_per_s, weight }
    }
}

/// The path of one forwarding.
pub fn forward_path(id: Uuid) -> String {
    format!("{VERSION}/forwards/{id}")
}
