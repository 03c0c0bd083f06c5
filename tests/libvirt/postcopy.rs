//! Post-copy: the guest runs at the destination while RAM of it is still at the source. Interrupted, it stands
//! on both hosts, and goes on with `--postcopy-resume`.
//!
//! QEMU 7.2 needs the system call userfaultfd(2), which only root has where `vm.unprivileged_userfaultfd` is 0:
//! so in `matrix.rs` it is root's. QEMU 10 uses /dev/userfaultfd, which host.sh lets everybody open.

use anyhow::Result;

use crate::bed::Libvirt::V11;
use crate::bed::QEMU_USER;
use crate::moves::moves_as;

const POSTCOPY: [&str; 3] = ["--p2p", "--copy-storage-all", "--postcopy"];

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn post_copy_without_roots_rights() -> Result<()> {
    let options = [&POSTCOPY[..], &["--postcopy-after-precopy"]].concat();
    moves_as("post_copy_without_roots_rights", QEMU_USER, [V11, V11], &options)
}
