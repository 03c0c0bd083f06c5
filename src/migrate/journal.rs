//! The journal: the durable record of one migration on one host.
//!
//! One file per migration and role, one JSON record per line, each synced to disk before the
//! step that it announces is taken. A torn last line is what a crash leaves and is dropped;
//! anything else that cannot be read is refused, never guessed at. Knows no QEMU.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::phase::Phase;
use super::progress::Outcome;
use super::witness::Witness;
use crate::qemu::{CapabilityStatus, MigrationParameters};

/// The format that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// Finished journals kept as history.
pub const HISTORY_MAX: usize = 200;
const SUFFIX: &str = "journal";

/// Which part this host plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The guest comes from here.
    Source,
    /// The guest goes here.
    Destination,
}

impl Role {
    /// As shown to people and in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// A further try of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetryOf {
    /// The migration of the first.
    pub first: Uuid,
    /// Counted from one, so two at least.
    pub number: u32,
    /// What those before it left for it. In the header, so that there is no moment at which no
    /// open journal tells of it.
    #[serde(default)]
    pub kept: Vec<Undo>,
}

/// The first record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`] when it was written.
    pub format: u32,
    /// The migration.
    pub migration: Uuid,
    /// This host's part.
    pub role: Role,
    /// The virtual machine.
    pub vm: String,
    /// This host's identity.
    pub host: String,
    /// The other host's identity.
    pub peer: String,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Whether the guest ran when it began.
    pub running: bool,
    /// Source: the migration whose further try this is, and which one; its first is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryOf>,
}

impl Header {
    /// Tries follow each other within a second.
    fn order(&self) -> (i64, u32) {
        (self.began_at, self.retry.as_ref().map_or(1, |r| r.number))
    }
}

/// Something that was about to be made and has to go if the migration fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Undo {
    /// A descriptor under this name in the monitor.
    Fd(String),
    /// A block node.
    Node(String),
    /// A mirror job.
    Job(String),
    /// A dirty bitmap.
    Bitmap {
        /// Its node.
        node: String,
        /// Its name.
        name: String,
    },
    /// Migration capabilities and parameters as they were.
    MigrationSettings {
        /// All capabilities.
        capabilities: Vec<CapabilityStatus>,
        /// The parameters that we know.
        parameters: MigrationParameters,
    },
    /// A QEMU process that we started.
    Qemu,
    /// The NBD server.
    NbdServer,
    /// A block export.
    Export(String),
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// The first line.
    Begun(Header),
    /// The next step makes this.
    Undo(Undo),
    /// A phase has been entered.
    Phase(Phase),
    /// Source: the guest is the destination's from here on. Destination: never written.
    HandedOver,
    /// Destination: the guest is about to be started.
    Starting,
    /// Destination: the guest runs. Source: the destination said so.
    Runs,
    /// Destination: the guest never ran and never will. Source: the destination said so, or
    /// the hand-over was never reached.
    NeverRan,
    /// Destination: how a try that was undone left the disks.
    Witness(Witness),
    /// Nothing is open any more.
    Ended(Outcome),
}

/// Why a journal cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("journal {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A line in the middle is not a record.
    #[error("journal {} is damaged in line {line}; it was left as it is", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// The parser's answer.
        source: serde_json::Error,
    },
    /// The first line is missing or not a header.
    #[error("journal {} has no header; it was left as it is", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
    },
    /// Written by a newer version.
    #[error("journal {} has format {format}, this version reads up to {FORMAT}; it was left as it is", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// Written on another host.
    #[error("journal {} is of host {host}, not of this one; it was left as it is", path.display())]
    OtherHost {
        /// The file.
        path: PathBuf,
        /// Its host.
        host: String,
    },
}

/// An open journal, appended to.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Up to here the file has records that were written and synced.
    whole_bytes: u64,
    past: Past,
}

/// What a journal says so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// Its first record.
    pub header: Header,
    /// What was about to be made, in order.
    pub undo: Vec<Undo>,
    /// The last phase entered.
    pub phase: Phase,
    /// The last one before a roll-back: what failed, if it failed.
    pub reached: Phase,
    /// See [`Record::HandedOver`].
    pub handed_over: bool,
    /// See [`Record::Starting`].
    pub starting: bool,
    /// See [`Record::Runs`].
    pub runs: bool,
    /// See [`Record::NeverRan`].
    pub never_ran: bool,
    /// See [`Record::Witness`].
    pub witness: Option<Witness>,
    /// See [`Record::Ended`].
    pub ended: Option<Outcome>,
}

