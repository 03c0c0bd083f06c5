//! What a destination grants has an end: in time, and in bytes. The guest goes on at its source.

use std::fs;

use crate::faults::{Migration, Plan, Stage};
use crate::support::proof::field;
use crate::support::with_lab;
use anyhow::{Result, ensure};

/// Moves slowly, and gives why that failed.
fn fails(stage: &Stage) -> Result<String> {
    let migration = Migration::begin(&stage.alpha, "web1", "bravo", &["--limit", "2MiB/s", "--keep-source"])?;
    let report = migration.ended(&stage.alpha)?;
    ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
    stage.is_as_before()?;
    Ok(report["outcome"]["cause"].to_string())
}

#[test]
fn a_grant_ends_in_time_and_in_bytes_and_the_guest_goes_on_at_its_source() -> Result<()> {
    with_lab("a_grant_ends_in_time_and_in_bytes_and_the_guest_goes_on_at_its_source", |lab| {
        let deadlines = "resume_s = 8\nresume_paused_s = 4\ngrant_s = 15\n";
        let mut stage = Stage::set_up(lab, Plan { rate: 60, deadlines, ..Plan::ORDINARY })?;
        let cause = fails(&stage)?;
        ensure!(cause.contains("its grant is over: 15 s"), "{cause}");

        stage.bravo.terminate()?;
        let config = stage.bravo.host().dir.join("vmferry.toml");
        let text = fs::read_to_string(&config)?;
        let other = text.replacen("grant_s = 15\n", "", 1).replacen(
            "receive = ",
            "receive_bytes = \"4MiB\"\nreceive = ",
            1,
        );
        ensure!(other.len() > text.len(), "no place for a quota in {text}");
        fs::write(&config, other)?;
        stage.bravo.restart()?;
        let cause = fails(&stage)?;
        ensure!(cause.contains("4.0 MiB are permitted"), "{cause}");
        let refused = stage.bravo.metrics()?.sum("vmferry_peer_refusals_total", &[("reason", "quota")])?;
        ensure!(refused == 1.0, "{refused} refusals");
        Ok(())
    })
}
