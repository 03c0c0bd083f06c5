//! `--incremental`: only the topmost image is copied, onto one that stands on something that shows the same.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::{Machine, Place, blockdev, device, file_node};
use super::{Stage, moves, tells};
use crate::faults::Migration;
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::{Lab, Paths, Version, with_lab};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 96 * MIB;
/// What is written to topmost images, in all.
const TOP_BYTES: u64 = 24 * MIB;

/// The images that the destination's agent makes stand on these.
const CREATE: &str = "format = \"source\"\nbacking = \"DIR/{vm}/base-{disk}\"\n";

fn image(file: &Path) -> String {
    format!("driver=qcow2,file.filename={}", file.display())
}

fn raw_image(file: &Path) -> String {
    format!("driver=raw,file.filename={}", file.display())
}

/// A qcow2 image on this one.
fn on(place: &Place, base: &Path, format: &str, name: &str, bytes: u64) -> Result<PathBuf> {
    place.create("qcow2", &format!("backing_file={},backing_fmt={format}", base.display()), name, bytes)
}

/// Disks of these images, by the beginnings of their names.
fn disks(files: &[PathBuf]) -> Vec<String> {
    let one = |(n, file): (usize, &PathBuf)| {
        let driver = if file.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        let node = json!({"driver": driver, "node-name": format!("n{n}"), "discard": "unmap", "file": file_node(file)});
        [blockdev(&node), device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=n{n}", n + 5))].concat()
    };
    files.iter().enumerate().flat_map(one).collect()
}

fn allocated(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

fn same(paths: &Paths, ours: &Path, theirs: &Path) -> Result<()> {
    run(paths.qemu_img().args(["compare", "-q"]).arg(ours).arg(theirs), LONG).map(drop)
}

fn backing(paths: &Paths, file: &Path) -> Result<Value> {
    let info = run(paths.qemu_img().args(["info", "--output=json"]).arg(file), SHORT)?;
    Ok(serde_json::from_str::<Value>(&info)?["backing-filename"].clone())
}

/// A copy of what an image shows, in one file.
fn flat(place: &Place, from: &Path, to: &Path) -> Result<()> {
    let mut convert = place.paths.qemu_img();
    run(convert.args(["convert", "-q", "-O", "qcow2"]).arg(from).arg(to), LONG).map(drop)
}

/// On a chain; on a smaller base; on a larger one; on none.
fn source_images(source: &Place) -> Result<Vec<PathBuf>> {
    let bottom = source.create("raw", "", "bottom.raw", DISK_BYTES / 2)?;
    source.io(&raw_image(&bottom), "write -P 1 0 40M")?;
    let middle = on(source, &bottom, "raw", "middle", DISK_BYTES)?;
    source.io(&image(&middle), "write -P 2 60M 8M")?;
    source.io(&image(&middle), "write -z 8M 1M")?;
    let small = source.create("qcow2", "", "small", MIB)?;
    source.io(&image(&small), "write -P 3 0 1M")?;
    let large = source.create("qcow2", "", "large", 6 * MIB)?;
    source.io(&image(&large), "write -P 4 0 6M")?;
    let tops = vec![
        on(source, &middle, "qcow2", "top0", DISK_BYTES)?,
        on(source, &small, "qcow2", "top1", 4 * MIB)?,
        on(source, &large, "qcow2", "top2", 4 * MIB)?,
        source.create("raw", "", "top3.raw", 4 * MIB)?,
    ];
    source.io(&image(&tops[0]), &format!("write -P 5 30M {}", TOP_BYTES - 4 * MIB))?;
    // Zeroes over what lies below, and a part of a cluster.
    source.io(&image(&tops[0]), "write -z 61M 1M")?;
    source.io(&image(&tops[0]), "write -P 6 4099k 5k")?;
    source.io(&image(&tops[1]), "write -P 7 1000k 64k")?;
    source.io(&image(&tops[2]), "write -P 8 0 64k")?;
    source.io(&raw_image(&tops[3]), "write -P 9 0 3M")?;
    Ok(tops)
}

pub(crate) fn only_tops_are_copied(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up_with(lab, &["thin"], Some(CREATE))?;
    let [source, target] = stage.places(lab, "thin", version)?;
    let ours = source_images(&source)?;
    for (n, base) in ["middle", "small", "large"].iter().enumerate() {
        flat(&source, &source.file(base), &target.file(&format!("base-disk{n}")))?;
    }
    let theirs: Vec<PathBuf> =
        (0..4).map(|n| target.file(&format!("disk{n}.{}", if n == 3 { "raw" } else { "qcow2" }))).collect();
    let at_source = source.start(&disks(&ours), false)?;
    target.will_start(&disks(&theirs))?;
    let (code, found) = stage.check("thin", &["--incremental=disk3"])?;
    ensure!(code == 1, "{found:?}");
    tells(&found, "no-base", "problem", &["disk3", "raw"])?;
    let (code, found) = stage.check("thin", &["--incremental"])?;
    ensure!(code == 0, "{found:?}");
    tells(&found, "no-base", "note", &["disk3", "copied whole"])?;
    tells(&found, "base-kept", "note", &["disk0", "before anything is copied"])?;
    let before = stage.net.alpha.sent_bytes()?;
    let (code, last) = stage.migrate("thin", &["--incremental", "--keep-source"])?;
    ensure!(code == 0 && last["outcome"]["result"] == "moved", "{last}");
    ensure!(last["outcome"]["leftovers"] == json!([]), "{last}");
    let (sent, most) = (stage.net.alpha.sent_bytes()? - before, TOP_BYTES * 105 / 100);
    ensure!(sent <= most, "{sent} bytes were sent, at most {most} for {TOP_BYTES} in topmost images");
    // Below what the topmost image of the first has not: 9 to 30 and 60 to 68 MiB but for one, and nothing in the rest.
    let below =
        "disk0: what it stands on is the same on both hosts (36 MiB were hashed, 39 MiB read as zeroes)";
    for said in [below, "disk1: what it stands on is the same"] {
        ensure!(last["notes"].to_string().contains(said), "{last}");
    }
    at_source.quit()?;
    target.quit_started()?;
    for (n, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        same(&lab.paths, ours, theirs).with_context(|| format!("disk{n}"))?;
        if n < 3 {
            let base = target.file(&format!("base-disk{n}"));
            ensure!(backing(&lab.paths, theirs)? == json!(base), "disk{n} does not stand on its base");
            let (there, here) = (allocated(theirs)?, allocated(ours)?);
            ensure!(
                there <= here + MIB,
                "disk{n} occupies {there} bytes at the destination, {here} at the source"
            );
        }
    }
    Ok(())
}

#[test]
fn only_the_topmost_images_are_copied_on_qemu_10() -> Result<()> {
    with_lab("only_the_topmost_images_are_copied_on_qemu_10", |lab| only_tops_are_copied(lab, Version::V10))
}

#[test]
#[ignore = "make disks"]
fn only_the_topmost_images_are_copied_on_qemu_7_2() -> Result<()> {
    with_lab("only_the_topmost_images_are_copied_on_qemu_7_2", |lab| only_tops_are_copied(lab, Version::V72))
}

/// A guest with one disk, and a base that is the same on both hosts.
struct Pair {
    at_source: Machine,
    at_target: Machine,
    source_top: PathBuf,
    target: Place,
}

impl Pair {
    fn set_up(stage: &Stage, lab: &Lab, name: &str, version: Version) -> Result<Self> {
        Self::of_bytes(stage, lab, (name, 8 * MIB), version)
    }

    fn of_bytes(stage: &Stage, lab: &Lab, (name, bytes): (&str, u64), version: Version) -> Result<Self> {
        let [source, target] = stage.places(lab, name, version)?;
        let tops = [&source, &target].map(|place| -> Result<PathBuf> {
            let base = place.create("raw", "", "base", bytes)?;
            place.io(&raw_image(&base), "write -P 1 0 6M")?;
            on(place, &base, "raw", "top", bytes)
        });
        let [source_top, target_top] = tops;
        let (source_top, target_top) = (source_top?, target_top?);
        source.io(&image(&source_top), "write -P 2 1M 3M")?;
        let at_source = source.start(&disks(std::slice::from_ref(&source_top)), false)?;
        let at_target = target.start(&disks(&[target_top]), true)?;
        Ok(Self { at_source, at_target, source_top, target })
    }
}

/// Flips one bit of a raw image.
fn flip(file: &Path, at: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
}

pub(crate) fn what_differs_is_not_copied(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["differs"])?;
    let pair = Pair::set_up(&stage, lab, "differs", version)?;
    let base = pair.target.file("base");
    // Below what the source's topmost image has: nobody sees it.
    flip(&base, 2 * MIB)?;
    const AT: u64 = 5 * MIB + 70_000;
    flip(&base, AT)?;
    let (code, found) = stage.check("differs", &["--incremental"])?;
    ensure!(code == 0, "{found:?}");
    let before = [pair.at_source.snapshot()?, pair.at_target.snapshot()?];
    let (code, last) = stage.migrate("differs", &["--incremental", "--retry", "3"])?;
    ensure!(code == 1 && last["outcome"]["leftovers"] == json!([]), "{last}");
    let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
    let first = AT / 65536 * 65536;
    tells(
        &told,
        "base-differs",
        "problem",
        &["disk0", &format!("bytes {first} to {} differ", first + 65535)],
    )?;
    let after = [pair.at_source.snapshot()?, pair.at_target.snapshot()?];
    ensure!(before == after, "{before:#?} became {after:#?}");
    flip(&base, AT)?;
    // Where the source's base has nothing.
    flip(&base, 7 * MIB)?;
    let (code, last) = stage.migrate("differs", &["--incremental"])?;
    let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
    ensure!(code == 1, "{last}");
    tells(&told, "base-differs", "problem", &["disk0", &format!("bytes {} to", 7 * MIB)])?;
    flip(&base, 7 * MIB)?;
    let (code, last) = stage.migrate("differs", &["--incremental"])?;
    ensure!(code == 0, "{last}");
    let (theirs, ours) = (pair.target.file("top"), pair.source_top);
    pair.at_source.quit()?;
    pair.at_target.quit()?;
    same(&lab.paths, &ours, &theirs)
}

#[test]
#[ignore = "make disks"]
fn a_base_that_differs_in_one_bit_stops_it_on_qemu_10() -> Result<()> {
    with_lab("a_base_that_differs_in_one_bit_stops_it_on_qemu_10", |lab| {
        what_differs_is_not_copied(lab, Version::V10)
    })
}

#[test]
#[ignore = "make disks"]
fn a_base_that_differs_in_one_bit_stops_it_on_qemu_7_2() -> Result<()> {
    with_lab("a_base_that_differs_in_one_bit_stops_it_on_qemu_7_2", |lab| {
        what_differs_is_not_copied(lab, Version::V72)
    })
}

/// What an earlier try has left in the destination's topmost image is written over.
#[test]
#[ignore = "make disks"]
fn a_further_try_goes_on_onto_what_the_first_has_left() -> Result<()> {
    with_lab("a_further_try_goes_on_onto_what_the_first_has_left", |lab| {
        let stage = Stage::set_up(lab, &["again"])?;
        let Pair { at_source, at_target, source_top, target } =
            Pair::set_up(&stage, lab, "again", Version::V10)?;
        let top = target.file("top");
        let slowly = ["--incremental", "--retry", "9", "--limit", "1MiB/s"];
        let migration = Migration::begin(&stage.alpha, "again", "bravo", &slowly)?;
        wait_for("a part of the topmost image", LONG, || Ok((allocated(&top)? > MIB).then_some(())))?;
        at_target.kill()?;
        wait_for("the end of the first try", LONG, || {
            Ok((migration.now(&stage.alpha)?["tries"]["number"] != 1).then_some(()))
        })?;
        let at_target = target.start(&disks(std::slice::from_ref(&top)), true)?;
        let limited = stage.alpha.vmferry(&["limit", "again", "--rate", "none"])?;
        ensure!(limited.code == 0, "{limited:?}");
        let last = migration.ended(&stage.alpha)?;
        ensure!(last["outcome"]["result"] == "moved", "{last}");
        at_source.quit()?;
        at_target.quit()?;
        same(&lab.paths, &source_top, &top)
    })
}

/// Neither side has anything that could be left, and both say so.
#[test]
#[ignore = "make disks"]
fn what_stands_on_nothing_is_refused_by_name() -> Result<()> {
    with_lab("what_stands_on_nothing_is_refused_by_name", |lab| {
        let stage = Stage::set_up(lab, &["raw", "flat"])?;
        let [source, target] = stage.places(lab, "raw", Version::V10)?;
        let ours = source.image("raw", "", "0.raw")?;
        let theirs = target.image("raw", "", "0.raw")?;
        let (_source, _target) =
            (source.start(&disks(&[ours]), false)?, target.start(&disks(&[theirs]), true)?);
        let (code, found) = stage.check("raw", &["--incremental"])?;
        ensure!(code == 1, "{found:?}");
        tells(&found, "no-base", "problem", &["disk0", "raw"])?;
        let [source, target] = stage.places(lab, "flat", Version::V10)?;
        let base = source.image("qcow2", "", "base")?;
        let ours = on(&source, &base, "qcow2", "top", super::machine::DISK_BYTES)?;
        let theirs = target.image("qcow2", "", "top")?;
        let (_source, _target) =
            (source.start(&disks(&[ours]), false)?, target.start(&disks(&[theirs]), true)?);
        let (code, found) = stage.check("flat", &["--incremental"])?;
        ensure!(code == 1, "{found:?}");
        tells(&found, "no-base", "problem", &["disk0", "stands on no backing file"])?;
        let (code, last) = stage.migrate("flat", &["--incremental=disk0"])?;
        ensure!(code == 1, "{last}");
        let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
        tells(&told, "no-base", "problem", &["disk0"])
    })
}

/// A terabyte of nothing below both topmost images costs nobody a terabyte of reading.
#[test]
#[ignore = "make disks"]
fn nothing_in_a_base_is_not_read() -> Result<()> {
    holes_are_not_read("nothing_in_a_base_is_not_read", Version::V72)
}

pub(crate) fn holes_are_not_read(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["hollow"])?;
        let Pair { at_source, at_target, source_top, target } =
            Pair::of_bytes(&stage, lab, ("hollow", MIB << 20), version)?;
        let last = moves(&stage, "hollow", at_source, at_target, &["--incremental"])?;
        let said = format!("(3 MiB were hashed, {} MiB read as zeroes)", (1 << 20) - 6);
        ensure!(last["notes"].to_string().contains(&said), "{last}");
        same(&lab.paths, &source_top, &target.file("top"))
    })
}