impl Past {
    fn new(header: Header) -> Self {
        let undo = header.retry.as_ref().map_or_else(Vec::new, |r| r.kept.clone());
        Self {
            header,
            undo,
            phase: Phase::Begin,
            reached: Phase::Begin,
            handed_over: false,
            starting: false,
            runs: false,
            never_ran: false,
            witness: None,
            ended: None,
        }
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Begun(_) => {}
            Record::Undo(undo) => self.undo.push(undo),
            Record::Phase(phase) => {
                self.phase = phase;
                if phase != Phase::RollBack {
                    self.reached = phase;
                }
            }
            Record::HandedOver => self.handed_over = true,
            Record::Starting => self.starting = true,
            Record::Runs => self.runs = true,
            Record::NeverRan => self.never_ran = true,
            Record::Witness(witness) => self.witness = Some(witness),
            Record::Ended(outcome) => self.ended = Some(outcome),
        }
    }
}

impl Journal {
    /// Begins a journal in `folder`.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the migration must not begin then.
    pub fn create(folder: &Path, header: Header) -> Result<Self, JournalError> {
        let path = Self::path(folder, header.migration, header.role);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path).map_err(io)?;
        let past = Past::new(header.clone());
        let mut journal = Self { path: path.clone(), file, whole_bytes: 0, past };
        let begun = journal
            .write(&Record::Begun(header))
            .and_then(|()| File::open(folder).and_then(|f| f.sync_all()).map_err(io));
        if let Err(e) = begun {
            // Nothing has been done under it, and without a header nobody could believe it.
            let _ = std::fs::remove_file(&path);
            return Err(e);
        }
        Ok(journal)
    }

    /// Opens a journal that an earlier process wrote on this `host`, dropping a torn last line.
    ///
    /// # Errors
    /// Any [`JournalError`]; the file is not changed then.
    pub fn open(path: &Path, host: &str) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.into(), source };
        let text = std::fs::read(path).map_err(io)?;
        let whole = whole_bytes(&text);
        let past = believe(path, &text[..whole], host)?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        if whole < text.len() {
            file.set_len(whole as u64).map_err(io)?;
            file.sync_all().map_err(io)?;
        }
        Ok(Self { path: path.into(), file, whole_bytes: whole as u64, past })
    }

    /// What a journal says that somebody else may be writing. Changes nothing.
    ///
    /// # Errors
    /// Any [`JournalError`].
    pub fn peek(path: &Path, host: &str) -> Result<Past, JournalError> {
        let text = std::fs::read(path).map_err(|source| JournalError::Io { path: path.into(), source })?;
        believe(path, &text[..whole_bytes(&text)], host)
    }

    /// Where the journal of a migration lies.
    #[must_use]
    pub fn path(folder: &Path, migration: Uuid, role: Role) -> PathBuf {
        folder.join(format!("{migration}.{}.{SUFFIX}", role.name()))
    }

    /// What it says so far.
    #[must_use]
    pub fn past(&self) -> &Past {
        &self.past
    }

    /// Appends a record and waits until it is on the disk.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the step that the record announces must not be taken then.
    pub fn record(&mut self, record: Record) -> Result<(), JournalError> {
        self.write(&record)?;
        self.past.apply(record);
        Ok(())
    }

    /// Announces something that a failure has to undo.
    ///
    /// # Errors
    /// As [`Journal::record`].
    pub fn will_make(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.record(Record::Undo(undo))
    }

    fn write(&mut self, record: &Record) -> Result<(), JournalError> {
        let io = |source| JournalError::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(record).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        // A record that failed may be there in part, or whole and not for sure: with it the next
        // one would make a damaged journal, and a hand-over that was called off would seem made.
        if self.file.metadata().map_err(io)?.len() != self.whole_bytes {
            self.file.set_len(self.whole_bytes).map_err(io)?;
        }
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            let _ = self.file.set_len(self.whole_bytes).and_then(|()| self.file.sync_data());
            return Err(io(e));
        }
        self.whole_bytes += line.len() as u64;
        Ok(())
    }
}

/// A torn last line is what a crash leaves.
fn whole_bytes(text: &[u8]) -> usize {
    text.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1)
}

fn believe(path: &Path, text: &[u8], host: &str) -> Result<Past, JournalError> {
    let past = read(path, text)?;
    if past.header.host != host {
        return Err(JournalError::OtherHost { path: path.into(), host: past.header.host });
    }
    Ok(past)
}

