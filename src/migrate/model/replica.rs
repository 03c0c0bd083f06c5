//! A replica: the copy of a VM's disks that one of its peers keeps for it, as each of both hosts remembers it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::image::ImageStamp;
use super::plan::CopiedDisk;
use crate::qemu::ProcessId;

/// What the source remembers of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceReplica {
    pub(crate) vm: String,
    /// The destination, as its certificate names it.
    pub(crate) peer: String,
    /// In the names of its dirty bitmaps.
    pub(crate) id: Uuid,
    /// The process that has them: they are not stored, and go with it.
    pub(crate) qemu: Option<ProcessId>,
    /// Seconds since the epoch.
    pub(crate) began_at: i64,
    /// When all disks were last in step with the guest; in seconds since the epoch.
    #[serde(default)]
    pub(crate) in_step_at: Option<i64>,
    /// The last migration or run that the destination had prepared on these images. It is on both hosts, and the
    /// replica is used only if both have the same.
    #[serde(default)]
    pub(crate) after: Option<Uuid>,
    #[serde(default)]
    pub(crate) disks: Vec<ReplicaDisk>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReplicaDisk {
    /// As it was when its copy began.
    pub(crate) disk: CopiedDisk,
    /// Everything at the destination equals the source's but for what its bitmaps hold.
    pub(crate) in_step: bool,
}

/// What the destination remembers of one, beside the images that it has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftAs {
    /// The migration or run that left the images so.
    pub(crate) after: Uuid,
    /// When that one began; in seconds since the epoch.
    pub(crate) began_at: i64,
    pub(crate) stamp: ImageStamp,
}

impl SourceReplica {
    /// One that nothing has been copied for.
    pub(crate) fn new(vm: &str, peer: &str, now: i64) -> Self {
        Self {
            vm: vm.into(),
            peer: peer.into(),
            id: Uuid::new_v4(),
            qemu: None,
            began_at: now,
            in_step_at: None,
            after: None,
            disks: Vec::new(),
        }
    }
}
