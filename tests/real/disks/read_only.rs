//! A disk that the guest cannot write to is not copied; with `--compare-read-only` it must be the same on both hosts.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::machine::{Machine, Place, blockdev, device, raw};
use super::{Stage, moves, tells};
use crate::support::{Lab, Version, with_lab};

const MIB: u64 = 1 << 20;
/// No whole number of what is hashed at once.
const MEDIUM_BYTES: u64 = 18 * MIB + 512;

/// A guest with a disk and two media, one of them a CD-ROM's; what they lie on.
fn words(place: &Place, bytes: u64) -> Result<(Vec<String>, [PathBuf; 3])> {
    let disk = place.create("raw", "", "disk.raw", 8 * MIB)?;
    let cd = place.create("raw", "", "cd.raw", 2 * MIB)?;
    let golden = place.create("raw", "", "golden.raw", bytes)?;
    let mut words = device("virtio-scsi-pci,addr=9").to_vec();
    for (node, file, of) in [
        ("n0", &disk, "virtio-blk-pci,id=disk0,addr=5,drive=n0"),
        ("n1", &cd, "scsi-cd,id=cd0,bus=scsi.0,scsi-id=4,lun=0,drive=n1"),
        ("n2", &golden, "virtio-blk-pci,id=golden,addr=6,drive=n2"),
    ] {
        let mut layer = raw(node, file);
        layer["read-only"] = json!(node != "n0");
        words.extend(blockdev(&layer));
        words.extend(device(of));
    }
    Ok((words, [disk, cd, golden]))
}

fn write(place: &Place, file: &Path, what: &str) -> Result<()> {
    place.io(&format!("driver=raw,file.filename={}", file.display()), what)
}

fn flip(file: &Path, at: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    Ok(())
}

fn start(place: &Place, bytes: u64, waits: bool) -> Result<(Machine, [PathBuf; 3])> {
    let (words, files) = words(place, bytes)?;
    write(place, &files[1], "write -P 1 0 1M")?;
    write(place, &files[2], "write -P 2 3M 15M")?;
    Ok((place.start(&words, waits)?, files))
}

pub(crate) fn media_are_compared(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["media"])?;
    let [source, target] = stage.places(lab, "media", version)?;
    let (at_source, _) = start(&source, MEDIUM_BYTES, false)?;
    let (smaller, _) = start(&target, MEDIUM_BYTES - 512, true)?;
    let (code, found) = stage.check("media", &["--compare-read-only"])?;
    ensure!(code == 1, "{found:?}");
    tells(&found, "read-only-differs", "problem", &["golden", "bytes at the source"])?;
    smaller.quit()?;
    let (at_target, files) = start(&target, MEDIUM_BYTES, true)?;
    let (code, found) = stage.check("media", &["--compare-read-only"])?;
    ensure!(code == 0 && !found.iter().any(|found| found["kind"] == "not-copied"), "{found:?}");
    // Behind the back of its QEMU, in the part that is no whole piece.
    flip(&files[2], MEDIUM_BYTES - 7)?;
    let words = ["--compare-read-only", "--keep-source"];
    let (code, last) = stage.migrate("media", &words)?;
    ensure!(code == 1 && last["outcome"]["result"] == "failed", "{last}");
    let told = last["outcome"].to_string();
    let bytes = format!("bytes {} to {} differ", 18 * MIB, MEDIUM_BYTES - 1);
    ensure!(told.contains("golden") && told.contains(&bytes), "{told}");
    ensure!(last["disks"][0]["stream_bytes"] == 0, "something was copied: {last}");
    let status = at_source.qmp()?.execute("query-status", json!({}))?;
    ensure!(status["status"] == "paused", "{status}");
    flip(&files[2], MEDIUM_BYTES - 7)?;
    let (code, last) = stage.migrate("media", &words)?;
    ensure!(code == 0 && last["outcome"]["result"] == "moved", "{last}");
    for disk in ["cd0", "golden"] {
        let note = format!("{disk}: read-only, the same on both hosts");
        ensure!(last["notes"].to_string().contains(&note), "{last}");
    }
    at_source.quit()?;
    at_target.quit()
}

#[test]
#[ignore = "make disks"]
fn media_that_differ_stop_it_on_qemu_10() -> Result<()> {
    with_lab("media_that_differ_stop_it_on_qemu_10", |lab| media_are_compared(lab, Version::V10))
}

#[test]
#[ignore = "make disks"]
fn media_that_differ_stop_it_on_qemu_7_2() -> Result<()> {
    with_lab("media_that_differ_stop_it_on_qemu_7_2", |lab| media_are_compared(lab, Version::V72))
}

/// A guest with a disk, and with two CD-ROMs whose media are open for writing; the media.
fn with_open_media(place: &Place, filled_with: u8) -> Result<(Vec<String>, [PathBuf; 2])> {
    let disk = place.image("raw", "", "disk.raw")?;
    let media = ["ide.iso", "scsi.iso"].map(|name| place.file(name));
    for medium in &media {
        fs::write(medium, vec![filled_with; 2 << 20])?;
    }
    let drive = format!("if=none,id=d2,format=raw,file={}", media[1].display());
    let words = [
        blockdev(&raw("n0", &disk)),
        device("virtio-blk-pci,id=disk0,addr=5,drive=n0"),
        blockdev(&raw("n1", &media[0])),
        device("ide-cd,id=cd0,bus=ide.0,drive=n1"),
        ["-drive".to_owned(), drive],
        device("virtio-scsi-pci,id=s,addr=9"),
        device("scsi-cd,id=cd1,bus=s.0,scsi-id=4,lun=0,drive=d2"),
    ];
    Ok((words.concat(), media))
}

/// What a CD-ROM's node allows is not what the guest can do.
fn media_that_are_open_for_writing_stay(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["cds"])?;
    let [source, target] = stage.places(lab, "cds", version)?;
    let at_source = source.start(&with_open_media(&source, 1)?.0, false)?;
    let (words, media) = with_open_media(&target, 2)?;
    let at_target = target.start(&words, true)?;
    let (code, found) = stage.check("cds", &[])?;
    ensure!(code == 0, "{found:?}");
    tells(&found, "not-copied", "note", &["cd0", "cd1"])?;
    let last = moves(&stage, "cds", at_source, at_target, &[])?;
    let copied: Vec<_> = last["disks"].as_array().context("no disks")?.iter().map(|d| &d["name"]).collect();
    ensure!(copied == ["disk0"], "{last}");
    for medium in &media {
        let bytes = fs::read(medium)?;
        ensure!(
            bytes.len() == 2 << 20 && bytes.iter().all(|byte| *byte == 2),
            "{} was written to",
            medium.display()
        );
    }
    Ok(())
}

#[test]
fn media_that_are_open_for_writing_stay_on_qemu_10() -> Result<()> {
    with_lab("media_that_are_open_for_writing_stay_on_qemu_10", |lab| {
        media_that_are_open_for_writing_stay(lab, Version::V10)
    })
}

#[test]
fn media_that_are_open_for_writing_stay_on_qemu_7_2() -> Result<()> {
    with_lab("media_that_are_open_for_writing_stay_on_qemu_7_2", |lab| {
        media_that_are_open_for_writing_stay(lab, Version::V72)
    })
}