fn read(path: &Path, text: &[u8]) -> Result<Past, JournalError> {
    let mut past: Option<Past> = None;
    for (number, line) in text.split(|&b| b == b'\n').enumerate().filter(|(_, l)| !l.is_empty()) {
        let record = serde_json::from_slice(line).map_err(|source| JournalError::Damaged {
            path: path.into(),
            line: number + 1,
            source,
        })?;
        match (&mut past, record) {
            (None, Record::Begun(header)) if header.format > FORMAT => {
                return Err(JournalError::Newer { path: path.into(), format: header.format });
            }
            (None, Record::Begun(header)) => past = Some(Past::new(header)),
            (None, _) => break,
            (Some(past), record) => past.apply(record),
        }
    }
    past.ok_or_else(|| JournalError::NoHeader { path: path.into() })
}

/// All journals of a folder, newest last; those that cannot be believed as errors.
///
/// # Errors
/// [`JournalError::Io`] when the folder cannot be read.
pub fn list(folder: &Path, host: &str) -> Result<Vec<Result<Journal, JournalError>>, JournalError> {
    let io = |source| JournalError::Io { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == SUFFIX) {
            paths.push(path);
        }
    }
    let mut journals: Vec<_> = paths.iter().map(|p| Journal::open(p, host)).collect();
    journals.sort_by_key(|j| j.as_ref().map_or((i64::MAX, 0), |j| j.past.header.order()));
    Ok(journals)
}

/// Removes the oldest finished journals beyond [`HISTORY_MAX`].
///
/// # Errors
/// [`JournalError::Io`].
pub fn prune(folder: &Path, host: &str) -> Result<(), JournalError> {
    let ended: Vec<_> =
        list(folder, host)?.into_iter().flatten().filter(|j| j.past.ended.is_some()).collect();
    for journal in ended.iter().take(ended.len().saturating_sub(HISTORY_MAX)) {
        std::fs::remove_file(&journal.path)
            .map_err(|source| JournalError::Io { path: journal.path.clone(), source })?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            format: FORMAT,
            migration: Uuid::from_u128(7),
            role: Role::Source,
            vm: "web1".into(),
            host: "alpha".into(),
            peer: "bravo".into(),
            began_at: 1_700_000_000,
            running: true,
            retry: None,
        }
    }

    fn written(folder: &Path) -> PathBuf {
        let mut journal = Journal::create(folder, header()).unwrap();
        journal.will_make(Undo::Node("vmferry-disk0".into())).unwrap();
        journal.record(Record::Phase(Phase::Device)).unwrap();
        journal.record(Record::HandedOver).unwrap();
        journal.path
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let past = Journal::open(&path, "alpha").unwrap().past;
        assert_eq!(past.header, header());
        assert_eq!(past.undo, [Undo::Node("vmferry-disk0".into())]);
        assert_eq!(past.phase, Phase::Device);
        assert!(past.handed_over && !past.runs && past.ended.is_none());
    }

    #[test]
    fn every_torn_tail_leaves_the_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let text = std::fs::read(&path).unwrap();
        let lines_end =
            |n: usize| text.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(n).unwrap().0 + 1;
        for cut in lines_end(0)..=text.len() {
            std::fs::write(&path, &text[..cut]).unwrap();
            let past = Journal::open(&path, "alpha").expect("a torn tail is no damage").past;
            assert_eq!(past.handed_over, cut == text.len(), "cut at {cut}");
            let left = std::fs::read(&path).unwrap();
            assert!(left.ends_with(b"\n") && text.starts_with(&left), "cut at {cut}");
        }
        std::fs::write(&path, &text[..lines_end(0) - 1]).unwrap();
        assert!(matches!(Journal::open(&path, "alpha"), Err(JournalError::NoHeader { .. })));
    }

    #[test]
    fn what_cannot_be_believed_is_refused_and_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let good = std::fs::read_to_string(&path).unwrap();
        assert!(matches!(Journal::open(&path, "bravo"), Err(JournalError::OtherHost { .. })));
        let newer = good.replace("\"format\":1", "\"format\":2");
        let damaged = good.replace("{\"phase\"", "#\"phase\"");
        for (text, word) in [(newer, "format 2"), (damaged, "line 3")] {
            std::fs::write(&path, &text).unwrap();
            let error = Journal::open(&path, "alpha").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_record_that_was_written_in_part_does_not_damage_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(folder.path(), header()).unwrap();
        // What a full disk leaves of a record.
        journal.file.write_all(b"\"handed-").unwrap();
        journal.record(Record::NeverRan).unwrap();
        let past = Journal::open(&journal.path, "alpha").unwrap().past;
        assert!(past.never_ran && !past.handed_over);
    }

    #[test]
    fn a_record_that_cannot_be_written_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(folder.path(), header()).unwrap();
        journal.file = File::open(&journal.path).unwrap();
        assert!(journal.record(Record::HandedOver).is_err());
        assert!(!journal.past.handed_over, "what is not on the disk has not happened");
    }
}
