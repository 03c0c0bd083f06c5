//! The migrations of libvirt's that this host has, in memory and, while they are not over, as a file each: so
//! an agent that was restarted goes on with them, and one that crashed takes away what they left.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::error::LibvirtError;
use super::state::{Channel, Ended, Role, Stage, State};

/// Under way at once.
pub(super) const ACTIVE_MAX: usize = 64;
/// Of those, prepared by one peer.
pub(super) const ACTIVE_OF_PEER_MAX: usize = 32;
/// Ended ones that are still shown.
const ENDED_MAX: usize = 100;

/// One of them, as a file holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) state: State,
    /// The peer's name in the configuration; of a source.
    pub(super) to: String,
    /// Of a source.
    pub(super) forwardings: BTreeMap<Channel, Uuid>,
    /// Without a follower.
    pub(super) hold_s: Option<u64>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) record: Record,
    pub(super) shown: watch::Sender<State>,
    /// Who follows it: at the last one's end it has not long to live.
    pub(super) followers: usize,
    /// It is kept until then in any case.
    pub(super) kept_until: Instant,
    /// Somebody is about to end it.
    pub(super) is_ending: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    entries: Mutex<BTreeMap<Uuid, Entry>>,
    /// Ends that nobody has counted yet.
    ends: Mutex<BTreeMap<(Role, Ended), u64>>,
}

impl Store {
    /// `state_dir` is the agent's.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { folder: state_dir.join("libvirt"), entries: Mutex::default(), ends: Mutex::default() }
    }

    /// The records that an earlier process has left; one that cannot be read is said and left.
    pub(super) fn left(&self) -> Vec<Record> {
        let files = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let read = files.filter(|file| file.path().extension().is_some_and(|e| e == "json")).filter_map(|file| {
            let path = file.path();
            let record = std::fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?));
            record.inspect_err(|e| tracing::error!(file = %path.display(), error = %e, "what was left of a migration of libvirt's cannot be read")).ok()
        });
        read.collect()
    }

    /// Adds one.
    ///
    /// # Errors
    /// There are too many, or it cannot be written.
    pub(super) fn add(&self, record: Record, kept: Duration) -> Result<(), LibvirtError> {
        let mut entries = self.locked();
        let active = |entry: &&Entry| entry.record.state.stage != Stage::Ended;
        let of_peer = |entry: &&Entry| {
            let state = &entry.record.state;
            state.role == Role::Destination && state.peer == record.state.peer
        };
        if entries.values().filter(active).count() >= ACTIVE_MAX {
            return Err(LibvirtError::TooMany(ACTIVE_MAX));
        }
        let from_it = entries.values().filter(active).filter(of_peer).count();
        if record.state.role == Role::Destination && from_it >= ACTIVE_OF_PEER_MAX {
            return Err(LibvirtError::TooMany(ACTIVE_OF_PEER_MAX));
        }
        self.write(&record)?;
        forget_old(&mut entries);
        let (id, state) = (record.state.id, record.state.clone());
        let kept_until = Instant::now() + kept;
        let shown = watch::Sender::new(state);
        entries.insert(id, Entry { record, shown, followers: 0, kept_until, is_ending: false });
        Ok(())
    }

    /// Changes one and shows the change; none if it is not there.
    pub(super) fn change<T>(&self, id: Uuid, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut entries = self.locked();
        let entry = entries.get_mut(&id)?;
        let changed = change(entry);
        entry.shown.send_if_modified(|shown| {
            let differs = *shown != entry.record.state;
            if differs {
                shown.clone_from(&entry.record.state);
            }
            differs
        });
        Some(changed)
    }

    /// All of them, the oldest first.
    pub(super) fn all(&self) -> Vec<State> {
        let mut all: Vec<State> = self.locked().values().map(|entry| entry.record.state.clone()).collect();
        all.sort_by_key(|state| (state.began_at, state.id));
        all
    }

    /// One of them.
    pub(super) fn record(&self, id: Uuid) -> Option<Record> {
        self.locked().get(&id).map(|entry| entry.record.clone())
    }

    /// It is over: shown for a while, and no file any more.
    pub(super) fn ended(&self, id: Uuid, state: impl FnOnce(&mut State)) -> Option<State> {
        let ended = self.change(id, |entry| {
            state(&mut entry.record.state);
            entry.record.state.stage = Stage::Ended;
            entry.record.state.clone()
        });
        self.forget_file(id);
        if let Some(State { role, ended: Some(how), .. }) = &ended {
            *self.ends.lock().unwrap_or_else(PoisonError::into_inner).entry((*role, *how)).or_default() += 1;
        }
        ended
    }

    /// How many have ended in which way since the last call.
    pub(super) fn take_ends(&self) -> BTreeMap<(Role, Ended), u64> {
        std::mem::take(&mut *self.ends.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was left of one is gone.
    pub(super) fn forget_file(&self, id: Uuid) {
        match std::fs::remove_file(self.file(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %self.file(id).display(), error = %e, "a record cannot be removed");
            }
            _ => {}
        }
    }

    /// Writes one anew, as it is now.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn rewrite(&self, id: Uuid) -> Result<(), LibvirtError> {
        self.record(id).map_or(Ok(()), |record| self.write(&record))
    }

    fn write(&self, record: &Record) -> Result<(), LibvirtError> {
        let written = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            let text = serde_json::to_vec(record)?;
            let path = self.file(record.state.id);
            let new = path.with_extension("new");
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            std::fs::rename(&new, &path)
        };
        written().map_err(|source| LibvirtError::Here {
            what: format!("cannot write into {}", self.folder.display()),
            remedy: "make room there, and let the agent's user write".into(),
            source,
        })
    }

    fn file(&self, id: Uuid) -> PathBuf {
        self.folder.join(format!("{}.json", id.simple()))
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<Uuid, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes room for one more.
fn forget_old(entries: &mut BTreeMap<Uuid, Entry>) {
    let ended = entries.values().map(|entry| &entry.record.state).filter(|state| state.stage == Stage::Ended);
    let mut ended: Vec<_> = ended.map(|state| (state.began_at, state.id)).collect();
    ended.sort_unstable();
    let too_many = ended.len().saturating_sub(ENDED_MAX);
    for (_, id) in ended.into_iter().take(too_many) {
        entries.remove(&id);
    }
}
