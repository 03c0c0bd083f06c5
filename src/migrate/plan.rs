//! The plan: which disks are copied where, and whether that can work. Pure.

use super::message::{DiskSpec, Export};
use super::problem::{Problem, ProblemKind};
use crate::qemu::Disk;

/// The first channel number for disks; RAM has channel 0.
pub const FIRST_DISK_CHANNEL: u16 = 1;
/// Disks that one migration may copy.
pub const DISKS_MAX: usize = 256;

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

/// What is said of the disks to the other host. Firmware flash travels with the RAM.
#[must_use]
pub fn specs(disks: &[Disk]) -> Vec<DiskSpec> {
    let spec = |disk: &Disk| DiskSpec {
        name: disk.name.clone(),
        virtual_size: disk.virtual_size,
        format: disk.format.clone(),
        read_only: disk.read_only,
    };
    disks.iter().filter(|d| !d.firmware).map(spec).collect()
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

/// Compares the offered disks with those of the waiting QEMU.
#[must_use]
pub fn disk_problems(offered: &[DiskSpec], present: &[Disk]) -> Vec<Problem> {
    let mut problems = Vec::new();
    if offered.len() > DISKS_MAX {
        let text = format!("{} disks are more than the {DISKS_MAX} that one migration copies", offered.len());
        problems.push(Problem::new(ProblemKind::Other, text, "move some of them off the VM first"));
    }
    for want in offered {
        match present.iter().find(|d| d.name == want.name) {
            None => problems.push(missing(want, present)),
            Some(have) => problems.extend(mismatch(want, have)),
        }
    }
    problems
}

fn missing(want: &DiskSpec, present: &[Disk]) -> Problem {
    let names: Vec<_> = present.iter().map(|d| d.name.as_str()).collect();
    let found = if names.is_empty() { "no disk at all".into() } else { names.join(", ") };
    Problem::new(
        ProblemKind::DiskMissing,
        format!("disk {} is missing at the destination, whose QEMU has {found}", want.name),
        "give the destination's QEMU the same devices with the same ids as the source's",
    )
}

fn mismatch(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let (name, wanted, found) = (&want.name, want.virtual_size, have.virtual_size);
    if have.read_only && !want.read_only {
        return Some(Problem::new(
            ProblemKind::DiskReadOnly,
            format!("disk {name} is read-only at the destination"),
            "remove read-only from its block device there",
        ));
    }
    if found < wanted {
        return Some(Problem::new(
            ProblemKind::DiskTooSmall,
            format!("disk {name} has {found} bytes at the destination and needs {wanted}"),
            format!("`qemu-img resize` it there to {wanted} bytes"),
        ));
    }
    if found > wanted {
        return Some(Problem::new(
            ProblemKind::DiskTooLarge,
            format!("disk {name} has {found} bytes at the destination, the source's has {wanted}"),
            format!(
                "create it anew with {wanted} bytes: the guest's disk must not change its size while it runs"
            ),
        ));
    }
    let encrypted = |format: &str| format == "luks";
    if encrypted(&want.format) && !encrypted(&have.format) {
        return Some(Problem::new(
            ProblemKind::DiskFormat,
            format!(
                "disk {name} is encrypted (luks) at the source and would lie in clear as {} at the destination",
                have.format
            ),
            "create it as luks at the destination",
        ));
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn want(name: &str, size: u64, format: &str) -> DiskSpec {
        DiskSpec { name: name.into(), virtual_size: size, format: format.into(), read_only: false }
    }

    fn have(name: &str, size: u64, format: &str) -> Disk {
        Disk {
            name: name.into(),
            node_name: name.into(),
            virtual_size: size,
            format: format.into(),
            qdev: String::new(),
            read_only: false,
            removable: false,
            firmware: false,
            filename: None,
            backing: false,
            actual_size: None,
        }
    }

    fn kinds(offered: &DiskSpec, present: &[Disk]) -> Vec<ProblemKind> {
        disk_problems(std::slice::from_ref(offered), present).into_iter().map(|p| p.kind).collect()
    }

    #[test]
    fn each_mismatch_is_found_and_a_match_is_not() {
        let raw = want("disk0", 1024, "raw");
        assert_eq!(kinds(&raw, &[have("disk0", 1024, "qcow2")]), []);
        assert_eq!(kinds(&raw, &[have("disk1", 1024, "raw")]), [ProblemKind::DiskMissing]);
        assert_eq!(kinds(&raw, &[have("disk0", 1023, "raw")]), [ProblemKind::DiskTooSmall]);
        assert_eq!(kinds(&raw, &[have("disk0", 1025, "raw")]), [ProblemKind::DiskTooLarge]);
        let locked = Disk { read_only: true, ..have("disk0", 1024, "raw") };
        assert_eq!(kinds(&raw, &[locked]), [ProblemKind::DiskReadOnly]);
        let luks = want("disk0", 1024, "luks");
        assert_eq!(kinds(&luks, &[have("disk0", 1024, "raw")]), [ProblemKind::DiskFormat]);
        assert_eq!(kinds(&luks, &[have("disk0", 1024, "luks")]), []);
    }

    #[test]
    fn read_only_disks_are_not_copied_but_must_be_there() {
        let iso = DiskSpec { read_only: true, ..want("cd0", 10, "raw") };
        let disk = want("disk0", 10, "raw");
        let granted = exports(&[iso.clone(), disk]);
        assert_eq!(granted.len(), 1);
        assert_eq!((granted[0].disk.as_str(), granted[0].channel), ("disk0", FIRST_DISK_CHANNEL));
        assert_eq!(kinds(&iso, &[]), [ProblemKind::DiskMissing]);
    }
}
