//! Settling: what an agent finds open at its start.
//!
//! The rules are those of [`super::handover`]: its machines are told what the journal says, and
//! what they want is done. A source that has not durably handed over takes its guest back. One
//! that has asks the destination until it knows. A destination that has not durably begun to
//! start the guest durably says that it never will; one that has goes on.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::sleep;
use uuid::Uuid;

use super::decide::{self, ANSWER_DEADLINE, ASK_AGAIN, Decided, Question};
use super::handover::{
    Ask, Destination, DestinationEffect, DestinationInput, Ended, Ran, Source, SourceEffect, SourceInput,
};
use super::host::{Host, Refused, Reservation};
use super::journal::{self, Journal, Past, Record, Role, Undo};
use super::life::{self, Known};
use super::message::{Fate, Request};
use super::phase::Phase;
use super::problem::chain;
use super::progress::{Outcome, Progress, ProgressSink};
use super::{destination, retry, source, undo, vm, witness};
use crate::net::identity::Identity;
use crate::qemu::{Cont, Qmp, QueryStatus, RunState};

/// A journal that an earlier life of this agent left open, and where to report on it.
pub struct Open {
    /// The journal.
    pub journal: Journal,
    /// Its progress.
    pub progress: ProgressSink,
    /// Nothing else may begin with this VM meanwhile.
    reservation: Reservation,
}

