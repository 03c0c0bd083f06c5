//! Recovery: what is open, left over or not believed on this host, who knows what about it, and
//! what becomes of it. Settling goes on by itself; here it is told, what was left is cleaned up,
//! and an operator may decide what nobody else can.

mod arrived;
mod ask;
mod case;
mod clean;

pub use case::{Case, CaseKind, Owner};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::timeout;
use uuid::Uuid;

use super::decide::ask_peer;
use super::handover::{Known, Side};
use super::host::Host;
use super::host::decisions::{Decision, Order};
use super::journal::{self, Header, JournalError, Past, Peeked, Role};
use super::model::problem::chain;
use super::protocol::message::Told;
use super::settle;
use crate::net::identity::Identity;
use ask::{ask_qemu, peer_words};
use case::{is_theirs, owner, records};
use clean::clean_up;

/// How long the other host is asked before a decision is taken. One that is lost does not answer.
const CONTRADICTED_WITHIN: Duration = Duration::from_secs(3);
/// Most virtual machines that are asked about at the same time.
const AT_ONCE: usize = 64;

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
/// Errors: [`JournalError::Io`] when the journals' folder cannot be read.
pub async fn cases(host: &Arc<Host>, asked: Asked) -> Result<Vec<Case>, JournalError> {
    let mut of_vm: BTreeMap<String, Vec<(usize, Peeked)>> = BTreeMap::new();
    let all = host.journals.peek_all()?;
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

/// How many migrations have ended and left something to clean up.
/// Errors: [`JournalError::Io`] when the journals' folder cannot be read.
pub fn leftovers_count(host: &Host) -> Result<usize, JournalError> {
    let all = host.journals.peek_all()?;
    let has_left = |past: &Past| past.ended.is_some() && !past.left().is_empty();
    Ok(all.iter().filter(|(_, past)| past.as_ref().is_ok_and(has_left)).count())
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
        Ok(past) if host.journals.unended(past.header.migration, past.header.role).is_some() => {
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
    let all = move || reading.journals.peek_all();
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

/// An operator decides whose the virtual machine is. Cancelled before the migration has taken it, or not
/// taken before `until` (seconds of the Unix epoch), the decision is void. It is not taken against the word
/// of the other host.
pub async fn force(
    host: &Host,
    migration: Uuid,
    side: Side,
    uid: Option<u32>,
    until: Option<i64>,
) -> Result<(), NotForced> {
    let nothing = NotForced::NothingOpen(migration);
    let (true, Some(orders)) =
        (host.decisions.question(migration).is_some(), host.decisions.orders(migration))
    else {
        return Err(nothing);
    };
    if side == Side::Here
        && let Some(why) = contradiction(host, migration).await
    {
        return Err(NotForced::Refused(why));
    }
    if until.is_some_and(|until| until < time::OffsetDateTime::now_utc().unix_timestamp()) {
        return Err(NotForced::Refused("the agent did not get to it in time, and it is void".into()));
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
    let peek = |role| host.journals.peek(&host.journals.path(migration, role));
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

/// A file that ends within its first line. One that is being written at this moment is not shown.
fn not_begun(host: &Host, file: PathBuf, asked: Asked) -> Option<Case> {
    if journal::is_in_use(&file) {
        return None;
    }
    if asked.clean {
        match host.journals.remove_unbegun(&file) {
            Ok(_) => return None,
            Err(e) => tracing::warn!(error = chain(&e), "a journal that was never begun stays"),
        }
    }
    let plan = "its migration never began, so that nothing was done under it; the file is removed by \
                `recover` and at the next start of the agent";
    let left = vec![file.display().to_string()];
    Some(Case { kind: CaseKind::Leftovers, plan: plan.into(), left, ..Case::of(file, None) })
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
    Case { plan, ..Case::of(file, None) }
}

async fn open(host: &Host, file: PathBuf, past: &Past, asked: Asked) -> Case {
    let question = host.decisions.question(past.header.migration);
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
    let may_force = question.is_some() && host.decisions.orders(past.header.migration).is_some();
    let ours = past.known();
    // As long as there is something to decide, what this host has written for itself is not the last word.
    let ours = Known { never_ran: ours.never_ran && !may_force, ..ours };
    Case {
        kind: if question.is_some() { CaseKind::Undecided } else { CaseKind::UnderWay },
        peer_says: peer.as_ref().map(peer_words),
        qemu_says: Some(qemu),
        owner: owner(past.header.role, ours, told.map(|t| t.known)),
        plan,
        may_force,
        ..Case::of(file, Some(past))
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
        ..Case::of(file, Some(past))
    }
}

/// Nothing is open or left; shown when it is asked for by its id.
fn closed(file: PathBuf, past: &Past) -> Case {
    Case {
        kind: CaseKind::Closed,
        owner: owner(past.header.role, past.known(), None),
        plan: "the migration has ended, and nothing is open or left over".into(),
        ..Case::of(file, Some(past))
    }
}

/// What this host's journals say of a migration of which `peer` is the other side.
pub(crate) fn tell(host: &Host, peer: &Identity, migration: Uuid) -> Option<Told> {
    [Role::Source, Role::Destination].into_iter().find_map(|role| {
        let path = host.journals.path(migration, role);
        let past = host.journals.peek(&path).ok()?;
        (past.header.peer == peer.as_str())
            .then(|| Told { phase: settle::phase_of(&past), known: past.known() })
    })
}
