//! What migrations that have ended have left, cleaned up later.

use std::path::Path;
use std::sync::Arc;

use tokio::time::timeout;

use super::ask::QEMU_DEADLINE;
use crate::migrate::decide::ask_peer;
use crate::migrate::destination::{self, created_images};
use crate::migrate::guest::{life, process, undo};
use crate::migrate::handover::Ended;
use crate::migrate::host::Host;
use crate::migrate::journal::{self, Past, Record, Role};
use crate::migrate::model::leftover::words;
use crate::migrate::model::problem::chain;
use crate::qemu::{Qmp, QueryStatus, RunState};

/// Tries again to clean up after a migration that has ended; what is still left.
pub(super) async fn clean_up(host: &Arc<Host>, path: &Path, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    // Nothing else may happen to that VM meanwhile.
    let _reservation = match host.reserve(name, past.header.migration) {
        Ok(reservation) => reservation,
        Err(_) => return past.left().to_vec(),
    };
    // Nobody else writes to it from here on. What was read may be older than that.
    let mut journal = match host.journals.open(path) {
        Ok(journal) => journal,
        Err(e) => return vec![chain(&e)],
    };
    let past = &journal.past().clone();
    let left = match host.config.vm(name) {
        _ if past.left().is_empty() => return Vec::new(),
        None => past.left().to_vec(),
        // Its agent ended before.
        Some(_) if past.header.role == Role::Destination && !past.came_to_a_qemu() => Vec::new(),
        Some(config) => match timeout(QEMU_DEADLINE * 5, process::connect(&config)).await {
            Ok(Ok((qmp, _events))) if past.is_of(qmp.process()) => clean_qemu(host, &qmp, past).await,
            _ if past.never_ran && process::started_in_vain(past) => {
                process::end_started(past).await.into_iter().collect()
            }
            _ => without_qemu(host, past, &life::Known::by_journal(past, &config).await),
        },
    };
    let left = if left.is_empty() { created_images_left(host, past).await } else { left };
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

/// Removes the images that were made for a guest that stays at its source, by the source's word; what stays.
async fn created_images_left(host: &Host, past: &Past) -> Vec<String> {
    if past.header.role != Role::Destination || past.has_moved() || !created_images::may_be_there(past) {
        return Vec::new();
    }
    let told = ask_peer(host, past).await.ok().flatten();
    let is_given_back = told.is_some_and(|told| told.known.ended == Some(Ended::Stayed));
    created_images::remove_late(host, past, is_given_back).await
}

async fn clean_qemu(host: &Host, qmp: &Qmp, past: &Past) -> Vec<String> {
    let name = &past.header.vm;
    // Else somebody may have started the VM here since.
    let same = past.is_surely_of(qmp.process());
    let status = match qmp.execute(QueryStatus).await {
        Ok(info) => info.status,
        Err(e) => return vec![format!("the QEMU of VM {name} cannot be asked: {}", chain(&e))],
    };
    let moved = past.has_moved();
    match (past.header.role, moved) {
        // Its roll-back could not reach it. What is in it bears our names, so it is that QEMU.
        (Role::Source, false)
            if moved_since(host, past) != Some(true) && undo::is_under_way(qmp, past).await =>
        {
            words(undo::roll_back(qmp, past, undo::Bitmaps::Go).await.leftovers)
        }
        (Role::Source, false) => {
            let mut left = undo::clean_late(qmp, past).await;
            if past.running() && status == RunState::PostMigrate {
                left.push(format!(
                    "VM {name} stands still at the source, where a migration of its QEMU has completed: continue it with \
                     `cont` if it surely runs nowhere else"
                ));
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
        (Role::Destination, false) => {
            destination::undo(name, qmp, past, None, destination::Moment::Late).await
        }
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
    let moved = past.has_moved();
    let should_run = moved == (past.header.role == Role::Destination);
    let nowhere = should_run && past.guest_stands();
    if !nowhere || !known.is_gone() {
        return Vec::new();
    }
    match moved_since(host, past) {
        Some(true) => return Vec::new(),
        None => return past.left().to_vec(),
        Some(false) => {}
    }
    words(vec![match past.header.role {
        Role::Source => known.of_source(&past.header.vm),
        Role::Destination => known.of_destination(&past.header.vm),
    }])
}

/// Whether a later migration tells of the VM; `None`: not all journals that may be of it can be read.
fn moved_since(host: &Host, before: &Past) -> Option<bool> {
    let all = host.journals.peek_all().ok()?;
    if all.iter().any(|one| journal::is_later(one, before) == Some(true)) {
        return Some(true);
    }
    all.iter().all(|one| journal::is_later(one, before).is_some()).then_some(false)
}
