//! The record's files: lines are added at the end of the newest, a full one is followed by the next, and the
//! oldest go when there are too many. A file is named by the number of its first line.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::event::Event;
use super::line::{Head, Kept, hash, line};

/// The format that this version writes.
const FORMAT: u32 = 1;
const SUFFIX: &str = "jsonl";

/// How much of it is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Beyond this many bytes a file is full.
    pub file_bytes: u64,
    /// Files, the newest included.
    pub files: usize,
}

impl Default for Limits {
    /// About 1 GiB: two million requests.
    fn default() -> Self {
        Self { file_bytes: 16 * 1024 * 1024, files: 64 }
    }
}

/// Room that is left on the disk, which journals need more: so much, or a twentieth of a small one.
const RESERVE_BYTES: u64 = 16 * 1024 * 1024;
const RESERVE_PART: u64 = 20;

/// Whether there is room for a record beside what else is written there.
/// Errors: there is none, or nobody knows.
pub(super) fn has_room(folder: &Path) -> io::Result<()> {
    let disk = nix::sys::statvfs::statvfs(folder)?;
    let available = disk.blocks_available() * disk.fragment_size();
    let reserve = RESERVE_BYTES.min(disk.blocks() * disk.fragment_size() / RESERVE_PART);
    if available >= reserve {
        return Ok(());
    }
    let words = format!("of its disk {available} bytes are left, and {reserve} are not for it");
    Err(io::Error::new(io::ErrorKind::StorageFull, words))
}

/// The files of a record, oldest first.
/// Errors: the folder cannot be read.
pub fn paths(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    let is_ours = |path: &PathBuf| path.extension().is_some_and(|e| e == SUFFIX);
    let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).filter(is_ours).collect();
    // Names have the same length.
    paths.sort();
    Ok(paths)
}

/// The record's end, open for writing.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    host: String,
    limits: Limits,
    file: File,
    /// Bytes of whole lines in it.
    length: u64,
    head: Head,
    is_synced: bool,
    /// Bytes beyond `length` may be there, of a write that failed.
    is_torn: bool,
}

impl Files {
    /// Opens the record in `folder`, and takes away the part of a line at its end that a process before did not
    /// get to write.
    pub(super) fn open(folder: &Path, host: &str, limits: Limits) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let Some(newest) = paths(folder)?.pop() else {
            return Self::begin(folder, host, limits, Head::none());
        };
        let mut text = Vec::new();
        File::open(&newest)?.read_to_end(&mut text)?;
        let length = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let (whole, torn) = text.split_at(length);
        let Some(head) = head_of(whole, &newest) else {
            // Nothing but a part of its first line was written, which has the head of the file before.
            return Self::begin_again(folder, host, limits, &newest);
        };
        let file = OpenOptions::new().append(true).open(&newest)?;
        if !torn.is_empty() {
            file.set_len(length as u64)?;
        }
        let (folder, host, length) = (folder.into(), host.into(), length as u64);
        let mut files = Self { folder, host, limits, file, length, head, is_synced: false, is_torn: false };
        if !torn.is_empty() {
            let event = Event::TornLine { bytes: torn.len() as u64, hash: hash(torn) };
            files.append(OffsetDateTime::now_utc(), &event)?;
        }
        Ok(files)
    }

    fn begin_again(folder: &Path, host: &str, limits: Limits, empty: &Path) -> io::Result<Self> {
        std::fs::remove_file(empty)?;
        Self::open(folder, host, limits)
    }

    /// Begins the file after `head`.
    fn begin(folder: &Path, host: &str, limits: Limits, head: Head) -> io::Result<Self> {
        let path = folder.join(format!("{:020}.{SUFFIX}", head.number + 1));
        // A rotation that has failed half-way may have left it empty.
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        file.set_len(0)?;
        let (folder, host) = (folder.to_owned(), host.to_owned());
        let mut files =
            Self { folder, host, limits, file, length: 0, head, is_synced: false, is_torn: false };
        let event = Event::FileBegins { host: files.host.clone(), format: FORMAT };
        files.add(OffsetDateTime::now_utc(), &event)?;
        files.sync()?;
        File::open(&files.folder)?.sync_all()?;
        Ok(files)
    }

    /// Adds a line; true when a new file was begun for it.
    /// Errors: nothing was added, and the same may be tried again.
    pub(super) fn append(&mut self, at: OffsetDateTime, event: &Event) -> io::Result<bool> {
        let is_full = self.length >= self.limits.file_bytes;
        if is_full {
            self.sync()?;
            *self = Self::begin(&self.folder, &self.host, self.limits, self.head.clone())?;
            self.remove_old()?;
        }
        self.add(at, event)?;
        Ok(is_full)
    }

    fn add(&mut self, at: OffsetDateTime, event: &Event) -> io::Result<()> {
        if self.is_torn {
            self.file.set_len(self.length)?;
            self.is_torn = false;
        }
        let mut text = line(&self.head, at, event);
        let head = Head::of(self.head.number + 1, &text);
        text.push(b'\n');
        self.is_synced = false;
        if let Err(e) = self.file.write_all(&text) {
            self.is_torn = true;
            return Err(e);
        }
        self.length += text.len() as u64;
        self.head = head;
        Ok(())
    }

    /// Says in the newest file what is removed, then removes it.
    fn remove_old(&mut self) -> io::Result<()> {
        let all = paths(&self.folder)?;
        for old in all.iter().take(all.len().saturating_sub(self.limits.files)) {
            let text = std::fs::read(old)?;
            if let Some(last) = head_of(&text, old) {
                let event = Event::FileRemoved { last: last.number, hash: last.hash };
                self.add(OffsetDateTime::now_utc(), &event)?;
                self.sync()?;
            }
            std::fs::remove_file(old)?;
        }
        Ok(())
    }

    /// Has everything on the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if !self.is_synced {
            self.file.sync_data()?;
            self.is_synced = true;
        }
        Ok(())
    }

    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    pub(super) fn is_synced(&self) -> bool {
        self.is_synced
    }
}

/// The last line of a file, by its own number if it has one, else by counting from the last that has. `None` when
/// it has no whole line.
fn head_of(text: &[u8], path: &Path) -> Option<Head> {
    let end = text.iter().rposition(|b| *b == b'\n')?;
    let lines: Vec<_> = text[..end].split(|b| *b == b'\n').collect();
    let last = lines.last()?;
    let known = lines.iter().rev().enumerate().find_map(|(back, line)| Some((back, Kept::read(line)?.n)));
    let first = || path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok()).unwrap_or(1);
    let number = match known {
        Some((back, n)) => n.saturating_add(back as u64),
        None => first().saturating_add(lines.len() as u64 - 1),
    };
    Some(Head::of(number, last))
}
