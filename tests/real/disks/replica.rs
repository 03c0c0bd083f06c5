//! Replicas: a peer has a VM's disks before the VM goes there, and gets what changed. Judged by the link's own
//! counter and by the bytes in the images. No system is on the disks: what is written to them is known.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Stage;
use super::machine::{Machine, Place, blockdev, device, raw};
use crate::support::process::{LONG, run};
use crate::support::{Lab, Version, with_lab};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;
/// What one write changes in large pieces, and in pieces of 4 KiB of which each is in a part of its own.
const LARGE_BYTES: u64 = 12 * MIB;
const SMALL: u64 = 32;
/// What is recorded as changed is in parts of this size.
const PART_BYTES: u64 = 64 * 1024;
const CHANGED_BYTES: u64 = LARGE_BYTES + SMALL * PART_BYTES;

/// A guest with one disk of each format.
struct Guest {
    source: Place,
    target: Place,
    machine: Machine,
}

fn words(files: &[PathBuf]) -> Vec<String> {
    let one = |(n, file): (usize, &PathBuf)| {
        let mut node = raw(&format!("n{n}"), file);
        node["driver"] = json!(file.extension().and_then(|e| e.to_str()).unwrap_or("raw"));
        [blockdev(&node), device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=n{n}", n + 5))].concat()
    };
    files.iter().enumerate().flat_map(one).collect()
}

impl Guest {
    fn set_up(lab: &Lab, stage: &Stage, name: &str, version: Version) -> Result<Self> {
        let [source, target] = stage.places(lab, name, version)?;
        let formats = [("raw", "0.raw"), ("qcow2", "1.qcow2")];
        let ours: Result<Vec<PathBuf>> =
            formats.iter().map(|(format, name)| source.create(format, "", name, DISK_BYTES)).collect();
        let machine = source.start(&words(&ours?), false)?;
        let guest = Self { source, target, machine };
        guest.target.will_start(&words(&guest.theirs()))?;
        for disk in 0..2 {
            // Data everywhere, so that a whole copy is seen.
            guest.io(disk, &format!("write -P {} 0 {DISK_BYTES}", 11 + disk))?;
        }
        Ok(guest)
    }

    fn ours(&self) -> [PathBuf; 2] {
        [self.source.file("0.raw"), self.source.file("1.qcow2")]
    }

    /// As bravo's agent makes them.
    fn theirs(&self) -> [PathBuf; 2] {
        [self.target.file("disk0.raw"), self.target.file("disk1.qcow2")]
    }

    /// Does it as the guest would.
    fn io(&self, disk: usize, command: &str) -> Result<()> {
        let line = format!("qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"{command}\"");
        let told = self.machine.qmp()?.execute("human-monitor-command", json!({"command-line": line}))?;
        ensure!(!told.to_string().to_lowercase().contains("fail"), "{command}: {told}");
        Ok(())
    }

    /// Changes [`CHANGED_BYTES`] of the first disk, counted in parts.
    fn changes(&self, pattern: u8) -> Result<()> {
        self.io(0, &format!("write -P {pattern} 8M {LARGE_BYTES}"))?;
        let first = DISK_BYTES / 2;
        (0..SMALL)
            .try_for_each(|n| self.io(0, &format!("write -P {pattern} {} 4096", first + n * 4 * PART_BYTES)))
    }

    /// Both hosts have the same.
    fn is_same(&self, paths: &crate::support::Paths) -> Result<()> {
        let compare = |ours: &Path, theirs: &Path| {
            run(paths.qemu_img().args(["compare", "-U", "-q"]).arg(ours).arg(theirs), LONG).map(drop)
        };
        self.ours().iter().zip(&self.theirs()).try_for_each(|(ours, theirs)| compare(ours, theirs))
    }
}

/// The last line of what `vmferry replicate` prints.
fn replicate(stage: &Stage, name: &str, more: &[&str]) -> Result<(i32, Value)> {
    let outcome = stage.alpha.vmferry(&[&["replicate", name, "--to", "bravo", "--json"], more].concat())?;
    let last = outcome.stdout.lines().last().with_context(|| format!("{outcome:?}"))?;
    Ok((outcome.code, serde_json::from_str(last)?))
}

fn is_in_step(stage: &Stage, name: &str) -> Result<Value> {
    let (code, last) = replicate(stage, name, &[])?;
    ensure!(code == 0 && last["outcome"]["result"] == "replicated", "{last}");
    ensure!(last["outcome"]["leftovers"] == json!([]) && last["phase"] == "done", "{last}");
    Ok(last)
}

fn notes(report: &Value) -> String {
    report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

fn stream_bytes(report: &Value) -> u64 {
    (0..2).filter_map(|disk| report["disks"][disk]["stream_bytes"].as_u64()).sum()
}

fn only_what_changed_is_sent(lab: &Lab, stage: &Stage, version: Version) -> Result<()> {
    let guest = Guest::set_up(lab, stage, "replica", version)?;
    let most = CHANGED_BYTES * 105 / 100;
    let first = is_in_step(stage, "replica")?;
    ensure!(stream_bytes(&first) > 2 * DISK_BYTES, "less than a whole copy: {first}");
    ensure!(!notes(&first).contains("again"), "{first}");
    guest.is_same(&lab.paths).context("after the first run")?;
    ensure!(guest.machine.qmp()?.status()? == "paused", "the guest is as it was");
    // Nobody has the images open.
    let left = std::os::unix::net::UnixStream::connect(guest.target.file("test.qmp"));
    ensure!(left.is_err(), "the destination's QEMU is still there");

    guest.changes(21)?;
    let before = stage.net.alpha.sent_bytes()?;
    let second = is_in_step(stage, "replica")?;
    let sent = stage.net.alpha.sent_bytes()? - before;
    ensure!(sent >= CHANGED_BYTES && sent <= most, "{sent} bytes for {CHANGED_BYTES} that changed: {second}");
    guest.is_same(&lab.paths).context("after the second run")?;

    guest.changes(31)?;
    let (code, moved) = stage.migrate("replica", &["--keep-source"])?;
    ensure!(code == 0 && moved["outcome"]["result"] == "moved", "{moved}");
    ensure!(moved["outcome"]["leftovers"] == json!([]), "{moved}");
    ensure!(!notes(&moved).contains("the whole disk"), "{moved}");
    let bytes = stream_bytes(&moved);
    ensure!(bytes >= CHANGED_BYTES && bytes <= most, "{bytes} for {CHANGED_BYTES} that changed: {moved}");
    let left = crate::support::proof::leftovers(&mut guest.machine.qmp()?)?;
    ensure!(left.is_empty(), "{left:?}");
    guest.target.quit_started()?;
    guest.is_same(&lab.paths).context("after the move")?;
    guest.machine.quit()
}

#[test]
fn a_move_from_a_replica_sends_what_changed_on_qemu_10() -> Result<()> {
    with_lab("a_move_from_a_replica_sends_what_changed_on_qemu_10", |lab| {
        let stage = Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
        only_what_changed_is_sent(lab, &stage, Version::V10)
    })
}

#[test]
#[ignore = "make disks"]
fn a_move_from_a_replica_sends_what_changed_on_qemu_7_2() -> Result<()> {
    with_lab("a_move_from_a_replica_sends_what_changed_on_qemu_7_2", |lab| {
        let stage = Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
        only_what_changed_is_sent(lab, &stage, Version::V72)
    })
}
