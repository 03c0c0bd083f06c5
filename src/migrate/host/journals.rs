//! The journals of this host's migrations: where they lie, those whose disk did not take the last
//! record, and those that are not believed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::migrate::journal::{
    self, Beginning, Ending, FORMAT, FORMAT_WITH_WITNESS, Header, Journal, JournalError, Past, Peeked,
    Record, Role,
};
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::net::identity::Identity;

/// Old ones are thrown away when so many more have ended.
const PRUNE_AFTER: usize = 100;

/// All journals of one host.
#[derive(Debug)]
pub(crate) struct Journals {
    folder: PathBuf,
    /// This host, as its journals name it.
    host: Identity,
    /// Of migrations that have ended, but whose disk did not take the last record.
    unended: Mutex<Vec<(Journal, Ending)>>,
    /// So many have ended since old ones were thrown away.
    ended: AtomicUsize,
    /// Those that are not believed.
    refused: Mutex<Vec<Refused>>,
    /// When the last one began.
    last: Mutex<Option<Moment>>,
}

/// Seconds since 1970, and nanoseconds.
type Moment = (i64, u32);

/// A journal that is not believed: nobody knows whose its virtual machine is.
#[derive(Debug, Clone)]
pub(crate) struct Refused {
    pub(crate) path: PathBuf,
    /// Of its header, where that can be read.
    pub(crate) vm: Option<String>,
    pub(crate) cause: String,
}

impl Journals {
    pub(super) fn new(folder: PathBuf, host: Identity) -> Self {
        let ended = AtomicUsize::new(0);
        Self {
            folder,
            host,
            unended: Mutex::default(),
            ended,
            refused: Mutex::default(),
            last: Mutex::default(),
        }
    }

    pub(crate) fn begin(
        &self,
        migration: Uuid,
        role: Role,
        peer: &Identity,
        beginning: Beginning<'_>,
    ) -> Result<Journal, JournalError> {
        self.end_late()?;
        let (began_at, began_ns) = self.next_moment()?;
        let header = Header {
            format: if beginning.witness { FORMAT_WITH_WITNESS } else { FORMAT },
            migration,
            role,
            vm: beginning.vm.into(),
            host: self.host.to_string(),
            peer: peer.to_string(),
            began_at,
            began_ns: Some(began_ns),
            running: beginning.running,
            keep_source: beginning.keep_source,
            retry: beginning.retry,
            accepted: beginning.accepted,
        };
        Journal::create(&self.folder, header)
    }

