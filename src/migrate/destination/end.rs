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
    DestinationLeftovers, MigrationStatus, Qmp, QueryMigrate, QueryStatus, RunState, destination_cleanup,
    names,
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

/// Whether it has the guest of this migration, which is the source's: paused, or continued by somebody.
async fn has_the_guest(qmp: &Qmp, past: &Past) -> bool {
    let state = qmp.execute(QueryStatus).await.map(|info| info.status);
    past.is_surely_of(qmp.process()) && state.is_ok_and(|state| state != RunState::InMigrate)
}

/// Whether the QEMU behind the monitor is still the one that waited for this migration.
async fn is_that_qemu(qmp: &Qmp, past: &Past) -> bool {
    if took_ram(past) && past.is_surely_of(qmp.process()) {
        return true;
    }
    match qmp.execute(QueryStatus).await.map(|info| info.status) {
        Ok(RunState::InMigrate) => true,
        Ok(RunState::Paused) => took_ram(past),
        _ => false,
    }
}

/// Undoes what `past` records: ends the QEMU that we started, or cleans the one that we found.
pub(crate) async fn undo(name: &str, qmp: &Qmp, past: &Past, started: Option<StartedQemu>) -> Vec<String> {
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
    if took_ram(past) && (is_used_up(qmp).await || has_the_guest(qmp, past).await) {
        // It would have ended by itself, had it not been asked to stay and to tell why; or somebody could continue there
        // what goes on at the source.
        return process::quit(name, qmp).await.err().map(|e| chain(&e)).into_iter().collect();
    }
    let not_ours = report.left.iter().filter(|l| !l.source.is_over());
    not_ours.map(|l| format!("{} in the destination's QEMU: {}", l.what, chain(&l.source))).collect()
}
