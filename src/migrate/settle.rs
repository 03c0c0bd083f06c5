//! Settling: what an agent finds open, and a source that has handed over and heard no more.
//!
//! The rules are the invariants' own. A source that has not durably handed over takes its guest
//! back. One that has asks the destination until it knows. A destination that has not durably
//! begun to start the guest durably says that it never will; one that has goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::failure::Failure;
use super::host::{Host, Reservation};
use super::journal::{self, Journal, Past, Record, Role, Undo};
use super::link::{Link, LinkError};
use super::message::{Fate, Request, Response, Started};
use super::phase::Phase;
use super::problem::chain;
use super::progress::{Outcome, Progress, ProgressSink};
use super::{destination, retry, undo, vm, witness};
use crate::net::identity::Identity;
use crate::qemu::{Cont, Qmp, QueryStatus, RunState};

/// Between two questions to a destination that cannot be reached.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After this long without an answer the migration is shown as undecided; asking goes on.
const UNDECIDED_AFTER: Duration = Duration::from_secs(30);
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

/// What became of a guest that was handed over.
pub(super) enum Decision {
    /// It runs at the destination.
    Runs(Started, Box<Link>),
    /// It never ran there and never will.
    NeverRan,
}

/// A source that has handed over.
pub(super) struct Handed {
    pub(super) host: Arc<Host>,
    /// The peer's name in the configuration.
    pub(super) peer: String,
    pub(super) progress: ProgressSink,
}

impl Handed {
    /// Asks until the destination answers. There is no deadline: neither side may guess.
    pub(super) async fn ask_until_decided(&self, journal: &Journal, cause: String) -> Decision {
        let since = Instant::now();
        let mut last = cause;
        loop {
            match self.ask(journal).await {
                Ok(decision) => return decision,
                Err(e) => {
                    let now = chain(&e);
                    if now != last {
                        tracing::warn!(cause = now, "the destination has not said what became of the guest");
                        last = now;
                    }
                }
            }
            if since.elapsed() > UNDECIDED_AFTER {
                let cause = format!(
                    "the guest was handed over to {}, which has not said since whether it runs: {last}. \
                     It is asked again every second; the guest stays paused here until then",
                    self.peer
                );
                super::source::finish(&self.progress, Phase::Undecided, Outcome::Undecided { cause });
            }
            sleep(ASK_AGAIN).await;
        }
    }

    async fn ask(&self, journal: &Journal) -> Result<Decision, Failure> {
        let session = self.host.session(&self.peer).await?;
        let migration = journal.past().header.migration;
        let mut link = Link::open(&session, migration).await?;
        let mut answer = link.ask(Request::Settle, ANSWER_DEADLINE).await?;
        if matches!(answer, Response::Fate(Fate::Loaded)) {
            let deadline = self.host.config.deadlines.hook() + ANSWER_DEADLINE;
            answer = link.ask(Request::Start, deadline).await?;
        }
        match answer {
            Response::Started(started) => Ok(Decision::Runs(started, Box::new(link))),
            Response::Fate(Fate::Runs) => {
                let started = Started { hook_ms: None, warnings: Vec::new() };
                Ok(Decision::Runs(started, Box::new(link)))
            }
            Response::Fate(Fate::NeverRan) => Ok(Decision::NeverRan),
            _ => Err(LinkError::Unexpected { request: "settle" }.into()),
        }
    }
}

/// Tells a destination, over a control stream of its own, that the guest stays where it is.
///
/// # Errors
/// It cannot be told; it finds out by itself when it has waited for long enough.
pub(super) async fn call_off(host: &Host, peer: &str, migration: Uuid, reason: &str) -> Result<(), Failure> {
    let session = host.session(peer).await?;
    let mut link = Link::open(&session, migration).await?;
    if let Response::Fate(Fate::Loaded) = link.ask(Request::Settle, ANSWER_DEADLINE).await? {
        link.demand(Request::Abort { reason: reason.into() }, ANSWER_DEADLINE).await?;
    }
    link.finish();
    Ok(())
}

