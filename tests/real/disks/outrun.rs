//! A guest that writes to its disks faster than a limit lets them be copied. Left alone the copy never ends;
//! slowed down it does, and the guest goes on meanwhile. What was done to it is undone in every end.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::faults::{End, Migration, Plan, Stage};
use crate::support::process::{LONG, wait_for};
use crate::support::{Version, Vm, with_lab};

const MIB: u64 = 1 << 20;
/// Each block makes QEMU copy 64 KiB of each of two disks: more than twice as much as the limit lets through.
const FAST: Plan = Plan { ballast_mib: 16, rate: 300, dirty_mib: 0, ..Plan::ORDINARY };
const LIMIT: [&str; 3] = ["--limit", "16MiB/s", "--keep-source"];
/// So little that a guest with a small part of a processor outruns it as well.
const LIMIT_OF_CHANGES: [&str; 3] = ["--limit", "6MiB/s", "--keep-source"];
/// Each of two disks is in step with so much left.
const BEHIND_MIB_MAX: u64 = 2 * 4;
/// What the copies of both disks would be several times over: what the guest writes to, and the ballast.
const IN_VAIN_BYTES: u64 = 3 * 2 * (32 + 16) * MIB;

fn disk_bytes(progress: &Value) -> u64 {
    let disks = progress["disks"].as_array().into_iter().flatten();
    disks.filter_map(|disk| disk["stream_bytes"].as_u64()).sum()
}

fn slowed(progress: &Value) -> Vec<&str> {
    progress["disks"].as_array().into_iter().flatten().filter_map(|disk| disk["slowed"].as_str()).collect()
}

/// How many MiB the pause had to copy, by what was said of it.
fn behind_mib(report: &Value) -> u64 {
    let notes = report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let told =
        notes.filter_map(|note| note.split_once(" MiB are behind")?.0.rsplit(' ').next()?.parse().ok());
    told.max().unwrap_or(0)
}

/// What limits the guest's disks: bytes written and writes in a second, and the group of each.
fn limits(vm: &Vm) -> Result<Vec<Value>> {
    let drives = vm.qmp()?.query("query-block")?;
    let drives = drives.as_array().context("no drives")?;
    let disks = drives.iter().filter(|drive| drive["qdev"].as_str().is_some_and(|at| at.contains("disk")));
    let of = |drive: &Value| {
        let node = &drive["inserted"];
        json!([node["bps"], node["bps_wr"], node["iops_wr"], node["iops_wr_max"], node["group"]])
    };
    Ok(disks.map(of).collect())
}

/// Somebody has limited the first disk already, wider than the guest writes.
fn limit_first(vm: &Vm) -> Result<Vec<Value>> {
    let theirs = json!({
        "id": "/machine/peripheral/disk0/virtio-backend", "group": "theirs",
        "bps": 900 * MIB, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 9000, "iops_wr_max": 9999
    });
    vm.qmp()?.execute("block_set_io_throttle", theirs)?;
    let limits = limits(vm)?;
    ensure!(limits[0] == json!([900 * MIB, 0, 9000, 9999, "theirs"]), "{limits:?}");
    Ok(limits)
}

fn is_slowed(stage: &Stage, migration: &Migration, how: &str) -> Result<()> {
    migration.reach(&stage.alpha.socket(), "mirror", |p| slowed(p).contains(&how))?;
    let ours = |limits: &Value| limits[4].as_str().is_some_and(|group| group.starts_with("vmferry-"));
    let limited = limits(&stage.source)?.iter().any(ours);
    ensure!(limited == (how == "throttled"), "{:?}", limits(&stage.source));
    Ok(())
}