/// The journal of a migration that was to go on as it was, and cannot; `None` when it is closed.
pub(super) fn reopen(host: &Arc<Host>, (id, role): (Uuid, Role), progress: ProgressSink) -> Option<Open> {
    let path = Journal::path(&host.journals(), id, role);
    let journal = Journal::open(&path, host.identity.as_str());
    let journal =
        journal.inspect_err(|e| tracing::error!(error = chain(e), "a journal is not believed")).ok()?;
    if journal.past().ended.is_some() {
        return None;
    }
    let reservation = host.reserve(&journal.past().header.vm, id).ok()?;
    Some(Open { journal, progress, reservation })
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
    let (mut open, mut history) = (Vec::new(), Vec::new());
    // The newest first: if two are open for one VM, only that one tells where its guest is.
    let (mut believed, mut refused) = (Vec::new(), Vec::new());
    for (path, found) in journal::list(&host.journals(), host.identity.as_str())?.into_iter().rev() {
        match found {
            Ok(journal) => believed.push(journal),
            Err(e) => refused.push((path, e)),
        }
    }
    for journal in believed {
        let header = &journal.past().header;
        if taken_up.contains(&(header.migration, header.role)) {
            continue;
        }
        let mut progress = told(journal.past());
        if journal.past().ended.is_none() {
            match host.reserve(&journal.past().header.vm, journal.past().header.migration) {
                Ok(reservation) => {
                    open.push(Open { journal, progress: ProgressSink::new(progress), reservation });
                    continue;
                }
                Err(_) => progress.outcome = Some(supersede(host, journal)),
            }
        }
        history.push(progress);
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
pub(super) fn refuse(host: &Host, path: std::path::PathBuf, error: &journal::JournalError) {
    let (vm, cause) = (journal::vm_of(&path), chain(error));
    tracing::error!(
        error = cause,
        vm,
        "a journal is not believed; the migration it tells of needs an operator"
    );
    host.refuse(Refused { path, vm, cause });
}

/// Ends a journal that a later migration of its VM has made void.
fn supersede(host: &Host, journal: Journal) -> Outcome {
    let phase = journal.past().phase;
    let cause = "a later migration of the VM began before this one was settled".to_owned();
    let outcome =
        Outcome::Failed { phase, cause, problems: Vec::new(), cancelled: false, leftovers: Vec::new() };
    host.end(journal, outcome.clone());
    outcome
}

fn told(past: &Past) -> Progress {
    let header = &past.header;
    let id = header.retry.as_ref().map_or(header.migration, |r| r.first);
    let mut progress = Progress::new(id, &header.vm, header.role, &header.peer);
    progress.began_at = header.began_at;
    progress.phase = match &past.ended {
        Some(Outcome::Moved { .. }) => Phase::Done,
        Some(_) => Phase::Failed,
        None => past.phase,
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
        Role::Destination => settle_destination(host, open).await,
    }
}

async fn settle_source(host: Arc<Host>, open: Open) {
    // The guest must not be moved again while this is open.
    let Open { mut journal, progress, reservation } = open;
    let past = journal.past().clone();
    let peer = host.config.peer_by_identity(&past.header.peer).map(|(name, _)| name.to_owned());
    let peer = peer.unwrap_or_else(|| past.header.peer.clone());
    let (mut machine, effects) = Source::restarted(past.known());
    let question = Question::new(&host, &peer, past.header.migration, progress.clone());
    let cause = "the agent was restarted after the hand-over".into();
    let decided = question.decide(&mut machine, &mut journal, effects, cause).await;
    match machine.ended() {
        Some(Ended::Moved) => settle_moved(&host, machine, journal, &progress, decided).await,
        _ => settle_stayed(&host, &peer, machine, journal, &progress, decided).await,
    }
    drop(reservation);
}

async fn settle_stayed(
    host: &Host,
    peer: &str,
    mut machine: Source,
    journal: Journal,
    progress: &ProgressSink,
    decided: Decided,
) {
    let past = journal.past().clone();
    let leftovers = take_back(host, &past).await;
    let cause = "the source's agent was restarted during the migration; it was rolled back".to_owned();
    let mut thanks = decided.effects;
    if thanks.contains(&SourceEffect::Ask(Ask::Abort)) && past.reached >= Phase::Precopy {
        match decide::call_off(host, peer, past.header.migration, &cause).await {
            Ok(fate) => thanks
                .extend(fate.iter().flat_map(|f| decide::source_step(&mut machine, SourceInput::Heard(*f)))),
            Err(e) => tracing::info!(error = chain(&e), "the destination undoes its part by itself"),
        }
    }
    if thanks.contains(&SourceEffect::Ask(Ask::Confirmed)) {
        decide::thank(host, peer, past.header.migration).await;
    }
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    end(host, journal, progress, Phase::Failed, outcome);
}

async fn settle_moved(
    host: &Host,
    mut machine: Source,
    mut journal: Journal,
    progress: &ProgressSink,
    decided: Decided,
) {
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
    let name = &past.header.vm;
    if forced.is_some() || past.forced.is_some() {
        leftovers.push(source::kept_by_force(name));
    } else if let Some(config) = host.config.vms.get(name) {
        match life::reach(past, config).await {
            Ok((qmp, _events)) if is_postmigrate(&qmp).await => {
                leftovers.extend(release(name, &qmp, past).await);
            }
            Ok(_) => {}
            Err((known, _)) => leftovers.extend(known.of_the_old(name)),
        }
    }
    end(host, journal, progress, Phase::Done, Outcome::Moved { leftovers });
}

/// Ends the old QEMU, or leaves it as was asked for.
async fn release(name: &str, qmp: &Qmp, past: &Past) -> Vec<String> {
    if past.header.keep_source {
        return undo::clean_kept(qmp, past).await;
    }
    vm::end_the_old(name, qmp).await.into_iter().collect()
}

async fn is_postmigrate(qmp: &Qmp) -> bool {
    matches!(qmp.execute(QueryStatus).await, Ok(info) if info.status == RunState::PostMigrate)
}

/// Undoes what was made in the source's QEMU, and lets the guest run.
pub(super) async fn take_back(host: &Host, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    match host.vm(name, "source") {
        Err(problem) => vec![problem.to_string()],
        Ok(config) => match life::reach(past, config).await {
            Ok((qmp, _events)) => undo::roll_back(&qmp, past, undo::Bitmaps::Go).await.leftovers,
            Err((known, _)) => vec![known.of_source(name)],
        },
    }
}

async fn settle_destination(host: Arc<Host>, open: Open) {
    let Open { mut journal, progress, reservation } = open;
    let past = journal.past().clone();
    let name = past.header.vm.clone();
    let (machine, effects) = Destination::restarted(past.known());
    // That the guest never ran is decided without its QEMU, which may be slow: the source waits for it.
    let before = if past.starting { Some(reach_destination(&host, &past).await) } else { None };
    let reached = before.as_ref().and_then(|qemu| qemu.as_ref().ok());
    let (ended, mut leftovers) = go_on(&host, machine, &mut journal, reached, effects).await;
    let qemu = match before {
        Some(qemu) => qemu,
        None => reach_destination(&host, &past).await,
    };
    if ended == Some(Ended::Moved) {
        leftovers.extend(qemu.err().flatten().map(|known| known.of_destination(&name)));
        return end(&host, journal, &progress, Phase::Done, Outcome::Moved { leftovers });
    }
    if ended.is_none() {
        tracing::warn!(vm = name, "the agent stops before its disk has taken a record; the next one goes on");
        return;
    }
    match &qemu {
        Ok(qmp) => {
            let images = witness::images(&crate::qemu::disks(qmp).await.unwrap_or_default());
            leftovers.extend(destination::undo(&name, qmp, &past, None).await);
            witness::bear(&mut journal, &images, &leftovers);
        }
        Err(Some(known)) if !known.is_gone() && !past.undo.is_empty() => leftovers.push(format!(
            "the destination's QEMU of VM {name}: {}. What the migration made is undone when `vmferry recover` \
             reaches it",
            known.in_words()
        )),
        Err(_) => {}
    }
    let cause = "the destination's agent was restarted during the migration".to_owned();
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    end(&host, journal, &progress, Phase::Failed, outcome);
    drop(reservation);
}

/// The destination's QEMU, or what is known of it; nothing where the VM is not configured any more.
async fn reach_destination(host: &Host, past: &Past) -> Result<Qmp, Option<Known>> {
    let config = host.vm(&past.header.vm, "destination").map_err(|_| None)?;
    let reached = life::reach(past, config).await;
    reached.map(|(qmp, _)| qmp).map_err(|(known, _)| Some(known))
}

/// Follows the machine until it is decided; `None` when the agent stops before.
async fn go_on(
    host: &Host,
    mut machine: Destination,
    journal: &mut Journal,
    qmp: Option<&Qmp>,
    mut effects: Vec<DestinationEffect>,
) -> (Option<Ended>, Vec<String>) {
    let mut leftovers = Vec::new();
    loop {
        let (next, error) = decide::write_destination(&mut machine, journal, effects, None);
        effects = next;
        if effects == [DestinationEffect::Start] {
            let (ran, trouble) = run_at_last(host, journal.past(), qmp).await;
            leftovers.extend(trouble);
            effects = decide::destination_step(&mut machine, DestinationInput::Ran(ran));
            effects.retain(|e| matches!(e, DestinationEffect::Write(_)));
            continue;
        }
        if machine.ended().is_some() {
            leftovers.extend(error.map(|e| chain(&e)));
            return (machine.ended(), leftovers);
        }
        tokio::select! {
            () = sleep(ASK_AGAIN) => {}
            () = host.stopping.cancelled() => return (None, leftovers),
        }
        effects = decide::destination_step(&mut machine, DestinationInput::Again);
    }
}

/// Starts a guest that an earlier life of this agent was about to start. Whether its command had
/// done its work by then is not known, so that runs again.
async fn run_at_last(host: &Host, past: &Past, qmp: Option<&Qmp>) -> (Ran, Vec<String>) {
    let name = &past.header.vm;
    let Some(qmp) = qmp else { return (Ran::No, Vec::new()) };
    let paused = matches!(qmp.execute(QueryStatus).await, Ok(info) if info.status == RunState::Paused);
    if !paused || !past.header.running {
        return (Ran::Perhaps, Vec::new());
    }
    let hook = host.config.vms.get(name).map(|vm| vm.before_start.clone()).unwrap_or_default();
    let ran = vm::run_hook(&hook, name, host.config.deadlines.hook()).await;
    let mut leftovers: Vec<String> = ran.err().into_iter().collect();
    if let Err(e) = qmp.execute(Cont).await {
        leftovers.push(format!("VM {name} could not be continued: {}", chain(&e)));
        return (Ran::Perhaps, leftovers);
    }
    (Ran::Yes, leftovers)
}

fn end(host: &Host, journal: Journal, progress: &ProgressSink, phase: Phase, outcome: Outcome) {
    tracing::info!(vm = journal.past().header.vm, result = outcome.label(), "settled");
    host.end(journal, outcome.clone());
    source::finish(progress, phase, outcome);
}

/// What this host says of a migration that `peer` sent, and that nobody serves any more; `None` when
/// it knows of none.
pub(super) fn recall(host: &Host, peer: &Identity, migration: Uuid) -> Option<Fate> {
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
pub(super) fn confirmed(host: &Host, peer: &Identity, migration: Uuid) {
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
pub(super) fn started_qemu(past: &Past) -> bool {
    past.undo.contains(&Undo::Qemu)
}
