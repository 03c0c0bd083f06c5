//! Migrations that are begun again by themselves: what is, what is not, and what a further try
//! copies. Real QEMU, real agents, real failures.

use crate::faults::{End, Migration, Plan, Reach, Stage};
use crate::support::process::{LONG, wait_for};
use crate::support::{Agent, Version, with_lab};
use anyhow::{Result, ensure};
use serde_json::Value;

/// A guest that changes little: 2 MiB of each disk, over and over. Its copies last by their size alone.
pub(crate) const CALM: Plan = Plan { blocks: 512, rate: 20, ballast_mib: 64, ..Plan::ORDINARY };
/// A guest that changes so much that no pass over its changes finds nothing.
const BUSY: Plan = Plan { rate: 30, ..Plan::ORDINARY };
const MIB: u64 = 1 << 20;
/// Each disk has so much of random data: a whole copy takes more.
const WHOLE_BYTES: u64 = Plan::ORDINARY.ballast_mib as u64 * MIB;
/// What a calm guest changes in a test, many times over.
const LITTLE_BYTES: u64 = 16 * MIB;
const MIRROR: &[&str] = &["mirror"];

/// Waits until the try of that number is under way, or waited for.
fn wait_try(agent: &Agent, migration: &Migration, number: u64, waiting: bool) -> Result<Value> {
    wait_for(&format!("try {number}"), LONG, || {
        let now = migration.now(agent)?;
        ensure!(now["outcome"].is_null(), "it ended before try {number}: {now}");
        let tries = &now["tries"];
        Ok((tries["number"] == number && tries["next_in_ms"].is_number() == waiting).then_some(now))
    })
}

/// Waits until the try of that number is in that phase.
fn wait_phase(stage: &Stage, migration: &Migration, number: u64, phase: &str) -> Result<()> {
    wait_try(&stage.alpha, migration, number, false)?;
    wait_for(&format!("try {number} to be in phase {phase}"), LONG, || {
        let now = migration.now(&stage.alpha)?;
        ensure!(now["outcome"].is_null() && now["tries"]["number"] == number, "it ended: {now}");
        Ok((now["phase"] == phase).then_some(()))
    })
}

fn notes(report: &Value) -> String {
    report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

fn stream_bytes(report: &Value, disk: usize) -> u64 {
    report["disks"][disk]["stream_bytes"].as_u64().unwrap_or(0)
}

/// Begins a migration whose disks are whole at the destination while its RAM is on the way.
fn reach_whole(stage: &mut Stage, retries: &str) -> Result<Migration> {
    let migration = stage.reach_with(Reach::Mirror, &["--retry", retries, "--keep-source"])?;
    let reached = migration.reach(&stage.alpha.socket(), "precopy", |_| true)?;
    for disk in 0..2 {
        ensure!(stream_bytes(&reached, disk) > WHOLE_BYTES, "less than a whole copy: {reached}");
    }
    Ok(migration)
}

fn only_changes(report: &Value, disk: usize) -> Result<()> {
    ensure!(notes(report).contains(&format!(" MiB of {} MiB copied again", 192)), "{report}");
    ensure!(!notes(report).contains(&format!("disk{disk}: the whole disk")), "{report}");
    let bytes = stream_bytes(report, disk);
    ensure!(bytes < LITTLE_BYTES, "{bytes} bytes for what changed of disk{disk}: {report}");
    Ok(())
}

pub(crate) fn only_what_changed_is_copied_again(plan: Plan, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let migration = reach_whole(&mut stage, "2")?;
        stage.destination.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 2, "{report}");
        (0..2).try_for_each(|disk| only_changes(&report, disk))?;
        let earlier = report["tries"]["earlier_stream_bytes"].as_u64().unwrap_or(0);
        ensure!(earlier > 2 * WHOLE_BYTES, "{report}");
        stage.is_moved()
    })
}

#[test]
fn only_what_changed_is_copied_again_by_qemu_10() -> Result<()> {
    only_what_changed_is_copied_again(CALM, "only_what_changed_is_copied_again_by_qemu_10")
}

#[test]
fn only_what_changed_is_copied_again_by_qemu_7_2() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, ..CALM };
    only_what_changed_is_copied_again(plan, "only_what_changed_is_copied_again_by_qemu_7_2")
}

