//! Settling: what an agent finds open at its start.
//!
//! The rules are those of [`super::handover`]: its machines are told what the journal says, and
//! what they want is done. A source that has not durably handed over takes its guest back. One
//! that has asks the destination until it knows. A destination that has not durably begun to
//! start the guest durably says that it never will; one that has goes on.
//!
//! Several journals may be open for one virtual machine. Each is settled by its machine; only the
//! newest touches the virtual machine's QEMU.

mod abandoned;
mod destination;

pub use abandoned::abandoned;

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::sleep;
use uuid::Uuid;

use super::decide::{self, ANSWER_DEADLINE, ASK_AGAIN, Decided, Question};
use super::guest::life::{self, Look};
use super::guest::undo::RolledBack;
use super::guest::{process, undo};
use super::handover::{Ask, Ended, Side, Source, SourceEffect, SourceInput};
use super::host::{Host, Refused, Reservation};
use super::journal::{self, Journal, JournalError, Past, Record, Role, Undo};
use super::model::phase::Phase;
use super::model::problem::chain;
use super::model::progress::{Outcome, Progress, ProgressSink};
use super::protocol::message::{Fate, Request};
use super::source::{self, retry};
use crate::net::identity::Identity;
use crate::qemu::{QueryStatus, RunState};

/// A journal that an earlier life of this agent left open, and where to report on it.
pub struct Open {
    /// The journal.
    pub journal: Journal,
    /// Its progress.
    pub progress: ProgressSink,
    /// No later migration of its VM is open: its QEMU is this one's to touch.
    heir: bool,
    /// Nothing else begins with this VM until all that is open of it is settled.
    _reservation: Arc<Reservation>,
}

/// The journal of a migration that was to go on as it was, and cannot; `None` when it is closed.
pub(crate) fn reopen(host: &Arc<Host>, (id, role): (Uuid, Role), progress: ProgressSink) -> Option<Open> {
    let path = Journal::path(&host.journals(), id, role);
    let journal = Journal::open(&path, host.identity.as_str());
    let journal =
        journal.inspect_err(|e| tracing::error!(error = chain(e), "a journal is not believed")).ok()?;
    if journal.past().ended.is_some() {
        return None;
    }
    let _reservation = Arc::new(host.reserve(&journal.past().header.vm, id).ok()?);
    Some(Open { journal, progress, heir: true, _reservation })
}

/// Finds what is open on this host, and history, but for migrations that go on as they were.
///
/// # Errors
/// [`journal::JournalError`] when the folder cannot be read. Journals that cannot be believed
/// are logged and left alone.
pub fn find(
    host: &Arc<Host>,
    taken_up: &BTreeSet<(Uuid, Role)>,
) -> Result<(Vec<Open>, Vec<Progress>), journal::JournalError> {
    let (mut open, mut history, mut refused) = (Vec::<Open>::new(), Vec::new(), Vec::new());
    let name = host.identity.as_str();
    // The newest first: if several are open for one VM, only that one touches its QEMU.
    for (path, past) in journal::peek_all(&host.journals(), name)?.into_iter().rev() {
        let past = match past {
            Ok(past) if taken_up.contains(&(past.header.migration, past.header.role)) => continue,
            Ok(past) => past,
            Err(JournalError::NotBegun { .. }) => {
                let removed = journal::remove_unbegun(&path, name);
                let _ = removed.inspect_err(|e| tracing::warn!(error = chain(e), "it is ignored"));
                continue;
            }
            Err(e) => {
                refused.push((path, e));
                continue;
            }
        };
        if past.ended.is_some() {
            history.push(told(&past));
            continue;
        }
        let vm = &past.header.vm;
        let newer = open.iter().find(|newer| newer.journal.past().header.vm == *vm);
        let reservation = match newer {
            Some(newer) => Some(Arc::clone(&newer._reservation)),
            None => host.reserve(vm, past.header.migration).ok().map(Arc::new),
        };
        let heir = newer.is_none();
        match (Journal::open(&path, name), reservation) {
            (Ok(journal), Some(_reservation)) => {
                let progress = ProgressSink::new(told(&past));
                open.push(Open { journal, progress, heir, _reservation });
            }
            (Ok(_), None) => {
                tracing::error!(vm, "an open journal of a VM that is in use; a restart settles it")
            }
            (Err(e), _) => refused.push((path, e)),
        }
    }
    history.reverse();
    // What is open and believed is settled all the same; nothing new begins beside it.
    for (path, e) in refused {
        refuse(host, path, &e);
    }
    let shown = |p: &Progress| {
        !open.iter().any(|o: &Open| o.progress.now().id == p.id && o.progress.now().role == p.role)
    };
    history.retain(shown);
    Ok((open, retry::only_last(history)))
}

/// A journal that is not believed is left alone, and no migration of its VM begins.
pub(crate) fn refuse(host: &Host, path: std::path::PathBuf, error: &journal::JournalError) {
    let (vm, cause) = (journal::vm_of(&path), chain(error));
    tracing::error!(
        error = cause,
        vm,
        "a journal is not believed; the migration it tells of needs an operator"
    );
    host.refuse(Refused { path, vm, cause });
}

