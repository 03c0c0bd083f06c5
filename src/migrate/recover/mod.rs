//! Recovery: what is open, left over or not believed on this host, who knows what about it, and
//! what becomes of it. Settling goes on by itself; here it is told, what was left is cleaned up,
//! and an operator may decide what nobody else can.

mod arrived;
mod ask;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use uuid::Uuid;

use super::destination;
use super::guest::life;
use super::guest::{process, undo};
use super::handover::{Ended, Known, Side};
use super::host::Host;
use super::host::decisions::{Decision, Order};
use super::journal::{self, Header, Journal, JournalError, Past, Peeked, Record, Role};
use super::model::phase::Phase;
use super::model::problem::chain;
use super::model::progress::Outcome;
use super::protocol::message::Told;
use super::settle;
use crate::net::identity::Identity;
use crate::qemu::{Qmp, QueryStatus, RunState};
use ask::{ask_peer, ask_qemu, peer_words};

/// How long a monitor may take. One that the migration itself is using does not answer.
const QEMU_DEADLINE: Duration = Duration::from_secs(2);
/// How long the other host is asked before a decision is taken. One that is lost does not answer.
const CONTRADICTED_WITHIN: Duration = Duration::from_secs(3);
/// Most virtual machines that are asked about at the same time.
const AT_ONCE: usize = 64;

/// What sort of case it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaseKind {
    /// A migration that is under way, or is being settled, and needs nobody.
    UnderWay,
    /// Nobody knows yet whose the virtual machine is.
    Undecided,
    /// It has ended, and something is left to clean up.
    Leftovers,
    /// Its journal is not believed: nobody knows whose the virtual machine is.
    Refused,
    /// It has ended and left nothing. Shown only when it is asked for by its id.
    Closed,
}

/// Whose the virtual machine is, by what is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// This host's.
    Here,
    /// The other host's.
    There,
    /// Not known.
    Unknown,
}

/// One migration that is not closed.
#[derive(Debug, Clone)]
pub struct Case {
    /// What sort.
    pub kind: CaseKind,
    /// The migration, or the try of one: by the file's name if the journal is not believed.
    pub id: Option<Uuid>,
    /// The virtual machine, where that can be read.
    pub vm: Option<String>,
    /// This host's part.
    pub role: Option<Role>,
    /// The other host, as its certificate names it.
    pub peer: Option<String>,
    /// Seconds since the epoch.
    pub began_at: Option<i64>,
    /// The journal's last phase.
    pub phase: Option<Phase>,
    /// What this host's journal says, in its own words.
    pub journal: Vec<String>,
    /// What the other host's agent says now, or why it cannot be asked.
    pub peer_says: Option<String>,
    /// What the virtual machine's QEMU on this host says now, or why it cannot be asked.
    pub qemu_says: Option<String>,
    /// Whose the virtual machine is by all that.
    pub owner: Owner,
    /// What is done about it, and why.
    pub plan: String,
    /// What is left to clean up.
    pub left: Vec<String>,
    /// Whether an operator may decide it.
    pub may_force: bool,
    /// The journal's file.
    pub file: PathBuf,
}

/// Why an operator's decision was not taken.
#[derive(Debug, thiserror::Error)]
pub enum NotForced {
    /// It is decided, is under way, or was never here.
    #[error("there is nothing to decide about migration {0}")]
    NothingOpen(Uuid),
    /// It was not taken: nothing was written, and nothing will be.
    #[error("the decision was not taken: {0}")]
    Refused(String),
    /// It may have been taken, or may be after a restart of the agent.
    #[error("whether the decision was taken is not known: {0}")]
    Unknown(String),
}

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// Only this migration, or the try of it.
    pub migration: Option<Uuid>,
    /// Clean up what is left over, where that is possible by now.
    pub clean: bool,
    /// Leave the other agents alone: what they know is not waited for.
    pub without_peers: bool,
}

