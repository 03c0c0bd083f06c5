//! Which of the guest's disks are copied, and how many at once. Pure.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::qemu::Disk;
use crate::ranged::read_within;

/// Which of the disks that the guest can write to are copied. The destination's guest finds the others as
/// they are there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskChoice {
    #[default]
    All,
    /// These, in this order.
    Only(Vec<String>),
    Except(#[schemars(with = "Vec<String>")] BTreeSet<String>),
}

impl DiskChoice {
    /// Whether a disk of this name is copied, if it can be.
    pub fn takes(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.iter().any(|one| one == name),
            Self::Except(names) => !names.contains(name),
        }
    }

    /// Whether a disk that could be copied is not.
    pub(crate) fn leaves_out(&self, disk: &Disk) -> bool {
        is_copyable(disk) && !self.takes(&disk.name)
    }

    /// Where a disk is in the order of copying; others keep theirs behind it.
    pub(super) fn place(&self, name: &str) -> usize {
        match self {
            Self::Only(names) => names.iter().position(|one| one == name).unwrap_or(usize::MAX),
            Self::All | Self::Except(_) => 0,
        }
    }

    /// Names that are none of these disks, or those of disks that are never copied.
    pub(crate) fn unknown<'a>(&'a self, disks: &[Disk]) -> Vec<&'a str> {
        let is_one = |name: &str| disks.iter().any(|disk| disk.name == name && !disk.firmware);
        let is_copied = |name: &str| disks.iter().any(|disk| disk.name == name && is_copyable(disk));
        match self {
            Self::All => Vec::new(),
            Self::Only(names) => names.iter().map(String::as_str).filter(|name| !is_copied(name)).collect(),
            Self::Except(names) => names.iter().map(String::as_str).filter(|name| !is_one(name)).collect(),
        }
    }

    pub(crate) fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// Whether a migration can copy it: the guest can write to it, and no device's state carries it.
pub(crate) fn is_copyable(disk: &Disk) -> bool {
    !disk.read_only && !disk.firmware
}

/// How many disks are copied whole at the same time: 1 to [`DisksAtOnce::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "u32")]
pub struct DisksAtOnce(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} disks at once: it is 1 to {max}", max = DisksAtOnce::MAX)]
pub struct DisksAtOnceError(u32);

impl DisksAtOnce {
    /// As many as one migration copies at all.
    pub const MAX: u32 = 256;
}

read_within!(DisksAtOnce: u32, 1, DisksAtOnce::MAX.into());

impl TryFrom<u32> for DisksAtOnce {
    type Error = DisksAtOnceError;

    fn try_from(disks: u32) -> Result<Self, DisksAtOnceError> {
        if (1..=Self::MAX).contains(&disks) { Ok(Self(disks)) } else { Err(DisksAtOnceError(disks)) }
    }
}

impl From<DisksAtOnce> for u32 {
    fn from(disks: DisksAtOnce) -> Self {
        disks.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str) -> Disk {
        Disk { name: name.into(), ..Disk::default() }
    }

    #[test]
    fn what_cannot_be_meant_is_told_by_name() {
        let disks = [disk("vda"), disk("vdb"), Disk { read_only: true, ..disk("cd0") }];
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let only = DiskChoice::Only(names(&["vdb", "cd0", "vdz"]));
        assert_eq!(only.unknown(&disks), ["cd0", "vdz"]);
        let except = DiskChoice::Except(names(&["vda", "cd0", "vdz"]).into_iter().collect());
        assert_eq!(except.unknown(&disks), ["vdz"]);
        let left: Vec<bool> = disks.iter().map(|disk| except.leaves_out(disk)).collect();
        assert_eq!(left, [true, false, false], "a read-only disk is never copied");
        assert!(DiskChoice::All.unknown(&disks).is_empty());
    }

    #[test]
    fn the_number_at_once_is_bounded() {
        assert!(DisksAtOnce::try_from(0).is_err() && DisksAtOnce::try_from(257).is_err());
        assert_eq!(u32::from(DisksAtOnce::try_from(256).unwrap_or(DisksAtOnce(0))), 256);
    }
}
