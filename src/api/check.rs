//! What `check` is asked, and what it and migrations find.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Accepted, DiskChoice, DiskSample, InBand, Incremental, Options, Problem};

/// What is to be checked: `POST /v1/check`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// The virtual machine, `[vm.NAME]` on both hosts.
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    /// Warnings are problems.
    #[serde(default)]
    pub strict: bool,
    /// Kinds of problems that are only warnings.
    #[serde(default)]
    #[schemars(with = "Vec<Accepted>")]
    pub accept: BTreeSet<Accepted>,
    /// Which disks are copied.
    #[serde(default)]
    pub disks: DiskChoice,
    /// Whether disks could be compared, too.
    #[serde(default)]
    pub verify: bool,
    /// Whether disks that the guest cannot write to could be compared, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compare_read_only: bool,
    /// Of which disks only the topmost image is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incremental: Option<Incremental>,
    /// How disks would cross inside QEMU's own stream; none for streams of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_band: Option<InBand>,
    /// Not even where NBD cannot be used.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub never_in_band: bool,
}

impl From<CheckRequest> for Options {
    fn from(request: CheckRequest) -> Self {
        let CheckRequest {
            vm: _,
            to: _,
            strict,
            accept,
            disks,
            verify,
            compare_read_only,
            incremental,
            in_band,
            never_in_band,
        } = request;
        let verify = verify.then(DiskSample::all);
        Self {
            strict,
            accept,
            disks,
            verify,
            compare_read_only,
            incremental,
            in_band,
            never_in_band,
            ..Self::default()
        }
    }
}

/// The answer to [`CheckRequest`].
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CheckReport {
    /// What was found; the migration is refused if the severity of one of them is `problem`.
    pub problems: Vec<Problem>,
}
