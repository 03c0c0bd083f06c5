//! Larger devices that the destination's own commands make: the guest sees its size of them and no more, and
//! after a failure they are gone. A file stands in for a volume of LVM, whose size is rounded up, or a loop device: a
//! real one, behind a link as LVM and ZFS make theirs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::{DISK_BYTES, Place, blockdev, device, file_node};
use super::{Stage, tells};
use crate::faults::Migration;
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::vm::write_script;
use crate::support::{Lab, Version, with_lab};

/// What the commands are of, in bravo's configuration; `DIR` is its folder.
pub(super) const CREATE: &str = "[vm.volume.create]\npath = 'DIR/volume/{vm}-{disk}'\n\
                                 command = ['DIR/volume/make', 'a word']\nremove = ['DIR/volume/make']";

/// What the commands make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Device,
}

/// What is on a device before.
const USED: u8 = 0o252;

impl Kind {
    fn script(self, bytes: u64) -> String {
        match self {
            Self::File => format!("create) truncate -s {bytes} \"$1\";;\nremove) rm \"$1\";;"),
            Self::Device => format!(
                "create) head -c {bytes} /dev/zero | tr '\\0' '\\{USED:o}' >\"$1.file\" &&\n\
                 ln -s \"$(/sbin/losetup --find --show \"$1.file\")\" \"$1\";;\n\
                 remove) /sbin/losetup --detach \"$(readlink \"$1\")\" && rm \"$1\" \"$1.file\";;"
            ),
        }
    }

    fn file_node(self, volume: &Path) -> Value {
        match self {
            Self::File => file_node(volume),
            Self::Device => json!({"driver": "host_device", "filename": volume, "discard": "unmap"}),
        }
    }

    /// What lies behind the disk is this, before and after.
    fn behind(self) -> u8 {
        if self == Self::File { 0 } else { USED }
    }
}

/// A loop device of somebody's.
struct Somebodys(PathBuf);

impl Somebodys {
    fn make(file: &Path) -> Result<Self> {
        fs::write(file, vec![9; DISK_BYTES as usize])?;
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file), SHORT)?;
        Ok(Self(device.trim().into()))
    }

    fn is_untouched(&self) -> Result<()> {
        let all = fs::read(&self.0)?;
        ensure!(all.len() as u64 == DISK_BYTES && all.iter().all(|byte| *byte == 9), "{}", self.0.display());
        Ok(())
    }
}

impl Drop for Somebodys {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0), SHORT);
    }
}

/// Makes and removes a volume of so many bytes, and takes notes.
fn commands(target: &Place, kind: Kind, bytes: u64) -> Result<()> {
    let log = target.file("calls");
    let script = format!(
        "#!/bin/sh\necho $VMFERRY_ACTION $VMFERRY_VM $VMFERRY_DISK $VMFERRY_BYTES $VMFERRY_FORMAT $# >> '{}'\n\
         set -- \"$VMFERRY_PATH\"\ncase $VMFERRY_ACTION in\n{}\nesac\n",
        log.display(),
        kind.script(bytes)
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
fn disk(kind: Kind, volume: &Path, bytes: Option<u64>) -> Vec<String> {
    let mut node =
        json!({"driver": "raw", "node-name": "n", "discard": "unmap", "file": kind.file_node(volume)});
    if let Some(bytes) = bytes {
        node["size"] = json!(bytes);
    }
    [blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=n")].concat()
}

/// Alone, with one QEMU on both hosts.
pub(crate) fn on(lab: &Lab, version: Version) -> Result<()> {
    alone(lab, version, Kind::File)
}

fn alone(lab: &Lab, version: Version, kind: Kind) -> Result<()> {
    let stage = Stage::set_up_with(lab, &["volume"], Some(CREATE))?;
    let somebodys = Somebodys::make(&lab.dir().join("somebodys"))?;
    what_commands_make_is_used_and_removed(&stage, lab, version, kind)?;
    somebodys.is_untouched()
}

#[test]
#[ignore = "make disks"]
fn what_commands_make_is_used_and_removed_on_qemu_10() -> Result<()> {
    with_lab("what_commands_make_is_used_and_removed_on_qemu_10", |lab| on(lab, Version::V10))
}

#[test]
#[ignore = "make disks"]
fn a_block_device_that_commands_make_is_used_and_removed_on_qemu_10() -> Result<()> {
    with_lab("a_block_device_that_commands_make_is_used_and_removed_on_qemu_10", |lab| {
        alone(lab, Version::V10, Kind::Device)
    })
}

#[test]
#[ignore = "make disks"]
fn a_block_device_that_commands_make_is_used_and_removed_on_qemu_7_2() -> Result<()> {
    with_lab("a_block_device_that_commands_make_is_used_and_removed_on_qemu_7_2", |lab| {
        alone(lab, Version::V72, Kind::Device)
    })
}

pub(super) fn what_commands_make_is_used_and_removed(
    stage: &Stage,
    lab: &Lab,
    version: Version,
    kind: Kind,
) -> Result<()> {
    let [source, target] = stage.places(lab, "volume", version)?;
    let ours = source.image("raw", "", "0.raw")?;
    let (volume, options) = (target.file("volume-disk0"), |file: &Path| {
        format!("driver=raw,size={DISK_BYTES},file.filename={}", file.display())
    });
    source.io(&options(&ours), &format!("write -P 7 0 {DISK_BYTES}"))?;
    let at_source = source.start(&disk(Kind::File, &ours, None), false)?;
    let before = files(&target)?;
    let made = format!("create volume disk0 {DISK_BYTES} raw 1");
    let removed = format!("remove volume disk0 {DISK_BYTES} raw 0");
    let is_undone = |what: &str| -> Result<()> {
        // The source need not wait for it.
        wait_for("the volume to be removed", LONG, || {
            let all = fs::read_to_string(target.file("calls")).unwrap_or_default();
            let is_there = files(&target)?.iter().any(|name| name.starts_with("volume"));
            Ok((all.lines().count() > 1 && !is_there).then_some(()))
        })
        .with_context(|| what.to_owned())?;
        let calls = calls(&target)?;
        ensure!(calls == [made.clone(), removed.clone()], "{what}: {calls:?}");
        ensure!(before.iter().all(|name| target.file(name).exists()), "{what}: something else was removed");
        Ok(())
    };

    // Neither too small a volume nor one whose whole size the guest would see.
    for (bytes, problem) in [(DISK_BYTES / 2, "disk-too-small"), (DISK_BYTES * 2, "disk-too-large")] {
        commands(&target, kind, bytes)?;
        target.will_start(&disk(kind, &volume, None))?;
        let (code, found) = stage.check("volume", &[])?;
        ensure!(code == 1, "{found:?}");
        tells(&found, problem, "problem", &["disk0", &bytes.to_string(), &DISK_BYTES.to_string()])?;
        is_undone(problem)?;
    }

    target.will_start(&disk(kind, &volume, Some(DISK_BYTES)))?;
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
        all[DISK_BYTES as usize..].iter().all(|byte| *byte == kind.behind()),
        "what is behind the disk was written to"
    );
    if kind == Kind::Device {
        // Nobody else removes what a guest has.
        run(
            Command::new(target.file("make"))
                .envs([("VMFERRY_ACTION", "remove")])
                .env("VMFERRY_PATH", &volume),
            LONG,
        )?;
    }
    Ok(())
}

/// The names in the destination's folder.
fn files(target: &Place) -> Result<Vec<String>> {
    fs::read_dir(&target.dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}
