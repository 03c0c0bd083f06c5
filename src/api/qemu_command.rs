//! The command line of a VM's QEMU, for another host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is other on the host for which a command line is made: `POST /v1/vms/{vm}/qemu-command`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QemuCommandRequest {
    /// QEMU's program there; as it is here if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// Where a disk's image is there: `{vm}`, `{disk}` and `{format}` stand for their names. As here if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<String>,
    /// Other paths, or what they begin with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<OtherPath>,
}

/// What a path, or the beginning of one, is on the other host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OtherPath {
    pub from: String,
    pub to: String,
}

/// A command line for a QEMU that waits for the VM, and what is to be said of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct QemuCommand {
    pub vm: String,
    /// The process that it was made from.
    pub pid: i32,
    /// The program and its arguments.
    pub words: Vec<String>,
    /// What is not as in that process's.
    pub changed: Vec<String>,
    /// What could not be decided.
    pub undecided: Vec<String>,
    /// Paths that it needs there.
    pub paths: Vec<String>,
}
