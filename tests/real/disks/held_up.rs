//! A destination whose QEMU gets hardly any of a processor: that is told at the source, and not that its disk or the
//! network is slow.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::faults::{Migration, Plan, Stage};
use crate::support::process::{LONG, SHORT, run, start, wait_for};
use crate::support::with_lab;

/// The guest hardly writes: it would outrun even a copy that is held up.
const PLAN: Plan = Plan { rate: 1, dirty_mib: 0, ballast_mib: 160, ..Plan::ORDINARY };

fn is_scheduled(pid: &str, policy: &str, processors: &str, nice_of_session: &str) -> Result<()> {
    run(Command::new("taskset").args(["-acp", processors, pid]), SHORT)?;
    run(Command::new("chrt").args(["-a", policy, "-p", "0", pid]), SHORT)?;
    // Where the kernel schedules sessions (sched(7), "The autogroup feature").
    let autogroup = format!("/proc/{pid}/autogroup");
    if Path::new(&autogroup).exists() {
        fs::write(&autogroup, nice_of_session).context(autogroup)
    } else {
        Ok(())
    }
}

#[test]
#[ignore = "make disks"]
fn a_destination_without_a_processor_is_told_from_a_slow_disk() -> Result<()> {
    with_lab("a_destination_without_a_processor_is_told_from_a_slow_disk", |lab| {
        let stage = Stage::set_up(lab, PLAN)?;
        let words = ["--limit", "2MiB/s", "--keep-source"];
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &words)?;
        migration
            .reach(&stage.alpha.socket(), "mirror", |p| p["disks"][0]["stream_bytes"].as_u64() > Some(0))?;
        let pid = stage.destination.pid().context("no QEMU at the destination")?.to_string();
        // It runs when the other one on its processor rests, which that never does.
        is_scheduled(&pid, "--idle", "0", "19")?;
        let busy = start(Command::new("taskset").args(["-c", "0", "sh", "-c", "while :; do :; done"]))?;
        stage.alpha.vmferry(&["limit", "web1", "--rate", "none"])?;
        let mut said = Vec::new();
        wait_for("the cause", LONG, || {
            let now = migration.now(&stage.alpha)?;
            ensure!(now["phase"] == "mirror", "the copy has ended before: {said:?}");
            said.push(now["held_up_by"].to_string());
            Ok((now["held_up_by"] == "destination-cpu").then_some(()))
        })
        .with_context(|| format!("{said:?}"))?;
        let shown = stage.alpha.vmferry(&["status", "web1"])?;
        ensure!(shown.stdout.contains("the destination's processors"), "{shown:?}");
        drop(busy);
        is_scheduled(&pid, "--other", "0-1023", "0")?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        let metrics = stage.alpha.metrics()?;
        let held = metrics.sum("vmferry_migration_held_up_seconds_total", &[("cause", "destination-cpu")])?;
        ensure!(held > 0.0, "{metrics:?}");
        let course = stage.alpha.vmferry(&["report", "web1", "--json"])?;
        ensure!(course.stdout.contains("\"destination-cpu\":"), "{course:?}");
        stage.is_moved()
    })
}
