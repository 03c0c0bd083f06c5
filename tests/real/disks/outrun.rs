//! A guest that writes to its disks faster than a limit lets them be copied. Left alone the copy never ends;
//! slowed down it does, and the guest goes on meanwhile.

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::faults::{End, Migration, Plan, Stage};
use crate::support::{Version, with_lab};

const MIB: u64 = 1 << 20;
/// Each block makes QEMU copy 64 KiB of each of two disks: more than twice as much as the limit lets through.
const FAST: Plan = Plan { ballast_mib: 16, rate: 300, dirty_mib: 0, ..Plan::ORDINARY };
const LIMIT: [&str; 3] = ["--limit", "16MiB/s", "--keep-source"];
/// What the copies of both disks would be several times over: what the guest writes to, and the ballast.
const IN_VAIN_BYTES: u64 = 3 * 2 * (32 + 16) * MIB;

fn disk_bytes(progress: &Value) -> u64 {
    let disks = progress["disks"].as_array().into_iter().flatten();
    disks.filter_map(|disk| disk["stream_bytes"].as_u64()).sum()
}

fn slowed(progress: &Value) -> Vec<&str> {
    progress["disks"].as_array().into_iter().flatten().filter_map(|disk| disk["slowed"].as_str()).collect()
}

fn ends_when_it_is_slowed(version: Version, how: &str, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, Plan { version, ..FAST })?;
        let never = [&LIMIT[..], &["--never-slow-writes"]].concat();
        let in_vain = Migration::begin(&stage.alpha, "web1", "bravo", &never)?;
        let socket = stage.alpha.socket();
        let progress = in_vain.reach(&socket, "mirror", |p| disk_bytes(p) > IN_VAIN_BYTES)?;
        ensure!(slowed(&progress).is_empty(), "{progress}");
        in_vain.cancel(&stage.alpha)?;
        End::cancelled(&["mirror"]).fits(&in_vain.ended(&stage.alpha)?)?;
        stage.is_as_before()?;

        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &LIMIT)?;
        migration.reach(&socket, "mirror", |p| slowed(p).contains(&how))?;
        let shown = stage.alpha.vmferry(&["status", "web1"])?;
        ensure!(shown.stdout.contains("the guest's writes"), "{shown:?}");
        let count = stage.source.console()?.last().unwrap_or(0);
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        let notes = report["notes"].to_string();
        ensure!(notes.contains("faster than it is copied") && !notes.contains("are behind"), "{report}");
        ensure!(disk_bytes(&report) < IN_VAIN_BYTES, "{report}");
        let counted = stage.source.console()?.last().unwrap_or(0) - count;
        ensure!(counted > 20, "the guest has done {counted} writes since it was slowed");
        let metrics = stage.alpha.metrics()?;
        let told = metrics.sum("vmferry_migration_slowed_disks_total", &[("how", how)])?;
        ensure!(told == slowed(&report).len() as f64, "{told} disks: {report}");
        stage.calm()?;
        stage.is_moved()
    })
}

#[test]
#[ignore = "make disks"]
fn a_guest_that_outruns_its_copy_is_slowed_on_qemu_10() -> Result<()> {
    let name = "a_guest_that_outruns_its_copy_is_slowed_on_qemu_10";
    ends_when_it_is_slowed(Version::V10, "write-blocking", name)
}
