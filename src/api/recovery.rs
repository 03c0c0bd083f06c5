//! What is not closed on this host, and an operator's decision about it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{CaseKind, Owner, Phase, Role, Side};
use crate::migrate::recover;

/// `GET /v1/recover`, which only looks, and `POST /v1/recover`, which cleans up what it can.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recovery {
    /// What is not closed on this host; mostly nothing.
    pub cases: Vec<Case>,
}

/// One migration that is not closed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Case {
    pub kind: CaseKind,
    /// The migration, or the try of one: by the file's name if the journal is not believed.
    pub id: Option<Uuid>,
    /// The virtual machine, where that can be read.
    pub vm: Option<String>,
    pub role: Option<Role>,
    /// The other host, as its certificate names it.
    pub peer: Option<String>,
    /// Seconds since the epoch.
    pub began_at: Option<i64>,
    pub phase: Option<Phase>,
    /// What this host's journal says, in its own words.
    pub journal: Vec<String>,
    /// What the other host's agent says now, or why it cannot be asked.
    pub peer_says: Option<String>,
    /// What the virtual machine's QEMU on this host says now, or why it cannot be asked.
    pub qemu_says: Option<String>,
    /// Whose the virtual machine is by all that.
    pub owner: Owner,
    /// What is done about it, and why.
    pub plan: String,
    /// What is left to clean up.
    pub left: Vec<String>,
    /// Whether an operator may decide it.
    pub may_force: bool,
    pub file: PathBuf,
}

impl From<recover::Case> for Case {
    fn from(case: recover::Case) -> Self {
        Self {
            kind: case.kind,
            id: case.id,
            vm: case.vm,
            role: case.role,
            peer: case.peer,
            began_at: case.began_at,
            phase: case.phase,
            journal: case.journal,
            peer_says: case.peer_says,
            qemu_says: case.qemu_says,
            owner: case.owner,
            plan: case.plan,
            left: case.left,
            may_force: case.may_force,
            file: case.file,
        }
    }
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