#[test]
fn what_changed_is_kept_through_a_further_failure() -> Result<()> {
    with_lab("what_changed_is_kept_through_a_further_failure", |lab| {
        let mut stage = Stage::set_up(lab, BUSY)?;
        let migration = reach_whole(&mut stage, "3")?;
        stage.destination.kill()?;
        wait_phase(&stage, &migration, 2, "precopy")?;
        stage.destination.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 3, "{report}");
        ensure!(!notes(&report).contains("the whole disk"), "{report}");
        stage.is_moved()
    })
}

/// The mirrors were finished with the guest at rest, and the guest went on at the source.
#[test]
fn what_changed_is_kept_when_the_guest_had_been_paused() -> Result<()> {
    with_lab("what_changed_is_kept_when_the_guest_had_been_paused", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach_with(Reach::Device, &["--retry", "1", "--keep-source"])?;
        stage.destination.kill()?;
        stage.calm()?;
        stage.pause_at_once_in_try(&migration, 2)?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 2, "{report}");
        ensure!(notes(&report).contains("try 1 of 2 failed in phase device"), "{report}");
        ensure!(!notes(&report).contains("the whole disk"), "{report}");
        stage.is_moved()
    })
}

#[test]
fn a_disk_in_the_place_of_another_is_copied_as_a_whole() -> Result<()> {
    with_lab("a_disk_in_the_place_of_another_is_copied_as_a_whole", |lab| {
        let mut stage = Stage::set_up(lab, CALM)?;
        let migration = reach_whole(&mut stage, "2")?;
        stage.start().close()?;
        stage.destination.kill()?;
        stage.start().wait_reached()?;
        stage.destination.create_disk(0, stage.destination.spec.disk_mib)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 2, "{report}");
        // A file system may give the new file the old one's number.
        let whole = "disk0: the whole disk is copied again: ";
        let seen =
            ["there is another file in the place of its image", "its image at the destination was changed"];
        ensure!(seen.iter().any(|doubt| notes(&report).contains(&format!("{whole}{doubt}"))), "{report}");
        ensure!(stream_bytes(&report, 0) > WHOLE_BYTES, "{report}");
        only_changes(&report, 1)?;
        stage.is_moved()
    })
}

#[test]
fn an_agent_that_is_killed_between_tries_removes_what_stayed_for_them() -> Result<()> {
    with_lab("an_agent_that_is_killed_between_tries_removes_what_stayed_for_them", |lab| {
        let mut stage = Stage::set_up(lab, CALM)?;
        let migration = reach_whole(&mut stage, "2")?;
        stage.destination.kill()?;
        wait_try(&stage.alpha, &migration, 2, true)?;
        stage.alpha.kill()?;
        let left = crate::support::proof::leftovers(&mut stage.source.qmp()?)?;
        ensure!(left.iter().any(|one| one.contains("vmferry-a-")), "nothing stayed: {left:?}");
        stage.calm()?;
        stage.alpha.restart()?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["precopy"], &["restarted"]).fits(&report)?;
        stage.is_as_before()?;
        stage.moves()
    })
}

fn retries(agent: &Agent) -> Result<f64> {
    agent.metrics()?.sum("vmferry_migration_retries_total", &[])
}

#[test]
fn what_cannot_pass_and_what_was_cancelled_is_not_tried_again() -> Result<()> {
    with_lab("what_cannot_pass_and_what_was_cancelled_is_not_tried_again", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;

        // A name that the destination does not know stays unknown.
        let migration = Migration::begin(&stage.alpha, "web1", "nobody", &["--retry", "3"])?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["begin"], &["nobody"]).fits(&report)?;
        ensure!(report["tries"]["number"] == 1, "{report}");
        ensure!(notes(&report).contains("not tried again after try 1 of 4"), "{report}");

        // Nor does a disk grow.
        stage.destination.create_disk(0, 100)?;
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &["--retry", "3"])?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["prepare"], &["disk0 has 104857600 bytes at the destination"]).fits(&report)?;
        ensure!(notes(&report).contains("not tried again after try 1 of 4"), "{report}");
        stage.destination.create_disk(0, stage.destination.spec.disk_mib)?;

        let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        End::cancelled(MIRROR).fits(&report)?;
        ensure!(report["tries"]["number"] == 1, "{report}");

        // Cancelled while the next try is waited for: it never begins.
        let starts = stage.destination.starts();
        let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
        stage.destination.kill()?;
        wait_try(&stage.alpha, &migration, 2, true)?;
        let shown = stage.alpha.vmferry(&["status", &migration.id])?;
        ensure!(shown.stdout.contains("try     2 of 4"), "{shown:?}");
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        let words = &["cancelled while try 2 of 4 was waited for", "destination"];
        End { cancelled: true, ..End::failed(&["begin"], words) }.fits(&report)?;
        ensure!(stage.destination.starts() == starts + 1, "the destination was started again");
        ensure!(retries(&stage.alpha)? == 0.0, "a try that never began was counted");
        stage.is_as_before()
    })
}

