//! Who writes which journal: at most one writer for each file in this process. Other processes are
//! kept away by the lock on the state folder.
//!
//! A writer knows how long its file is, and cuts off what a failed write has left behind that. A
//! second writer would cut off what the first has synced.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

static WRITTEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The right to write to a journal; dropped, another may have it.
#[derive(Debug)]
pub(crate) struct Writer(PathBuf);

impl Writer {
    /// `None` while another has it.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        written().insert(path.to_owned()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        written().remove(&self.0);
    }
}

/// Whether somebody writes to it at this moment.
pub(crate) fn is_written(path: &Path) -> bool {
    written().contains(path)
}

fn written() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    WRITTEN.lock().unwrap_or_else(PoisonError::into_inner)
}
