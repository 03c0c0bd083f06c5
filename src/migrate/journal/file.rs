//! One journal's file: created, opened again after a crash, appended to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::line::{Chain, Flaw};
use super::writers::Writer;
use super::{FORMAT_WITH_WITNESS, Header, JournalError, Past, Record, Role, SUFFIX, Undo};
use crate::migrate::handover::Written;
use crate::qemu::Process;

/// An open journal, appended to.
#[derive(Debug)]
pub struct Journal {
    pub(crate) path: PathBuf,
    file: File,
    /// Up to here the file has records.
    whole_bytes: u64,
    /// And surely nothing else, surely on the disk.
    sure: bool,
    chain: Chain,
    pub(crate) past: Past,
    _writer: Writer,
}

#[derive(Debug, thiserror::Error)]
#[error("a record was not written")]
pub struct Unwritten {
    #[source]
    pub error: JournalError,
    /// Nobody knows whether it is there after a crash; else it surely is not.
    pub in_doubt: bool,
}

impl Journal {
    /// Begins a journal in `folder`.
    /// Errors: [`JournalError::Io`]; the migration must not begin then.
    pub fn create(folder: &Path, header: Header) -> Result<Self, JournalError> {
        blocking(|| Self::create_now(folder, header))
    }

    fn create_now(folder: &Path, header: Header) -> Result<Self, JournalError> {
        let path = Self::path(folder, header.migration, header.role);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let writer = writer(&path)?;
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path).map_err(io)?;
        let chain = Chain::begin(header.format, header.migration, header.role);
        let past = Past::new(header.clone());
        let mut journal =
            Self { path: path.clone(), file, whole_bytes: 0, sure: true, chain, past, _writer: writer };
        let begun = journal
            .write(&Record::Begun(header))
            .map_err(|e| e.error)
            .and_then(|()| File::open(folder).and_then(|f| f.sync_all()).map_err(io));
        if let Err(e) = begun {
            // Nothing has been done under it, and without a header nobody could believe it.
            let _ = std::fs::remove_file(&path);
            return Err(e);
        }
        Ok(journal)
    }

    /// Opens a journal that an earlier process wrote on this `host`, dropping a torn last line.
    /// What it says may be in the page cache only: see [`crate::migrate::handover`].
    /// Errors: any [`JournalError`]; the file is not changed then.
    pub fn open(path: &Path, host: &str) -> Result<Self, JournalError> {
        blocking(|| Self::open_now(path, host))
    }

    fn open_now(path: &Path, host: &str) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.into(), source };
        // Before it is read: from here on nobody else adds to it.
        let writer = writer(path)?;
        let text = std::fs::read(path).map_err(io)?;
        let believed = believe(path, &text, host)?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        let whole_bytes = believed.whole_bytes as u64;
        let mut journal = Self {
            path: path.into(),
            file,
            whole_bytes,
            sure: false,
            chain: believed.chain,
            past: believed.past,
            _writer: writer,
        };
        if let Err(e) = journal.mend(believed.lacks_end) {
            tracing::warn!(path = %path.display(), error = %e, "a torn line stays until the next record");
        }
        Ok(journal)
    }

    /// Ends a last line that lacks only its end, or takes a torn one away.
    fn mend(&mut self, lacks_end: bool) -> io::Result<()> {
        if lacks_end {
            self.file.write_all(b"\n")?;
            self.whole_bytes += 1;
        }
        self.make_sure()
    }

    /// What a journal says that somebody else may be writing. Changes nothing.
    pub fn peek(path: &Path, host: &str) -> Result<Past, JournalError> {
        let text = blocking(|| std::fs::read(path));
        let text = text.map_err(|source| JournalError::Io { path: path.into(), source })?;
        Ok(believe(path, &text, host)?.past)
    }

    /// Where the journal of a migration lies.
    pub fn path(folder: &Path, migration: Uuid, role: Role) -> PathBuf {
        folder.join(format!("{migration}.{}.{SUFFIX}", role.name()))
    }

    /// What it says so far.
    pub fn past(&self) -> &Past {
        &self.past
    }

    /// Appends a record and waits until it is on the disk.
    /// Errors: [`JournalError::Io`]; the step that the record announces must not be taken then.
    pub fn record(&mut self, record: Record) -> Result<(), JournalError> {
        self.append(record).map_err(|e| e.error)
    }

    /// Appends a record that the hand-over turns on, and says how sure it is.
    pub fn mark(&mut self, record: Record) -> (Written, Option<JournalError>) {
        match self.append(record) {
            Ok(()) => (Written::Durable, None),
            Err(Unwritten { error, in_doubt: false }) => (Written::Failed, Some(error)),
            Err(Unwritten { error, in_doubt: true }) => (Written::InDoubt, Some(error)),
        }
    }

    fn append(&mut self, record: Record) -> Result<(), Unwritten> {
        blocking(|| self.write(&record))?;
        self.past.apply(record);
        Ok(())
    }

    /// Takes its file away.
    /// Errors: it is still there, and can be written on.
    pub fn remove(self) -> Result<(), (Box<Self>, JournalError)> {
        match blocking(|| std::fs::remove_file(&self.path)) {
            Ok(()) => Ok(()),
            Err(source) => {
                let error = JournalError::Io { path: self.path.clone(), source };
                Err((Box::new(self), error))
            }
        }
    }

    /// Announces something that a failure has to undo.
    pub fn will_make(&mut self, undo: Undo) -> Result<(), JournalError> {
        self.record(Record::Undo(undo))
    }

    /// Takes note of the QEMU that it is about, for whoever has to say later whether it lives.
    pub fn note_qemu(&mut self, process: &Process) -> Result<(), JournalError> {
        match process.id() {
            Some(id) if self.past.qemu.as_ref() != Some(id) => self.record(Record::Qemu(id.clone())),
            _ => Ok(()),
        }
    }

    fn write(&mut self, record: &Record) -> Result<(), Unwritten> {
        let (line, chain) = self.chain.write(record).map_err(|e| self.unwritten(e.into(), false))?;
        if let Err(e) = self.write_line(&line) {
            let in_doubt = self.make_sure().is_err();
            return Err(self.unwritten(e, in_doubt));
        }
        self.sure = true;
        self.whole_bytes += line.len() as u64;
        self.chain = chain;
        Ok(())
    }

    fn unwritten(&self, source: io::Error, in_doubt: bool) -> Unwritten {
        Unwritten { error: JournalError::Io { path: self.path.clone(), source }, in_doubt }
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        // A record that failed may be there in part, or whole and not for sure: with it the next
        // one would make a damaged journal, and a hand-over that was called off would seem made.
        if self.file.metadata()?.len() != self.whole_bytes {
            self.sure = false;
            self.file.set_len(self.whole_bytes)?;
        }
        self.file.write_all(line).inspect_err(|_| self.sure &= self.is_whole())?;
        self.sure = false;
        self.file.sync_data()
    }

    /// Whether the file surely has every record that was written, and surely nothing else.
    pub fn is_sure(&self) -> bool {
        self.sure && self.is_whole()
    }

    /// Takes away what a write has left in doubt; nothing when there is no doubt.
    /// Errors: the doubt stays.
    pub fn settle_doubt(&mut self) -> io::Result<()> {
        blocking(|| self.make_sure())
    }

    fn is_whole(&self) -> bool {
        self.file.metadata().is_ok_and(|m| m.len() == self.whole_bytes)
    }

    /// Makes the file end with its last whole record, also after a loss of power.
    fn make_sure(&mut self) -> io::Result<()> {
        if self.sure && self.is_whole() {
            return Ok(());
        }
        self.sure = false;
        if !self.is_whole() {
            self.file.set_len(self.whole_bytes)?;
        }
        self.file.sync_all()?;
        self.sure = true;
        Ok(())
    }
}

