//! The migrations of this agent, as the local API sees them: progress and the way to cancel.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::migrate::bandwidth::ShareHandle;
use crate::migrate::journal::Role;
use crate::migrate::phase::Phase;
use crate::migrate::progress::{Outcome, Progress, ProgressSink};
use crate::migrate::timeline::Timeline;

/// Ended migrations kept in memory; the journals keep more.
const ENDED_MAX: usize = 200;
/// Ended migrations whose course is left to the next process.
const LEFT_MAX: usize = 50;

/// One migration on one side. Two agents on one host are two processes, so (id, role) is unique.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) progress: ProgressSink,
    pub(crate) cancel: CancellationToken,
    /// What it may send, while this process runs it as its source.
    pub(crate) share: Option<ShareHandle>,
}

/// What migrations have been through, for the next process.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Timelines(Vec<(Uuid, String, Timeline)>);

impl Timelines {
    /// Gives a migration its own, if it is here.
    pub(crate) fn restore(&mut self, progress: &ProgressSink) {
        let now = progress.now();
        let is_its = |(id, role, _): &(Uuid, String, Timeline)| *id == now.id && role == now.role.name();
        if let Some(at) = self.0.iter().position(is_its) {
            progress.restore_timeline(self.0.swap_remove(at).2);
        }
    }
}

/// Why a migration cannot be cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoCancel {
    /// There is none with that id.
    Unknown,
    /// The other host's agent decides.
    NotSource,
    /// Handed over already, or ended.
    TooLate,
}

/// A migration's place: by the second in which it began, then by when it was added, for two may
/// begin within a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    began_at: i64,
    number: u64,
    id: Uuid,
    role: &'static str,
}

#[derive(Debug, Default)]
struct Entries {
    all: BTreeMap<Place, Entry>,
    added: u64,
}

/// All migrations, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: Mutex<Entries>,
    asked: Mutex<()>,
}

impl Registry {
    /// Held while somebody looks whether there is a migration, and begins it if there is none.
    pub(crate) fn one_at_a_time(&self) -> std::sync::MutexGuard<'_, ()> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a migration of which nothing can be changed here.
    pub(crate) fn add(&self, progress: ProgressSink) {
        self.insert(Entry { progress, cancel: CancellationToken::new(), share: None });
    }

    /// Adds a migration.
    pub(crate) fn insert(&self, entry: Entry) {
        let now = entry.progress.now();
        let mut entries = self.locked();
        let role = now.role.name();
        // One that is here already is replaced.
        entries.all.retain(|place, _| (place.id, place.role) != (now.id, role));
        entries.added += 1;
        let place = Place { began_at: now.began_at, number: entries.added, id: now.id, role };
        entries.all.insert(place, entry);
        forget_oldest(&mut entries.all);
    }

    /// All migrations, oldest first.
    pub(crate) fn all(&self) -> Vec<Progress> {
        self.locked().all.values().map(|e| e.progress.now()).collect()
    }

    /// Where all of them write their progress, oldest first.
    pub(crate) fn sinks(&self) -> Vec<ProgressSink> {
        self.locked().all.values().map(|e| e.progress.clone()).collect()
    }

    /// What all that are under way, and the last that have ended, have been through.
    pub(crate) fn timelines(&self) -> Timelines {
        let mut ended = 0;
        let mut all = Vec::new();
        for sink in self.sinks().iter().rev() {
            let now = sink.now();
            ended += usize::from(now.outcome.is_some());
            if now.outcome.is_none() || ended <= LEFT_MAX {
                all.push((now.id, now.role.name().to_owned(), sink.timeline()));
            }
        }
        Timelines(all)
    }

    /// A migration by its id; the source's side where this agent has both.
    pub(crate) fn get(&self, id: Uuid) -> Option<Entry> {
        let entries = self.locked();
        let mut found: Vec<_> = entries.all.iter().filter(|(place, _)| place.id == id).collect();
        found.sort_by_key(|(place, _)| place.role != Role::Source.name());
        found.first().map(|(_, e)| (*e).clone())
    }