impl Asked {
    fn wants(&self, path: &Path, past: Result<&Past, &JournalError>) -> bool {
        let Some(id) = self.migration else { return true };
        let Ok(past) = past else { return journal::migration_of(path) == Some(id) };
        let header = &past.header;
        header.migration == id || header.retry.as_ref().is_some_and(|retry| retry.first == id)
    }
}

/// All cases of this host that are asked for. Hosts and virtual machines are asked at the same time,
/// so that one that does not answer delays none of the others.
///
/// # Errors
/// [`JournalError::Io`] when the journals' folder cannot be read.
pub async fn cases(host: &Arc<Host>, asked: Asked) -> Result<Vec<Case>, JournalError> {
    let mut of_vm: BTreeMap<String, Vec<(usize, Peeked)>> = BTreeMap::new();
    let all = journal::peek_all(&host.journals(), host.identity.as_str())?;
    for (place, (path, past)) in all.into_iter().enumerate() {
        if asked.wants(&path, past.as_ref()) {
            let vm = past.as_ref().map_or_else(|_| path.display().to_string(), |p| p.header.vm.clone());
            of_vm.entry(vm).or_default().push((place, (path, past)));
        }
    }
    // Of one virtual machine one after the other: its monitor serves one at a time.
    let of_vm = of_vm.into_values().map(|journals| {
        let host = Arc::clone(host);
        async move {
            let mut cases = Vec::new();
            for (place, (path, past)) in journals {
                cases.extend(case_of(&host, path, past, asked).await.map(|case| (place, case)));
            }
            cases
        }
    });
    let cases: Vec<Vec<_>> = stream::iter(of_vm).buffer_unordered(AT_ONCE).collect().await;
    let mut cases = cases.concat();
    cases.sort_by_key(|(place, _)| *place);
    Ok(cases.into_iter().map(|(_, case)| case).collect())
}

/// What is open, left or not believed about one journal.
async fn case_of(
    host: &Arc<Host>,
    path: PathBuf,
    past: Result<Past, JournalError>,
    asked: Asked,
) -> Option<Case> {
    match past {
        Err(JournalError::NotBegun { .. }) => not_begun(host, path, asked),
        Err(e) => {
            settle::refuse(host, path.clone(), &e);
            Some(refused(path, &e))
        }
        Ok(past) if host.unended(past.header.migration, past.header.role).is_some() => {
            let left = vec!["the journal's end, which the disk does not take".to_owned()];
            Some(leftovers(host, path, &past, left).await)
        }
        Ok(past) if past.ended.is_none() => Some(open(host, path, &past, asked).await),
        Ok(past) if past.left().is_empty() => asked.migration.map(|_| closed(path, &past)),
        Ok(past) => {
            let left = match asked.clean {
                true => clean_up(host, &path, &past).await,
                false => past.left().to_vec(),
            };
            match left.is_empty() {
                true => asked.migration.map(|_| closed(path, &past)),
                false => Some(leftovers(host, path, &past, left).await),
            }
        }
    }
}

/// Cleans up once, at an agent's start, what earlier ones left. What is open is left to settling: a
/// monitor serves one at a time.
pub async fn clean_at_start(host: Arc<Host>) {
    let reading = Arc::clone(&host);
    let all = move || journal::peek_all(&reading.journals(), reading.identity.as_str());
    let Ok(Ok(all)) = tokio::task::spawn_blocking(all).await else { return };
    let (mut pasts, all) = (Vec::new(), all.into_iter().filter_map(|(path, past)| Some((path, past.ok()?))));
    for (path, past) in all {
        if !past.left().is_empty() {
            let left = clean_up(&host, &path, &past).await;
            if !left.is_empty() {
                tracing::warn!(vm = past.header.vm, ?left, "left to clean up; see `vmferry recover`");
            }
        }
        pasts.push(past);
    }
    arrived::close_exports(&host, &pasts).await;
}

