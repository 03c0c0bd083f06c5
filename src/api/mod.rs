//! The local API's vocabulary: paths and bodies of HTTP+JSON on the agent's unix socket.
//!
//! Both the agent and the command line use it, and nothing else of each other. Everything is under
//! [`VERSION`]; fields may be added, never renamed. A migration as a whole is a type of its own, apart from
//! those of journals and of the hand-off; its parts, and what only the API tells, are the model's.
//! `openapi.json` describes all of it, and tests hold every answer to it.

mod check;
mod drain;
mod forward;
mod libvirt;
mod limits;
mod migration;
mod ping;
mod plan;
mod qemu_command;
mod recovery;
mod replica;
mod status;
mod timeline;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::config::{LocalSocket, SocketMode, TargetName};
pub use crate::migrate::bandwidth::{Weight, Wish};
pub use crate::migrate::handover::Side;
pub use crate::migrate::journal::Role;
pub use crate::migrate::leftover::Leftover;
pub use crate::migrate::phase::Phase;
pub use crate::migrate::prediction::{DiskOutlook, Outlook, Prediction};
pub use crate::migrate::problem::{Accepted, Problem, ProblemKind, Severity};
pub use crate::migrate::progress::{
    Comparison, DiskProgress as Disk, Downtime, HeldUp, Outcome, RamProgress as Ram, Reconnecting, Tries,
    Whole,
};
pub use crate::migrate::recover::{Case, CaseKind, Owner};
pub use crate::migrate::replicas::{Replica, ReplicatedDisk};
pub use crate::migrate::timeline::{Entered, Sample, StreamSample, Wait, Waiting};
pub use crate::migrate::vm_state::{Here, VmState};
pub use crate::migrate::{
    DiskChoice, DiskSample, DisksAtOnce, DowntimeLimit, InBand, Incremental, Options, Retry,
};
pub use crate::rate::Rate;
pub use check::{CheckReport, CheckRequest};
pub use drain::{
    AT_ONCE_MAX, DRAIN, DrainPeer, DrainPlan, DrainRequest, DrainResult, DrainStage, DrainStatus, DrainTry,
    DrainVm, DrainVmState, PeerCheck, PlannedVm,
};
pub use forward::{Forward, ForwardRequest, Forwards, Target, Traffic, forward_path};
pub use libvirt::{
    Channel, Channels, Expected, HoldSeconds, LIBVIRT, LibvirtEnd, LibvirtLook, LibvirtMigration,
    LibvirtRequest, LibvirtRole, LibvirtStage, MovedBytes, Told, libvirt_path,
};
pub use limits::{Limits, MigrationLimit, PeerLimit, PeerLimitRequest, ShareRequest};
pub use migration::{MigrateRequest, Migration};
pub use ping::{PROBE_BYTES_MAX, Ping, PingRequest, Probe, ProbeBytes, Reached};
pub use plan::{Foretold, MigrationPlan};
pub use qemu_command::{OtherPath, QemuCommand, QemuCommandRequest};
pub use recovery::{ForceRequest, RecoverQuery, Recovery};
pub use replica::{EndReplicaRequest, ReplicaEnd};
pub use status::{AuditStatus, Names, SandboxStatus, SessionStatus, Status};
pub use timeline::Course;

/// The version that all paths begin with.
pub const VERSION: &str = "/v1";

/// All that follows, for programs.
pub const OPENAPI: &str = include_str!("openapi.json");

/// What an answer that is not 2xx is: RFC 9457.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Any answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Error")]
pub struct ErrorBody {
    /// `about:blank`: the status says what kind of problem it is.
    #[serde(default, rename = "type")]
    #[schemars(extend("const" = "about:blank"))]
    pub kind: String,
    /// The status in words.
    #[serde(default)]
    pub title: String,
    #[serde(default)]
    #[schemars(range(min = 400, max = 599))]
    pub status: u16,
    /// The same as `error`.
    #[serde(default)]
    pub detail: String,
    pub error: String,
    /// What to do about it.
    pub remedy: String,
    /// The field of the request that is wrong, as in `options.retry`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// The format of a line of events.
pub const EVENT_FORMAT: u32 = 1;

/// A line of events: what it is about, as it is now.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[schemars(rename = "{T}Event")]
pub struct Event<T> {
    /// The line's format; another one is for other programs.
    #[schemars(extend("const" = EVENT_FORMAT))]
    pub event_format: u32,
    /// It is the last one: what ends without it has lost its agent, and is asked for again.
    pub end: bool,
    #[serde(flatten)]
    pub now: T,
}

impl<T: Serialize> Event<T> {
    /// A whole line.
    ///
    /// # Errors
    /// There is no JSON of it.
    pub fn line(now: T, end: bool) -> Result<Vec<u8>, serde_json::Error> {
        let mut line = serde_json::to_vec(&Self { event_format: EVENT_FORMAT, end, now })?;
        line.push(b'\n');
        Ok(line)
    }
}

pub fn migration_path(id: Uuid) -> String {
    format!("{VERSION}/migrations/{id}")
}

/// What is to be done when nobody knows whether an operator's decision was taken.
pub fn unknown_remedy(id: Uuid) -> String {
    format!("ask again with `vmferry recover {id} --look`; do not decide the other way before you know")
}