/// A journal that an earlier life of this agent left open, and where to report on it.
pub struct Open {
    /// The journal.
    pub journal: Journal,
    /// Its progress.
    pub progress: ProgressSink,
    /// Nothing else may begin with this VM meanwhile.
    reservation: Reservation,
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
    for found in journal::list(&host.journals(), host.identity.as_str())?.into_iter().rev() {
        let journal = match found {
            Ok(journal) => journal,
            Err(e) => {
                tracing::error!(
                    error = chain(&e),
                    "a journal is not believed; the migration it tells of needs an operator"
                );
                continue;
            }
        };
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
    let shown = |p: &Progress| {
        !open.iter().any(|o: &Open| o.progress.now().id == p.id && o.progress.now().role == p.role)
    };
    history.retain(shown);
    Ok((open, retry::only_last(history)))
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
    let decided_to_return = past.never_ran || !past.handed_over;
    if past.runs || !decided_to_return {
        let decision = if past.runs {
            None
        } else {
            let handed = Handed { host: Arc::clone(&host), peer: peer.clone(), progress: progress.clone() };
            let cause = "the agent was restarted after the hand-over".into();
            Some(handed.ask_until_decided(&journal, cause).await)
        };
        if !matches!(decision, Some(Decision::NeverRan)) {
            return settle_moved(&host, journal, &progress, decision).await;
        }
    }
    let leftovers = take_back(&host, &mut journal).await;
    let cause = "the source's agent was restarted during the migration; it was rolled back".to_owned();
    if past.phase >= Phase::Precopy
        && !past.handed_over
        && let Err(e) = call_off(&host, &peer, past.header.migration, &cause).await
    {
        tracing::info!(error = chain(&e), "the destination undoes its part by itself");
    }
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    end(&host, journal, &progress, Phase::Failed, outcome);
    drop(reservation);
}

async fn settle_moved(
    host: &Host,
    mut journal: Journal,
    progress: &ProgressSink,
    decision: Option<Decision>,
) {
    let mut leftovers = Vec::new();
    if let Err(e) = journal.record(Record::Runs) {
        leftovers.push(chain(&e));
    }
    if let Some(Decision::Runs(_, mut link)) = decision {
        let _ = link.demand(Request::Confirmed, ANSWER_DEADLINE).await;
        link.finish();
    }
    let name = &journal.past().header.vm;
    if let Some(config) = host.config.vms.get(name)
        && let Ok((qmp, _events)) = vm::connect(config).await
        && is_postmigrate(&qmp).await
        && let Err(e) = vm::quit(name, &qmp).await
    {
        leftovers.push(format!("{}; end it by hand, and never continue it", chain(&e)));
    }
    end(host, journal, progress, Phase::Done, Outcome::Moved { leftovers });
}

async fn is_postmigrate(qmp: &Qmp) -> bool {
    matches!(qmp.execute(QueryStatus).await, Ok(info) if info.status == RunState::PostMigrate)
}

async fn take_back(host: &Host, journal: &mut Journal) -> Vec<String> {
    let mut leftovers = Vec::new();
    // Durable first: from here on no word of ours can start the guest at the destination.
    if let Err(e) = journal.record(Record::NeverRan) {
        return vec![chain(&e)];
    }
    let past = journal.past();
    let name = &past.header.vm;
    match host.vm(name, "source") {
        Err(problem) => leftovers.push(problem.to_string()),
        Ok(config) => match vm::connect(config).await {
            Ok((qmp, _events)) => {
                leftovers.extend(undo::roll_back(&qmp, past, undo::Bitmaps::Go).await.leftovers)
            }
            Err(e) if e.is_not_listening() => leftovers.push(undo::gone(name)),
            Err(e) => leftovers.push(format!("the QEMU of VM {name} cannot be asked: {}", chain(&e))),
        },
    }
    leftovers
}

async fn settle_destination(host: Arc<Host>, open: Open) {
    let Open { mut journal, progress, reservation } = open;
    let past = journal.past().clone();
    let name = past.header.vm.clone();
    let connected = match host.vm(&name, "destination") {
        Ok(config) => vm::connect(config).await.ok(),
        Err(_) => None,
    };
    if past.runs || (past.starting && !past.never_ran) {
        let leftovers = go_on(&host, &mut journal, connected.map(|(qmp, _)| qmp)).await;
        return end(&host, journal, &progress, Phase::Done, Outcome::Moved { leftovers });
    }
    let mut leftovers = Vec::new();
    if let Err(e) = journal.record(Record::NeverRan) {
        leftovers.push(chain(&e));
    } else if let Some((qmp, _events)) = connected {
        let images = witness::images(&crate::qemu::disks(&qmp).await.unwrap_or_default());
        leftovers.extend(destination::undo(&name, &qmp, &past, None).await);
        witness::bear(&mut journal, &images, &leftovers);
    }
    let cause = "the destination's agent was restarted during the migration".to_owned();
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    end(&host, journal, &progress, Phase::Failed, outcome);
    drop(reservation);
}

/// The word to start was on disk: the guest is ours, so it must run.
async fn go_on(host: &Host, journal: &mut Journal, qmp: Option<Qmp>) -> Vec<String> {
    let past = journal.past();
    let name = &past.header.vm;
    let mut leftovers = Vec::new();
    match qmp {
        None => leftovers.push(format!(
            "the QEMU of VM {name}, which was handed over to this host, has gone: start the VM here"
        )),
        Some(qmp) if past.header.running && !past.runs => {
            leftovers.extend(run_at_last(host, name, &qmp).await)
        }
        Some(_) => {}
    }
    if let Err(e) = journal.record(Record::Runs) {
        leftovers.push(chain(&e));
    }
    leftovers
}

/// Starts a guest that an earlier life of this agent was about to start. Whether its command had
/// done its work by then is not known, so that runs again.
async fn run_at_last(host: &Host, name: &str, qmp: &Qmp) -> Vec<String> {
    let paused = matches!(qmp.execute(QueryStatus).await, Ok(info) if info.status == RunState::Paused);
    if !paused {
        return Vec::new();
    }
    let hook = host.config.vms.get(name).map(|vm| vm.before_start.clone()).unwrap_or_default();
    let ran = vm::run_hook(&hook, name, host.config.deadlines.hook()).await;
    let mut leftovers: Vec<String> = ran.err().into_iter().collect();
    if let Err(e) = qmp.execute(Cont).await {
        leftovers.push(format!("VM {name} could not be continued: {}", chain(&e)));
    }
    leftovers
}

fn end(host: &Host, journal: Journal, progress: &ProgressSink, phase: Phase, outcome: Outcome) {
    tracing::info!(vm = journal.past().header.vm, result = outcome.label(), "settled");
    host.end(journal, outcome.clone());
    super::source::finish(progress, phase, outcome);
}

/// What this host durably knows of a migration that `peer` sent; `None` when that is nothing.
pub(super) fn fate(host: &Host, peer: &Identity, migration: Uuid) -> Option<Fate> {
    let sent = |past: &Past| {
        let header = &past.header;
        header.migration == migration && header.role == Role::Destination && header.peer == peer.as_str()
    };
    if let Some(past) = host.unended(migration, Role::Destination).filter(sent)
        && let Err(e) = host.end_late()
    {
        tracing::warn!(error = chain(&e), "the journal still cannot be ended");
        // It never has the word to start, and its QEMU has been undone: that is as durable.
        return (!past.starting && !past.runs).then_some(Fate::NeverRan);
    }
    // It may be written to at this moment, so it is only looked at.
    let path = Journal::path(&host.journals(), migration, Role::Destination);
    match Journal::peek(&path, host.identity.as_str()).ok().filter(sent)? {
        Past { runs: true, .. } => Some(Fate::Runs),
        Past { never_ran: true, .. } | Past { ended: Some(Outcome::Failed { .. }), .. } => {
            Some(Fate::NeverRan)
        }
        _ => None,
    }
}

/// Whether the journal says that this agent started the destination's QEMU.
pub(super) fn started_qemu(past: &Past) -> bool {
    past.undo.contains(&Undo::Qemu)
}
