//! What is open and nobody's, in an agent that runs: a process that was to take over did not, and
//! what had been left to its journal alone was not taken back with the rest.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use super::open::{Open, told};
use crate::migrate::host::Host;
use crate::migrate::journal::{self, JournalError, Role};
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::ProgressSink;

/// Finds it: every open journal but those `taken` up again and those that somebody still writes.
/// Errors: [`JournalError`] when the folder cannot be read.
pub fn abandoned(host: &Arc<Host>, taken: &BTreeSet<(Uuid, Role)>) -> Result<Vec<Open>, JournalError> {
    let mut open = Vec::<Open>::new();
    // The newest first, as at a start.
    for (path, past) in host.journals.peek_all()?.into_iter().rev() {
        let Ok(past) = past else { continue };
        let header = &past.header;
        let is_open = past.ended.is_none() && host.journals.unended(header.migration, header.role).is_none();
        if !is_open || taken.contains(&(header.migration, header.role)) || journal::is_in_use(&path) {
            continue;
        }
        let newer = open.iter().find(|newer| newer.journal.past().header.vm == header.vm);
        let reservation = match newer {
            Some(newer) => Arc::clone(&newer._reservation),
            None => match host.reserve(&header.vm, header.migration) {
                Ok(reservation) => Arc::new(reservation),
                Err(problem) => {
                    tracing::error!(vm = header.vm, migration = %header.migration, %problem, "not settled; a restart settles it");
                    continue;
                }
            },
        };
        let heir = newer.is_none();
        match host.journals.open(&path) {
            Ok(journal) => {
                let progress =
                    ProgressSink::new(told(&past)).recorded_as(&host.audit, Some(header.migration));
                open.push(Open { journal, progress, heir, _reservation: reservation });
            }
            Err(e) => tracing::error!(vm = header.vm, error = chain(&e), "not settled; a restart settles it"),
        }
    }
    Ok(open)
}
