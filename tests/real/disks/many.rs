//! More disks than anybody has. QEMU's NBD server takes a hundred by default, and QEMU 10 tells of every
//! job whenever one more is made, so that its events grow with the square of the disks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::machine::{blockdev, device, raw};
use super::{Stage, moves};
use crate::support::{DiskFormat, Guest, Host, Pair, Version, VmSpec, proof, with_lab};

/// More than a hundred, all in all.
const MANY: usize = 104;

/// Where these disks of a host are.
fn folder(host: &Host) -> PathBuf {
    host.dir.join("disks")
}

/// The words for so many disks of 1 MiB on one controller; at the source each has its number in it.
fn words(host: &Host, count: usize) -> Result<Vec<String>> {
    fs::create_dir(folder(host))?;
    let mut words = device("virtio-scsi-pci,id=many,addr=9").to_vec();
    for number in 0..count {
        let path = folder(host).join(number.to_string());
        fs::write(&path, if host.name == "alpha" { text(number) } else { String::new() })?;
        File::options().write(true).open(&path)?.set_len(1 << 20)?;
        let (target, lun) = (number / 100, number % 100);
        let plugged = format!("scsi-hd,bus=many.0,scsi-id={target},lun={lun},drive=more{number}");
        words.extend(blockdev(&raw(&format!("more{number}"), &path)));
        words.extend(device(&plugged));
    }
    Ok(words)
}

fn text(number: usize) -> String {
    format!("disk {number}\n").repeat(1000)
}

fn have_arrived(count: usize, source: &Host, destination: &Host) -> Result<()> {
    let read = |folder: &Path, number: usize| fs::read(folder.join(number.to_string()));
    for number in 0..count {
        let (here, there) = (read(&folder(source), number)?, read(&folder(destination), number)?);
        ensure!(here.starts_with(text(number).as_bytes()) && here == there, "disk {number} did not arrive");
    }
    Ok(())
}

/// The guest of the bed with so many further disks.
fn of_a_guest_that_runs(name: &str, version: Version, more: usize) -> Result<()> {
    with_lab(name, |lab| {
        let net = lab.two_hosts()?;
        let spec = |host: &Host| -> Result<VmSpec> {
            let (disks, extra) = (vec![DiskFormat::Raw], words(host, more)?);
            Ok(VmSpec { disks, disk_mib: 16, rate: 20, extra, ..VmSpec::new("web1", version) })
        };
        let guest = Guest::define(lab, &net, &spec(&net.alpha)?, &spec(&net.bravo)?)?;
        guest.alpha.boot()?;
        let pair = Pair::start(lab, net, &[&guest])?;
        let outcome = pair.alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        ensure!(outcome.code == 0, "{outcome:?}");
        guest.alpha.wait_ended()?;
        let mut qmp = guest.bravo.qmp()?;
        ensure!(qmp.status()? == "running");
        if version == Version::V10 {
            proof::guest_continued(&guest.alpha, &guest.bravo)?;
        }
        qmp.query("stop")?;
        have_arrived(more, &pair.net.alpha, &pair.net.bravo)?;
        guest.bravo.kill().context("the end")
    })
}

/// A machine without a system, which is paused.
fn of_a_paused_machine(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["many"])?;
        let [source, target] = stage.places(lab, "many", version)?;
        let at_source = source.start(&words(&source.host, MANY)?, false)?;
        let at_target = target.start(&words(&target.host, MANY)?, true)?;
        let (code, found) = stage.check("many", &[])?;
        ensure!(code == 0, "{found:?}");
        moves(&stage, "many", at_source, at_target, &[])?;
        have_arrived(MANY, &source.host, &target.host)
    })
}

#[test]
fn so_many_disks_move_on_qemu_10() -> Result<()> {
    of_a_guest_that_runs("so_many_disks_move_on_qemu_10", Version::V10, MANY - 1)
}

#[test]
fn as_many_disks_as_its_main_loop_allows_move_on_qemu_7_2() -> Result<()> {
    of_a_guest_that_runs("as_many_disks_as_its_main_loop_allows_move_on_qemu_7_2", Version::V72, 45)
}

#[test]
fn more_than_a_hundred_disks_are_moved_by_qemu_10() -> Result<()> {
    of_a_paused_machine("more_than_a_hundred_disks_are_moved_by_qemu_10", Version::V10)
}

#[test]
fn more_than_a_hundred_disks_are_moved_by_qemu_7_2() -> Result<()> {
    of_a_paused_machine("more_than_a_hundred_disks_are_moved_by_qemu_7_2", Version::V72)
}
