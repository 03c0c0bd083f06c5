//! Replicas: a peer has a VM's disks before the VM goes there, and gets what changed. Judged by the link's own
//! counter and by the bytes in the images. No system is on the disks: what is written to them is known.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Stage;
use super::machine::{Machine, Place, blockdev, device, raw};
use crate::faults::{self, Migration, Plan};
use crate::support::process::{LONG, run, wait_for};
use crate::support::{Agent, Lab, Version, with_lab};

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

pub(crate) fn only_what_changed_is_sent(lab: &Lab, version: Version) -> Result<()> {
    let stage = &Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
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
    for host in [&stage.net.alpha, &stage.net.bravo] {
        let journals = fs::read_dir(host.dir.join("state/migrations"))?.count();
        ensure!(journals == 0, "{journals} journals of runs that nobody will ask for on {}", host.name);
    }

    guest.changes(31)?;
    let foretold = stage.alpha.vmferry(&["migrate", "replica", "--to", "bravo", "--dry-run", "--json"])?;
    let foretold: Value = serde_json::from_str(&foretold.stdout)?;
    let changed = |disk: usize| foretold["foretold"]["guest"]["disks"][disk]["changed_bytes"].as_u64();
    ensure!((changed(0), changed(1)) == (Some(CHANGED_BYTES), Some(0)), "{foretold}");
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
        only_what_changed_is_sent(lab, Version::V10)
    })
}

/// Changes a byte of an image, as nobody should.
fn touch(image: &Path) -> Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(image)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, MIB)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], MIB)?)
}

fn disk_bytes(report: &Value, disk: usize) -> u64 {
    report["disks"][disk]["stream_bytes"].as_u64().unwrap_or_default()
}

fn is_whole(report: &Value, disk: usize, why: &str) -> Result<()> {
    let said = format!("disk{disk}: the whole disk is copied again: {why}");
    ensure!(notes(report).contains(&said), "{said}: {report}");
    ensure!(disk_bytes(report, disk) > DISK_BYTES, "{report}");
    Ok(())
}

fn is_little(report: &Value, disk: usize) -> Result<()> {
    ensure!(!notes(report).contains(&format!("disk{disk}: the whole")), "{report}");
    ensure!(disk_bytes(report, disk) < DISK_BYTES / 2, "{report}");
    Ok(())
}

/// Begins a run that takes a while, and waits until some of what changed is at the destination.
fn in_the_middle(stage: &Stage, guest: &Guest, pattern: u8) -> Result<Migration> {
    guest.changes(pattern)?;
    let run = Migration::begin_as(&stage.alpha, "replicate", ("replica", "bravo"), &["--limit", "3MiB/s"])?;
    run.reach(&stage.alpha.socket(), "mirror", |now| disk_bytes(now, 0) > 2 * MIB)?;
    Ok(run)
}

/// What is left in QEMU when a run is over: its bitmaps, of which one of each disk records.
fn only_bitmaps_stay(guest: &Guest) -> Result<()> {
    let left = crate::support::proof::leftovers(&mut guest.machine.qmp()?)?;
    ensure!(left.iter().all(|one| one.contains("vmferry-replica-")), "{left:?}");
    Ok(())
}

/// An agent of either host is killed while what changed is copied.
fn a_killed_agent_costs_nothing(lab: &Lab, stage: &mut Stage, guest: &Guest) -> Result<()> {
    let _run = in_the_middle(stage, guest, 41)?;
    stage.alpha.kill()?;
    guest.io(1, "write -P 42 1M 64k")?;
    stage.alpha.restart()?;
    // The destination has to have seen it, too.
    is_free(stage)?;
    only_bitmaps_stay(guest)?;
    let next = is_in_step(stage, "replica")?;
    (0..2).try_for_each(|disk| is_little(&next, disk)).context("the source's agent")?;
    guest.is_same(&lab.paths).context("the source's agent")?;

    let run = in_the_middle(stage, guest, 43)?;
    stage.bravo.kill()?;
    stage.bravo.restart()?;
    // Its session is not known there any more.
    let failed = run.ended(&stage.alpha)?;
    ensure!(failed["outcome"]["result"] == "failed", "{failed}");
    is_free(stage)?;
    is_in_step(stage, "replica")?;
    guest.is_same(&lab.paths).context("the destination's agent")
}

/// Waits until neither host has the VM in a migration.
fn is_free(stage: &Stage) -> Result<()> {
    let over = |agent: &Agent| -> Result<bool> {
        let all = agent.api("/v1/migrations")?;
        Ok(all.as_array().into_iter().flatten().all(|one| !one["outcome"].is_null()))
    };
    wait_for("the end of what was broken off", LONG, || {
        Ok((over(&stage.alpha)? && over(&stage.bravo)?).then_some(()))
    })
}

