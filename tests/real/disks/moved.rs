//! Odd disks that can be moved, and what is said of what does not go along.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::machine::{DISK_BYTES, Machine, Place, SECRET, blockdev, device, file_node, raw};
use super::{Stage, tells};
use crate::support::process::{SHORT, run};
use crate::support::{Lab, Version, Volume, with_lab};

/// Writes a pattern of its own to a place of its own of each disk.
fn write(number: usize) -> String {
    format!("write -P {} {}k 64k", number + 1, 64 * (number % 60))
}

fn read(number: usize) -> String {
    format!("read -P {} {}k 64k", number + 1, 64 * (number % 60))
}

fn add(words: &mut Vec<String>, parts: impl IntoIterator<Item = [String; 2]>) {
    words.extend(parts.into_iter().flatten());
}

/// A kind of disk: how its node is made, and how `qemu-io` opens its image.
struct Kind {
    device: &'static str,
    make: fn(&Place, usize) -> Result<(Value, String)>,
}

/// None of the devices has an id.
const KINDS: &[Kind] = &[
    Kind { device: "virtio-blk-pci,addr=5", make: plain },
    Kind { device: "virtio-blk-pci,addr=6", make: plain },
    Kind { device: "scsi-hd,bus=scsi.0,scsi-id=3,lun=1", make: filtered_luks },
    Kind { device: "scsi-hd,bus=scsi.0,scsi-id=3,lun=2", make: encrypted_qcow2 },
    Kind { device: "ide-hd,bus=ide.2", make: data_file },
    Kind { device: "ide-hd,bus=ide.3", make: on_backing },
];

fn plain(place: &Place, n: usize) -> Result<(Value, String)> {
    let file = place.image("raw", "", &format!("{n}.raw"))?;
    Ok((raw(&format!("n{n}"), &file), format!("driver=raw,file.filename={}", file.display())))
}

fn filtered_luks(place: &Place, n: usize) -> Result<(Value, String)> {
    let file = place.image("luks", "key-secret=key,iter-time=10", &format!("{n}.luks"))?;
    let luks = json!({"driver": "luks", "key-secret": "key", "file": file_node(&file)});
    let node =
        json!({"driver": "throttle", "node-name": format!("n{n}"), "throttle-group": "calm", "file": luks});
    Ok((node, format!("driver=luks,key-secret=key,file.filename={}", file.display())))
}

fn encrypted_qcow2(place: &Place, n: usize) -> Result<(Value, String)> {
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let file = place.image("qcow2", options, &format!("{n}.qcow2"))?;
    let node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "file": file_node(&file),
                      "encrypt": {"format": "luks", "key-secret": "key"}});
    let options = format!("driver=qcow2,encrypt.key-secret=key,file.filename={}", file.display());
    Ok((node, options))
}

fn data_file(place: &Place, n: usize) -> Result<(Value, String)> {
    let data = place.file(&format!("{n}.data"));
    let file = place.image("qcow2", &format!("data_file={}", data.display()), &format!("{n}.qcow2"))?;
    let node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "file": file_node(&file)});
    Ok((node, format!("driver=qcow2,file.filename={}", file.display())))
}

/// What is written to the backing file, and how it is found.
const BELOW: (&str, &str) = ("write -P 99 3M 64k", "read -P 99 3M 64k");

/// With a backing file at the source.
fn on_backing(place: &Place, n: usize) -> Result<(Value, String)> {
    let base = place.image("qcow2", "", &format!("{n}-base.qcow2"))?;
    let (is_source, mut options) = (place.host.name == "alpha", String::new());
    if is_source {
        place.io(&format!("driver=qcow2,file.filename={}", base.display()), BELOW.0)?;
        options = format!("backing_file={},backing_fmt=qcow2", base.display());
    }
    let file = place.image("qcow2", &options, &format!("{n}.qcow2"))?;
    if is_source {
        let mut add = place.paths.qemu_img();
        run(add.args(["bitmap", "--add", "-g", "64k"]).arg(&file).arg("weekly"), SHORT)?;
    }
    let node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "file": file_node(&file)});
    Ok((node, format!("driver=qcow2,file.filename={}", file.display())))
}