/// An operator decides whose the virtual machine is. Cancelled before the migration has taken it, the
/// decision is void. It is not taken against the word of the other host.
///
/// # Errors
/// [`NotForced`]
pub async fn force(host: &Host, migration: Uuid, side: Side, uid: Option<u32>) -> Result<(), NotForced> {
    let nothing = NotForced::NothingOpen(migration);
    let (true, Some(orders)) = (host.question(migration).is_some(), host.orders(migration)) else {
        return Err(nothing);
    };
    if let (Side::Here, Some(why)) = (side, contradiction(host, migration).await) {
        return Err(NotForced::Refused(why));
    }
    let deadline = host.config.deadlines.order();
    let (order, asker) = Order::new(side, uid);
    match timeout(deadline, orders.send(order)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Err(nothing),
        Err(_) => {
            return Err(NotForced::Refused("the migration has not taken an earlier decision yet".into()));
        }
    }
    match asker.wait(deadline).await {
        Decision::Taken => Ok(()),
        Decision::Refused(why) => Err(NotForced::Refused(why)),
        Decision::Unknown(why) => Err(NotForced::Unknown(why)),
    }
}

/// What the other host says against a decision for this one: nothing if it cannot be asked.
async fn contradiction(host: &Host, migration: Uuid) -> Option<String> {
    let peek =
        |role| Journal::peek(&Journal::path(&host.journals(), migration, role), host.identity.as_str());
    let past = [Role::Source, Role::Destination].into_iter().find_map(|role| peek(role).ok())?;
    let told = timeout(CONTRADICTED_WITHIN, ask_peer(host, &past)).await.ok()?.ok()??;
    let Header { vm, peer, role, .. } = &past.header;
    is_theirs(*role, told.known).then(|| {
        format!(
            "{peer} says of VM {vm}: {}. Here it would run twice; what its QEMU does there, `vmferry recover` at {peer} \
             shows",
            records(&told.known).join(", ")
        )
    })
}

/// Whether the other host has begun to start the guest and not said that it never ran, or it is that host's.
fn is_theirs(role: Role, theirs: Known) -> bool {
    match owner(role, Known::default(), Some(theirs)) {
        Owner::There => true,
        Owner::Here => false,
        Owner::Unknown => role == Role::Source && theirs.starting,
    }
}

/// A file that ends within its first line. One that is being written at this moment is not shown.
fn not_begun(host: &Host, file: PathBuf, asked: Asked) -> Option<Case> {
    if journal::is_in_use(&file) {
        return None;
    }
    if asked.clean {
        match journal::remove_unbegun(&file, host.identity.as_str()) {
            Ok(_) => return None,
            Err(e) => tracing::warn!(error = chain(&e), "a journal that was never begun stays"),
        }
    }
    let plan = "its migration never began, so that nothing was done under it; the file is removed by \
                `recover` and at the next start of the agent";
    let left = vec![file.display().to_string()];
    Some(Case { kind: CaseKind::Leftovers, plan: plan.into(), left, ..unreadable(file) })
}

fn refused(file: PathBuf, error: &JournalError) -> Case {
    let kept = match journal::vm_of(&file) {
        Some(_) => "no migration of the VM begins",
        None => "it cannot be read of which VM it tells, so that no VM is kept from migrating",
    };
    let plan = format!(
        "nothing is done, and {kept}: {}. Find out on both hosts where the VM runs, then take the file away",
        chain(error)
    );
    Case { plan, ..unreadable(file) }
}

fn unreadable(file: PathBuf) -> Case {
    Case {
        kind: CaseKind::Refused,
        id: journal::migration_of(&file),
        vm: journal::vm_of(&file),
        role: None,
        peer: None,
        began_at: None,
        phase: None,
        journal: Vec::new(),
        peer_says: None,
        qemu_says: None,
        owner: Owner::Unknown,
        plan: String::new(),
        left: Vec::new(),
        may_force: false,
        file,
    }
}

