//! A destination's ends: the guest is here for good, or everything is as it was.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Destination;
use super::error::Trouble;
use super::image_stamp;
use crate::migrate::guest::process::{self, StartedQemu};
use crate::migrate::guest::settings;
use crate::migrate::handover::{Ask, DestinationInput};
use crate::migrate::host::decisions::Decision;
use crate::migrate::journal::{Past, Record, Undo};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::migrate::protocol::message::{Fate, Response};
use crate::migrate::protocol::server::Control;
use crate::migrate::{decide, settle, source};
use crate::qemu::{
    DestinationLeftovers, MigrationStatus, Qmp, QueryMigrate, QueryStatus, RunState, destination_cleanup,
    names,
};

/// How long a QEMU may take to notice that its stream has been cut.
const NOTICE_DEADLINE: Duration = Duration::from_secs(10);
const NOTICE_POLL: Duration = Duration::from_millis(50);

impl Destination {
    /// After the word to start nothing leads back: the guest is here, as well as it can be.
    pub(crate) fn go_on(mut self, trouble: &Trouble) {
        tracing::error!(vm = self.vm, cause = chain(trouble), "trouble after the hand-over");
        let mut leftovers = vec![chain(trouble)];
        if !self.journal.past().runs
            && let Err(e) = self.journal.record(Record::Runs)
        {
            leftovers.push(chain(&e));
        }
        self.end_moved(leftovers);
    }

    pub(crate) fn end_moved(self, leftovers: Vec<String>) {
        let outcome = Outcome::Moved { leftovers };
        self.log_end(&outcome);
        self.host.end(self.journal, outcome.clone());
        source::finish(&self.progress, Phase::Done, outcome);
    }

    /// The migration settings of a QEMU whose guest has arrived, as they were before.
    pub(crate) async fn restore_settings(&self) {
        let Some(before) = settings::before(self.journal.past()) else { return };
        if let Err(e) = before.restore(&self.qmp).await {
            tracing::warn!(
                vm = self.vm,
                error = chain(&e),
                "the migration settings stay as vmferry set them"
            );
        }
    }

    /// Undoes what was prepared, once it is proved that the guest never ran here and never will.
    pub(crate) async fn give_up(mut self, trouble: &Trouble, mut control: Option<Control>) {
        let asked = matches!(trouble, Trouble::Aborted(_));
        let input = match asked {
            true => DestinationInput::Asked(Ask::Abort),
            false => DestinationInput::Trouble,
        };
        let effects = decide::destination_step(&mut self.handover, input);
        let error = self.write(effects);
        // Streams first: an NBD client in its handshake would hang QEMU 7.2's server stop.
        self.streams.cut_all();
        self.ram = None;
        self.nbd = None;
        if !self.prove(&mut control).await {
            tracing::warn!(vm = self.vm, "the agent stops before its disk has taken a record");
            return;
        }
        let mut leftovers: Vec<String> = error.map(|e| chain(&e)).into_iter().collect();
        leftovers.extend(undo(&self.vm, &self.qmp, self.journal.past(), self.started.take()).await);
        image_stamp::bear(&mut self.journal, &self.images, &leftovers);
        let outcome = never_ran(trouble, leftovers);
        self.log_end(&outcome);
        self.host.end(self.journal, outcome.clone());
        tracing::info!(vm = self.vm, peer = %self.peer, "the destination is as it was");
        source::finish(&self.progress, Phase::Failed, outcome);
        if let Some(mut control) = control {
            if asked {
                control.answer(Response::Fate(Fate::NeverRan)).await;
            }
            control.finish();
        }
    }

    /// Tries until the journal proves that the guest never will run; not when the agent stops before.
    async fn prove(&mut self, control: &mut Option<Control>) -> bool {
        if self.handover.ended().is_none() {
            let words =
                "the guest never ran here, and never shall; but the disk does not take the record that \
                         proves it, which is tried every second"
                    .to_owned();
            self.host.open_question(self.journal.past().header.migration, words);
        }
        while self.handover.ended().is_none() {
            tokio::select! {
                () = tokio::time::sleep(decide::ASK_AGAIN) => {
                    let effects = decide::destination_step(&mut self.handover, DestinationInput::Again);
                    self.write(effects);
                }
                Some(order) = self.orders.recv() => {
                    let cause = "the guest is being given up here, which needs the disk and nobody's word";
                    if let Some(order) = order.claim() {
                        order.answer(Decision::Refused(cause.into()));
                    }
                }
                Some((again, _)) = self.controls.recv() => {
                    control.insert(again).answer(self.word()).await;
                }
                () = self.host.stopping.cancelled() => return false,
                () = self.host.frozen() => return false,
            }
        }
        true
    }
}

pub(crate) fn never_ran(trouble: &Trouble, leftovers: Vec<String>) -> Outcome {
    let problems = trouble.refusal().problems;
    let cancelled = matches!(trouble, Trouble::Aborted(reason) if reason == "cancelled");
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

/// Undoes what `past` records: ends the QEMU that we started, or cleans the one that we found.
pub(crate) async fn undo(name: &str, qmp: &Qmp, past: &Past, started: Option<StartedQemu>) -> Vec<String> {
    if settle::started_qemu(past) {
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
    if took_ram(past) && is_used_up(qmp).await {
        // It would have ended by itself, had it not been asked to stay and to tell why.
        return process::quit(name, qmp).await.err().map(|e| chain(&e)).into_iter().collect();
    }
    let not_ours = report.left.iter().filter(|l| !l.source.is_over());
    not_ours.map(|l| format!("{} in the destination's QEMU: {}", l.what, chain(&l.source))).collect()
}
