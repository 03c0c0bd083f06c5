//! What somebody does meanwhile to an image that lies below a filter: the drive's node is the same as before.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Stage;
use super::machine::{Machine, Place, blockdev, device, file_node, raw};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::{Lab, Version, with_lab};

/// Words for disk0 on a raw image of its own, and disk1 on a qcow2 image below a filter.
fn words(own: &Path, filtered: &Path) -> Vec<String> {
    let group = ["-object".to_owned(), "throttle-group,id=calm".to_owned()];
    let image = json!({"driver": "qcow2", "node-name": "image", "file": file_node(filtered)});
    let filter = json!({"driver": "throttle", "node-name": "n1", "throttle-group": "calm", "file": "image"});
    let nodes = [blockdev(&raw("n0", own)), blockdev(&image), blockdev(&filter)];
    let plugged = |n: usize| device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=n{n}", n + 5));
    [group].into_iter().chain(nodes).chain([plugged(0), plugged(1)]).flatten().collect()
}

struct Filtered {
    source: Place,
    at_source: Machine,
    at_target: Machine,
}

/// With a file of both hosts below the filter, or one of each host's own.
fn start(stage: &Stage, lab: &Lab, version: Version, is_shared: bool) -> Result<Filtered> {
    let [source, target] = stage.places(lab, "filtered", version)?;
    let (own, there) = (source.image("raw", "", "own.raw")?, target.image("raw", "", "own.raw")?);
    source.io(&format!("driver=raw,file.filename={}", own.display()), "write -P 1 0 4M")?;
    let below = source.image("qcow2", "", "below.qcow2")?;
    let below_there = if is_shared { below.clone() } else { target.image("qcow2", "", "below.qcow2")? };
    let at_source = source.start(&words(&own, &below), false)?;
    let at_target = target.start(&words(&there, &below_there), true)?;
    Ok(Filtered { source, at_source, at_target })
}

/// Migrates, and does something to the source's QEMU when the copy has begun. Why it failed.
fn fails(
    stage: &Stage,
    bed: &Filtered,
    more: &[&str],
    act: impl FnOnce(&mut crate::support::Qmp) -> Result<()>,
) -> Result<String> {
    let mut qmp = bed.at_source.qmp()?;
    let order = ["migrate", "filtered", "--to", "bravo", "--limit", "1MiB/s", "--json"];
    let run = stage.alpha.vmferry_start(&[&order, more].concat())?;
    wait_for("the copy's beginning", SHORT, || {
        Ok(qmp.query("query-block-jobs")?.as_array().is_some_and(|jobs| !jobs.is_empty()).then_some(()))
    })?;
    act(&mut qmp)?;
    let outcome = run.wait(LONG)?;
    let last: Value = serde_json::from_str(outcome.stdout.lines().last().context("nothing was said")?)?;
    ensure!(outcome.code == 1 && last["outcome"]["leftovers"] == json!([]), "{last}");
    // As QEMU 7.2 calls one that was paused already when its switchover began.
    let status = qmp.status()?;
    ensure!(status == "paused" || status == "postmigrate", "the guest is {status}");
    Ok(last["outcome"]["cause"].as_str().unwrap_or_default().to_owned())
}

/// A disk that is not copied is nobody's but the guest's, and QEMU lets anybody put an image above it. The destination's
/// QEMU has the one that was the topmost.
#[test]
fn a_snapshot_of_a_shared_disk_below_a_filter_ends_it() -> Result<()> {
    with_lab("a_snapshot_of_a_shared_disk_below_a_filter_ends_it", |lab| {
        let stage = Stage::set_up(lab, &["filtered"])?;
        let bed = start(&stage, lab, Version::V10, true)?;
        let top = json!({"node-name": "image", "snapshot-file": bed.source.file("top.qcow2"),
                         "format": "qcow2", "snapshot-node-name": "top"});
        let cause = fails(&stage, &bed, &["--except-disk", "disk1"], |qmp| {
            qmp.execute("blockdev-snapshot-sync", top).map(drop)
        })?;
        ensure!(cause.contains("has changed") && cause.contains("top.qcow2"), "{cause}");
        ensure!(bed.at_target.qmp()?.status()? == "inmigrate");
        Ok(())
    })
}

/// A backup that begins on the way. QEMU would abort when it gives the image up, and the guest would die.
fn a_bitmap_in_use(version: Version, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["filtered"])?;
        let bed = start(&stage, lab, version, false)?;
        let socket = bed.source.file("backup.nbd");
        let cause = fails(&stage, &bed, &[], |qmp| {
            let bitmap = json!({"node": "image", "name": "backup", "persistent": true, "disabled": true});
            qmp.execute("block-dirty-bitmap-add", bitmap)?;
            qmp.execute("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}))?;
            let export =
                json!({"type": "nbd", "id": "b", "node-name": "image", "name": "b", "bitmaps": ["backup"]});
            qmp.execute("block-export-add", export).map(drop)
        })?;
        ensure!(cause.contains("bitmap backup") && cause.contains("end the backup first"), "{cause}");
        Ok(())
    })
}

#[test]
fn a_bitmap_in_use_below_a_filter_ends_it_on_qemu_10() -> Result<()> {
    a_bitmap_in_use(Version::V10, "a_bitmap_in_use_below_a_filter_ends_it_on_qemu_10")
}

#[test]
#[ignore = "make disks"]
fn a_bitmap_in_use_below_a_filter_ends_it_on_qemu_7_2() -> Result<()> {
    a_bitmap_in_use(Version::V72, "a_bitmap_in_use_below_a_filter_ends_it_on_qemu_7_2")
}