async fn open(host: &Host, file: PathBuf, past: &Past, asked: Asked) -> Case {
    let question = host.question(past.header.migration);
    let qemu_asked = async {
        match question {
            Some(_) => ask_qemu(host, past).await,
            None => "its monitor is in use by the migration".into(),
        }
    };
    let peer_asked = async {
        match asked.without_peers {
            true => None,
            false => Some(ask_peer(host, past).await),
        }
    };
    let (peer, qemu) = tokio::join!(peer_asked, qemu_asked);
    let told = peer.as_ref().and_then(|told| told.as_ref().ok()?.as_ref());
    let plan = match &question {
        Some(question) => question.clone(),
        None => "it is under way, or is being settled: nothing else needs to be done".to_owned(),
    };
    Case {
        kind: if question.is_some() { CaseKind::Undecided } else { CaseKind::UnderWay },
        peer_says: peer.as_ref().map(peer_words),
        qemu_says: Some(qemu),
        owner: owner(past.header.role, past.known(), told.map(|t| t.known)),
        plan,
        may_force: question.is_some() && host.orders(past.header.migration).is_some(),
        ..case(file, past)
    }
}

async fn leftovers(host: &Host, file: PathBuf, past: &Past, left: Vec<String>) -> Case {
    Case {
        qemu_says: Some(ask_qemu(host, past).await),
        owner: owner(past.header.role, past.known(), None),
        plan: "the migration has ended; what it left is tried to be cleaned up at every `recover` and every \
               start of the agent, and only what its journal says that it made"
            .into(),
        left,
        ..case(file, past)
    }
}

/// Nothing is open or left; shown when it is asked for by its id.
fn closed(file: PathBuf, past: &Past) -> Case {
    Case {
        kind: CaseKind::Closed,
        owner: owner(past.header.role, past.known(), None),
        plan: "the migration has ended, and nothing is open or left over".into(),
        ..case(file, past)
    }
}

fn case(file: PathBuf, past: &Past) -> Case {
    let header = &past.header;
    Case {
        kind: CaseKind::Leftovers,
        id: Some(header.migration),
        vm: Some(header.vm.clone()),
        role: Some(header.role),
        peer: Some(header.peer.clone()),
        began_at: Some(header.began_at),
        phase: Some(settle::phase_of(past)),
        journal: records(&past.known()),
        peer_says: None,
        qemu_says: None,
        owner: Owner::Unknown,
        plan: String::new(),
        left: Vec::new(),
        may_force: false,
        file,
    }
}

fn records(known: &Known) -> Vec<String> {
    let forced = match known.forced {
        None => "",
        Some(Side::Here) => "forced here",
        Some(Side::There) => "forced there",
    };
    let ended = match known.ended {
        None => "",
        Some(Ended::Moved) => "ended: moved",
        Some(Ended::Stayed) => "ended: not moved",
    };
    let all = [
        (known.handed_over, "handed-over"),
        (known.starting, "starting"),
        (known.runs, "runs"),
        (known.never_ran, "never-ran"),
        (!forced.is_empty(), forced),
        (!ended.is_empty(), ended),
    ];
    all.iter().filter(|(is, _)| *is).map(|(_, word)| (*word).to_owned()).collect()
}

/// Whose the virtual machine is: what this host knows for good, and else what the other one does.
fn owner(role: Role, ours: Known, theirs: Option<Known>) -> Owner {
    let theirs = theirs.unwrap_or_default();
    let by_us = match role {
        Role::Source => at_source(ours),
        Role::Destination => at_destination(ours),
    };
    let by_them = match role {
        Role::Source => at_destination(theirs),
        Role::Destination => at_source(theirs),
    };
    let is_source = role == Role::Source;
    match by_us.or(by_them) {
        Some(Ended::Stayed) if is_source => Owner::Here,
        Some(Ended::Stayed) => Owner::There,
        Some(Ended::Moved) if is_source => Owner::There,
        Some(Ended::Moved) => Owner::Here,
        None => Owner::Unknown,
    }
}

