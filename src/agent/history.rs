//! What is remembered of migrations that have ended, over restarts: a file in the state folder, bounded in
//! number and age. Journals say how one ended; this has what else an operator was shown. Nothing depends on it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::migrate::progress::{Outcome, Progress};

/// So many are remembered.
const ENDED_MAX: usize = 200;
/// For so long.
const SECONDS_MAX: i64 = 90 * 86_400;
/// What would take more is not.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// The file, and how many lines it has.
#[derive(Debug)]
pub(super) struct History {
    path: PathBuf,
    lines: Mutex<usize>,
}

impl History {
    pub(super) fn new(state: &Path) -> Self {
        Self { path: state.join("history.jsonl"), lines: Mutex::new(0) }
    }

    /// What `told`, by the journals, and the file together know, oldest first. The journals' word on an end
    /// counts. The file is made small again.
    pub(super) fn load(&self, told: Vec<Progress>) -> Vec<Progress> {
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let mut lines = self.locked();
        let remembered = self.read(now);
        if let Err(error) = self.write(&remembered) {
            tracing::warn!(%error, path = %self.path.display(), "the history of migrations is not made smaller");
        }
        *lines = remembered.len();
        together(told, remembered)
    }

    /// Remembers one that has ended; one that has not, or is undecided, is not remembered. Nor is a run that brought
    /// a replica into step: there are many, and `vmferry replicas` has the last one.
    pub(super) fn add(&self, ended: &Progress) {
        if !matches!(ended.outcome, Some(Outcome::Moved { .. } | Outcome::Failed { .. })) {
            return;
        }
        let mut lines = self.locked();
        if let Err(error) = self.append(ended, &mut lines) {
            tracing::warn!(%error, path = %self.path.display(), "what ended is not remembered");
        }
    }

    fn append(&self, ended: &Progress, lines: &mut usize) -> io::Result<()> {
        if *lines >= 2 * ENDED_MAX {
            let remembered = self.read(ended.began_at);
            self.write(&remembered)?;
            *lines = remembered.len();
        }
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
        file.write_all(&line(ended)?)?;
        *lines += 1;
        Ok(())
    }

    /// Those that are to be remembered, the last word on each. What cannot be read is left out.
    fn read(&self, now: i64) -> Vec<Progress> {
        let text = fs::read(&self.path).unwrap_or_default();
        let ended = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        let mut remembered = Vec::<Progress>::new();
        for one in ended.filter(|one: &Progress| now - one.began_at <= SECONDS_MAX) {
            remembered.retain(|other| (other.id, other.role) != (one.id, one.role));
            remembered.push(one);
        }
        remembered.split_off(remembered.len().saturating_sub(ENDED_MAX))
    }

    fn write(&self, remembered: &[Progress]) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file: File =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        for one in remembered {
            file.write_all(&line(one)?)?;
        }
        fs::rename(&new, &self.path)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, usize> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(ended: &Progress) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(ended)?;
    if line.len() > LINE_BYTES_MAX {
        // What it told beside its end.
        line = serde_json::to_vec(&Progress { notes: Vec::new(), disks: Vec::new(), ..ended.clone() })?;
    }
    if line.len() > LINE_BYTES_MAX {
        return Err(io::Error::other("it takes too much"));
    }
    line.push(b'\n');
    Ok(line)
}

fn together(told: Vec<Progress>, remembered: Vec<Progress>) -> Vec<Progress> {
    let mut all = remembered;
    for one in told {
        match all.iter_mut().find(|known| (known.id, known.role) == (one.id, one.role)) {
            Some(known) => (known.phase, known.outcome) = (one.phase, one.outcome),
            None => all.push(one),
        }
    }
    all.sort_by_key(|one| one.began_at);
    all
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::migrate::journal::Role;
    use crate::migrate::phase::Phase;

    fn ended(id: u128, began_at: i64) -> Progress {
        let mut progress = Progress::new(Uuid::from_u128(id), "web1", Role::Source, "bravo");
        (progress.began_at, progress.elapsed_ms) = (began_at, 2000);
        progress.outcome = Some(Outcome::Moved { leftovers: Vec::new() });
        progress
    }

    #[test]
    fn so_many_are_remembered_and_for_so_long() {
        let folder = tempfile::tempdir().unwrap();
        let (history, now) = (History::new(folder.path()), time::OffsetDateTime::now_utc().unix_timestamp());
        history.add(&ended(1, now - SECONDS_MAX - 60));
        history.add(&Progress { outcome: None, ..ended(2, now) });
        history.add(&Progress { outcome: Some(Outcome::Undecided { cause: "x".into() }), ..ended(3, now) });
        let many = 3 * ENDED_MAX as u128;
        (10..10 + many).for_each(|id| history.add(&ended(id, now - 10)));
        let lines = fs::read_to_string(folder.path().join("history.jsonl")).unwrap().lines().count();
        assert!(lines <= 2 * ENDED_MAX + 1, "{lines} lines");
        let again = History::new(folder.path()).load(Vec::new());
        assert_eq!(again.len(), ENDED_MAX);
        assert_eq!(again.last().unwrap().id, Uuid::from_u128(9 + many));
    }

    #[test]
    fn the_journals_say_how_it_ended_and_the_file_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let (history, now) = (History::new(folder.path()), time::OffsetDateTime::now_utc().unix_timestamp());
        history.add(&ended(1, now - 20));
        let path = folder.path().join("history.jsonl");
        let torn = [&fs::read(&path).unwrap()[..], b"{\"id\": torn\n\n"].concat();
        fs::write(&path, torn).unwrap();
        history.add(&ended(3, now));
        let failed = Outcome::Failed {
            phase: Phase::Device,
            cause: "forced".into(),
            problems: Vec::new(),
            cancelled: false,
            leftovers: Vec::new(),
        };
        let told = |id, began_at| Progress {
            elapsed_ms: 0,
            phase: Phase::Failed,
            outcome: Some(failed.clone()),
            ..ended(id, began_at)
        };
        let all = history.load(vec![told(1, now - 20), told(2, now - 10)]);
        let seen: Vec<_> =
            all.iter().map(|p| (p.id.as_u128(), p.elapsed_ms, p.phase == Phase::Failed)).collect();
        assert_eq!(seen, [(1, 2000, true), (2, 0, true), (3, 2000, false)]);
    }
}