pub(crate) fn ends_when_it_is_slowed(version: Version, how: &str, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, Plan { version, ..FAST })?;
        let before = limit_first(&stage.source)?;
        let never = [&LIMIT[..], &["--never-slow-writes"]].concat();
        let in_vain = Migration::begin(&stage.alpha, "web1", "bravo", &never)?;
        let socket = stage.alpha.socket();
        let progress = in_vain.reach(&socket, "mirror", |p| disk_bytes(p) > IN_VAIN_BYTES)?;
        ensure!(slowed(&progress).is_empty() && limits(&stage.source)? == before, "{progress}");
        in_vain.cancel(&stage.alpha)?;
        End::cancelled(&["mirror"]).fits(&in_vain.ended(&stage.alpha)?)?;
        stage.is_as_before()?;

        // Nobody but the journal knows of it.
        is_slowed(&stage, &Migration::begin(&stage.alpha, "web1", "bravo", &LIMIT)?, how)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        wait_for("the guest's limits to be as before", LONG, || {
            Ok((limits(&stage.source)? == before).then_some(()))
        })?;
        wait_for("the crashed migration to be settled", LONG, || Ok(stage.is_as_before().ok()))?;

        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &LIMIT)?;
        is_slowed(&stage, &migration, how)?;
        let shown = stage.alpha.vmferry(&["status", "web1"])?;
        ensure!(shown.stdout.contains("the guest's writes"), "{shown:?}");
        let count = stage.source.console()?.last().unwrap_or(0);
        stage.alpha.take_over()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
        let notes = report["notes"].to_string();
        ensure!(notes.contains("faster than it is copied") && !notes.contains("are behind"), "{report}");
        let counted = stage.source.console()?.last().unwrap_or(0) - count;
        ensure!(counted > 20, "the guest has done {counted} writes since it was slowed");
        let metrics = stage.alpha.metrics()?;
        let told = metrics.sum("vmferry_migration_slowed_disks_total", &[("how", how)])?;
        ensure!(told == slowed(&report).len() as f64, "{told} disks: {report}");
        ensure!(limits(&stage.source)? == before, "{:?} at the source", limits(&stage.source));
        let there = limits(&stage.destination)?;
        ensure!(there.iter().all(|of| of[1] == 0 && of[4].is_null()), "{there:?} at the destination");
        stage.is_moved()
    })
}

/// The same where only what changed since a replica was in step is copied: that has no mirror, so its writes are
/// limited by every QEMU. A run of the replica itself ends with what was recorded, and slows nothing.
pub(crate) fn ends_when_changes_are_slowed(version: Version, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, Plan { version, ..FAST })?;
        let before = limit_first(&stage.source)?;
        let whole: &[&str] = &[];
        for options in [whole, &LIMIT_OF_CHANGES[..2]] {
            let run = Migration::begin_as(&stage.alpha, "replicate", ("web1", "bravo"), options)?;
            let report = run.ended(&stage.alpha)?;
            ensure!(report["outcome"]["result"] == "replicated", "{report}");
            ensure!(options.is_empty() || slowed(&report).is_empty(), "{report}");
            ensure!(limits(&stage.source)? == before, "{:?}", limits(&stage.source));
        }
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &LIMIT_OF_CHANGES)?;
        is_slowed(&stage, &migration, "throttled")?;
        let count = stage.source.console()?.last().unwrap_or(0);
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
        let notes = report["notes"].to_string();
        ensure!(notes.contains("copied again") && !notes.contains("the whole disk"), "{report}");
        ensure!(
            notes.contains("faster than it is copied") && behind_mib(&report) <= BEHIND_MIB_MAX,
            "{report}"
        );
        let counted = stage.source.console()?.last().unwrap_or(0) - count;
        ensure!(counted > 20, "the guest has done {counted} writes since it was slowed");
        ensure!(limits(&stage.source)? == before, "{:?} at the source", limits(&stage.source));
        stage.is_moved()
    })
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_outruns_the_copy_of_its_changes_is_slowed_on_qemu_10() -> Result<()> {
    let name = "a_guest_that_outruns_the_copy_of_its_changes_is_slowed_on_qemu_10";
    ends_when_changes_are_slowed(Version::V10, name)
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_outruns_the_copy_of_its_changes_is_slowed_on_qemu_7_2() -> Result<()> {
    let name = "a_guest_that_outruns_the_copy_of_its_changes_is_slowed_on_qemu_7_2";
    ends_when_changes_are_slowed(Version::V72, name)
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_outruns_its_copy_is_slowed_on_qemu_10() -> Result<()> {
    let name = "a_guest_that_outruns_its_copy_is_slowed_on_qemu_10";
    ends_when_it_is_slowed(Version::V10, "write-blocking", name)
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_outruns_its_copy_is_slowed_on_qemu_7_2() -> Result<()> {
    let name = "a_guest_that_outruns_its_copy_is_slowed_on_qemu_7_2";
    ends_when_it_is_slowed(Version::V72, "throttled", name)
}