fn at_source(known: Known) -> Option<Ended> {
    match known {
        Known { ended: Some(ended), .. } => Some(ended),
        Known { forced: Some(Side::There), .. } | Known { runs: true, .. } => Some(Ended::Moved),
        Known { forced: Some(Side::Here), .. } | Known { never_ran: true, .. } => Some(Ended::Stayed),
        // Without `handed-over` it is under way, or the write of it is in doubt.
        _ => None,
    }
}

fn at_destination(known: Known) -> Option<Ended> {
    match known {
        Known { ended: Some(ended), .. } => Some(ended),
        Known { never_ran: true, .. } => Some(Ended::Stayed),
        Known { runs: true, .. } => Some(Ended::Moved),
        // With `starting` alone its QEMU may yet turn out to be gone before it was told to run.
        _ => None,
    }
}

/// What this host's journals say of a migration of which `peer` is the other side.
pub(crate) fn tell(host: &Host, peer: &Identity, migration: Uuid) -> Option<Told> {
    [Role::Source, Role::Destination].into_iter().find_map(|role| {
        let path = Journal::path(&host.journals(), migration, role);
        let past = Journal::peek(&path, host.identity.as_str()).ok()?;
        (past.header.peer == peer.as_str())
            .then(|| Told { phase: settle::phase_of(&past), known: past.known() })
    })
}

/// Tries again to clean up after a migration that has ended; what is still left.
async fn clean_up(host: &Arc<Host>, path: &Path, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    // Nothing else may happen to that VM meanwhile.
    let _reservation = match host.reserve(name, past.header.migration) {
        Ok(reservation) => reservation,
        Err(_) => return past.left().to_vec(),
    };
    // Nobody else writes to it from here on. What was read may be older than that.
    let mut journal = match Journal::open(path, host.identity.as_str()) {
        Ok(journal) => journal,
        Err(e) => return vec![chain(&e)],
    };
    let past = &journal.past().clone();
    let left = match host.config.vms.get(name) {
        _ if past.left().is_empty() => return Vec::new(),
        None => past.left().to_vec(),
        Some(config) => match timeout(QEMU_DEADLINE * 5, process::connect(config)).await {
            Ok(Ok((qmp, _events))) if past.is_of(qmp.process()) => clean_qemu(host, &qmp, past).await,
            _ if past.never_ran && process::started_in_vain(past) => {
                process::end_started(past).await.into_iter().collect()
            }
            _ => without_qemu(host, past, &life::Known::by_journal(past, config).await),
        },
    };
    if !left.is_empty() {
        return left;
    }
    match journal.record(Record::Cleaned) {
        Ok(()) => {
            tracing::info!(vm = name, migration = %past.header.migration, "what was left is cleaned up");
            Vec::new()
        }
        Err(e) => vec![chain(&e)],
    }
}

async fn clean_qemu(host: &Host, qmp: &Qmp, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    // Else somebody may have started the VM here since.
    let same = past.is_surely_of(qmp.process());
    let status = match qmp.execute(QueryStatus).await {
        Ok(info) => info.status,
        Err(e) => return vec![format!("the QEMU of VM {name} cannot be asked: {}", chain(&e))],
    };
    let moved = matches!(past.ended, Some(Outcome::Moved { .. }));
    match (past.header.role, moved) {
        // Its roll-back could not reach it. What is in it bears our names, so it is that QEMU.
        (Role::Source, false) if !moved_since(host, past) && undo::is_under_way(qmp, past).await => {
            undo::roll_back(qmp, past, undo::Bitmaps::Go).await.leftovers
        }
        (Role::Source, false) => {
            let mut left = undo::clean_late(qmp, past).await;
            if past.running() && status == RunState::PostMigrate {
                left.push(format!("VM {name} stands still at the source: continue it with `cont`"));
            }
            left
        }
        (Role::Source, true) if same && status == RunState::Running => vec![format!(
            "VM {name} runs here again, in the QEMU that it was moved away from: if it runs at {} as well, it \
             runs twice",
            past.header.peer
        )],
        (Role::Source, true) if !same && status != RunState::PostMigrate => Vec::new(),
        (Role::Source, true) if past.header.keep_source => undo::clean_kept(qmp, past).await,
        (Role::Source, true) if past.forced.is_some() => past.left().to_vec(),
        (Role::Source, true) => process::end_the_old(name, qmp).await.into_iter().collect(),
        (Role::Destination, false) => destination::undo(name, qmp, past, None).await,
        (Role::Destination, true) if status == RunState::Running => Vec::new(),
        (Role::Destination, true) => vec![format!("VM {name}, which is this host's, is {status}")],
    }
}