/// Why a migration that was found open was not finished.
fn cause(heir: bool, why: &str) -> String {
    match heir {
        true => why.to_owned(),
        false => "a later migration of the VM began before this one was settled".to_owned(),
    }
}

/// Where an open migration is: in the pause the journal has records of whose the guest is, and no
/// phases.
pub(crate) fn phase_of(past: &Past) -> Phase {
    let is_source = past.header.role == Role::Source;
    let forced_away = past.forced.is_some_and(|side| (side == Side::There) == is_source);
    let forced_back = past.forced.is_some() && !forced_away;
    if past.never_ran || forced_back {
        Phase::RollBack
    } else if past.runs || (is_source && forced_away) {
        Phase::Confirm
    } else if past.handed_over || past.starting || forced_away {
        Phase::HandOver
    } else {
        past.phase
    }
}

fn told(past: &Past) -> Progress {
    let header = &past.header;
    let id = header.retry.as_ref().map_or(header.migration, |r| r.first);
    let mut progress = Progress::new(id, &header.vm, header.role, &header.peer);
    progress.began_at = header.began_at;
    progress.phase = match &past.ended {
        Some(Outcome::Moved { .. }) => Phase::Done,
        Some(_) => Phase::Failed,
        None => phase_of(past),
    };
    progress.outcome.clone_from(&past.ended);
    progress
}

/// Settles one open journal.
pub async fn settle(host: Arc<Host>, open: Open) {
    let past = open.journal.past().clone();
    tracing::info!(
        migration = %past.header.migration, vm = past.header.vm, role = past.header.role.name(),
        phase = past.phase.name(), "settling a migration that an earlier agent left open"
    );
    match past.header.role {
        Role::Source => settle_source(host, open).await,
        Role::Destination => destination::settle(host, open).await,
    }
}

async fn settle_source(host: Arc<Host>, open: Open) {
    // The guest must not be moved again while this is open.
    let Open { mut journal, progress, heir, _reservation } = open;
    let past = journal.past().clone();
    let peer = host.peer_name(&past.header.peer).unwrap_or_else(|| past.header.peer.clone());
    let (mut machine, effects) = Source::restarted(past.known());
    let question = Question::new(&host, &peer, past.header.migration, progress.clone());
    let why = "the agent was restarted after the hand-over".into();
    // The agent stops: its journal stays open, for the next one.
    let Some(decided) = question.decide(&mut machine, &mut journal, effects, why).await else { return };
    let settling = Settling { host: &host, peer: &peer, heir, progress: &progress };
    match machine.ended() {
        Some(Ended::Moved) => settling.moved(machine, journal, decided).await,
        _ => settling.stayed(machine, journal, decided).await,
    }
}

/// A source whose guest's owner is known.
struct Settling<'a> {
    host: &'a Host,
    peer: &'a str,
    heir: bool,
    progress: &'a ProgressSink,
}

impl Settling<'_> {
    async fn stayed(&self, mut machine: Source, journal: Journal, decided: Decided) {
        let (host, peer, past) = (self.host, self.peer, journal.past().clone());
        let Some(leftovers) = self.take_back(&past).await else {
            tracing::warn!(
                vm = past.header.vm,
                "the agent stops before the guest is taken back; the next one goes on"
            );
            return;
        };
        let why = "the source's agent was restarted during the migration; it was rolled back";
        let cause = cause(self.heir, why);
        let mut thanks = decided.effects;
        if thanks.contains(&SourceEffect::Ask(Ask::Abort)) && past.reached >= Phase::Precopy {
            match decide::call_off(host, peer, past.header.migration, &cause).await {
                Ok(fate) => thanks.extend(
                    fate.iter().flat_map(|f| decide::source_step(&mut machine, SourceInput::Heard(*f))),
                ),
                Err(e) => tracing::info!(error = chain(&e), "the destination undoes its part by itself"),
            }
        }
        if thanks.contains(&SourceEffect::Ask(Ask::Confirmed)) {
            decide::thank(host, peer, past.header.migration).await;
        }
        let outcome =
            Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
        end(host, journal, self.progress, Phase::Failed, outcome);
    }

    /// However long the QEMU cannot be asked; `None` when the agent stops before.
    async fn take_back(&self, past: &Past) -> Option<Vec<String>> {
        if !self.heir {
            return Some(Vec::new());
        }
        let (id, name) = (past.header.migration, &past.header.vm);
        loop {
            let why = match take_back(self.host, past).await {
                Ok(undone) => {
                    self.host.answered(id);
                    self.progress.update(|p| p.notes.extend(undone.standing));
                    return Some(undone.leftovers);
                }
                Err(why) => why,
            };
            let words = format!(
                "VM {name} is this host's, and its guest cannot be taken back yet: {why}. That is tried again every \
                 second"
            );
            self.host.open_question(id, words);
            tokio::select! {
                () = sleep(ASK_AGAIN) => {}
                () = self.host.stopping.cancelled() => return None,
            }
        }
    }

    async fn moved(&self, mut machine: Source, mut journal: Journal, decided: Decided) {
        let Decided { effects, link, forced, .. } = decided;
        let (effects, error) = decide::write_source(&mut machine, &mut journal, effects, None);
        let mut leftovers: Vec<String> = error.iter().map(|e| chain(e)).collect();
        if effects.contains(&SourceEffect::Ask(Ask::Confirmed))
            && let Some(mut link) = link
        {
            let _ = link.demand(Request::Confirmed, ANSWER_DEADLINE).await;
            link.finish();
        }
        let past = journal.past();
        if forced.is_some() || past.forced.is_some() {
            leftovers.push(source::kept_by_force(&past.header.vm));
        } else if self.heir {
            leftovers.extend(release(self.host, past).await);
        }
        end(self.host, journal, self.progress, Phase::Done, Outcome::Moved { leftovers });
    }
}

