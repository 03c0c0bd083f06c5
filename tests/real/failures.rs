//! Real failures of real migrations. After each one the guest runs on the source without a lost
//! write, the cause is named, and nothing is left; at the end of each test the guest moves.

use crate::faults::cut::Cut;
use crate::faults::{Case, End, Fault, Migration, Plan, Reach, Side, Stage, Who, play_all};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::{Version, with_lab};
use anyhow::{Context, Result, ensure};

const KILL_QEMU: Fault = Fault::Kill(Who::DestinationQemu);
const QEMU_GONE: &[&str] = &["destination", "QEMU", "web1|RAM|gone"];

/// A peer that is gone is not waited for any longer.
const GIVEN_UP_SOON: &str = "resume_s = 2\nresume_paused_s = 2\n";

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
    let cut = |which, who| Fault::StreamCut(which, who);
    let ram_at_source = cut(Cut::Ram, Who::SourceQemu);
    let loads_no_more = &["RAM|load of migration|destination"];
    survives(
        "the_destinations_qemu_and_the_streams_fail",
        Plan::ORDINARY,
        &[
            Case::new(KILL_QEMU, Reach::Mirror, End::failed(&["mirror"], QEMU_GONE)),
            Case::new(KILL_QEMU, Reach::Precopy, End::failed(&["precopy"], QEMU_GONE)),
            Case::new(KILL_QEMU, Reach::Switchover, End::failed(&["switchover", "device"], QEMU_GONE)),
            Case::new(KILL_QEMU, Reach::Device, End::failed(&["device"], QEMU_GONE)),
            Case::new(cut(Cut::Disk, Who::SourceQemu), Reach::Mirror, End::failed(&["mirror"], A_DISK)),
            Case::new(
                cut(Cut::Disk, Who::DestinationQemu),
                Reach::Precopy,
                End::failed(&["precopy"], A_DISK),
            ),
            Case::new(ram_at_source, Reach::Precopy, End::failed(&["precopy"], &["RAM"])),
            Case::new(
                cut(Cut::Ram, Who::DestinationQemu),
                Reach::Precopy,
                End::failed(&["precopy"], loads_no_more),
            ),
            Case::new(ram_at_source, Reach::Device, End::failed(&["device"], &["RAM"])),
        ],
    )
}

#[test]
fn the_operator_cancels_in_every_phase() -> Result<()> {
    let cancelled = |reach, phases| Case::new(Fault::Cancel, reach, End::cancelled(phases));
    survives(
        "the_operator_cancels_in_every_phase",
        Plan::ORDINARY,
        &[
            // The destination's QEMU is being started, which then goes on.
            cancelled(Reach::Prepare, &["prepare"]),
            cancelled(Reach::Mirror, &["mirror"]),
            cancelled(Reach::Precopy, &["precopy"]),
            cancelled(Reach::Switchover, &["switchover", "device"]),
            cancelled(Reach::Device, &["device"]),
        ],
    )
}

#[test]
fn an_agent_is_killed_or_stopped() -> Result<()> {
    const LOST: &[&str] = &["session", "bravo"];
    const RESTARTED: &[&str] = &["agent", "restarted"];
    let kill = |who, reach, phases, words| Case::new(Fault::Kill(who), reach, End::failed(phases, words));
    let stop =
        |who, reach, phases, words| Case::new(Fault::Terminate(who), reach, End::failed(phases, words));
    survives(
        "an_agent_is_killed_or_stopped",
        Plan { deadlines: GIVEN_UP_SOON, ..Plan::ORDINARY },
        &[
            kill(Who::DestinationAgent, Reach::Mirror, &["mirror"], LOST).until_the_end(),
            kill(Who::DestinationAgent, Reach::Precopy, &["precopy"], LOST).until_the_end(),
            kill(Who::SourceAgent, Reach::Mirror, &["mirror"], RESTARTED),
            kill(Who::SourceAgent, Reach::Precopy, &["precopy"], RESTARTED),
            kill(Who::SourceAgent, Reach::Device, &["precopy", "switchover", "device"], RESTARTED),
            kill(Who::BothAgents, Reach::Precopy, &["precopy"], RESTARTED),
            stop(Who::SourceAgent, Reach::Precopy, &["precopy"], &["agent"]),
            stop(Who::DestinationAgent, Reach::Mirror, &["mirror"], &["bravo|destination", "shut|stop"]),
        ],
    )
}

/// The destination's agent had dialled the session: the source waits for its dialler, which is gone, and hears it from
/// the new process long before `resume_s` is over.
#[test]
fn a_new_agent_of_the_destination_makes_itself_known() -> Result<()> {
    const WAITS: &str = "resume_s = 600\nresume_paused_s = 600\n";
    let started_anew = |phases| End::failed(phases, &["session", "bravo", "started anew"]);
    let plan = Plan { deadlines: WAITS, both_ways: true, ..Plan::ORDINARY };
    with_lab("a_new_agent_of_the_destination_makes_itself_known", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        for (reach, end) in [
            (Reach::Mirror, started_anew(&["mirror"])),
            (Reach::Switchover, started_anew(&["switchover", "device"])),
        ] {
            let pinged = stage.bravo.vmferry(&["ping", "alpha"])?;
            let sessions = stage.alpha.api("/v1/status")?["sessions"].clone();
            ensure!(pinged.code == 0 && sessions[0]["dialed"] == false, "{pinged:?}: {sessions}");
            let migration = stage.reach(reach)?;
            stage.bravo.kill()?;
            stage.bravo.restart()?;
            ensure!(migration.wait_end(&stage.alpha, LONG), "{}", migration.now(&stage.alpha)?);
            stage.calm()?;
            end.fits(&migration.ended(&stage.alpha)?)?;
            stage.is_as_before()?;
        }
        stage.moves()
    })
}