/// QEMU's own hash of a dirty bitmap's bits.
fn bits(machine: &Machine, node: &str, name: &str) -> Result<Value> {
    machine.qmp()?.execute("x-debug-block-dirty-bitmap-sha256", json!({"node": node, "name": name}))
}

/// What is known of a node's dirty bitmaps.
fn bitmaps(machine: &Machine, node: &str) -> Result<Vec<Value>> {
    let nodes = machine.qmp()?.execute("query-named-block-nodes", json!({"flat": true}))?;
    let found = nodes.as_array().into_iter().flatten().find(|known| known["node-name"] == node);
    Ok(found.and_then(|node| node["dirty-bitmaps"].as_array().cloned()).unwrap_or_default())
}

/// The words for a guest with a disk of each kind, in this order, and how their images are opened.
fn all_kinds(place: &Place, reversed: bool) -> Result<(Vec<String>, Vec<String>)> {
    let mut words = Vec::new();
    add(&mut words, [["-object".into(), SECRET.into()], ["-object".into(), "throttle-group,id=calm".into()]]);
    add(&mut words, [device("virtio-scsi-pci,addr=9")]);
    let (mut disks, mut images) = (Vec::new(), Vec::new());
    for (n, kind) in KINDS.iter().enumerate() {
        let (node, image) = (kind.make)(place, n)?;
        disks.push([blockdev(&node), device(&format!("{},drive=n{n}", kind.device))]);
        images.push(image);
    }
    // A medium that is read-only.
    let medium = place.create("raw", "", "cd.raw", if reversed { DISK_BYTES * 2 } else { DISK_BYTES })?;
    let mut node = raw("cd", &medium);
    node["read-only"] = json!(true);
    disks.push([blockdev(&node), device("scsi-cd,id=cd0,bus=scsi.0,scsi-id=4,lun=0,drive=cd")]);
    if reversed {
        disks.reverse();
    }
    disks.into_iter().for_each(|disk| add(&mut words, disk));
    Ok((words, images))
}

pub(crate) fn each_kind_arrives_in_its_place(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up(lab, &["kinds"])?;
    let [source, target] = stage.places(lab, "kinds", version)?;
    let (source_words, images) = all_kinds(&source, false)?;
    for (n, image) in images.iter().enumerate() {
        source.io(image, &write(n))?;
    }
    let (target_words, copies) = all_kinds(&target, true)?;
    let at_source = source.start(&source_words, false)?;
    let at_target = target.start(&target_words, true)?;
    let mut qmp = at_source.qmp()?;
    // One that is in the image has what was written there; one that is not gets the same.
    let bitmap = json!({"node": "n0", "name": "nightly", "granularity": 65536});
    qmp.execute("block-dirty-bitmap-add", bitmap)?;
    let from = json!([{"node": "n5", "name": "weekly"}]);
    qmp.execute("block-dirty-bitmap-merge", json!({"node": "n0", "target": "nightly", "bitmaps": from}))?;
    qmp.execute("block-dirty-bitmap-add", json!({"node": "n1", "name": "disabled", "disabled": true}))?;
    let snapshot = json!({"device": "n5", "name": "before-upgrade"});
    let snapshots = qmp.execute("blockdev-snapshot-internal-sync", snapshot).is_ok();
    drop(qmp);

    let (code, found) = stage.check("kinds", &[])?;
    ensure!(code == 0, "{found:?}");
    tells(&found, "bitmaps-carried", "note", &["0000-00-05.0", "nightly"])?;
    tells(&found, "bitmaps-carried", "note", &["0000-00-1f.2-3-0", "weekly"])?;
    tells(&found, "backing-merged", "note", &["0000-00-1f.2-3-0"])?;
    tells(&found, "not-copied", "note", &["cd0"])?;
    tells(&found, "disk-too-large", "warning", &["cd0"])?;
    if snapshots {
        tells(&found, "snapshots-dropped", "warning", &["0000-00-1f.2-3-0", "before-upgrade"])?;
    }
    let (code, refused) = stage.migrate("kinds", &["--strict"])?;
    ensure!(code == 1 && refused["outcome"]["result"] == "failed", "{refused}");

    let all = [("n0", "nightly"), ("n1", "disabled"), ("n5", "weekly")];
    let before = all.map(|(node, name)| bits(&at_source, node, name));
    let written = bitmaps(&at_source, "n5")?;
    ensure!(written[0]["count"] == 65536, "{written:?}");
    let (code, report) = stage.migrate("kinds", &["--keep-source"])?;
    ensure!(code == 0 && report["outcome"]["result"] == "moved", "{report}");
    ensure!(report["outcome"]["leftovers"] == json!([]), "{report}");
    let notes = report["notes"].to_string();
    ensure!(notes.contains("nightly") && notes.contains("cd0"), "not said after the move: {notes}");
    for ((node, name), before) in all.into_iter().zip(before) {
        ensure!(bits(&at_target, node, name)? == before?, "{name} of {node} has other bits");
        let arrived = bitmaps(&at_target, node)?;
        let (records, is_stored) = (name != "disabled", name == "weekly");
        ensure!(arrived.len() == 1 && arrived[0]["recording"] == records, "{arrived:?}");
        ensure!(arrived[0]["persistent"] == is_stored && arrived[0]["busy"] == false, "{arrived:?}");
    }
    ensure!(at_target.qmp()?.status()? == "paused", "the guest was paused");
    at_source.quit()?;
    at_target.quit()?;
    let info =
        run(target.paths.qemu_img().args(["info", "--output=json"]).arg(target.file("5.qcow2")), SHORT)?;
    let stored = &serde_json::from_str::<Value>(&info)?["format-specific"]["data"]["bitmaps"];
    ensure!(stored[0]["name"] == "weekly" && stored[0]["flags"] == json!(["auto"]), "{stored}");
    for (n, copy) in copies.iter().enumerate() {
        target.io(copy, &read(n))?;
    }
    target.io(&copies[5], BELOW.1)
}

