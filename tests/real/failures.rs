//! Real failures of real migrations. After each one the guest runs on the source without a lost
//! write, the cause is named, and nothing is left; at the end of each test the guest moves.

use crate::faults::{Case, End, Migration, Plan, Reach, Stage, hurt, play_all};
use crate::support::{Version, with_lab};
use anyhow::{Context, Result, ensure};

fn failed(phases: &'static [&'static str], words: &'static [&'static str]) -> End {
    End { phases, words, cancelled: false, left: None }
}

const CANCELLED: &[&str] = &["cancelled"];

fn cancelled(phases: &'static [&'static str]) -> End {
    End { phases, words: CANCELLED, cancelled: true, left: None }
}

fn case(name: &'static str, reach: Reach, fault: fn(&mut Stage, &Migration) -> Result<()>, end: End) -> Case {
    Case { name, reach, fault, end }
}

fn survives(name: &str, plan: Plan, cases: &[Case]) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        play_all(&mut stage, cases)?;
        stage.moves()
    })
}

#[test]
fn the_destinations_qemu_and_the_streams_fail() -> Result<()> {
    const A_DISK: &[&str] = &["disk0|disk1"];
    let qemu_gone = &["destination", "QEMU", "web1|RAM|gone"];
    survives(
        "the_destinations_qemu_and_the_streams_fail",
        Plan::ORDINARY,
        &[
            case(
                "QEMU killed, mirror",
                Reach::Mirror,
                hurt::kill_destination_qemu,
                failed(&["mirror"], qemu_gone),
            ),
            case(
                "QEMU killed, RAM",
                Reach::Precopy,
                hurt::kill_destination_qemu,
                failed(&["precopy"], qemu_gone),
            ),
            case(
                "QEMU killed, switchover",
                Reach::Switchover,
                hurt::kill_destination_qemu,
                failed(&["switchover", "device"], qemu_gone),
            ),
            case(
                "QEMU killed, device",
                Reach::Device,
                hurt::kill_destination_qemu,
                failed(&["device"], qemu_gone),
            ),
            case(
                "disk cut at the source, mirror",
                Reach::Mirror,
                hurt::cut_disk_at_source,
                failed(&["mirror"], A_DISK),
            ),
            case(
                "disk cut at the destination, RAM",
                Reach::Precopy,
                hurt::cut_disk_at_destination,
                failed(&["precopy"], A_DISK),
            ),
            case(
                "RAM cut at the source",
                Reach::Precopy,
                hurt::cut_ram_at_source,
                failed(&["precopy"], &["RAM"]),
            ),
            case(
                "RAM cut at the destination",
                Reach::Precopy,
                hurt::cut_ram_at_destination,
                failed(&["precopy"], &["RAM|load of migration|destination"]),
            ),
            case(
                "RAM cut in the device phase",
                Reach::Device,
                hurt::cut_ram_at_source,
                failed(&["device"], &["RAM"]),
            ),
        ],
    )
}

#[test]
fn the_operator_cancels_in_every_phase() -> Result<()> {
    with_lab("the_operator_cancels_in_every_phase", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        play_all(
            &mut stage,
            &[
                case("prepare", Reach::Prepare, hurt::cancel_before_the_start, cancelled(&["prepare"])),
                case("mirror", Reach::Mirror, hurt::cancel, cancelled(&["mirror"])),
                case("precopy", Reach::Precopy, hurt::cancel, cancelled(&["precopy"])),
                case("switchover", Reach::Switchover, hurt::cancel, cancelled(&["switchover", "device"])),
                case("device", Reach::Device, hurt::cancel, cancelled(&["device"])),
            ],
        )?;
        stage.moves()
    })
}

#[test]
fn an_agent_is_killed_or_stopped() -> Result<()> {
    const LOST: &[&str] = &["session", "bravo"];
    const RESTARTED: &[&str] = &["agent", "restarted"];
    survives(
        "an_agent_is_killed_or_stopped",
        Plan::ORDINARY,
        &[
            case(
                "destination killed, mirror",
                Reach::Mirror,
                hurt::kill_destination_agent,
                failed(&["mirror"], LOST),
            ),
            case(
                "destination killed, RAM",
                Reach::Precopy,
                hurt::kill_destination_agent,
                failed(&["precopy"], LOST),
            ),
            case(
                "source killed, mirror",
                Reach::Mirror,
                hurt::kill_source_agent,
                failed(&["mirror"], RESTARTED),
            ),
            case(
                "source killed, RAM",
                Reach::Precopy,
                hurt::kill_source_agent,
                failed(&["precopy"], RESTARTED),
            ),
            case(
                "source killed, device",
                Reach::Device,
                hurt::kill_source_agent,
                failed(&["precopy", "switchover", "device"], RESTARTED),
            ),
            case("both killed, RAM", Reach::Precopy, hurt::kill_both_agents, failed(&["precopy"], RESTARTED)),
            case(
                "source stopped, RAM",
                Reach::Precopy,
                hurt::stop_source_agent,
                failed(&["precopy"], &["agent"]),
            ),
            case(
                "destination stopped, mirror",
                Reach::Mirror,
                hurt::stop_destination_agent,
                failed(&["mirror"], &["bravo|destination", "shut|stop"]),
            ),
        ],
    )
}