    /// The time, but later than what any journal of this host has: which of two migrations was the later one is told by
    /// that, also when the clock is put back in between.
    fn next_moment(&self) -> Result<Moment, JournalError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match *last {
            Some(last) => last,
            None => {
                let all = self.peek_all()?;
                let pasts = all.iter().filter_map(|(_, past)| past.as_ref().ok());
                pasts.map(|past| past.header.moment()).max().unwrap_or_default()
            }
        };
        let now = time::OffsetDateTime::now_utc();
        let after = match before {
            (seconds, 999_999_999) => (seconds + 1, 0),
            (seconds, ns) => (seconds, ns + 1),
        };
        Ok(*last.insert((now.unix_timestamp(), now.nanosecond()).max(after)))
    }

    /// Opens a journal to write to it.
    pub(crate) fn open(&self, path: &Path) -> Result<Journal, JournalError> {
        Journal::open(path, self.host.as_str())
    }

    /// What a journal says that somebody else may be writing.
    pub(crate) fn peek(&self, path: &Path) -> Result<Past, JournalError> {
        Journal::peek(path, self.host.as_str())
    }

    /// What all of them say, newest last.
    pub(crate) fn peek_all(&self) -> Result<Vec<Peeked>, JournalError> {
        journal::peek_all(&self.folder, self.host.as_str())
    }

    /// Whether one that is being written is about a migration with a witness.
    pub(crate) fn have_a_witness(&self) -> bool {
        let Ok(files) = std::fs::read_dir(&self.folder) else { return false };
        let written = files.flatten().map(|file| file.path()).filter(|path| journal::is_in_use(path));
        let mut pasts = written.map(|path| self.peek(&path));
        pasts.any(|past| {
            past.is_ok_and(|past| past.header.format >= FORMAT_WITH_WITNESS && past.ended.is_none())
        })
    }

    /// Takes a journal away that was never begun; whether it was one.
    pub(crate) fn remove_unbegun(&self, path: &Path) -> Result<bool, JournalError> {
        journal::remove_unbegun(path, self.host.as_str())
    }

    /// Whether so many have ended that old ones are to be thrown away: a peer can have migrations begin and end as
    /// often as it likes.
    pub(crate) fn are_many(&self) -> bool {
        self.ended.load(Relaxed) >= PRUNE_AFTER
    }

    /// Throws old ones away.
    pub(crate) fn prune(&self) -> Result<(), JournalError> {
        self.ended.store(0, Relaxed);
        journal::prune(&self.folder, self.host.as_str(), time::OffsetDateTime::now_utc().unix_timestamp())
    }

    /// Where the journal of a migration lies.
    pub(crate) fn path(&self, migration: Uuid, role: Role) -> PathBuf {
        Journal::path(&self.folder, migration, role)
    }

    /// Ends a journal. A disk that does not take the last record is tried again from time to time,
    /// and before the next migration of that VM begins: two open journals of one guest would
    /// contradict each other.
    pub(crate) fn end(&self, mut journal: Journal, outcome: Outcome) {
        let ending = Ending::from(outcome);
        self.ended.fetch_add(1, Relaxed);
        if let Err(e) = journal.record(Record::Ended(ending.clone())) {
            tracing::error!(error = chain(&e), "the journal's end cannot be written; it is tried again");
            lock(&self.unended).push((journal, ending));
        }
    }

    /// Forgets a migration that nothing was granted for, and that has left nothing: its source cannot have
    /// handed over, and nobody will ask.
    pub(crate) fn forget(&self, journal: Journal, outcome: Outcome) {
        if let Err((journal, e)) = journal.remove() {
            tracing::warn!(error = chain(&e), "the journal of a migration that never began is kept");
            self.end(*journal, outcome);
        }
    }

    /// Ends the journals that could not be ended when their migrations did.
    /// Errors: [`JournalError`] of the first that still cannot be ended.
    pub(crate) fn end_late(&self) -> Result<(), JournalError> {
        let mut unended = lock(&self.unended);
        while let Some((journal, ending)) = unended.last_mut() {
            journal.record(Record::Ended(ending.clone()))?;
            unended.pop();
        }
        Ok(())
    }

    /// A migration whose journal does not say yet how it ended, and how it did.
    pub(crate) fn unended(&self, migration: Uuid, role: Role) -> Option<(Past, Ending)> {
        let unended = lock(&self.unended);
        let mut pasts = unended.iter().map(|(journal, ending)| (journal.past(), ending));
        let found = pasts.find(|(p, _)| p.header.migration == migration && p.header.role == role);
        found.map(|(past, ending)| (past.clone(), ending.clone()))
    }

    /// Takes note of a journal that is not believed.
    pub(crate) fn refuse(&self, refused: Refused) {
        let mut all = lock(&self.refused);
        all.retain(|r| r.path != refused.path);
        all.push(refused);
    }

    /// The journals that are not believed and have not been taken away.
    pub(crate) fn refused(&self) -> Vec<Refused> {
        let mut all = lock(&self.refused);
        all.retain(|r| r.path.exists());
        all.clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn beginning(witness: bool) -> Beginning<'static> {
        let accepted = std::collections::BTreeSet::new();
        Beginning { vm: "web1", running: true, keep_source: false, retry: None, accepted, witness }
    }

    #[test]
    fn a_journal_with_a_witness_has_a_format_of_its_own_and_is_found_while_it_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let journals = Journals::new(folder.path().to_owned(), "alpha".parse().unwrap());
        let peer = "bravo".parse().unwrap();
        let plain = journals.begin(Uuid::from_u128(1), Role::Source, &peer, beginning(false)).unwrap();
        assert_eq!(plain.past().header.format, FORMAT);
        assert!(!journals.have_a_witness());
        let open = journals.begin(Uuid::from_u128(2), Role::Destination, &peer, beginning(true)).unwrap();
        assert_eq!(open.past().header.format, FORMAT_WITH_WITNESS);
        let text = std::fs::read_to_string(journals.path(Uuid::from_u128(2), Role::Destination)).unwrap();
        // What the version before this one reads first, and refuses by its number.
        assert!(text.starts_with(r#"{"n":0,"record":{"begun":{"format":3,"#), "{text}");
        assert!(journals.have_a_witness());
        journals.end(open, Outcome::Moved { leftovers: Vec::new() });
        assert!(!journals.have_a_witness());
    }

    /// Of two migrations the clock was put back between, by a process that has seen both and by the next one.
    #[test]
    fn what_begins_later_is_later_whatever_the_clock_says() {
        let folder = tempfile::tempdir().unwrap();
        let new = || Journals::new(folder.path().to_owned(), "alpha".parse().unwrap());
        let begin = |journals: &Journals, n| {
            let peer = "bravo".parse().unwrap();
            let journal = journals.begin(Uuid::from_u128(n), Role::Source, &peer, beginning(false)).unwrap();
            journal.past().header.clone()
        };
        let journals = new();
        let in_an_hour = time::OffsetDateTime::now_utc().unix_timestamp() + 3600;
        *journals.last.lock().unwrap() = Some((in_an_hour, 999_999_999));
        let first = begin(&journals, 1);
        assert_eq!(first.moment(), (in_an_hour + 1, 0));
        let second = begin(&journals, 2);
        assert!(second.may_be_later_than(&first));
        assert!(begin(&new(), 3).may_be_later_than(&second));
    }

    #[test]
    fn old_ones_are_thrown_away_when_many_have_ended() {
        let folder = tempfile::tempdir().unwrap();
        let journals = Journals::new(folder.path().to_owned(), "alpha".parse().unwrap());
        for n in 1..=PRUNE_AFTER {
            let (id, peer) = (Uuid::from_u128(n as u128), "bravo".parse().unwrap());
            let journal = journals.begin(id, Role::Source, &peer, beginning(false)).unwrap();
            journals.end(journal, Outcome::Moved { leftovers: Vec::new() });
            assert_eq!(journals.are_many(), n == PRUNE_AFTER, "{n}");
        }
        journals.prune().unwrap();
        assert!(!journals.are_many());
    }
}
