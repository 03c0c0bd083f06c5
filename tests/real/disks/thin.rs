//! What is thin at the source is so at the destination, and nothing is sent for what is not there. Judged by
//! the link's own counter and by the blocks of the destination's images.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;

use super::machine::{Machine, blockdev, device, raw};
use super::{Stage, volumes};
use crate::faults::Migration;
use crate::support::process::{LONG, run, wait_for};
use crate::support::{Lab, Paths, Version, with_lab};

const MIB: u64 = 1 << 20;
/// How many pieces of 4 KiB there are besides the large ones, with holes between them.
const SMALL: u64 = 2048;
const SMALL_BYTES: u64 = 4096;
const SMALL_EVERY: u64 = 64 * 1024;
/// What the guest writes zeroes over after it was copied.
const ZEROED_BYTES: u64 = MIB;

/// How large a disk is, and what of it is data.
#[derive(Debug, Clone, Copy)]
struct Thin {
    bytes: u64,
    /// What is in large pieces.
    large_bytes: u64,
}

impl Thin {
    const ORDINARY: Self = Self { bytes: 4096 * MIB, large_bytes: 32 * MIB };
    /// 200 MiB of data in 20 GiB.
    const LARGE: Self = Self { bytes: 20480 * MIB, large_bytes: 192 * MIB };

    const fn data_bytes(self) -> u64 {
        self.large_bytes + SMALL * SMALL_BYTES
    }

    /// Writes what no part of is zeroes.
    fn write(self, file: &Path) -> Result<()> {
        let file = fs::OpenOptions::new().write(true).open(file)?;
        let bytes: Vec<u8> = (0..self.large_bytes / 4).map(|n| (n % 251) as u8 + 1).collect();
        (0..4_u64).try_for_each(|part| file.write_all_at(&bytes, part * (self.bytes / 8)))?;
        let small = |n: u64| self.bytes / 2 + n * SMALL_EVERY + SMALL_BYTES;
        Ok((0..SMALL).try_for_each(|n| file.write_all_at(&bytes[..SMALL_BYTES as usize], small(n)))?)
    }
}