fn writer(path: &Path) -> Result<Writer, JournalError> {
    Writer::of(path).ok_or_else(|| JournalError::InUse { path: path.into() })
}

/// Waits for a disk, off the runtime's threads: its other tasks, the watchdog's among them, go on
/// meanwhile on another thread, if it has more than one.
pub(super) fn blocking<T>(wait: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}

/// A journal's text, as far as it is believed.
struct Believed {
    past: Past,
    chain: Chain,
    whole_bytes: usize,
    /// The last line has everything but its end.
    lacks_end: bool,
}

fn believe(path: &Path, text: &[u8], host: &str) -> Result<Believed, JournalError> {
    let believed = read(path, text)?;
    let header = &believed.past.header;
    if header.host != host {
        return Err(JournalError::OtherHost { path: path.into(), host: header.host.clone() });
    }
    if path.file_name() != Journal::path(Path::new(""), header.migration, header.role).file_name() {
        let (migration, role) = (header.migration, header.role);
        return Err(JournalError::Misnamed { path: path.into(), migration, role });
    }
    Ok(believed)
}

/// How the second line begins.
const SECOND: &[u8] = b"{\"n\":1,";

fn read(path: &Path, text: &[u8]) -> Result<Believed, JournalError> {
    let no_header = || JournalError::NoHeader { path: path.into() };
    let ends = text.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    let mut lines = text[..ends].split_inclusive(|&b| b == b'\n').map(|l| &l[..l.len() - 1]).enumerate();
    let Some((_, first)) = lines.next() else {
        // A second record would prove that the first had been whole.
        let is_begun = text.windows(SECOND.len()).any(|part| part == SECOND);
        return Err(if is_begun { no_header() } else { JournalError::NotBegun { path: path.into() } });
    };
    let damaged = |at: usize, source| JournalError::Damaged { path: path.into(), line: at + 1, source };
    let (header, mut chain) = first_line(path, first).map_err(|e| match e {
        First::NoHeader => no_header(),
        First::Newer(format) => JournalError::Newer { path: path.into(), format },
        First::Flaw(flaw) => damaged(0, flaw),
    })?;
    let mut past = Past::new(header);
    let mut count = 1;
    for (at, line) in lines {
        let (record, next) = chain.read(line).map_err(|flaw| damaged(at, flaw))?;
        if matches!(record, Record::Begun(_)) {
            return Err(damaged(at, Flaw::Begins));
        }
        past.apply(record);
        (chain, count) = (next, at + 1);
    }
    let tail = &text[ends..];
    let kept = chain.torn(tail).map_err(|flaw| damaged(count, flaw))?;
    if kept > 0 {
        let (record, next) = chain.read(tail).map_err(|flaw| damaged(count, flaw))?;
        past.apply(record);
        chain = next;
    }
    Ok(Believed { past, chain, whole_bytes: ends + kept, lacks_end: kept > 0 })
}