fn ends(stage: &Stage, guest: &Guest) -> Result<()> {
    let end = |more: &[&str]| {
        stage.alpha.vmferry(&[&["replicate", "replica", "--to", "bravo", "--end"], more].concat())
    };
    let listed =
        |agent: &Agent| -> Result<usize> { Ok(agent.api("/v1/replicas")?.as_array().map_or(0, Vec::len)) };
    let shown = stage.alpha.vmferry(&["replicas"])?;
    ensure!(shown.stdout.contains("replica  on bravo, last in step 20"), "{shown:?}");
    touch(&guest.theirs()[1])?;
    let some_left = end(&["--remove-images"])?;
    ensure!(
        some_left.code == 3 && some_left.stdout.contains("disk1.qcow2 stays: it was changed"),
        "{some_left:?}"
    );
    let there = guest.theirs().map(|image| image.exists());
    ensure!(there == [false, true], "{there:?}");
    ensure!(listed(&stage.bravo)? == 1 && listed(&stage.alpha)? == 0);
    let ended = end(&[])?;
    ensure!(ended.code == 0 && listed(&stage.bravo)? == 0, "{ended:?}");
    let again = end(&[])?;
    ensure!(again.code == 2 && again.stderr.contains("remembers a replica"), "{again:?}");
    let left = crate::support::proof::leftovers(&mut guest.machine.qmp()?)?;
    ensure!(left.is_empty(), "{left:?}");
    fs::remove_file(&guest.theirs()[1])?;
    Ok(())
}

/// What the guest writes while all of it is copied is copied then, and not once more.
#[test]
#[ignore = "make disks"]
fn what_is_written_during_the_first_copy_is_not_sent_again() -> Result<()> {
    with_lab("what_is_written_during_the_first_copy_is_not_sent_again", |lab| {
        let stage = Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
        let guest = Guest::set_up(lab, &stage, "replica", Version::V10)?;
        let slowly = &["--limit", "24MiB/s"];
        let first = Migration::begin_as(&stage.alpha, "replicate", ("replica", "bravo"), slowly)?;
        first.reach(&stage.alpha.socket(), "mirror", |now| disk_bytes(now, 0) > 2 * MIB)?;
        guest.changes(61)?;
        let report = first.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "replicated", "{report}");
        only_bitmaps_stay(&guest)?;
        guest.is_same(&lab.paths)?;
        let second = is_in_step(&stage, "replica")?;
        ensure!(stream_bytes(&second) < MIB, "{second}");
        guest.machine.quit()
    })
}

#[test]
#[ignore = "make disks"]
fn a_replica_that_may_not_fit_is_copied_whole_and_one_that_was_broken_off_is_not() -> Result<()> {
    let name = "a_replica_that_may_not_fit_is_copied_whole_and_one_that_was_broken_off_is_not";
    is_copied_whole_or_goes_on(name, Version::V10)
}

#[test]
#[ignore = "make disks"]
fn a_replica_that_may_not_fit_is_copied_whole_on_qemu_7_2() -> Result<()> {
    is_copied_whole_or_goes_on("a_replica_that_may_not_fit_is_copied_whole_on_qemu_7_2", Version::V72)
}

pub(crate) fn is_copied_whole_or_goes_on(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
        let guest = Guest::set_up(lab, &stage, "replica", version)?;
        is_in_step(&stage, "replica")?;
        a_killed_agent_costs_nothing(lab, &mut stage, &guest)?;

        touch(&guest.theirs()[0])?;
        let touched = is_in_step(&stage, "replica")?;
        is_whole(&touched, 0, "its image at the destination was changed since it was copied")?;
        is_little(&touched, 1)?;
        guest.is_same(&lab.paths)?;

        // It stays so when the run that was to copy it was broken off.
        touch(&guest.theirs()[0])?;
        let slow =
            Migration::begin_as(&stage.alpha, "replicate", ("replica", "bravo"), &["--limit", "1MiB/s"])?;
        slow.reach(&stage.alpha.socket(), "mirror", |now| disk_bytes(now, 0) > MIB)?;
        slow.cancel(&stage.alpha)?;
        slow.ended(&stage.alpha)?;
        let next = is_in_step(&stage, "replica")?;
        ensure!(notes(&next).contains("disk0: the whole disk is copied again"), "{next}");
        guest.is_same(&lab.paths)?;

        let ours = guest.ours();
        let Guest { source, target, machine } = guest;
        machine.quit()?;
        let machine = source.start(&words(&ours), false)?;
        let guest = Guest { source, target, machine };
        guest.io(0, "write -P 51 2M 1M")?;
        let restarted = is_in_step(&stage, "replica")?;
        (0..2).try_for_each(|disk| is_whole(&restarted, disk, "the VM's QEMU was started since"))?;
        guest.is_same(&lab.paths)?;
        ends(&stage, &guest)?;
        guest.machine.quit()
    })
}

