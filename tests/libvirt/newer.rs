//! Debian 13's libvirt and QEMU, between themselves and from Debian 12's: tests/setup/libvirt-newer.sh.

use anyhow::Result;

use crate::bed::Libvirt::{V9, V11};
use crate::bed::QEMU_USER;
use crate::moves::moves_as;

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_9_to_11_by_p2p() -> Result<()> {
    moves_as("from_9_to_11_by_p2p", QEMU_USER, [V9, V11], &["--p2p", "--copy-storage-all"])
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_9_to_11_with_virsh_between() -> Result<()> {
    moves_as("from_9_to_11_with_virsh_between", QEMU_USER, [V9, V11], &["--copy-storage-all"])
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_9_to_11_by_four_parallel_connections() -> Result<()> {
    let options = ["--p2p", "--copy-storage-all", "--parallel", "4"];
    moves_as("from_9_to_11_by_four_parallel_connections", QEMU_USER, [V9, V11], &options)
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_11_to_11_by_p2p() -> Result<()> {
    let options = ["--p2p", "--copy-storage-all", "--persistent", "--undefinesource"];
    moves_as("from_11_to_11_by_p2p", QEMU_USER, [V11, V11], &options)
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_11_to_11_with_virsh_between() -> Result<()> {
    moves_as("from_11_to_11_with_virsh_between", QEMU_USER, [V11, V11], &["--copy-storage-all"])
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn from_11_to_11_by_four_parallel_connections() -> Result<()> {
    let options = [
        "--p2p",
        "--copy-storage-all",
        "--migrate-disks-detect-zeroes",
        "vda,vdb",
        "--parallel",
        "4",
        "--compressed",
        "--comp-methods",
        "zlib",
        "--comp-zlib-level",
        "1",
    ];
    moves_as("from_11_to_11_by_four_parallel_connections", QEMU_USER, [V11, V11], &options)
}
