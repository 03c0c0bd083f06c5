//! All journals of a host: found again at a start, and thrown away at last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::file::blocking;
use super::writers::{Writer, is_written};
use super::{Journal, JournalError, Past, Role, SUFFIX};

/// Finished journals of each peer kept as history.
pub const HISTORY_MAX: usize = 200;
/// Finished journals of each peer kept of migrations whose source may still come and ask.
pub const UNCONFIRMED_MAX: usize = 5_000;
/// How long they are kept; a source that was away for longer needs an operator.
pub const UNCONFIRMED_DAYS_MAX: i64 = 400;

/// A file of the folder, and what it says.
pub type Peeked = (PathBuf, Result<Past, JournalError>);

/// Whether a journal is of another migration of the same VM, and of a later one; `None`: it may be, and cannot be read.
pub(crate) fn is_later((path, said): &Peeked, before: &Past) -> Option<bool> {
    match said {
        Ok(past) => {
            let (after, before) = (&past.header, &before.header);
            let is_of_vm = after.vm == before.vm && after.migration != before.migration;
            Some(is_of_vm && after.may_be_later_than(before))
        }
        // Nothing has been done by it.
        Err(JournalError::NotBegun { .. }) => Some(false),
        Err(_) => match vm_of(path) {
            Some(vm) if vm != before.header.vm => Some(false),
            _ => None,
        },
    }
}

/// What all journals of a folder say, of which some may be written to at this moment, newest last.
/// Changes nothing.
///
/// Those that cannot be believed are errors, each with its file.
/// Errors: [`JournalError::Io`] when the folder cannot be read.
pub fn peek_all(folder: &Path, host: &str) -> Result<Vec<Peeked>, JournalError> {
    blocking(|| peek_each(folder, host))
}

fn peek_each(folder: &Path, host: &str) -> Result<Vec<Peeked>, JournalError> {
    let peek = |path: PathBuf| {
        let past = Journal::peek(&path, host);
        (path, past)
    };
    let mut pasts: Vec<_> = paths(folder)?.into_iter().map(peek).collect();
    pasts.sort_by_key(|(_, p)| p.as_ref().map_or(((i64::MAX, 0), 0), |p| p.header.order()));
    Ok(pasts)
}

fn paths(folder: &Path) -> Result<Vec<PathBuf>, JournalError> {
    let io = |source| JournalError::Io { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == SUFFIX) {
            paths.push(path);
        }
    }
    Ok(paths)
}

/// Removes the oldest finished journals beyond the limits, which each peer has for itself: none makes another's
/// go. One that has something left to clean up, or whose source may still ask for it, counts by limits of its
/// own, which are far away.
pub fn prune(folder: &Path, host: &str, now: i64) -> Result<(), JournalError> {
    let all = peek_all(folder, host)?.into_iter().filter_map(|(path, past)| Some((path, past.ok()?)));
    let mut of_peers = BTreeMap::<String, Vec<(PathBuf, Past)>>::new();
    for (path, past) in all.filter(|(path, past)| past.ended.is_some() && !is_written(path)) {
        of_peers.entry(past.header.peer.clone()).or_default().push((path, past));
    }
    let oldest = now - UNCONFIRMED_DAYS_MAX * 24 * 3600;
    for path in of_peers.into_values().flat_map(|ended| beyond_limits(ended, oldest)) {
        std::fs::remove_file(&path).map_err(|source| JournalError::Io { path, source })?;
    }
    Ok(())
}

/// Of one peer's, oldest first.
fn beyond_limits(ended: Vec<(PathBuf, Past)>, oldest: i64) -> Vec<PathBuf> {
    let (kept, history): (Vec<_>, Vec<_>) = ended.into_iter().partition(|(_, past)| is_wanted(past));
    let (too_many, too_old) =
        (kept.len().saturating_sub(UNCONFIRMED_MAX), history.len().saturating_sub(HISTORY_MAX));
    let kept = kept.into_iter().enumerate();
    let old = kept.filter(|(at, (_, p))| *at < too_many || p.header.began_at < oldest).map(|(_, j)| j);
    old.chain(history.into_iter().take(too_old)).map(|(path, _)| path).collect()
}

/// Removes a file that was never begun; false when it is something else by now.
pub fn remove_unbegun(path: &Path, host: &str) -> Result<bool, JournalError> {
    let Some(_nobody_else) = Writer::of(path) else { return Ok(false) };
    if !matches!(Journal::peek(path, host), Err(JournalError::NotBegun { .. })) {
        return Ok(false);
    }
    std::fs::remove_file(path).map_err(|source| JournalError::Io { path: path.into(), source })?;
    tracing::warn!(path = %path.display(), "a journal that was never begun is removed: nothing was done under it");
    Ok(true)
}

fn is_wanted(past: &Past) -> bool {
    // A destination that comes back asks its source what an operator has decided there.
    let may_be_asked_for = match past.header.role {
        Role::Source => past.forced.is_some(),
        Role::Destination => !past.confirmed,
    };
    !past.left().is_empty() || may_be_asked_for
}

/// The migration that a journal is about, by its file's name.
pub fn migration_of(path: &Path) -> Option<Uuid> {
    path.file_name()?.to_str()?.split('.').next()?.parse().ok()
}

/// The virtual machine that a journal is about, though the journal cannot be believed.
pub fn vm_of(path: &Path) -> Option<String> {
    let text = std::fs::read(path).ok()?;
    let line = text.split(|&b| b == b'\n').next()?;
    let value: serde_json::Value = serde_json::from_slice(line).ok()?;
    let begun = value.get("record").unwrap_or(&value).get("begun")?;
    Some(begun.get("vm")?.as_str()?.to_owned())
}
