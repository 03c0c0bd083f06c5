//! Roll-back on the source: what the journal says was made goes, and the guest runs again.
//!
//! Used by a migration that fails and by an agent that finds an open journal at its start. The
//! pumps are cut before: QEMU's main loop may hang on a stalled stream and then answers nobody.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::life::Known;
use crate::migrate::journal::{Past, Undo};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::qemu::{
    BlockdevDel, CleanupReport, Cont, MigrationStatus, Qmp, QmpError, QueryMigrate, QueryStatus, RunState,
    SourceLeftovers, names, source_cleanup, unthrottle,
};

/// How long the guest may take to run again.
const RESUME_DEADLINE: Duration = Duration::from_secs(60);
const RESUME_POLL: Duration = Duration::from_millis(50);

/// What becomes of the dirty bitmaps that follow disks from try to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bitmaps {
    Go,
    /// They go on recording; the journal stays open for as long.
    StayForTheNextTry,
}

/// Removes what followed the disks' changes; what could not be removed.
pub(crate) async fn end_following(qmp: &Qmp, past: &Past) -> Vec<String> {
    let SourceLeftovers { exports, nbd_server, bitmaps, .. } = leftovers(past);
    if exports.is_empty() && !nbd_server && bitmaps.is_empty() {
        return Vec::new();
    }
    let what = SourceLeftovers { exports, nbd_server, bitmaps, ..SourceLeftovers::default() };
    in_words(&source_cleanup(qmp, &what).await)
}

fn in_words(report: &CleanupReport) -> Vec<String> {
    let left = report.left.iter();
    left.map(|left| format!("{} in the source's QEMU: {}", left.what, chain(&left.source))).collect()
}

/// How a roll-back went.
#[derive(Debug)]
pub(crate) struct RolledBack {
    /// What could not be undone, in words.
    pub(crate) leftovers: Vec<Leftover>,
    /// Why the guest does not run, where that is somebody's will or the guest's own doing.
    pub(crate) standing: Option<String>,
    /// QEMU has gone, and the guest with it.
    pub(crate) gone: bool,
}

impl RolledBack {
    /// Nothing could be undone, for this reason.
    pub(crate) fn not(why: Leftover) -> Self {
        Self { leftovers: vec![why], standing: None, gone: false }
    }
}

/// Undoes what `past` records in the source's QEMU, and lets the guest run if it ran before.
pub(crate) async fn roll_back(qmp: &Qmp, past: &Past, bitmaps: Bitmaps) -> RolledBack {
    let mut what = leftovers(past);
    if bitmaps == Bitmaps::StayForTheNextTry {
        what.bitmaps.retain(|(_, name)| names::is_compared(name));
    }
    let is_ours = may_be_ours(qmp, past, &what).await;
    let report = source_cleanup(qmp, &what).await;
    if report.is_connection_lost() || report.is_unanswered() {
        let known = Known::of(qmp.process(), qmp.path()).await;
        let left = known.of_source(&past.header.vm);
        return RolledBack { leftovers: vec![left], standing: None, gone: known.is_gone() };
    }
    let mut leftovers: Vec<_> = in_words(&report).into_iter().map(Leftover::from).collect();
    let vm = &past.header.vm;
    let standing = match resume(qmp, past.running(), is_ours).await {
        Ok(RunState::Running) => None,
        Ok(state) => Some(standing(vm, &state)),
        Err(e) => {
            let words = format!("VM {vm} could not be resumed at the source: {}", chain(&e));
            leftovers.push(Leftover::Guest(words));
            None
        }
    };
    RolledBack { leftovers, standing, gone: false }
}

/// What the journal says may be in the source's QEMU.
pub(crate) fn leftovers(past: &Past) -> SourceLeftovers {
    let has_fd = |name: &str| past.undo.iter().any(|undo| matches!(undo, Undo::Fd(fd) if fd == name));
    // A trial is over before anything is copied.
    let is_trial = has_fd(names::TRIAL_FDNAME) && past.reached < Phase::Mirror;
    let migration = has_fd(names::RAM_FDNAME) || is_trial;
    let mut left = SourceLeftovers { migration, ..SourceLeftovers::default() };
    for undo in &past.undo {
        match undo {
            Undo::Fd(name) => left.fdnames.push(name.clone()),
            Undo::Node(name) => left.nodes.push(name.clone()),
            Undo::Job(id) => left.jobs.push(id.clone()),
            Undo::Bitmap { node, name } => left.bitmaps.push((node.clone(), name.clone())),
            Undo::Export(id) => left.exports.push(id.clone()),
            Undo::NbdServer => left.nbd_server = true,
            Undo::Throttle(throttled) => left.throttled.push(throttled.clone()),
            Undo::MigrationSettings { capabilities, parameters } => {
                left.capabilities_before.clone_from(capabilities);
                left.parameters_before = Some(parameters.clone());
            }
            // What is on the destination's disks is the destination's matter.
            Undo::Qemu | Undo::Image { .. } | Undo::Volume(_) => {}
        }
    }
    left
}

