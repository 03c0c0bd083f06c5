//! The guest's watch: what the guest and others at its QEMU do while a migration is under way, and
//! whether the guest is to run where it ends up.
//!
//! QEMU's events only say that something happened; what it comes to is asked (`query-status`). A
//! guest that somebody has paused arrives paused, and stays paused when the migration is rolled
//! back. What is known of that is in the journal before anybody acts on it, at both sides.
//!
//! Not seen, because QEMU does not show it: a `stop` while the guest stands still for the
//! switchover, or in the instant before. It has no effect there.

use tokio::time::Instant;

use super::failure::Failure;
use super::given_up;
use super::state::Source;
use crate::migrate::guest::inventory::Inventory;
use crate::migrate::journal::Record;
use crate::migrate::model::meanwhile::{Meanwhile, Standing};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Request;
use crate::qemu::{EventKind, IoStatus, MigrationStatus, QueryBlock, QueryStatus, RunState};

/// How long the destination may take to write down whether the guest is to run.
const NOTED_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);

/// What an event of QEMU's means, in every phase that waits.
pub(crate) async fn on_guest_event(source: &mut Source, event: &EventKind) -> Result<(), Failure> {
    if let Some(meanwhile) = Meanwhile::told_by(event) {
        return Err(meanwhile.into());
    }
    // From the pause for the switchover on, nobody can continue the guest but QEMU.
    let may_change = source.clock.phase < Phase::Switchover;
    match event {
        EventKind::Migration { status: MigrationStatus::Failed } => Err(given_up::ram_failed(source).await),
        EventKind::Stop if may_change => on_stop(source).await,
        EventKind::Resume | EventKind::Suspend | EventKind::Wakeup if may_change => {
            look_at_guest(source).await.map(drop)
        }
        EventKind::GuestPanicked => {
            source.context.note("the guest has panicked at the source".into());
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The guest stands still: for the switchover, by somebody's will, or because it must.
async fn on_stop(source: &mut Source) -> Result<(), Failure> {
    let before = source.clock.paused_at;
    // While QEMU is asked it counts as paused: only so long is a lost connection waited for.
    source.clock.paused_at.get_or_insert_with(Instant::now);
    let standing = look_at_guest(source).await;
    match standing {
        Ok(Standing::Passing) if source.clock.phase == Phase::Precopy => source.guest_stands_still(),
        _ => source.clock.paused_at = before,
    }
    standing.map(drop)
}

/// The same, when nobody has listened to QEMU for a while.
pub(crate) async fn look_if_missed(source: &mut Source) -> Result<(), Failure> {
    match source.guest.has_missed_events() {
        true => look_at_guest(source).await.map(drop),
        false => Ok(()),
    }
}

/// Asks QEMU how the guest is, and takes note if somebody has paused or continued it.
pub(crate) async fn look_at_guest(source: &mut Source) -> Result<Standing, Failure> {
    let state = source.query(QueryStatus).await?.status;
    let standing = Standing::of(&state);
    match standing {
        Standing::Runs => is_to_run(source, true)?,
        Standing::Paused => is_to_run(source, false)?,
        Standing::Passing => {}
        Standing::Fell => return Err(fell(source, state).await.into()),
    }
    Ok(standing)
}

/// Takes note of whether the guest is to run where it ends up: durably, because a restarted
/// agent must not resume a guest that somebody has paused.
fn is_to_run(source: &mut Source, running: bool) -> Result<(), Failure> {
    if source.journal.past().running() == running {
        return Ok(());
    }
    source.journal.record(Record::ToRun { running })?;
    source.context.progress.update(|p| p.paused = !running);
    let vm = &source.context.request.vm;
    source.context.note(match running {
        true => format!("somebody continued VM {vm} at the source: it is to run where it ends up"),
        false => format!("somebody paused VM {vm} at the source: it stays paused where it ends up"),
    });
    Ok(())
}

async fn fell(source: &Source, state: RunState) -> Meanwhile {
    if state != RunState::IoError {
        return Meanwhile::Fell { state, failing: Vec::new() };
    }
    let blocks = source.query(QueryBlock).await.unwrap_or_default();
    let failing = blocks.into_iter().filter_map(|block| {
        let why = match block.io_status? {
            IoStatus::Ok => return None,
            IoStatus::NoSpace => " (no space left)",
            _ => "",
        };
        let node = block.inserted.map(|i| i.node_name);
        let ours = source.copy.plan.disks.iter().find(|p| Some(&p.disk.node_name) == node.as_ref());
        let name = ours.map_or(block.qdev, |p| format!("disk {}", p.disk.name));
        Some(format!("{name}{why}"))
    });
    Meanwhile::Fell { state, failing: failing.collect() }
}

/// That the machine is still the one of the plan.
pub(crate) async fn is_as_planned(source: &mut Source) -> Result<(), Failure> {
    let (policy, qmp) = (source.reconnect_policy(), &source.guest.qmp);
    let found = match &source.guest.inventory {
        Some(inventory) => policy.ask(|| inventory.unchanged(qmp)).await?,
        // Of an earlier version of this agent: what it was is not known.
        None => {
            source.guest.inventory = Some(policy.ask(|| Inventory::of(qmp)).await?);
            None
        }
    };
    found.map_or(Ok(()), |meanwhile| Err(meanwhile.into()))
}

/// Tells the destination whether the guest is to run there, if that has changed since the offer.
/// It is durable there before the disks are given up here.
pub(crate) async fn tell_whether_it_runs(source: &mut Source) -> Result<(), Failure> {
    match source.journal.past().to_run {
        Some(running) => source.demand(Request::ToRun { running }, NOTED_WITHIN).await,
        None => Ok(()),
    }
}

/// The failure that explains this one, if QEMU has said so meanwhile; with its words.
pub(crate) async fn overruled(source: &mut Source, failure: Failure, cause: String) -> (Failure, String) {
    let is_own_decision = matches!(
        failure,
        Failure::Cancelled
            | Failure::Replicated
            | Failure::Stopping
            | Failure::Frozen
            | Failure::Meanwhile(_)
            | Failure::Problems(_)
    );
    if is_own_decision {
        return (failure, cause);
    }
    let told = match source.guest.told_meanwhile() {
        Some(told) => Some(told.into()),
        None => given_up::is_our_qemus(source, &failure).await,
    };
    match told {
        Some(failure) => {
            tracing::info!(first = cause, "what failed first is explained by what QEMU says");
            let cause = chain(&failure);
            (failure, cause)
        }
        None => (failure, cause),
    }
}
