//! A destination's ends: the guest is here for good, or everything is as it was.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::error::{Abort, Error};
use super::state::Destination;
use crate::migrate::guest::process::{self, StartedQemu};
use crate::migrate::guest::settings;
use crate::migrate::journal::{Past, Undo};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::qemu::{
    DestinationLeftovers, MigrationStatus, Qmp, QueryMigrate, QueryStatus, RunState, Stop,
    destination_cleanup, names,
};

/// How long a QEMU may take to notice that its stream has been cut.
const NOTICE_DEADLINE: Duration = Duration::from_secs(10);
const NOTICE_POLL: Duration = Duration::from_millis(50);

impl Destination {
    /// The migration settings of a QEMU whose guest has arrived, as they were before.
    pub(crate) async fn restore_settings(&self) {
        let Some(before) = settings::before(self.journal.past()) else { return };
        if let Err(e) = before.restore(&self.guest.qmp).await {
            tracing::warn!(
                vm = self.vm,
                error = chain(&e),
                "the migration settings stay as vmferry set them"
            );
        }
    }
}

pub(crate) fn never_ran(trouble: &Error, leftovers: Vec<Leftover>) -> Outcome {
    if matches!(trouble, Error::Aborted(Abort::Replicated)) {
        return Outcome::Replicated { leftovers };
    }
    let problems = trouble.refusal().problems;
    let cancelled = matches!(trouble, Error::Aborted(Abort::Cancelled));
    let cause = chain(trouble);
    Outcome::Failed { phase: Phase::Prepare, cause, problems, cancelled, leftovers }
}

fn took_ram(past: &Past) -> bool {
    past.undo.contains(&Undo::Fd(names::RAM_FDNAME.into()))
}

/// Whether a QEMU has no guest and can take none any more, because its migration has failed. Its
/// stream has been cut, which it may notice a moment later.
async fn is_used_up(qmp: &Qmp) -> bool {
    let until = Instant::now() + NOTICE_DEADLINE;
    loop {
        let Ok(RunState::InMigrate) = qmp.execute(QueryStatus).await.map(|info| info.status) else {
            return false;
        };
        match qmp.execute(QueryMigrate).await.map(|info| info.status) {
            Ok(MigrationStatus::Failed) => return true,
            Ok(status) if status.is_live() && Instant::now() < until => sleep(NOTICE_POLL).await,
            _ => return false,
        }
    }
}

/// Whether the QEMU behind the monitor is still the one that waited for this migration.
async fn is_that_qemu(qmp: &Qmp, past: &Past) -> bool {
    match qmp.execute(QueryStatus).await.map(|info| info.status) {
        Ok(RunState::InMigrate) => true,
        Ok(RunState::Paused) => took_ram(past),
        _ => false,
    }
}

/// In which moment a destination's QEMU is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Nobody but this migration has used it.
    AtOnce,
    /// The same, and somebody has let the guest run there, unasked.
    Continued,
    /// Long after: it may be another migration's, or an operator's.
    Late,
}

/// What this migration's QEMU does with the whole guest, where it surely has it.
async fn with_the_guest(qmp: &Qmp, past: &Past, moment: Moment) -> Option<RunState> {
    let is_it = moment != Moment::Late && took_ram(past) && past.is_surely_of(qmp.process());
    let state = if is_it { qmp.execute(QueryStatus).await.ok()?.status } else { return None };
    (state != RunState::InMigrate).then_some(state)
}

/// A guest that ran where it should not have: it is the only one, or it runs twice, and only an operator can know.
async fn stopped(name: &str, qmp: &Qmp, past: &Past) -> Vec<String> {
    let stopped = match qmp.execute_until_answered(Stop).await {
        Ok(_) => "it is stopped".to_owned(),
        Err(e) => format!("it could not be stopped ({})", chain(&e)),
    };
    let end = match process::started_qemu(past) {
        true => "`vmferry recover`, and the next start of this agent, end this QEMU",
        false => "end this QEMU once the VM surely runs there",
    };
    vec![format!(
        "somebody continued VM {name} here before {} had handed it over; {stopped}, and its QEMU is left. Never continue \
         it while the VM may run there; {end}",
        past.header.peer
    )]
}

/// Undoes what `past` records: ends the QEMU that we started, or cleans the one that we found.
pub(crate) async fn undo(
    name: &str,
    qmp: &Qmp,
    past: &Past,
    started: Option<StartedQemu>,
    moment: Moment,
) -> Vec<String> {
    let guest = with_the_guest(qmp, past, moment).await;
    if guest == Some(RunState::Running) || guest.is_some() && moment == Moment::Continued {
        return stopped(name, qmp, past).await;
    }
    if process::started_qemu(past) {
        let ended = match started {
            Some(started) => started.stop(qmp).await,
            None if is_that_qemu(qmp, past).await => process::quit(name, qmp).await,
            // Somebody has started the VM since; what we had started is gone with its process.
            None => Ok(()),
        };
        return ended.err().map(|e| chain(&e)).into_iter().collect();
    }
    let mut left = DestinationLeftovers::default();
    for undo in &past.undo {
        match undo {
            Undo::Fd(name) => left.fdnames.push(name.clone()),
            Undo::NbdServer => left.nbd_server = true,
            Undo::Export(id) => left.exports.push(id.clone()),
            _ => {}
        }
    }
    if let Some(before) = settings::before(past) {
        left.capabilities_before = before.capabilities;
        left.parameters_before = Some(before.parameters);
    }
    let report = destination_cleanup(qmp, &left).await;
    if guest == Some(RunState::Paused) || took_ram(past) && is_used_up(qmp).await {
        // The one would have ended by itself, had it not been asked to stay and to tell why. The other has the whole
        // guest, which goes on at its source, and which somebody could continue here.
        return process::quit(name, qmp).await.err().map(|e| chain(&e)).into_iter().collect();
    }
    let not_ours = report.left.iter().filter(|l| !l.source.is_over());
    not_ours.map(|l| format!("{} in the destination's QEMU: {}", l.what, chain(&l.source))).collect()
}