/// Takes what was made out of a QEMU long after the migration has ended: the guest and the settings are
/// left as they are by now, and so is a migration of somebody else's.
pub(crate) async fn clean_late(qmp: &Qmp, past: &Past) -> Vec<String> {
    match qmp.execute(QueryMigrate).await {
        Ok(info) if info.status.is_live() => return past.left().to_vec(),
        Err(e) => return vec![format!("the QEMU of VM {} cannot be asked: {}", past.header.vm, chain(&e))],
        Ok(_) => {}
    }
    let mut what = leftovers(past);
    what.capabilities_before.clear();
    what.parameters_before = None;
    in_words(&source_cleanup(qmp, &what).await)
}

/// Whether the migration that `past` tells of is still under way in its QEMU, because that could not be
/// asked when the migration ended.
pub(crate) async fn is_under_way(qmp: &Qmp, past: &Past) -> bool {
    let (Ok(info), Ok(found)) = (qmp.execute(QueryMigrate).await, crate::qemu::leftovers(qmp).await) else {
        return false;
    };
    let what = leftovers(past);
    let ours = found.jobs.iter().any(|id| what.jobs.contains(id))
        || found.nodes.iter().any(|name| what.nodes.contains(name));
    info.status.is_live() && ours
}

/// Takes what was made out of a QEMU that is kept, and whose guest has moved.
pub(crate) async fn clean_kept(qmp: &Qmp, past: &Past) -> Vec<String> {
    let mut left = end_following(qmp, past).await;
    let SourceLeftovers { nodes, throttled, .. } = leftovers(past);
    for throttled in throttled {
        if let Err(e) = unthrottle(qmp, &throttled).await {
            left.push(format!("the limit of what the guest writes to {}: {}", throttled.device, chain(&e)));
        }
    }
    for node in nodes {
        if let Err(e) = qmp.execute(BlockdevDel { node_name: node.clone() }).await {
            left.push(format!("block node {node} in the source's QEMU: {}", chain(&e)));
        }
    }
    left
}

/// Whether a migration that QEMU has completed may be this one: QEMU was given the stream for its RAM, and the mirrors
/// were dismissed, as they are before it is let go on to its end. Else somebody has moved the guest elsewhere.
async fn may_be_ours(qmp: &Qmp, past: &Past, what: &SourceLeftovers) -> bool {
    if !past.undo.contains(&Undo::Fd(names::RAM_FDNAME.into())) {
        return false;
    }
    let found = crate::qemu::leftovers(qmp).await;
    what.jobs.is_empty() || found.is_ok_and(|found| !found.jobs.iter().any(|id| what.jobs.contains(id)))
}

/// Why the guest does not run although it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResumeError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("it stays in state {0}")]
    State(RunState),
    #[error(
        "a migration that is not this one has taken the guest out of this QEMU (somebody's `migrate`), and it may run \
         elsewhere: never continue it here unless it surely runs nowhere else"
    )]
    Elsewhere,
}

/// Lets a guest run again that nobody but QEMU's migration has stopped; how it is then.
///
/// QEMU itself resumes a guest that ran when it was stopped for the switchover, unless the migration
/// was completed. So one that stands still after any other end stood still before, by somebody's
/// will or because it must, and is left as it is.
///
/// Errors: also where a completed migration was not ours.
async fn resume(qmp: &Qmp, is_to_run: bool, is_ours: bool) -> Result<RunState, ResumeError> {
    let until = Instant::now() + RESUME_DEADLINE;
    loop {
        let state = qmp.execute_within(QueryStatus, RESUME_DEADLINE).await?.status;
        match state {
            RunState::PostMigrate
                if !is_ours && qmp.execute(QueryMigrate).await?.status == MigrationStatus::Completed =>
            {
                return Err(ResumeError::Elsewhere);
            }
            RunState::PostMigrate if is_to_run => match qmp.execute(QueryMigrate).await?.status {
                MigrationStatus::Completed => match qmp.execute_within(Cont, RESUME_DEADLINE).await {
                    // Whether it was heard is asked.
                    Err(e) if e.is_interrupted() => {}
                    done => drop(done?),
                },
                status if status.is_live() => {}
                _ => return Ok(state),
            },
            RunState::FinishMigrate => {}
            _ => return Ok(state),
        }
        if Instant::now() >= until {
            return Err(ResumeError::State(state));
        }
        sleep(RESUME_POLL).await;
    }
}

/// Why a guest that was not moved does not run.
fn standing(vm: &str, state: &RunState) -> String {
    match state {
        RunState::Paused | RunState::Prelaunch => format!("VM {vm} is paused at the source, and is left so"),
        RunState::PostMigrate => format!(
            "VM {vm} is paused at the source, and is left so; its QEMU calls that {state}, and takes no further \
             migration until the guest was continued once (`cont`)"
        ),
        other => format!("VM {vm} is in state {other} at the source, and is left so"),
    }
}