#[test]
fn disks_of_each_kind_arrive_in_their_places_on_qemu_10() -> Result<()> {
    with_lab("disks_of_each_kind_arrive_in_their_places_on_qemu_10", |lab| {
        each_kind_arrives_in_its_place(lab, Version::V10)
    })
}

#[test]
fn disks_of_each_kind_arrive_in_their_places_on_qemu_7_2() -> Result<()> {
    with_lab("disks_of_each_kind_arrive_in_their_places_on_qemu_7_2", |lab| {
        each_kind_arrives_in_its_place(lab, Version::V72)
    })
}

/// A disk on a volume of this size.
fn on_volume(place: &Place, bytes: u64) -> Result<Vec<String>> {
    let file = place.create("raw", "", "small/disk0.raw", bytes)?;
    let mut words = Vec::new();
    add(&mut words, [blockdev(&raw("vda", &file)), device("virtio-blk-pci,id=disk0,drive=vda")]);
    Ok(words)
}

/// Both sides see that what is occupied does not fit, and that what is not may not.
#[test]
fn a_disk_without_room_at_the_destination_is_refused() -> Result<()> {
    with_lab("a_disk_without_room_at_the_destination_is_refused", |lab| {
        let stage = Stage::set_up(lab, &["full", "thin"])?;
        for (name, data, kind, severity) in
            [("full", 24_u64 << 20, "no-room", "problem"), ("thin", 1 << 20, "thin-becomes-thick", "warning")]
        {
            let [source, target] = stage.places(lab, name, Version::V10)?;
            std::fs::create_dir(source.file("small"))?;
            let _volume = Volume::mount(&target.file("small"), 16)?;
            let words = on_volume(&source, 64 << 20)?;
            let options = format!("driver=raw,file.filename={}", source.file("small/disk0.raw").display());
            source.io(&options, &format!("write -P 7 0 {data}"))?;
            let at_source = source.start(&words, false)?;
            let at_target = target.start(&on_volume(&target, 64 << 20)?, true)?;
            let (code, found) = stage.check(name, &[])?;
            tells(&found, kind, severity, &["disk0", "room for"])?;
            ensure!((code == 1) == (severity == "problem"), "{code}: {found:?}");
            let (code, last) = stage.migrate(name, if code == 1 { &[] } else { &["--strict"] })?;
            ensure!(code == 1 && last["outcome"]["result"] == "failed", "{last}");
            at_source.quit()?;
            at_target.quit()?;
        }
        Ok(())
    })
}
