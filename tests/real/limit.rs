//! Limits on a real migration: kept while it runs, changed while it runs, kept over a planned
//! restart, shown to whoever asks. How exactly they are kept is in `tests/mux`, on a clock of its
//! own.

use std::time::{Duration, Instant};

use crate::faults::{Events, Migration, Plan, Stage};
use crate::support::process::{LONG, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, with_lab};
use anyhow::{Result, ensure};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 4 * MIB;
const OF_PEER: u64 = 64 * MIB;
/// What a tick of the progress is late, and what queues hold that is counted already.
const LATE: Duration = Duration::from_millis(500);
const QUEUED: u64 = MIB;

fn limits(agent: &Agent) -> Result<Value> {
    let outcome = agent.vmferry(&["limit", "--json"])?;
    ensure!(outcome.code == 0, "vmferry limit gave {outcome:?}");
    Ok(serde_json::from_str(&outcome.stdout)?)
}

/// Bytes on all streams, and when they were asked for and answered.
fn carried(migration: &Migration, agent: &Agent) -> Result<(Instant, u64, Instant)> {
    let asked = Instant::now();
    let progress = migration.now(agent)?;
    let disks = field(&progress, "/disks")?.as_array().cloned().unwrap_or_default();
    let parts = disks.iter().chain(progress.get("ram")).filter_map(|part| part["stream_bytes"].as_u64());
    Ok((asked, parts.sum(), Instant::now()))
}

/// Looks on for a while: no more than `limit` may be carried, and more than nothing.
fn keeps(limit: u64, migration: &Migration, agent: &Agent) -> Result<()> {
    let since = carried(migration, agent)?;
    std::thread::sleep(Duration::from_secs(4));
    has_kept(limit, since, carried(migration, agent)?)
}

fn has_kept(limit: u64, since: (Instant, u64, Instant), until: (Instant, u64, Instant)) -> Result<()> {
    let ((begin, before, _), (_, after, end)) = (since, until);
    let (bytes, time) = (after - before, end.duration_since(begin) + LATE);
    let most = (limit as f64 * time.as_secs_f64() * 1.02) as u64 + QUEUED;
    eprintln!("  {bytes} bytes in {time:?}; at most {most}");
    ensure!(bytes <= most, "{bytes} bytes in {time:?}, at {limit} bytes per second at most {most}");
    ensure!(bytes > 0, "nothing moves");
    Ok(())
}

fn are_as_set(agent: &Agent, migration: &Migration) -> Result<()> {
    let now = limits(agent)?;
    ensure!(now["peers"] == json!([{"peer": "bravo", "limit_bytes_per_s": OF_PEER}]), "{now}");
    let one = field(&now, "/migrations/0")?;
    let shown = (one["id"].as_str(), one["limit_bytes_per_s"].as_u64(), one["weight"].as_u64());
    ensure!(shown == (Some(migration.id.as_str()), Some(LIMIT), Some(300)), "{now}");
    Ok(())
}

/// What is shown after a restart: one total that goes on, a rate within the limit, no wild time.
fn goes_on(before: &Value, migration: &Migration, agent: &Agent) -> Result<()> {
    let number = |progress: &Value, at: &str| field(progress, at).map(|n| n.as_u64().unwrap_or_default());
    ensure!(number(before, "/whole/left_bytes")? > 0 && number(before, "/whole/permille")? > 0, "{before}");
    let mut events = Events::of(&agent.socket(), &migration.id)?;
    let (mut last, mut measured) = (before.clone(), 0);
    wait_for("a rate that was measured since", LONG, || {
        let Some(now) = events.next()? else { return Ok(None) };
        for at in ["/elapsed_ms", "/whole/done_bytes", "/whole/permille"] {
            ensure!(number(&now, at)? >= number(&last, at)?, "{at} has fallen: {last}, {now}");
        }
        let (rate, left_s) = (number(&now, "/rate_bytes_per_s")?, &now["whole"]["left_s"]);
        ensure!(rate <= 2 * LIMIT + QUEUED, "{rate} bytes per second are shown: {now}");
        if let Some(left_s) = left_s.as_u64() {
            let by_limit = number(&now, "/whole/left_bytes")? / LIMIT;
            ensure!(left_s >= by_limit / 2, "{left_s} s is wild, by the limit it takes {by_limit}");
        }
        measured += u32::from(rate != number(&last, "/rate_bytes_per_s")?);
        last = now;
        Ok((measured > 2).then_some(()))
    })
}

