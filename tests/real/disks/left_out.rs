//! Disks that are chosen: those that are not copied have to be on storage that both hosts share, and the
//! others are begun in the order and number that was asked for.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::{Machine, Place, blockdev, device, file_node, raw};
use super::{Stage, moves, tells};
use crate::support::process::{SHORT, run};
use crate::support::volume::Loop;
use crate::support::{Lab, Qmp, Version, with_lab};

/// What is written to the disk of this number, and how it is found.
fn pattern(number: usize) -> String {
    format!("-P {} {number}M 512k", number + 1)
}

/// By the file's extension.
fn format_of(file: &Path) -> &str {
    file.extension().and_then(|extension| extension.to_str()).unwrap_or("raw")
}

fn disks(files: &[std::path::PathBuf]) -> Vec<String> {
    let one = |(n, file): (usize, &std::path::PathBuf)| {
        let mut node = raw(&format!("n{n}"), file);
        node["driver"] = json!(format_of(file));
        [blockdev(&node), device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=n{n}", n + 5))].concat()
    };
    files.iter().enumerate().flat_map(one).collect()
}

fn options(file: &Path) -> String {
    format!("driver={},file.filename={}", format_of(file), file.display())
}

/// One disk of each host's own and one that both share.
struct Mixed {
    source: Place,
    target: Place,
    at_source: Machine,
    at_target: Machine,
    shared: std::path::PathBuf,
}

impl Mixed {
    fn set_up(stage: &Stage, lab: &Lab, name: &str, version: Version) -> Result<Self> {
        let [source, target] = stage.places(lab, name, version)?;
        let shared = source.image("qcow2", "", "shared.qcow2")?;
        run(source.paths.qemu_img().args(["bitmap", "--add"]).arg(&shared).arg("nightly"), SHORT)?;
        let own = source.image("raw", "", "own.raw")?;
        let there = target.image("raw", "", "own.raw")?;
        source.io(&options(&own), &format!("write {}", pattern(0)))?;
        source.io(&options(&shared), &format!("write {}", pattern(1)))?;
        let at_source = source.start(&disks(&[own, shared.clone()]), false)?;
        let at_target = target.start(&disks(&[there, shared.clone()]), true)?;
        Ok(Self { source, target, at_source, at_target, shared })
    }

    /// What the shared image says of its dirty bitmap.
    fn bitmap(&self) -> Result<Value> {
        let info = ["info", "-U", "--output=json"];
        let info = run(self.source.paths.qemu_img().args(info).arg(&self.shared), SHORT)?;
        let info: Value = serde_json::from_str(&info)?;
        Ok(info["format-specific"]["data"]["bitmaps"][0].clone())
    }
}

pub(crate) fn what_is_shared_stays_where_it_is(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["mixed", "ram"])?;
    let mixed = Mixed::set_up(&stage, lab, "mixed", version)?;
    let (code, found) = stage.check("mixed", &[])?;
    ensure!(code == 1, "{found:?}");
    tells(&found, "same-image", "problem", &["disk1", "both hosts"])?;
    let (code, found) = stage.check("mixed", &["--except-disk", "disk9"])?;
    ensure!(code == 1, "{found:?}");
    tells(&found, "disk-unknown", "problem", &["disk9"])?;
    let (code, found) = stage.check("mixed", &["--disk", "disk0"])?;
    ensure!(code == 0, "{found:?}");
    tells(&found, "disk-left-out", "note", &["disk1", "both hosts use one storage"])?;

    let (code, last) = stage.migrate("mixed", &["--disk", "disk0"])?;
    ensure!(code == 0 && last["outcome"]["result"] == "moved", "{last}");
    let copied: Vec<_> = last["disks"].as_array().context("no disks")?.iter().map(|d| &d["name"]).collect();
    ensure!(copied == ["disk0"], "{last}");
    ensure!(last["notes"].to_string().contains("disk1 is not copied"), "{last}");
    // A guest that is loaded and does not run has not begun to use it: the source's could still go on.
    ensure!(mixed.bitmap()?["flags"] == json!(["auto"]), "{}", mixed.bitmap()?);
    mixed.target.io(&options(&mixed.shared), &format!("write {}", pattern(2)))?;
    let mut qmp = mixed.at_target.qmp()?;
    qmp.query("cont")?;
    ensure!(qmp.status()? == "running");
    drop(qmp);
    ensure!(
        mixed.target.io(&options(&mixed.shared), &format!("write {}", pattern(3))).is_err(),
        "a running guest does not have its disk for itself"
    );
    let Mixed { source, target, at_source, at_target, shared } = mixed;
    at_source.quit()?;
    at_target.quit()?;
    target.io(&options(&target.file("own.raw")), &format!("read {}", pattern(0)))?;
    for number in [1, 2] {
        source.io(&options(&shared), &format!("read {}", pattern(number)))?;
    }

    // RAM alone.
    let [source, target] = stage.places(lab, "ram", version)?;
    let both = [source.image("raw", "", "a.raw")?, source.image("raw", "", "b.raw")?];
    let before = std::fs::read(&both[0])?;
    let (at_source, at_target) = (source.start(&disks(&both), false)?, target.start(&disks(&both), true)?);
    let all = ["--except-disk", "disk0", "--except-disk", "disk1"];
    let last = moves(&stage, "ram", at_source, at_target, &all)?;
    ensure!(last["disks"] == json!([]), "{last}");
    ensure!(std::fs::read(&both[0])? == before, "a shared disk was written to");
    Ok(())
}