#[test]
fn tries_run_out_and_the_last_cause_is_told() -> Result<()> {
    with_lab("tries_run_out_and_the_last_cause_is_told", |lab| {
        let plan = Plan { disk_volume_mib: [None, Some(24)], ..Plan::ORDINARY };
        let stage = Stage::set_up(lab, plan)?;
        let words = ["migrate", "web1", "--to", "bravo", "--retry", "1", "--accept", "no-room"];
        let outcome = stage.alpha.vmferry(&words)?;
        ensure!(outcome.code == 1, "{outcome:?}");
        ensure!(outcome.stderr.contains("try 2 of 2, next in "), "{outcome:?}");
        for words in ["failed in phase mirror, try 2 of 2", "cause: ", "try 1 of 2 failed in phase mirror"] {
            ensure!(outcome.stdout.contains(words), "{words}: {outcome:?}");
        }
        ensure!(outcome.stdout.matches("No space left on device").count() == 2, "{outcome:?}");
        ensure!(retries(&stage.alpha)? == 1.0);
        stage.is_as_before()
    })
}

#[test]
fn a_further_try_moves_the_guest_under_the_first_ones_id() -> Result<()> {
    with_lab("a_further_try_moves_the_guest_under_the_first_ones_id", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach_with(Reach::Mirror, &["--retry", "2", "--keep-source"])?;
        stage.destination.kill()?;
        let waiting = wait_try(&stage.alpha, &migration, 2, true)?;
        ensure!(
            waiting["tries"]["last_failure"].as_str().is_some_and(|f| f.contains("destination")),
            "{waiting}"
        );
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        ensure!(report["tries"]["number"] == 2, "{report}");
        ensure!(report["tries"]["migration"] != report["id"], "both tries had one id: {report}");
        // It failed before either copy was whole.
        for disk in 0..2 {
            ensure!(
                notes(&report).contains(&format!("disk{disk}: the whole disk is copied again: ")),
                "{report}"
            );
            ensure!(stream_bytes(&report, disk) > WHOLE_BYTES, "{report}");
        }
        stage.is_moved()?;
        // What the agent finds in its journals is one migration as well.
        stage.alpha.terminate()?;
        stage.alpha.restart()?;
        let listed = stage.alpha.api("/v1/migrations")?;
        let same: Vec<_> =
            listed.as_array().into_iter().flatten().filter(|m| m["id"] == migration.id).collect();
        ensure!(same.len() == 1 && same[0]["outcome"]["result"] == "moved", "{listed}");
        ensure!(listed.as_array().is_some_and(|all| all.len() == 1), "{listed}");
        Ok(())
    })
}

/// What stayed for the further try goes on with the next process, and so does the wait.
#[test]
fn an_agent_is_replaced_between_two_tries() -> Result<()> {
    with_lab("an_agent_is_replaced_between_two_tries", |lab| {
        let mut stage = Stage::set_up(lab, CALM)?;
        let migration = reach_whole(&mut stage, "9")?;
        // Each try fails at once while there is no agent, and each wait is longer than the one before.
        stage.bravo.kill()?;
        wait_try(&stage.alpha, &migration, 4, true)?;
        stage.alpha.take_over()?;
        let waiting = migration.now(&stage.alpha)?;
        ensure!(waiting["tries"]["number"] == 4 && waiting["tries"]["next_in_ms"].is_number(), "{waiting}");
        stage.bravo.restart()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 4, "{report}");
        (0..2).try_for_each(|disk| only_changes(&report, disk))?;
        stage.is_moved()
    })
}
