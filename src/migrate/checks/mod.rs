//! What would keep a migration from going well, found before it begins: the disks, the machine and the
//! descriptors of both hosts compared. `docs/check.md` has every finding.

pub(crate) mod descriptors;
pub(crate) mod disks;
pub(crate) mod machine;
pub(crate) mod qemu;
