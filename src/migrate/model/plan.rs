//! The plan: which disks are copied. Pure.

use crate::qemu::Disk;

/// The channel of the RAM stream.
pub const RAM_CHANNEL: u16 = 0;
/// The first channel number for disks.
pub const FIRST_DISK_CHANNEL: u16 = 1;

/// A disk that is copied.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CopiedDisk {
    /// Its name on both hosts.
    pub name: String,
    /// The source's block node.
    pub node_name: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
}

/// The source's disks that a migration copies: all that the guest can write to.
#[must_use]
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
