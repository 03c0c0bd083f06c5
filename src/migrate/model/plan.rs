//! The plan: which disks are copied, and where. Pure.

use crate::migrate::protocol::message::{DiskSpec, Export};
use crate::qemu::Disk;

/// The first channel number for disks; RAM has channel 0.
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

/// Exports for the offered disks that are copied, in their order.
#[must_use]
pub fn exports(offered: &[DiskSpec]) -> Vec<Export> {
    let copied = offered.iter().filter(|d| !d.read_only);
    copied
        .zip(FIRST_DISK_CHANNEL..)
        .map(|(d, channel)| Export { disk: d.name.clone(), export: d.name.clone(), channel })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_only_disks_are_not_copied() {
        let spec = |name: &str, read_only| DiskSpec {
            name: name.into(),
            virtual_size: 10,
            format: "raw".into(),
            read_only,
            place: None,
        };
        let granted = exports(&[spec("cd0", true), spec("disk0", false)]);
        assert_eq!(granted.len(), 1);
        assert_eq!((granted[0].disk.as_str(), granted[0].channel), ("disk0", FIRST_DISK_CHANNEL));
    }
}
