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
mod announce;
mod destination;
mod open;
mod source;

pub use abandoned::abandoned;
pub use announce::{announce, peers_of};
pub use open::Open;
pub(crate) use open::phase_of;
use open::told;

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use super::host::Host;
use super::host::journals::Refused;
use super::journal::{self, Ending, JournalError, Past, Record, Role};
use super::model::problem::chain;
use super::model::progress::{Progress, ProgressSink};
use super::protocol::message::Fate;
use super::source::retry;
use crate::net::identity::Identity;

/// The journal of a migration that was to go on as it was, and cannot; `None` when it is closed.
pub(crate) fn reopen(host: &Arc<Host>, (id, role): (Uuid, Role), progress: ProgressSink) -> Option<Open> {
    let path = host.journals.path(id, role);
    let journal = host.journals.open(&path);
    let journal =
        journal.inspect_err(|e| tracing::error!(error = chain(e), "a journal is not believed")).ok()?;
    if journal.past().ended.is_some() {
        return None;
    }
    let _reservation = Arc::new(host.reserve(&journal.past().header.vm, id).ok()?);
    Some(Open { journal, progress, heir: true, _reservation })
}

/// Finds what is open on this host, and history, but for migrations that go on as they were.
/// Errors: [`journal::JournalError`] when the folder cannot be read. Journals that cannot be believed are
/// logged and left alone.
pub fn find(
    host: &Arc<Host>,
    taken_up: &BTreeSet<(Uuid, Role)>,
) -> Result<(Vec<Open>, Vec<Progress>), journal::JournalError> {
    let (mut open, mut history, mut refused) = (Vec::<Open>::new(), Vec::new(), Vec::new());
    // The newest first: if several are open for one VM, only that one touches its QEMU.
    for (path, past) in host.journals.peek_all()?.into_iter().rev() {
        let past = match past {
            Ok(past) if taken_up.contains(&(past.header.migration, past.header.role)) => continue,
            Ok(past) => past,
            Err(JournalError::NotBegun { .. }) => {
                let removed = host.journals.remove_unbegun(&path);
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
        match (host.journals.open(&path), reservation) {
            (Ok(journal), Some(_reservation)) => {
                let progress =
                    ProgressSink::new(told(&past)).recorded_as(&host.audit, Some(past.header.migration));
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
    host.journals.refuse(Refused { path, vm, cause });
}

/// Settles one open journal.
pub async fn settle(host: Arc<Host>, open: Open) {
    let past = open.journal.past().clone();
    tracing::info!(
        migration = %past.header.migration, vm = past.header.vm, role = past.header.role.name(),
        phase = past.phase.name(), "settling a migration that an earlier agent left open"
    );
    match past.header.role {
        Role::Source => source::settle(host, open).await,
        Role::Destination => destination::settle(host, open).await,
    }
}

/// What this host says of a migration that `peer` sent, and that nobody serves any more; `None` when
/// it knows of none.
pub(crate) fn recall(host: &Host, peer: &Identity, migration: Uuid) -> Option<Fate> {
    let sent = |past: &Past| {
        let header = &past.header;
        header.migration == migration && header.role == Role::Destination && header.peer == peer.as_str()
    };
    // Its machine has decided; only the journal's end is missing.
    if let Some((_, ending)) =
        host.journals.unended(migration, Role::Destination).filter(|(past, _)| sent(past))
    {
        return Some(match ending {
            Ending::Moved { .. } => Fate::Runs,
            _ => Fate::NeverRan,
        });
    }
    // It may be written to at this moment, so it is only looked at.
    let path = host.journals.path(migration, Role::Destination);
    match host.journals.peek(&path) {
        Ok(past) if sent(&past) => Some(match past.known().ended {
            Some(ended) => ended.fate(),
            None if host.decisions.says_runs(migration) => Fate::Runs,
            None => Fate::Open,
        }),
        // Something is there, and it is not known what.
        Err(_) if path.exists() => Some(Fate::Open),
        _ => None,
    }
}

/// Why a guest that was handed over to this host was not seen to run here, if that is so: for the source, which says
/// what became of it.
pub(crate) fn why_it_stands(host: &Host, peer: &Identity, migration: Uuid) -> Option<String> {
    let past = host.journals.peek(&host.journals.path(migration, Role::Destination)).ok()?;
    let is_it = past.header.peer == peer.as_str() && past.has_moved() && past.guest_stands();
    is_it.then(|| past.left().join("; ")).filter(|left| !left.is_empty())
}

/// The source knows how it ended, and never asks again.
pub(crate) fn confirmed(host: &Host, peer: &Identity, migration: Uuid) {
    let path = host.journals.path(migration, Role::Destination);
    let ours = |past: &Past| past.header.peer == peer.as_str() && past.ended.is_some() && !past.confirmed;
    // Only looked at first: one that has not ended has somebody who writes to it.
    if !host.journals.peek(&path).is_ok_and(|past| ours(&past)) {
        return;
    }
    let journal = host.journals.open(&path);
    if let Err(e) = journal.and_then(|mut journal| journal.record(Record::Confirmed)) {
        tracing::info!(
            error = chain(&e),
            "that the source knows was not written; the journal is kept longer"
        );
    }
}