    /// The progress that whoever follows this migration sees.
    pub(crate) fn followed(&self, id: Uuid, role: Role) -> Option<ProgressSink> {
        let entries = self.locked();
        let found = entries.all.iter().find(|(place, _)| (place.id, place.role) == (id, role.name()));
        found.map(|(_, entry)| entry.progress.clone())
    }

    /// Asks a migration to roll back.
    pub(crate) fn cancel(&self, id: Uuid) -> Result<(), NoCancel> {
        let entry = self.get(id).ok_or(NoCancel::Unknown)?;
        let now = entry.progress.now();
        if now.role != Role::Source {
            return Err(NoCancel::NotSource);
        }
        // A try that is being rolled back may have a successor, which is not begun then.
        let between_tries = now.phase == Phase::RollBack && now.tries.is_some();
        if !(now.phase.may_cancel() || between_tries) || now.outcome.is_some() {
            return Err(NoCancel::TooLate);
        }
        entry.cancel.cancel();
        Ok(())
    }

    /// Asks all that may still roll back to do so.
    pub(crate) fn cancel_all(&self) {
        self.locked().all.values().for_each(|e| e.cancel.cancel());
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_oldest(entries: &mut BTreeMap<Place, Entry>) {
    let ended = |e: &Entry| {
        let outcome = e.progress.now().outcome;
        outcome.is_some_and(|o| !matches!(o, Outcome::Undecided { .. }))
    };
    forget_runs(entries);
    let old: Vec<_> = entries.iter().filter(|(_, e)| ended(e)).map(|(k, _)| *k).collect();
    for key in old.iter().take(old.len().saturating_sub(ENDED_MAX)) {
        entries.remove(key);
    }
}

/// Of the runs that brought a replica into step only the last is shown.
fn forget_runs(entries: &mut BTreeMap<Place, Entry>) {
    let mut later = BTreeSet::new();
    let mut old = Vec::new();
    for (place, entry) in entries.iter().rev() {
        let now = entry.progress.now();
        if matches!(now.outcome, Some(Outcome::Replicated { .. }))
            && !later.insert((place.role, now.vm, now.peer))
        {
            old.push(*place);
        }
    }
    for place in old {
        entries.remove(&place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_beginnings_also_within_a_second() {
        let registry = Registry::default();
        let progress = |vm: &str, began_at| {
            let progress = Progress::new(Uuid::new_v4(), vm, Role::Source, "bravo");
            ProgressSink::new(Progress { began_at, ..progress })
        };
        let later = progress("later", 2000);
        registry.add(later.clone());
        let names: Vec<String> = (0..50).map(|n| format!("vm{n}")).collect();
        names.iter().for_each(|name| registry.add(progress(name, 1000)));
        // Added again, it is the same.
        registry.add(later);
        let all: Vec<String> = registry.all().into_iter().map(|p| p.vm).collect();
        assert_eq!(all[..50], names);
        assert_eq!(all[50..], ["later"]);
    }

    #[test]
    fn of_a_replicas_runs_only_the_last_is_shown() {
        let registry = Registry::default();
        let run = |vm: &str, peer: &str, outcome: Outcome| {
            let mut progress = Progress::new(Uuid::new_v4(), vm, Role::Source, peer);
            progress.outcome = Some(outcome);
            registry.add(ProgressSink::new(progress));
        };
        let in_step = || Outcome::Replicated { leftovers: Vec::new() };
        run("web1", "bravo", Outcome::Moved { leftovers: Vec::new() });
        (0..5).for_each(|_| run("web1", "bravo", in_step()));
        run("web1", "charlie", in_step());
        run("web2", "bravo", in_step());
        run("web3", "bravo", in_step());
        let shown: Vec<String> = registry.all().into_iter().map(|p| format!("{} {}", p.vm, p.peer)).collect();
        assert_eq!(shown, ["web1 bravo", "web1 bravo", "web1 charlie", "web2 bravo", "web3 bravo"]);
    }
}
