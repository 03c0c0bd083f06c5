//! The plan: which disks are copied, and how. Pure.

use crate::qemu::Disk;

/// The first channel number for disks; RAM has channels of its own below.
pub const FIRST_DISK_CHANNEL: u16 = 1;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CopiedDisk {
    /// Its name on both hosts.
    pub name: String,
    pub node_name: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
}

/// How a disk's bytes get to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All of it and then what the guest writes: QEMU's `blockdev-mirror`.
    Whole,
    /// What changed since an earlier try had copied all of it: this agent reads it by a dirty bitmap.
    Changes,
}

/// A disk that is copied, and how. It goes to the export that the destination grants under its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    pub disk: CopiedDisk,
    pub way: Way,
}

impl DiskPlan {
    pub fn whole(disk: CopiedDisk) -> Self {
        Self { disk, way: Way::Whole }
    }
}

/// The source's disks that a migration copies: all that the guest can write to.
pub fn copied(disks: &[Disk]) -> Vec<CopiedDisk> {
    let writable = disks.iter().filter(|d| !d.read_only && !d.firmware);
    writable
        .map(|d| CopiedDisk {
            name: d.name.clone(),
            node_name: d.node_name.clone(),
            virtual_size: d.virtual_size,
        })
        .collect()
}
