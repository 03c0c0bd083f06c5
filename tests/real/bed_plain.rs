//! The proofs of a migration against one that QEMU does by itself: they hold for a good one, and
//! they see what vmferry is there to avoid, clear text and a port for each part.

use crate::support::process::{SHORT, run};
use crate::support::proof::{self, HandoverCopies};
use crate::support::{Capture, Version, Vm, VmSpec, plain, with_lab};
use anyhow::{Result, ensure};

fn plain_migration(source_version: Version, destination_version: Version) -> Result<()> {
    with_lab("plain_migration", |lab| {
        let net = lab.two_hosts()?;
        // QEMU 7.2 loses RAM that a guest dirties while it migrates without KVM.
        let dirty_mib = if source_version == Version::V10 { 4 } else { 0 };
        let spec = VmSpec { dirty_mib, ..VmSpec::new("web1", source_version) };
        let source = Vm::define(&lab.paths, &net.alpha, &spec)?;
        let destination =
            Vm::define(&lab.paths, &net.bravo, &VmSpec { version: destination_version, ..spec.clone() })?;
        let copies = HandoverCopies::define(&destination)?;
        source.boot()?;
        let capture = Capture::start(&net, "plain")?;
        plain::migrate(&source, &destination, &net.bravo.v4, || {
            run(&mut net.bravo.command(copies.hook()), SHORT).map(drop)
        })?;
        let traffic = capture.finish(&[spec.marker.as_bytes()])?;

        ensure!(source.qmp()?.status()? == "postmigrate");
        copies.same_as_source(&lab.paths, &source, &destination)?;
        let continued = proof::guest_continued(&source, &destination)?;
        proof::qemu_is_clean(&mut destination.qmp()?)?;
        ensure!(!proof::leftovers(&mut source.qmp()?)?.is_empty(), "jobs that were left went unnoticed");
        ensure!(
            proof::same_content(&lab.paths, &source.disk(0), "raw", &destination.disk(0), "raw").is_err(),
            "the guest went on writing, yet its disks are the same: {continued:?}"
        );
        source.quit()?;
        destination.quit()?;
        proof::disks_whole(&destination)?;

        ensure!(traffic.seen[0] > 1000, "the marker in clear went unseen: {traffic:?}");
        ensure!(traffic.connections.len() == 3, "two disks and RAM: {traffic:?}");
        ensure!(
            traffic.destination_ports().into_iter().eq([plain::RAM_PORT, plain::NBD_PORT]),
            "{traffic:?}"
        );
        Ok(())
    })
}

#[test]
fn qemu_10_to_qemu_10() -> Result<()> {
    plain_migration(Version::V10, Version::V10)
}

#[test]
fn qemu_7_2_to_qemu_10() -> Result<()> {
    plain_migration(Version::V72, Version::V10)
}