#[test]
fn the_destinations_disk_is_full() -> Result<()> {
    let plan = Plan { small_disk_mib: Some(40), ..Plan::ORDINARY };
    with_lab("the_destinations_disk_is_full", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        case(
            "destination's disk full",
            Reach::Mirror,
            hurt::nothing,
            failed(&["mirror"], &["disk1", "No space left on device"]),
        )
        .play(&mut stage)
    })
}

#[test]
fn qemu_7_2_fails_in_the_same_ways() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, ..Plan::ORDINARY };
    let qemu_gone = &["destination", "QEMU", "web1|gone"];
    survives(
        "qemu_7_2_fails_in_the_same_ways",
        plan,
        &[
            case(
                "QEMU killed, mirror",
                Reach::Mirror,
                hurt::kill_destination_qemu,
                failed(&["mirror"], qemu_gone),
            ),
            case("cancelled, mirror", Reach::Mirror, hurt::cancel, cancelled(&["mirror"])),
        ],
    )
}

#[test]
fn a_journal_cannot_be_written() -> Result<()> {
    const FULL: &[&str] = &["journal", "No space left on device"];
    const FROZEN: &[&str] = &["journal", "Operation not permitted"];
    let plan = Plan { small_state_mib: Some(1), ..Plan::ORDINARY };
    with_lab("a_journal_cannot_be_written", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        refused_on_a_full_disk(&stage)?;
        // A file's last block has room for some more records; for all those of the disks it has not.
        let full = End { left: Some("journal"), ..failed(&["prepare", "mirror", "precopy"], FULL) };
        case("journal's disk full, prepare", Reach::Prepare, hurt::fill_journal, full).play(&mut stage)?;
        let frozen = End { left: Some("journal"), ..failed(&["hand-over"], FROZEN) };
        case("no record of the hand-over", Reach::Device, hurt::freeze_source_journal, frozen)
            .play(&mut stage)?;
        let refused = failed(&["precopy"], &["destination", "journal", "Operation not permitted"]);
        case(
            "no journal at the destination, mirror",
            Reach::Mirror,
            hurt::freeze_destination_journal,
            refused,
        )
        .play(&mut stage)?;
        let no_start = failed(&["hand-over"], &["destination", "journal", "Operation not permitted"]);
        case("no record of the start", Reach::Device, hurt::freeze_destination_journal, no_start)
            .play(&mut stage)?;
        stage.moves()
    })
}

/// Nothing begins that could not be settled after a crash.
fn refused_on_a_full_disk(stage: &Stage) -> Result<()> {
    let [volume, _] = stage.state.as_ref().context("no small state folders")?;
    volume.fill()?;
    let migration = Migration::begin(&stage.alpha, "web1", "bravo", &[])?;
    let report = migration.ended(&stage.alpha)?;
    failed(&["begin"], &["journal", "No space left on device"]).fits(&report)?;
    ensure!(stage.destination.starts() == 0, "the destination was touched");
    volume.empty()?;
    stage.is_as_before()
}

#[test]
fn the_sources_qemu_is_killed() -> Result<()> {
    with_lab("the_sources_qemu_is_killed", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::Mirror)?;
        stage.source.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        let gone =
            End { left: Some("VM web1 runs nowhere"), ..failed(&["mirror"], &["source", "QEMU", "gone"]) };
        gone.fits(&report)?;
        stage.destination.wait_ended()?;
        stage.is_clean()?;
        stage.source.boot()?;
        let outcome = stage.alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        ensure!(outcome.code == 0, "the retry gave {outcome:?}");
        ensure!(stage.destination.qmp()?.status()? == "running");
        stage.source.wait_ended()
    })
}

#[test]
fn from_the_hand_over_on_the_guest_is_the_destinations() -> Result<()> {
    with_lab("from_the_hand_over_on_the_guest_is_the_destinations", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let gone = failed(&["hand-over"], &["destination", "QEMU"]);
        case("QEMU killed before it starts the guest", Reach::HandOver, hurt::kill_destination_qemu, gone)
            .play(&mut stage)?;
        let migration = stage.reach(Reach::HandOver)?;
        cancel_is_refused(&stage, &migration)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        stage.calm()?;
        stage.has_moved(&migration)?;
        stage.copies.same_as_source(&stage.paths, &stage.source, &stage.destination)
    })
}

fn cancel_is_refused(stage: &Stage, migration: &Migration) -> Result<()> {
    let outcome = stage.alpha.vmferry(&["cancel", &migration.id])?;
    ensure!(outcome.code != 0 && outcome.stderr.contains("already the destination's"), "{outcome:?}");
    let other = stage.bravo.vmferry(&["cancel", &migration.id])?;
    ensure!(other.code != 0 && other.stderr.contains("source"), "{other:?}");
    Ok(())
}

#[test]
fn a_destination_that_was_killed_at_the_hand_over_goes_on() -> Result<()> {
    with_lab("a_destination_that_was_killed_at_the_hand_over_goes_on", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::HandOver)?;
        stage.bravo.kill()?;
        stage.calm()?;
        // The command that the dead agent had begun goes on, and must not meet the next agent's.
        crate::support::process::wait_for("the first hook to end", crate::support::process::SHORT, || {
            Ok((stage.copies.calls() > 0).then_some(()))
        })?;
        stage.bravo.restart()?;
        stage.has_moved(&migration)
    })
}
