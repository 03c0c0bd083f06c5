//! Larger devices that the destination's own commands make: the guest sees its size of them and no more, and
//! after a failure they are gone. A file stands in for a volume of LVM, whose size is rounded up.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::machine::{DISK_BYTES, Place, blockdev, device, file_node, raw};
use super::{Stage, tells};
use crate::faults::Migration;
use crate::support::process::{LONG, wait_for};
use crate::support::vm::write_script;
use crate::support::{Lab, Version};

/// What the commands are of, in bravo's configuration; `DIR` is its folder.
pub(super) const CREATE: &str = "[vm.volume.create]\npath = 'DIR/volume/{vm}-{disk}'\n\
                                 command = ['DIR/volume/make', 'a word']\nremove = ['DIR/volume/make']";

/// Makes and removes a volume of so many bytes, and takes notes.
fn commands(target: &Place, bytes: u64) -> Result<()> {
    let log = target.file("calls");
    let script = format!(
        "#!/bin/sh\necho $VMFERRY_ACTION $VMFERRY_VM $VMFERRY_DISK $VMFERRY_BYTES $VMFERRY_FORMAT $# >> '{}'\n\
         case $VMFERRY_ACTION in\n create) truncate -s {bytes} \"$VMFERRY_PATH\";;\n remove) rm \"$VMFERRY_PATH\";;\nesac\n",
        log.display()
    );
    write_script(&target.file("make"), &script)
}

/// Takes the notes.
fn calls(target: &Place) -> Result<Vec<String>> {
    let calls = fs::read_to_string(target.file("calls")).unwrap_or_default();
    let _ = fs::remove_file(target.file("calls"));
    Ok(calls.lines().map(str::to_owned).collect())
}

/// A disk that is so many bytes of a volume; all of it without.
fn disk(volume: &Path, bytes: Option<u64>) -> Vec<String> {
    let mut node = raw("n", volume);
    if let Some(bytes) = bytes {
        node = json!({"driver": "raw", "node-name": "n", "size": bytes, "file": file_node(volume)});
    }
    [blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=n")].concat()
}

/// Alone, with one QEMU on both hosts.
pub(crate) fn on(lab: &Lab, version: Version) -> Result<()> {
    let stage = Stage::set_up_with(lab, &["volume"], Some(CREATE))?;
    what_commands_make_is_used_and_removed(&stage, lab, version)
}

pub(super) fn what_commands_make_is_used_and_removed(
    stage: &Stage,
    lab: &Lab,
    version: Version,
) -> Result<()> {
    let [source, target] = stage.places(lab, "volume", version)?;
    let ours = source.image("raw", "", "0.raw")?;
    let (volume, options) = (target.file("volume-disk0"), |file: &Path| {
        format!("driver=raw,size={DISK_BYTES},file.filename={}", file.display())
    });
    source.io(&options(&ours), &format!("write -P 7 0 {DISK_BYTES}"))?;
    let at_source = source.start(&disk(&ours, None), false)?;
    let made = format!("create volume disk0 {DISK_BYTES} raw 1");
    let removed = format!("remove volume disk0 {DISK_BYTES} raw 0");
    let is_undone = |what: &str| -> Result<()> {
        // The source need not wait for it.
        wait_for("the volume to be removed", LONG, || {
            let all = fs::read_to_string(target.file("calls")).unwrap_or_default();
            Ok((all.lines().count() > 1 && !volume.exists()).then_some(()))
        })
        .with_context(|| what.to_owned())?;
        let calls = calls(&target)?;
        ensure!(calls == [made.clone(), removed.clone()], "{what}: {calls:?}");
        Ok(())
    };

    // Neither too small a volume nor one whose whole size the guest would see.
    for (bytes, kind) in [(DISK_BYTES / 2, "disk-too-small"), (DISK_BYTES * 2, "disk-too-large")] {
        commands(&target, bytes)?;
        target.will_start(&disk(&volume, None))?;
        let (code, found) = stage.check("volume", &[])?;
        ensure!(code == 1, "{found:?}");
        tells(&found, kind, "problem", &["disk0", &bytes.to_string(), &DISK_BYTES.to_string()])?;
        is_undone(kind)?;
    }

    target.will_start(&disk(&volume, Some(DISK_BYTES)))?;
    let (code, found) = stage.check("volume", &[])?;
    ensure!(code == 0, "{found:?}");
    is_undone("check")?;
    let migration = Migration::begin(&stage.alpha, "volume", "bravo", &["--limit", "64KiB/s"])?;
    migration.reach(&stage.alpha.socket(), "mirror", |_| true)?;
    ensure!(volume.exists(), "nothing was made");
    migration.cancel(&stage.alpha)?;
    let last = migration.ended(&stage.alpha)?;
    ensure!(last["outcome"]["cancelled"] == true && last["outcome"]["leftovers"] == json!([]), "{last}");
    is_undone("a failure")?;

    wait_for("the guest to be moved", LONG, || {
        let (code, last) = stage.migrate("volume", &[])?;
        // The destination's agent may not be done with the one before.
        ensure!(code == 0 || last["outcome"]["problems"][0]["kind"] == "busy", "{last}");
        Ok((code == 0).then_some(()))
    })?;
    at_source.quit()?;
    target.quit_started()?;
    let calls = calls(&target)?;
    ensure!(calls == [made], "{calls:?}");
    target.io(&options(&volume), &format!("read -P 7 0 {DISK_BYTES}"))?;
    let all = fs::read(&volume)?;
    ensure!(all.len() as u64 == DISK_BYTES * 2, "its size was changed");
    ensure!(
        all[DISK_BYTES as usize..].iter().all(|byte| *byte == 0),
        "what is behind the disk was written to"
    );
    Ok(())
}