#[test]
fn what_is_shared_stays_where_it_is_on_qemu_10() -> Result<()> {
    with_lab("what_is_shared_stays_where_it_is_on_qemu_10", |lab| {
        what_is_shared_stays_where_it_is(lab, Version::V10)
    })
}

#[test]
fn what_is_shared_stays_where_it_is_on_qemu_7_2() -> Result<()> {
    with_lab("what_is_shared_stays_where_it_is_on_qemu_7_2", |lab| {
        what_is_shared_stays_where_it_is(lab, Version::V72)
    })
}

/// A node of what lies in this file from this byte on.
fn part(file: &Path, at: u64) -> Value {
    json!({"driver": "raw", "node-name": "n0", "offset": at, "size": 1 << 20, "file": file_node(file)})
}

fn below_filter(below: &Value) -> Value {
    json!({"driver": "throttle", "node-name": "n0", "throttle-group": "calm", "file": below})
}

/// One storage may show two guests two things. What the guest would find there is another disk then: the one before
/// a snapshot, another part, the bytes of a format instead of what they mean.
#[test]
fn what_one_storage_shows_in_two_ways_is_not_one_disk() -> Result<()> {
    with_lab("what_one_storage_shows_in_two_ways_is_not_one_disk", |lab| {
        let stage = Stage::set_up(lab, &["snapshot", "part", "format"])?;
        let words = |node: &Value| {
            let group = ["-object".to_owned(), "throttle-group,id=calm".to_owned()];
            [group, blockdev(node), device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat()
        };
        let refused = |name: &str, at_source: &Machine, at_target: &Machine, what: &[&str]| -> Result<()> {
            let before = [at_source.snapshot()?, at_target.snapshot()?];
            let (code, found) = stage.check(name, &["--except-disk", "disk0"])?;
            ensure!(code == 1, "{name}: {found:?}");
            tells(&found, "disk-left-out", "problem", what)?;
            let (code, last) = stage.migrate(name, &["--except-disk", "disk0"])?;
            ensure!(code == 1 && last["outcome"]["result"] == "failed", "{last}");
            ensure!(
                [at_source.snapshot()?, at_target.snapshot()?] == before,
                "{name}: something was changed"
            );
            Ok(())
        };

        let [source, target] = stage.places(lab, "snapshot", Version::V10)?;
        let base = source.image("qcow2", "", "base.qcow2")?;
        let node = json!({"driver": "qcow2", "node-name": "n0", "file": file_node(&base)});
        let (at_source, at_target) =
            (source.start(&words(&node), false)?, target.start(&words(&node), true)?);
        let top = json!({"node-name": "n0", "snapshot-file": source.file("top.qcow2"), "format": "qcow2",
                         "snapshot-node-name": "top"});
        at_source.qmp()?.execute("blockdev-snapshot-sync", top)?;
        refused("snapshot", &at_source, &at_target, &["disk0", "other contents", "base.qcow2"])?;

        let [source, target] = stage.places(lab, "part", Version::V72)?;
        let file = source.image("raw", "", "parts.raw")?;
        let at_source = source.start(&words(&part(&file, 0)), false)?;
        let at_target = target.start(&words(&part(&file, 2 << 20)), true)?;
        refused("part", &at_source, &at_target, &["disk0", "other contents", "raw from byte 2097152"])?;

        let [source, target] = stage.places(lab, "format", Version::V10)?;
        let file = source.create("qcow2", "", "disk.qcow2", 1 << 20)?;
        std::fs::File::options().append(true).open(&file)?.set_len(2 << 20)?;
        let meant = json!({"driver": "qcow2", "file": file_node(&file)});
        let mut bytes = part(&file, 0);
        bytes.as_object_mut().map(|node| node.remove("node-name"));
        let at_source = source.start(&words(&below_filter(&meant)), false)?;
        let at_target = target.start(&words(&below_filter(&bytes)), true)?;
        refused("format", &at_source, &at_target, &["disk0", "other contents", "as qcow2", "as raw"])
    })
}

/// Writes to a disk of a guest that stands still, past the guest.
fn write_in(qmp: &mut Qmp, pattern: &str) -> Result<()> {
    let line = format!("qemu-io -d disk0/virtio-backend \"write {pattern}\"");
    let said = qmp.execute("human-monitor-command", json!({"command-line": line}))?;
    ensure!(said == "", "{said}");
    Ok(())
}

/// With `cache.no-flush` QEMU forces nothing to the storage when it has stopped the guest. What was written to a loop
/// device is in that device's memory then, and not in the file below it, which is the destination's: two hosts on one
/// storage, as far as one kernel can play them.
fn what_is_not_in_the_shared_storage_does_not_stay(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["unforced"])?;
    let [source, target] = stage.places(lab, "unforced", version)?;
    let shared = source.image("raw", "", "shared.raw")?;
    let device_of_it = Loop::attach(&shared)?;
    let words = |direct: bool| {
        let file = json!({"driver": "host_device", "filename": device_of_it.device});
        let cache = json!({"no-flush": true, "direct": direct});
        let node = json!({"driver": "raw", "node-name": "n0", "cache": cache, "file": file});
        [blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat()
    };
    let at_target = target.start(&disks(std::slice::from_ref(&shared)), true)?;
    let left_out = ["--except-disk", "disk0"];

    let at_source = source.start(&words(false), false)?;
    write_in(&mut at_source.qmp()?, &pattern(0))?;
    let (code, found) = stage.check("unforced", &left_out)?;
    ensure!(code == 1, "{found:?}");
    tells(&found, "disk-left-out", "note", &["disk0", "both hosts use one storage"])?;
    tells(&found, "disk-not-stored", "problem", &["disk0", "memory of the source's host", "older contents"])?;
    let (code, last) = stage.migrate("unforced", &left_out)?;
    ensure!(code == 1 && last["outcome"]["result"] == "failed", "{last}");
    ensure!(last["outcome"].to_string().contains("cache.direct=on"), "{last}");
    at_source.quit()?;

    let at_source = source.start(&words(true), false)?;
    write_in(&mut at_source.qmp()?, &pattern(1))?;
    let (code, found) = stage.check("unforced", &left_out)?;
    ensure!(code == 0 && !found.iter().any(|found| found["kind"] == "disk-not-stored"), "{found:?}");
    moves(&stage, "unforced", at_source, at_target, &left_out)?;
    target.io(&options(&shared), &format!("read {}", pattern(1)))
}

#[test]
fn what_is_not_in_the_shared_storage_does_not_stay_on_qemu_10() -> Result<()> {
    with_lab("what_is_not_in_the_shared_storage_does_not_stay_on_qemu_10", |lab| {
        what_is_not_in_the_shared_storage_does_not_stay(lab, Version::V10)
    })
}

#[test]
fn what_is_not_in_the_shared_storage_does_not_stay_on_qemu_7_2() -> Result<()> {
    with_lab("what_is_not_in_the_shared_storage_does_not_stay_on_qemu_7_2", |lab| {
        what_is_not_in_the_shared_storage_does_not_stay(lab, Version::V72)
    })
}

/// An image of the destination's own is another disk, unless its operator says that it is not; nothing is
/// written to it.
#[test]
fn what_is_not_known_to_be_shared_needs_somebodys_word() -> Result<()> {
    with_lab("what_is_not_known_to_be_shared_needs_somebodys_word", |lab| {
        let stage = Stage::set_up(lab, &["own"])?;
        let [source, target] = stage.places(lab, "own", Version::V10)?;
        let images = |place: &Place| -> Result<_> {
            Ok([place.image("raw", "", "0.raw")?, place.image("raw", "", "1.raw")?])
        };
        let (ours, theirs) = (images(&source)?, images(&target)?);
        target.io(&options(&theirs[1]), &format!("write {}", pattern(1)))?;
        let before = std::fs::read(&theirs[1])?;
        let (at_source, at_target) =
            (source.start(&disks(&ours), false)?, target.start(&disks(&theirs), true)?);
        let (code, last) = stage.migrate("own", &["--except-disk", "disk1"])?;
        ensure!(code == 1, "{last}");
        let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
        tells(&told, "disk-left-out", "problem", &["disk1", "not known"])?;
        let accepted = ["--except-disk", "disk1", "--accept", "disk-left-out"];
        moves(&stage, "own", at_source, at_target, &accepted)?;
        ensure!(std::fs::read(&theirs[1])? == before, "a disk that was left out was written to");
        Ok(())
    })
}

/// What QEMU tells of its jobs.
fn beginnings_and_ends(events: &[Value]) -> Vec<String> {
    let of = |event: &Value| match event["event"].as_str() {
        Some("JOB_STATUS_CHANGE") if event["data"]["status"] == "created" => {
            Some(format!("begins {}", event["data"]["id"].as_str()?))
        }
        Some("BLOCK_JOB_READY") => Some(format!("ready {}", event["data"]["device"].as_str()?)),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

#[test]
fn disks_are_begun_in_the_order_and_number_that_was_asked_for() -> Result<()> {
    begin_in_order("disks_are_begun_in_the_order_and_number_that_was_asked_for", Version::V10)
}

#[test]
#[ignore = "make disks"]
fn disks_are_begun_in_the_order_and_number_that_was_asked_for_on_qemu_7_2() -> Result<()> {
    begin_in_order("disks_are_begun_in_the_order_and_number_that_was_asked_for_on_qemu_7_2", Version::V72)
}

pub(crate) fn begin_in_order(name: &str, version: Version) -> Result<()> {
    const BYTES: u64 = 40 << 20;
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["order"])?;
        let [source, target] = stage.places(lab, "order", version)?;
        let images = |place: &Place| -> Result<Vec<_>> {
            (0..3).map(|n| place.create("raw", "", &format!("{n}.raw"), BYTES)).collect()
        };
        // More than what a mirror has in flight: that is written before QEMU begins another one.
        let (ours, theirs) = (images(&source)?, images(&target)?);
        for (number, file) in ours.iter().enumerate() {
            source.io(&options(file), &format!("write -P {} 0 36M", number + 1))?;
        }
        let (at_source, at_target) =
            (source.start(&disks(&ours), false)?, target.start(&disks(&theirs), true)?);
        let mut watcher = at_source.qmp()?;
        let order = [
            "--disk",
            "disk2",
            "--disk",
            "disk0",
            "--disk",
            "disk1",
            "--disks-at-once",
            "1",
            "--limit",
            "40MiB/s",
            "--keep-source",
        ];
        let (code, last) = stage.migrate("order", &order)?;
        ensure!(code == 0, "{last}");
        // Its answer comes behind all events.
        watcher.query("query-status")?;
        let told = beginnings_and_ends(&watcher.take_events());
        let expected = ["disk2", "disk0", "disk1"];
        let expected: Vec<_> = expected
            .iter()
            .flat_map(|d| [format!("begins vmferry-{d}"), format!("ready vmferry-{d}")])
            .collect();
        ensure!(told == expected, "{told:?}");
        drop(watcher);
        at_source.quit()?;
        at_target.quit()?;
        for (number, file) in theirs.iter().enumerate() {
            target.io(&options(file), &format!("read -P {} 0 36M", number + 1))?;
        }
        Ok(())
    })
}