/// Disks of these images, by their extensions.
fn disks(files: &[PathBuf]) -> Vec<String> {
    let one = |(n, file): (usize, &PathBuf)| {
        let mut node = raw(&format!("n{n}"), file);
        node["driver"] = json!(file.extension().and_then(|e| e.to_str()).unwrap_or("raw"));
        [blockdev(&node), device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=n{n}", n + 5))].concat()
    };
    files.iter().enumerate().flat_map(one).collect()
}

/// Does it as the guest would.
fn io(machine: &Machine, disk: usize, command: &str) -> Result<()> {
    let line = format!("qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"{command}\"");
    let told = machine.qmp()?.execute("human-monitor-command", json!({"command-line": line}))?;
    ensure!(!told.to_string().to_lowercase().contains("fail"), "{command}: {told}");
    Ok(())
}

fn allocated(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

fn same(paths: &Paths, ours: &Path, theirs: &Path) -> Result<()> {
    run(paths.qemu_img().args(["compare", "-q"]).arg(ours).arg(theirs), LONG).map(drop)
}

fn what_is_thin_stays_thin(lab: &Lab, stage: &Stage, thin: Thin, [version, to]: [Version; 2]) -> Result<()> {
    let data_bytes = thin.data_bytes();
    let [source, mut target] = stage.places(lab, "thin", version)?;
    target.version = to;
    let image = |format: &str, name: &str| source.create(format, "", name, thin.bytes);
    let ours = [image("raw", "0.raw")?, image("qcow2", "1.qcow2")?];
    let theirs = [target.file("disk0.raw"), target.file("disk1.raw")];
    thin.write(&ours[0])?;
    let at_source = source.start(&disks(&ours), false)?;
    target.will_start(&disks(&theirs))?;
    let before = stage.net.alpha.sent_bytes()?;
    let slowly = ["--limit", "2MiB/s", "--keep-source"];
    let migration = Migration::begin(&stage.alpha, "thin", "bravo", &slowly)?;
    wait_for("the first piece at the destination", LONG, || {
        let is_there = theirs[0].exists() && allocated(&theirs[0])? > ZEROED_BYTES;
        Ok(is_there.then_some(()))
    })?;
    io(&at_source, 0, &format!("write -z -u 0 {ZEROED_BYTES}"))?;
    let limited = stage.alpha.vmferry(&["limit", "thin", "--rate", "none"])?;
    ensure!(limited.code == 0, "{limited:?}");
    let last = migration.ended(&stage.alpha)?;
    ensure!(last["outcome"]["result"] == "moved", "{last}");
    let (sent, most) = (stage.net.alpha.sent_bytes()? - before, data_bytes * 105 / 100);
    ensure!(sent <= most, "{sent} bytes were sent, at most {most} for {data_bytes} of data");
    let (disk, occupied) = (&last["disks"][0], last["disks"][0]["allocated_bytes"].as_u64());
    let is_about = occupied.is_some_and(|bytes| (data_bytes..data_bytes + MIB).contains(&bytes));
    ensure!(disk["virtual_bytes"] == thin.bytes && is_about, "{last}");
    at_source.quit()?;
    target.quit_started()?;
    let there = allocated(&theirs[0])?;
    // What the file system itself needs for so many pieces.
    let most = data_bytes - ZEROED_BYTES + MIB;
    ensure!(there <= most, "{there} bytes are occupied at the destination, at most {most} are data");
    ensure!(allocated(&theirs[1])? <= MIB, "nothing of the other disk was data");
    ours.iter().zip(&theirs).try_for_each(|(ours, theirs)| same(&lab.paths, ours, theirs))
}

/// So many bytes that nobody has written to.
fn nothing_is_sent_for_nothing(lab: &Lab, stage: &Stage, version: Version, bytes: u64) -> Result<()> {
    let [source, target] = stage.places(lab, "nothing", version)?;
    let theirs = target.file("disk0.raw");
    let at_source = source.start(&disks(&[source.create("raw", "", "0.raw", bytes)?]), false)?;
    target.will_start(&disks(std::slice::from_ref(&theirs)))?;
    let before = stage.net.alpha.sent_bytes()?;
    let (code, last) = stage.migrate("nothing", &["--verify"])?;
    ensure!(code == 0 && last["outcome"]["result"] == "moved", "{last}");
    let compared = &last["comparison"];
    let hashed = compared["hashed_bytes"].as_u64();
    ensure!(compared["equal_bytes"] == bytes && hashed.is_some_and(|hashed| hashed <= MIB), "{last}");
    let (sent, most) = (stage.net.alpha.sent_bytes()? - before, MIB + 8 * (bytes >> 20));
    ensure!(sent <= most && allocated(&theirs)? <= MIB, "{sent} bytes were sent for nothing, at most {most}");
    at_source.quit()?;
    target.quit_started()
}

/// Between two QEMUs, onto images that the destination's agent makes.
pub(crate) fn between(name: &str, from: Version, to: Version) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up_with(lab, &["thin"], Some(""))?;
        what_is_thin_stays_thin(lab, &stage, Thin::ORDINARY, [from, to])
    })
}

#[test]
#[ignore = "make disks"]
fn two_hundred_mib_of_twenty_gib_stay_thin() -> Result<()> {
    with_lab("two_hundred_mib_of_twenty_gib_stay_thin", |lab| {
        let stage = Stage::set_up_with(lab, &["thin"], Some(""))?;
        what_is_thin_stays_thin(lab, &stage, Thin::LARGE, [Version::V10; 2])
    })
}

/// A terabyte of it.
pub(crate) fn of_nothing(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up_with(lab, &["nothing"], Some(""))?;
        nothing_is_sent_for_nothing(lab, &stage, version, 1 << 40)
    })
}

#[test]
#[ignore = "make disks"]
fn a_terabyte_of_nothing_is_moved_by_qemu_7_2() -> Result<()> {
    of_nothing("a_terabyte_of_nothing_is_moved_by_qemu_7_2", Version::V72)
}

#[test]
fn what_is_thin_stays_thin_on_qemu_10() -> Result<()> {
    with_lab("what_is_thin_stays_thin_on_qemu_10", |lab| {
        let stage = Stage::set_up_with(lab, &["thin", "nothing"], Some(""))?;
        what_is_thin_stays_thin(lab, &stage, Thin::ORDINARY, [Version::V10; 2])?;
        nothing_is_sent_for_nothing(lab, &stage, Version::V10, 1 << 40)
    })
}

/// And the other images that an agent makes.
#[test]
fn what_is_thin_stays_thin_on_qemu_7_2() -> Result<()> {
    with_lab("what_is_thin_stays_thin_on_qemu_7_2", |lab| {
        let stage = Stage::set_up_with(lab, &["thin", "volume"], Some(volumes::CREATE))?;
        what_is_thin_stays_thin(lab, &stage, Thin::ORDINARY, [Version::V72; 2])?;
        volumes::what_commands_make_is_used_and_removed(&stage, lab, Version::V72, volumes::Kind::File)
    })
}