/// What was made in a QEMU that has ended went with it; a guest that should be here did not come back
/// by that. As long as its end is not proved, all stays as it was left.
fn without_qemu(host: &Host, past: &Past, known: &life::Known) -> Vec<String> {
    if !known.has_ended() {
        return past.left().to_vec();
    }
    let moved = matches!(past.ended, Some(Outcome::Moved { .. }));
    let should_run = moved == (past.header.role == Role::Destination);
    let nowhere = should_run && past.left().iter().any(|l| l.to_lowercase().contains("start"));
    if !nowhere || !known.is_gone() || moved_since(host, past) {
        return Vec::new();
    }
    vec![match past.header.role {
        Role::Source => known.of_source(&past.header.vm),
        Role::Destination => known.of_destination(&past.header.vm),
    }]
}

/// Whether a later migration tells of the VM.
fn moved_since(host: &Host, before: &Past) -> bool {
    let all = journal::peek_all(&host.journals(), host.identity.as_str()).unwrap_or_default();
    let mut pasts = all.iter().filter_map(|(_, past)| past.as_ref().ok());
    pasts.any(|p| p.header.vm == before.header.vm && p.header.began_at > before.header.began_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_for_this_host_is_contradicted_by_who_may_run_the_guest() {
        let none = Known::default();
        let starting = Known { starting: true, ..none };
        let runs = Known { runs: true, ..starting };
        let moved = Known { ended: Some(Ended::Moved), ..runs };
        let never = Known { never_ran: true, ..starting };
        let handed = Known { handed_over: true, ..none };
        let given_back = Known { never_ran: true, ..handed };
        for (role, theirs, against) in [
            (Role::Source, none, false),
            (Role::Source, starting, true),
            (Role::Source, runs, true),
            (Role::Source, moved, true),
            (Role::Source, never, false),
            (Role::Destination, handed, false),
            (Role::Destination, given_back, true),
        ] {
            assert_eq!(is_theirs(role, theirs), against, "{role:?}: {theirs:?}");
        }
    }

    #[test]
    fn who_owns_it_is_said_only_when_somebody_knows() {
        let none = Known::default();
        let handed = Known { handed_over: true, ..none };
        let starting = Known { starting: true, ..none };
        let runs = Known { runs: true, ..starting };
        let never = Known { never_ran: true, ..none };
        let given_back = Known { handed_over: true, never_ran: true, ..none };
        assert_eq!(owner(Role::Source, handed, None), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(none)), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(starting)), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(runs)), Owner::There);
        assert_eq!(owner(Role::Source, handed, Some(never)), Owner::Here);
        assert_eq!(owner(Role::Source, given_back, None), Owner::Here);
        assert_eq!(owner(Role::Destination, none, None), Owner::Unknown);
        assert_eq!(owner(Role::Destination, none, Some(handed)), Owner::Unknown);
        assert_eq!(owner(Role::Destination, none, Some(given_back)), Owner::There);
        assert_eq!(owner(Role::Destination, starting, Some(handed)), Owner::Unknown);
        assert_eq!(owner(Role::Destination, runs, Some(handed)), Owner::Here);
        assert_eq!(owner(Role::Destination, never, Some(handed)), Owner::There);
    }
}
