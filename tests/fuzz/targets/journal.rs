//! Journals: after a crash anything may be in them.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmferry::migrate::journal::{Journal, JournalError, Record, Role, vm_of};

const MIGRATION: Uuid = Uuid::from_u128(1);

thread_local! {
    /// In memory: every run of a target syncs its file.
    static FOLDER: tempfile::TempDir = {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        folder.expect("a folder")
    };
}

fn path() -> PathBuf {
    FOLDER.with(|folder| Journal::path(folder.path(), MIGRATION, Role::Source))
}

/// A file of any bytes.
pub(crate) fn file(data: &[u8]) {
    believed(data);
}

/// Lines that are records or nearly, each with its number and its checksum.
pub(crate) fn lines(data: &[u8]) {
    let mut sum = crc(0, format!("{MIGRATION}.{}", Role::Source.name()).as_bytes());
    let mut text = Vec::new();
    for (n, record) in data.split(|byte| *byte == b'\n').enumerate() {
        let line = [format!("{{\"n\":{n},\"record\":").as_bytes(), record].concat();
        sum = crc(sum, &line);
        text.extend_from_slice(&line);
        text.extend_from_slice(format!(",\"sum\":\"{sum:08x}\"}}\n").as_bytes());
    }
    believed(&text);
    // Its last line is torn.
    text.truncate(text.len() - usize::from(*data.last().unwrap_or(&0)).min(text.len()));
    believed(&text);
}

/// A crash-proof reader: what is refused stays as it is, and what is believed is believed again, whatever is
/// added to it.
fn believed(text: &[u8]) {
    let path = path();
    std::fs::write(&path, text).expect("a file");
    let _ = vm_of(&path);
    let seen = Journal::peek(&path, "alpha");
    assert_eq!(std::fs::read(&path).expect("the file"), text, "looking changes nothing");
    let opened = Journal::open(&path, "alpha");
    let mut journal = match (seen, opened) {
        (Ok(seen), Ok(journal)) => {
            assert_eq!(format!("{seen:?}"), format!("{:?}", journal.past()));
            journal
        }
        (Err(seen), Err(refused)) => {
            assert_eq!(seen.to_string(), refused.to_string());
            assert_eq!(std::fs::read(&path).expect("the file"), text, "what is refused is left as it is");
            assert!(!matches!(refused, JournalError::Io { .. } | JournalError::InUse { .. }), "{refused}");
            return;
        }
        (seen, opened) => panic!("seen: {seen:?}, opened: {opened:?}"),
    };
    let kept = std::fs::read(&path).expect("the file");
    assert!(kept.starts_with(&text[..text.len().min(kept.len())]), "only its end is mended");
    journal.record(Record::ToRun { running: true }).expect("a record");
    let past = format!("{:?}", journal.past());
    drop(journal);
    let again = Journal::peek(&path, "alpha").expect("what was mended is believed");
    assert_eq!(format!("{again:?}"), past);
}

fn crc(before: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(bytes);
    hasher.finalize()
}