enum First {
    NoHeader,
    Newer(u32),
    Flaw(Flaw),
}

/// The header, and where the second line belongs. What is newer is told by its format alone.
fn first_line(_path: &Path, line: &[u8]) -> Result<(Header, Chain), First> {
    let value: serde_json::Value = serde_json::from_slice(line).map_err(|_| First::NoHeader)?;
    let numbered = value.get("record").is_some();
    let begun = value.get("record").unwrap_or(&value).get("begun").ok_or(First::NoHeader)?;
    let format = begun.get("format").and_then(serde_json::Value::as_u64).ok_or(First::NoHeader)?;
    if format > u64::from(FORMAT_WITH_WITNESS) {
        return Err(First::Newer(u32::try_from(format).unwrap_or(u32::MAX)));
    }
    let header: Header = serde_json::from_value(begun.clone()).map_err(|e| First::Flaw(e.into()))?;
    if numbered != (header.format >= 2) {
        return Err(First::Flaw(Flaw::Checksum));
    }
    let chain = Chain::begin(header.format, header.migration, header.role);
    match chain.read(line).map_err(First::Flaw)? {
        (Record::Begun(read), chain) if read == header => Ok((header, chain)),
        _ => Err(First::NoHeader),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::migrate::model::phase::Phase;

    fn header() -> Header {
        Header {
            format: super::super::FORMAT,
            migration: Uuid::from_u128(7),
            role: Role::Source,
            vm: "web1".into(),
            host: "alpha".into(),
            peer: "bravo".into(),
            began_at: 1_700_000_000,
            began_ns: None,
            running: true,
            keep_source: false,
            retry: None,
            accepted: Default::default(),
        }
    }

    #[test]
    fn what_began_in_one_second_has_an_order_where_it_is_told() {
        let at = |began_at, began_ns| Header { began_at, began_ns, ..header() };
        for (one, other, may_be_later) in [
            (at(5, Some(2)), at(5, Some(1)), true),
            (at(5, Some(1)), at(5, Some(2)), false),
            (at(6, Some(1)), at(5, Some(2)), true),
            (at(5, None), at(5, Some(2)), true),
            (at(5, Some(1)), at(5, None), true),
            (at(4, None), at(5, None), false),
        ] {
            assert_eq!(one.may_be_later_than(&other), may_be_later, "{one:?}, {other:?}");
        }
    }

    fn written(folder: &Path) -> PathBuf {
        let mut journal = Journal::create(folder, header()).unwrap();
        journal.will_make(Undo::Node("vmferry-disk0".into())).unwrap();
        journal.record(Record::Phase(Phase::Device)).unwrap();
        journal.record(Record::HandedOver).unwrap();
        journal.path
    }

    /// Also with one worker, as on a host with one processor.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_slow_disk_keeps_nobody_else_waiting() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let waits = tokio::spawn(async move {
            let others = tokio::spawn(async move { sender.send(()).unwrap() });
            // Only another task ends this wait.
            let told = blocking(|| receiver.recv_timeout(std::time::Duration::from_secs(60)));
            others.await.unwrap();
            told
        });
        waits.await.unwrap().unwrap();
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
    fn a_journal_has_one_writer_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = Journal::create(folder.path(), header()).unwrap();
        let path = first.path.clone();
        let second = Journal::open(&path, "alpha");
        first.record(Record::HandedOver).unwrap();
        if let Ok(mut second) = second {
            second.record(Record::Cleaned).unwrap();
            let past = Journal::peek(&path, "alpha").unwrap();
            panic!("a second writer; what the first had synced is there: {}", past.handed_over);
        }
        assert!(matches!(second, Err(JournalError::InUse { .. })), "{second:?}");
        assert!(Journal::peek(&path, "alpha").unwrap().handed_over, "looking is free");
        drop(first);
        let mut next = Journal::open(&path, "alpha").unwrap();
        next.record(Record::Runs).unwrap();
        let past = Journal::peek(&path, "alpha").unwrap();
        assert!(past.handed_over && past.runs);
    }

    #[test]
    fn a_record_that_was_written_in_part_does_not_damage_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(folder.path(), header()).unwrap();
        // What a full disk leaves of a record.
        journal.file.write_all(b"\"handed-").unwrap();
        journal.record(Record::NeverRan).unwrap();
        let past = Journal::peek(&journal.path, "alpha").unwrap();
        assert!(past.never_ran && !past.handed_over);
    }

    #[test]
    fn a_record_that_cannot_be_written_has_not_happened() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(folder.path(), header()).unwrap();
        journal.file = File::open(&journal.path).unwrap();
        assert_eq!(journal.mark(Record::HandedOver).0, Written::Failed, "nothing was added");
        assert!(!journal.past.handed_over, "what is not on the disk has not happened");
    }

    #[test]
    fn what_can_be_neither_written_nor_taken_away_is_in_doubt() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(folder.path(), header()).unwrap();
        let writable = journal.file.try_clone().unwrap();
        journal.file.write_all(b"\"handed-").unwrap();
        journal.file = File::open(&journal.path).unwrap();
        assert_eq!(journal.mark(Record::HandedOver).0, Written::InDoubt);
        assert!(!journal.past.handed_over);
        // The disk works again: the next record takes the doubt away.
        journal.file = writable;
        assert_eq!(journal.mark(Record::NeverRan).0, Written::Durable);
        let past = Journal::peek(&journal.path, "alpha").unwrap();
        assert!(past.never_ran && !past.handed_over);
    }
}