#[test]
fn limits_are_kept_changed_and_handed_on() -> Result<()> {
    with_lab("limits_are_kept_changed_and_handed_on", |lab| {
        let mut stage = Stage::set_up(lab, Plan { rate: 60, ..Plan::ORDINARY })?;
        let of_peer = stage.alpha.vmferry(&["limit", "--peer", "bravo", "--rate", "64MiB/s"])?;
        ensure!(of_peer.code == 0 && of_peer.stdout.contains("64.0 MiB/s"), "{of_peer:?}");
        let nobody = stage.alpha.vmferry(&["limit", "--peer", "nobody", "--rate", "1M"])?;
        ensure!(nobody.code == 2 && nobody.stderr.contains("nobody"), "{nobody:?}");

        let words = ["--limit", "4MiB/s", "--weight", "300", "--keep-source"];
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &words)?;
        migration
            .reach(&stage.alpha.socket(), "mirror", |p| p["disks"][0]["stream_bytes"].as_u64() > Some(0))?;
        are_as_set(&stage.alpha, &migration)?;
        keeps(LIMIT, &migration, &stage.alpha)?;
        // Its guest writes more than the limit lets through, which is told once it is sure; beside other work
        // it may be the processor for a while.
        wait_for("the limit or the guest's writes to be what holds it up", LONG, || {
            let why = migration.now(&stage.alpha)?["held_up_by"].clone();
            Ok((why == "limit" || why == "guest-writes").then_some(()))
        })?;
        let metrics = stage.alpha.metrics()?;
        for (name, label, limit) in [
            ("vmferry_migration_limit_bytes_per_second", ("vm", "web1"), LIMIT),
            ("vmferry_session_limit_bytes_per_second", ("peer", "bravo"), OF_PEER),
        ] {
            ensure!(metrics.sum(name, &[label])? == limit as f64, "{name}: {metrics:?}");
        }
        let waited = metrics.sum("vmferry_session_limited_seconds_total", &[])?;
        ensure!(waited > 1.0, "limits were waited for {waited} s only");

        let (since, before) = (carried(&migration, &stage.alpha)?, migration.now(&stage.alpha)?);
        stage.alpha.take_over()?;
        are_as_set(&stage.alpha, &migration)?;
        goes_on(&before, &migration, &stage.alpha)?;
        has_kept(LIMIT, since, carried(&migration, &stage.alpha)?)?;
        let half = stage.alpha.vmferry(&["limit", "web1", "--rate", "2MiB/s"])?;
        ensure!(half.code == 0 && half.stdout.contains("2.0 MiB/s, weight 300"), "{half:?}");
        keeps(LIMIT / 2, &migration, &stage.alpha)?;

        let free = stage.alpha.vmferry(&["limit", &migration.id, "--rate", "none"])?;
        ensure!(free.code == 0 && free.stdout.contains("no limit"), "{free:?}");
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        let late = stage.alpha.vmferry(&["limit", &migration.id, "--rate", "1M"])?;
        ensure!(late.code == 2 && late.stderr.contains("has ended"), "{late:?}");
        let at_destination = stage.bravo.vmferry(&["limit", &migration.id, "--rate", "1M"])?;
        ensure!(at_destination.stderr.contains("limit it at the source"), "{at_destination:?}");
        stage.is_moved()
    })
}

/// QEMU stands still in `blockdev-mirror` until what earlier mirrors are writing has been written.
#[test]
fn the_guest_does_not_wait_for_a_slow_link_when_its_disks_copies_begin() -> Result<()> {
    with_lab("the_guest_does_not_wait_for_a_slow_link_when_its_disks_copies_begin", |lab| {
        let stage = Stage::set_up(lab, Plan { rate: 60, ..Plan::ORDINARY })?;
        let migration =
            Migration::begin(&stage.alpha, "web1", "bravo", &["--limit", "2MiB/s", "--keep-source"])?;
        // What the streams carried while the guest did not count on.
        let (mut count, mut bytes, mut most) = (0, 0, 0);
        wait_for("both disks to be copied", LONG, || {
            let (_, now, _) = carried(&migration, &stage.alpha)?;
            most = most.max(now - bytes);
            let counted = stage.source.console()?.last().unwrap_or(0);
            if counted != count {
                (count, bytes) = (counted, now);
            }
            Ok((now >= 24 * MIB).then_some(()))
        })?;
        eprintln!("  {most} bytes at most while the guest stood still");
        ensure!(most < 8 * MIB, "the guest stood still while {most} bytes were carried");
        Ok(())
    })
}