#[test]
fn the_destinations_disk_is_full() -> Result<()> {
    let plan = Plan { disk_volume_mib: [None, Some(24)], ..Plan::ORDINARY };
    with_lab("the_destinations_disk_is_full", |lab| {
        let full = End::failed(&["mirror"], &["disk1", "No space left on device"]);
        Case::by_itself(Reach::Mirror, full).play(&mut Stage::set_up(lab, plan)?)
    })
}

#[test]
fn qemu_7_2_fails_in_the_same_ways() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, ..Plan::ORDINARY };
    let qemu_gone = End::failed(&["mirror"], &["destination", "QEMU", "web1|gone"]);
    survives(
        "qemu_7_2_fails_in_the_same_ways",
        plan,
        &[
            Case::new(KILL_QEMU, Reach::Mirror, qemu_gone),
            Case::new(Fault::Cancel, Reach::Mirror, End::cancelled(&["mirror"])),
        ],
    )
}

#[test]
fn a_journal_cannot_be_written() -> Result<()> {
    // A file's last block has room for some more records; for all those of the disks it has not.
    let full = End::failed(&["prepare", "mirror", "precopy"], &["journal", "No space left on device"]);
    let frozen = |phases| End::failed(phases, &["journal", "Operation not permitted"]);
    let refused = |phases| End::failed(phases, &["destination", "journal", "Operation not permitted"]);
    let (source, destination) =
        (Fault::JournalFrozen(Who::SourceAgent), Fault::JournalFrozen(Who::DestinationAgent));
    let cases = [
        Case::new(Fault::SourceStateFull, Reach::Prepare, full.leaves("journal")),
        // No record of the hand-over.
        Case::new(source, Reach::Device, frozen(&["hand-over"]).leaves("journal")),
        Case::new(destination, Reach::Mirror, refused(&["precopy"])),
        // No record of the start.
        Case::new(destination, Reach::Device, refused(&["hand-over"])),
    ];
    let plan = Plan { state_volume_mib: Some(1), ..Plan::ORDINARY };
    with_lab("a_journal_cannot_be_written", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        refused_on_a_full_disk(&stage)?;
        play_all(&mut stage, &cases.map(Case::until_the_end))?;
        stage.moves()
    })
}

/// Nothing begins that could not be settled after a crash.
fn refused_on_a_full_disk(stage: &Stage) -> Result<()> {
    let volume = stage.state_volume(Side::Alpha).context("no small state folders")?;
    volume.fill()?;
    let migration = Migration::begin(&stage.alpha, "web1", "bravo", &[])?;
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["begin"], &["journal", "No space left on device"]).fits(&report)?;
    ensure!(stage.destination.starts() == 0, "the destination was touched");
    volume.empty()?;
    stage.is_as_before()
}

#[test]
fn the_sources_qemu_is_killed() -> Result<()> {
    with_lab("the_sources_qemu_is_killed", |lab| {
        let mut stage =
            Stage::set_up(lab, Plan { deadlines: GIVEN_UP_SOON, undecided_s: 1, ..Plan::ORDINARY })?;
        let migration = stage.reach(Reach::Mirror)?;
        stage.source.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["mirror"], &["source", "QEMU", "gone"]).leaves("VM web1 runs nowhere").fits(&report)?;
        stage.destination.wait_ended()?;
        stage.is_clean()?;
        stage.source.begin_boot()?;
        nobodys_while_the_destination_is_away(&mut stage)?;
        stage.source.begin_boot()?;
        let outcome = stage.alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        ensure!(outcome.code == 0, "the retry gave {outcome:?}");
        ensure!(stage.destination.qmp()?.status()? == "running");
        stage.source.wait_ended()
    })
}

/// The destination may have the whole guest, and cannot be asked: until it can, nobody is invited to start the VM.
fn nobodys_while_the_destination_is_away(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach(Reach::Device)?;
    stage.bravo.kill()?;
    stage.source.kill()?;
    stage.calm()?;
    let result = |wanted: &str| {
        wait_for(&format!("the result {wanted}"), LONG, || {
            let now = migration.now(&stage.alpha)?;
            Ok((now["outcome"]["result"] == wanted).then_some(now))
        })
    };
    result("undecided")?;
    let said = stage.alpha.vmferry(&["recover"])?;
    for words in ["UNDECIDED", "may have the whole guest", "start the VM nowhere", "not known"] {
        ensure!(said.code == 4 && said.stdout.contains(words), "{words} is missing: {said:?}");
    }
    stage.bravo.restart()?;
    let report = result("failed")?;
    End::failed(&["device"], &[]).leaves("VM web1 runs nowhere").fits(&report)?;
    stage.destination.wait_ended()?;
    stage.is_clean()
}

#[test]
fn from_the_hand_over_on_the_guest_is_the_destinations() -> Result<()> {
    with_lab("from_the_hand_over_on_the_guest_is_the_destinations", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let gone = End::failed(&["hand-over"], &["destination", "QEMU"]);
        Case::new(KILL_QEMU, Reach::HandOver, gone).play(&mut stage)?;
        let migration = stage.reach(Reach::HandOver)?;
        cancel_is_refused(&stage, &migration)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        stage.calm()?;
        stage.has_moved(&migration)?;
        stage.copies().same_as_source(&stage.paths, &stage.source, &stage.destination)
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
        wait_for("the first hook to end", SHORT, || Ok((stage.copies().calls() > 0).then_some(())))?;
        stage.bravo.restart()?;
        stage.has_moved(&migration)
    })
}