/// A planned restart of either agent in the middle of the first, whole copy, and in the middle of what changed.
#[test]
#[ignore = "make disks"]
fn an_agent_is_replaced_in_the_middle_of_a_run() -> Result<()> {
    goes_on_with_other_agents("an_agent_is_replaced_in_the_middle_of_a_run", Version::V10)
}

#[test]
#[ignore = "make disks"]
fn an_agent_is_replaced_in_the_middle_of_a_run_on_qemu_7_2() -> Result<()> {
    goes_on_with_other_agents("an_agent_is_replaced_in_the_middle_of_a_run_on_qemu_7_2", Version::V72)
}

pub(crate) fn goes_on_with_other_agents(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up_with(lab, &["replica"], Some("format = 'source'"))?;
        let guest = Guest::set_up(lab, &stage, "replica", version)?;
        let slowly = &["--limit", "24MiB/s"];
        let first = Migration::begin_as(&stage.alpha, "replicate", ("replica", "bravo"), slowly)?;
        first.reach(&stage.alpha.socket(), "mirror", |now| disk_bytes(now, 0) > 2 * MIB)?;
        stage.alpha.take_over()?;
        guest.io(0, "write -P 71 1M 64k")?;
        stage.bravo.take_over()?;
        went_on(lab, &stage, &guest, &first).context("all of it")?;

        // The agent that copies what changed is replaced, and what was copied by then is not copied again.
        let run = in_the_middle(&stage, &guest, 72)?;
        stage.alpha.take_over()?;
        guest.io(0, "write -P 72 63M 64k")?;
        stage.alpha.take_over()?;
        let report = went_on(lab, &stage, &guest, &run).context("the source's agent")?;
        let most = (CHANGED_BYTES + PART_BYTES) * 105 / 100;
        ensure!(stream_bytes(&report) <= most, "{report}");

        let run = in_the_middle(&stage, &guest, 73)?;
        stage.bravo.take_over()?;
        // Behind what is copied, and where it was.
        guest.io(0, "write -P 73 63M 64k")?;
        guest.io(0, "write -P 74 8M 64k")?;
        went_on(lab, &stage, &guest, &run).context("the destination's agent")?;
        ends(&stage, &guest)?;
        guest.machine.quit()
    })
}

/// The run has ended well, nothing but its bitmaps is left, and the next one copies no more than what was written.
fn went_on(lab: &Lab, stage: &Stage, guest: &Guest, run: &Migration) -> Result<Value> {
    let report = run.ended(&stage.alpha)?;
    ensure!(report["outcome"] == json!({"result": "replicated", "leftovers": []}), "{report}");
    ensure!(!notes(&report).contains("the whole disk"), "{report}");
    is_free(stage)?;
    only_bitmaps_stay(guest)?;
    is_in_step(stage, "replica")?;
    guest.is_same(&lab.paths)?;
    Ok(report)
}

/// A guest that writes all the time, and counts.
#[test]
#[ignore = "make disks"]
fn a_guest_that_writes_moves_from_its_replica_and_counts_on() -> Result<()> {
    counts_on("a_guest_that_writes_moves_from_its_replica_and_counts_on", Version::V10)
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_writes_moves_from_its_replica_and_counts_on_on_qemu_7_2() -> Result<()> {
    counts_on("a_guest_that_writes_moves_from_its_replica_and_counts_on_on_qemu_7_2", Version::V72)
}

pub(crate) fn counts_on(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        // QEMU 7.2 loses RAM of its own while it sends (tests/real/moves.rs).
        let dirty_mib = if version == Version::V72 { 0 } else { Plan::ORDINARY.dirty_mib };
        let calm = Plan { version, dirty_mib, ..crate::retry::CALM };
        let mut stage = faults::Stage::set_up(lab, calm)?;
        for _ in 0..2 {
            let run = Migration::begin_as(&stage.alpha, "replicate", ("web1", "bravo"), &[])?;
            let report = run.ended(&stage.alpha)?;
            ensure!(report["outcome"]["result"] == "replicated", "{report}");
            ensure!(stage.source.qmp()?.status()? == "running", "the guest goes on");
        }
        stage.calm()?;
        let moved = Migration::begin(&stage.alpha, "web1", "bravo", &["--keep-source"])?;
        let report = moved.ended(&stage.alpha)?;
        ensure!(
            report["outcome"]["result"] == "moved" && !notes(&report).contains("the whole disk"),
            "{report}"
        );
        (0..2).try_for_each(|disk| {
            ensure!(disk_bytes(&report, disk) < 24 * MIB, "{report}");
            Ok(())
        })?;
        stage.is_moved()
    })
}

#[test]
#[ignore = "make disks"]
fn a_move_from_a_replica_sends_what_changed_on_qemu_7_2() -> Result<()> {
    with_lab("a_move_from_a_replica_sends_what_changed_on_qemu_7_2", |lab| {
        only_what_changed_is_sent(lab, Version::V72)
    })
}
