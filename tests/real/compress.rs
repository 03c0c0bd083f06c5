//! A migration whose disks are compressed on their way, handed from process to process at both
//! ends while blocks are half delivered.

use crate::faults::{Migration, Plan, Stage};
use crate::support::proof::field;
use crate::support::with_lab;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

#[test]
fn compressed_disks_arrive_whole_and_over_restarts() -> Result<()> {
    with_lab("compressed_disks_arrive_whole_and_over_restarts", |lab| {
        let mut stage = Stage::set_up(lab, Plan { rate: 60, ..Plan::ORDINARY })?;
        let words = ["--compress", "--limit", "1MiB/s", "--keep-source"];
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &words)?;
        let socket = stage.alpha.socket();
        let is_under_way = |p: &serde_json::Value| p["disks"][0]["stream_bytes"].as_u64() > Some(1 << 20);
        migration.reach(&socket, "mirror", is_under_way)?;
        stage.alpha.take_over()?;
        stage.bravo.take_over()?;
        let after = migration.now(&stage.alpha)?;
        ensure!(after["phase"] == "mirror" && after["outcome"].is_null(), "{after}");
        let free = stage.alpha.vmferry(&["limit", "web1", "--rate", "none"])?;
        ensure!(free.code == 0, "{free:?}");
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        let mut saved = 0;
        for disk in field(&report, "/disks")?.as_array().into_iter().flatten() {
            let number = |name: &str| disk[name].as_u64().unwrap_or_default();
            eprintln!("  {} bytes on the stream, {} saved", number("stream_bytes"), number("saved_bytes"));
            saved += number("saved_bytes");
        }
        ensure!(saved > 0, "nothing was compressed: {report}");
        // This machine's own file system may not tell whether it is encrypted (an overlay).
        let is_hosts = |note: &Value| note.as_str().is_some_and(|note| note.contains("host encrypts"));
        let notes = field(&report, "/notes")?.as_array().context("no notes")?;
        ensure!(notes.iter().all(is_hosts), "{report}");
        stage.is_moved()
    })
}