/// Ends the old QEMU, or leaves it as was asked for. One that somebody has started since is left alone.
async fn release(host: &Host, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    let Some(config) = host.config.vms.get(name) else {
        return vec![format!(
            "VM {name}, which was handed over, is not in this host's configuration: if its old QEMU lives, end \
             it, and never continue it"
        )];
    };
    let qmp = match life::reach(past, config).await {
        Ok((qmp, _events)) => qmp,
        Err((known, _)) => return known.of_the_old(name).into_iter().collect(),
    };
    match qmp.execute(QueryStatus).await {
        Err(_) => life::Known::of(qmp.process(), qmp.path()).await.of_the_old(name).into_iter().collect(),
        Ok(info) if info.status != RunState::PostMigrate => Vec::new(),
        Ok(_) if past.header.keep_source => undo::clean_kept(&qmp, past).await,
        Ok(_) => process::end_the_old(name, &qmp).await.into_iter().collect(),
    }
}

/// Undoes what was made in the source's QEMU, and lets the guest run; why that QEMU cannot be asked.
async fn take_back(host: &Host, past: &Past) -> Result<RolledBack, String> {
    let name = &past.header.vm;
    let config = match host.vm(name, "source") {
        Err(problem) => return Ok(RolledBack::not(problem.to_string())),
        Ok(config) => config,
    };
    match life::look(past, config).await {
        Look::Answers(qmp) => Ok(undo::roll_back(&qmp, past, undo::Bitmaps::Go).await),
        Look::Lost(known) => Ok(RolledBack::not(known.of_source(name))),
        Look::Silent(known) => Err(known.in_words()),
    }
}

fn end(host: &Host, journal: Journal, progress: &ProgressSink, phase: Phase, outcome: Outcome) {
    tracing::info!(vm = journal.past().header.vm, result = outcome.label(), "settled");
    host.end(journal, outcome.clone());
    source::finish(progress, phase, outcome);
}

/// What this host says of a migration that `peer` sent, and that nobody serves any more; `None` when
/// it knows of none.
pub(crate) fn recall(host: &Host, peer: &Identity, migration: Uuid) -> Option<Fate> {
    let sent = |past: &Past| {
        let header = &past.header;
        header.migration == migration && header.role == Role::Destination && header.peer == peer.as_str()
    };
    // Its machine has decided; only the journal's end is missing.
    if let Some((_, outcome)) = host.unended(migration, Role::Destination).filter(|(past, _)| sent(past)) {
        return Some(match outcome {
            Outcome::Moved { .. } => Fate::Runs,
            _ => Fate::NeverRan,
        });
    }
    // It may be written to at this moment, so it is only looked at.
    let path = Journal::path(&host.journals(), migration, Role::Destination);
    match Journal::peek(&path, host.identity.as_str()) {
        Ok(past) if sent(&past) => Some(past.known().ended.map_or(Fate::Open, Ended::fate)),
        // Something is there, and it is not known what.
        Err(_) if path.exists() => Some(Fate::Open),
        _ => None,
    }
}

/// The source knows how it ended, and never asks again.
pub(crate) fn confirmed(host: &Host, peer: &Identity, migration: Uuid) {
    let path = Journal::path(&host.journals(), migration, Role::Destination);
    let ours = |past: &Past| past.header.peer == peer.as_str() && past.ended.is_some() && !past.confirmed;
    // Only looked at first: one that has not ended has somebody who writes to it.
    if !Journal::peek(&path, host.identity.as_str()).is_ok_and(|past| ours(&past)) {
        return;
    }
    let journal = Journal::open(&path, host.identity.as_str());
    if let Err(e) = journal.and_then(|mut journal| journal.record(Record::Confirmed)) {
        tracing::info!(
            error = chain(&e),
            "that the source knows was not written; the journal is kept longer"
        );
    }
}

/// Whether the journal says that this agent started the destination's QEMU.
pub(crate) fn started_qemu(past: &Past) -> bool {
    past.undo.contains(&Undo::Qemu)
}
