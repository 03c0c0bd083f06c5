//! The long matrix of `make libvirt`: every option that is passed on, both forms of a migration, and
//! repetitions of what races elsewhere.

use anyhow::{Result, ensure};

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER, virsh_ok};
use crate::moves::{moves, moves_as, proves_wire, spec};
use crate::support::{Capture, Way, with_lab};

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn virsh_stays_between() -> Result<()> {
    moves("virsh_stays_between", &["--copy-storage-all"])
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn only_what_the_backing_file_lacks_is_copied() -> Result<()> {
    moves("only_what_the_backing_file_lacks_is_copied", &["--p2p", "--copy-storage-inc"])
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn disks_are_named_and_the_definition_goes_along() -> Result<()> {
    let options =
        ["--p2p", "--copy-storage-all", "--migrate-disks", "vda,vdb", "--persistent", "--undefinesource"];
    moves("disks_are_named_and_the_definition_goes_along", &options)
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn it_is_slow_and_compressed_and_converges() -> Result<()> {
    let options = [
        "--p2p",
        "--copy-storage-all",
        "--bandwidth",
        "30",
        "--auto-converge",
        "--compressed",
        "--abort-on-error",
        "--timeout",
        "120",
        "--timeout-suspend",
    ];
    moves("it_is_slow_and_compressed_and_converges", &options)
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn the_guests_writes_wait_for_the_destination() -> Result<()> {
    moves(
        "the_guests_writes_wait_for_the_destination",
        &["--p2p", "--copy-storage-all", "--copy-storage-synchronous-writes"],
    )
}

/// Five RAM connections, of which QEMU 7.2 takes the first for the main one.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn ten_times_four_parallel_connections_come_in_order() -> Result<()> {
    for _ in 0..10 {
        moves(
            "ten_times_four_parallel_connections_come_in_order",
            &["--p2p", "--copy-storage-all", "--parallel", "4"],
        )?;
    }
    Ok(())
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn four_parallel_connections_with_virsh_between() -> Result<()> {
    let options = ["--copy-storage-inc", "--parallel", "4"];
    moves("four_parallel_connections_with_virsh_between", &options)
}

/// The destination's QEMU needs userfaultfd: here by being root's, and then the agent must be, too.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn post_copy() -> Result<()> {
    let options = ["--p2p", "--copy-storage-all", "--postcopy", "--postcopy-after-precopy"];
    moves_as("post_copy", "root", [Libvirt::V9; 2], &options)
}

/// Only the definition moves, of a domain that does not run.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_definition_moves_offline() -> Result<()> {
    with_lab("a_definition_moves_offline", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        virsh_ok(&hosts.net.alpha, &["destroy", &domain.name])?;
        let agents = Agents::start(lab, &hosts)?;
        let capture = Capture::start(&hosts.net, "wire")?;
        let words =
            ["libvirt", "migrate", "web1", "--to", "bravo", "--offline", "--persistent", "--undefinesource"];
        code(&agents.alpha.vmferry(&words)?, 0)?;
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        ensure!(domain.state_here(Way::ToBravo)? == "absent", "it is still defined here");
        ensure!(domain.state_there(Way::ToBravo)? == "shut off", "it is not defined there");
        agents.are_clean()
    })
}

/// libvirt's own connection takes another way, and comes to nothing behind the wall: what is asked for is not
/// replaced by what is at hand.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn without_a_permission_libvirts_own_connection_is_not_carried() -> Result<()> {
    with_lab("without_a_permission_libvirts_own_connection_is_not_carried", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = Agents::start_with(lab, &hosts, "libvirt = [\"web*\"]\n")?;
        let outcome = agents.migrate(&["--p2p", "--copy-storage-all"])?;
        code(&outcome, 2)?;
        ensure!(outcome.stderr.contains("libvirt_rpc = true"), "{outcome:?}");
        domain.proves_stay(Way::ToBravo)?;
        agents.are_clean()
    })
}
