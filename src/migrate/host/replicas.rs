//! What this host remembers of replicas: those of its own VMs at peers, and those that it keeps for peers. A file
//! each, replaced as a whole and synced. A record that cannot be read counts as none: then a whole copy is made.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::migrate::journal::{Past, Undo};
use crate::migrate::model::replica::{LeftAs, SourceReplica};

/// The format that this version writes and reads.
const FORMAT: u32 = 1;
/// Larger than any record.
const BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Kept for one peer.
const KEPT_MAX: usize = 1_000;
/// Longest name of a file.
const NAME_BYTES_MAX: usize = 240;

/// All replicas that this host knows of.
#[derive(Debug)]
pub(crate) struct Replicas {
    folder: PathBuf,
    /// Who reads one to replace it is alone.
    turn: Mutex<()>,
}

/// What this host remembers of a replica that it keeps for a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct KeptReplica {
    pub(crate) vm: String,
    /// The source, as its certificate names it.
    pub(crate) peer: String,
    /// How its images were left; none while something may be writing to them, and after an end that nobody saw.
    #[serde(default)]
    pub(crate) left: Option<LeftAs>,
    /// The images that this agent has made for it.
    #[serde(default)]
    pub(crate) made: Vec<Undo>,
}

/// Why a record is not on the disk.
#[derive(Debug, thiserror::Error)]
#[error("the record of the replica of VM {vm} {} cannot be written", path.display())]
pub struct ReplicaError {
    vm: String,
    path: PathBuf,
    source: io::Error,
}

#[derive(Debug, Serialize, Deserialize)]
struct Written<R> {
    format: u32,
    replica: R,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Source,
    Kept,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Kept => "kept",
        }
    }
}

impl Replicas {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { folder: state_dir.join("replicas"), turn: Mutex::default() }
    }

    /// What is remembered of this host's replica of a VM at a peer.
    pub(crate) fn source(&self, vm: &str, peer: &str) -> Option<SourceReplica> {
        self.read::<SourceReplica>(Side::Source, vm, peer).filter(|r| (&*r.vm, &*r.peer) == (vm, peer))
    }

    /// What is remembered of a replica that is kept here for a peer.
    pub(crate) fn kept(&self, vm: &str, peer: &str) -> Option<KeptReplica> {
        self.read::<KeptReplica>(Side::Kept, vm, peer).filter(|r| (&*r.vm, &*r.peer) == (vm, peer))
    }

    /// Writes it, durably.
    pub(crate) fn remember(&self, replica: &SourceReplica) -> Result<(), ReplicaError> {
        let _turn = self.locked();
        self.write(Side::Source, &replica.vm, &replica.peer, replica)
    }

    /// A run for a replica begins: nobody knows how its images will be left, and those that it has made stay.
    pub(crate) fn begin(&self, past: &Past) -> Result<(), ReplicaError> {
        let _turn = self.locked();
        let (vm, peer) = (&past.header.vm, &past.header.peer);
        let before = self.kept(vm, peer);
        let is_new = before.is_none();
        let mut made: Vec<Undo> = before.map(|before| before.made).unwrap_or_default();
        let is_there = |undo: &&Undo| {
            matches!(undo, Undo::Image { made: Some(_), .. })
                || matches!(undo, Undo::Volume(volume) if volume.made.is_some())
        };
        if is_new
            && self.every::<KeptReplica>(Side::Kept).iter().filter(|kept| kept.peer == *peer).count()
                >= KEPT_MAX
        {
            let source = io::Error::other(format!("{KEPT_MAX} replicas are kept for {peer} already"));
            return Err(ReplicaError { vm: vm.clone(), path: self.path(Side::Kept, vm, peer), source });
        }
        let new: Vec<Undo> = past.undo.iter().filter(is_there).cloned().collect();
        made.retain(|undo| !new.iter().any(|new| place(new) == place(undo)));
        made.extend(new);
        let kept = KeptReplica { vm: vm.clone(), peer: peer.clone(), left: None, made };
        self.write(Side::Kept, vm, peer, &kept)
    }

    /// Something has left the images of a replica so, if there is one.
    pub(crate) fn left(&self, past: &Past, left: LeftAs) -> Result<(), ReplicaError> {
        let _turn = self.locked();
        let (vm, peer) = (&past.header.vm, &past.header.peer);
        let Some(kept) = self.kept(vm, peer) else { return Ok(()) };
        self.write(Side::Kept, vm, peer, &KeptReplica { left: Some(left), ..kept })
    }

    /// Whether what a migration has made belongs to a replica by now, and is that one's to remove.
    pub(crate) fn has(&self, past: &Past) -> bool {
        let kept = self.kept(&past.header.vm, &past.header.peer);
        kept.is_some_and(|kept| kept.made.iter().any(|made| past.undo.contains(made)))
    }

    /// All of this host's VMs at peers, and all that are kept here.
    pub(crate) fn all(&self) -> (Vec<SourceReplica>, Vec<KeptReplica>) {
        (self.every(Side::Source), self.every(Side::Kept))
    }

    pub(crate) fn forget_source(&self, vm: &str, peer: &str) -> Result<(), ReplicaError> {
        self.remove(Side::Source, vm, peer)
    }

    pub(crate) fn forget_kept(&self, vm: &str, peer: &str) -> Result<(), ReplicaError> {
        self.remove(Side::Kept, vm, peer)
    }

    /// The guest of the VM is here: its images are no replica's any more, whoever it was kept for.
    pub(crate) fn guest_is_here(&self, vm: &str) {
        for kept in self.every::<KeptReplica>(Side::Kept).into_iter().filter(|kept| kept.vm == vm) {
            if let Err(e) = self.forget_kept(vm, &kept.peer) {
                // Whoever looks at it finds the images changed, and the guest in the journals.
                tracing::warn!(
                    vm,
                    error = crate::error_chain::chain(&e),
                    "a replica that has become the guest's is still listed"
                );
            }
        }
    }

    fn path(&self, side: Side, vm: &str, peer: &str) -> PathBuf {
        self.folder.join(format!("{}.{}@{}.json", side.name(), encoded(vm), encoded(peer)))
    }

    fn read<R: DeserializeOwned>(&self, side: Side, vm: &str, peer: &str) -> Option<R> {
        read(&self.path(side, vm, peer))
    }

    fn every<R: DeserializeOwned>(&self, side: Side) -> Vec<R> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let begins = format!("{}.", side.name());
        let mut paths: Vec<PathBuf> = files
            .filter(|file| file.file_name().to_string_lossy().starts_with(&begins))
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .collect();
        paths.sort();
        paths.iter().filter_map(|path| read(path)).collect()
    }

    fn write<R: Serialize>(&self, side: Side, vm: &str, peer: &str, replica: &R) -> Result<(), ReplicaError> {
        let path = self.path(side, vm, peer);
        let written = || -> io::Result<()> {
            let too_long = path.file_name().is_none_or(|name| name.len() > NAME_BYTES_MAX);
            if too_long {
                return Err(io::Error::other("the names of VM and peer are too long for a file's"));
            }
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            let text = serde_json::to_vec(&Written { format: FORMAT, replica })?;
            let new = path.with_extension("new");
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        written().map_err(|source| ReplicaError { vm: vm.to_owned(), path: path.clone(), source })
    }

    fn remove(&self, side: Side, vm: &str, peer: &str) -> Result<(), ReplicaError> {
        let _turn = self.locked();
        let path = self.path(side, vm, peer);
        let removed = match fs::remove_file(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| File::open(&self.folder)?.sync_all()),
        };
        removed.map_err(|source| ReplicaError { vm: vm.to_owned(), path, source })
    }

    fn locked(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where something that was made is.
fn place(undo: &Undo) -> Option<&Path> {
    match undo {
        Undo::Image { path, .. } => Some(path),
        Undo::Volume(volume) => Some(&volume.path),
        _ => None,
    }
}

fn read<R: DeserializeOwned>(path: &Path) -> Option<R> {
    let text = || -> io::Result<Written<R>> {
        if fs::metadata(path)?.len() > BYTES_MAX {
            return Err(io::Error::other("it is too large"));
        }
        let written: Written<R> = serde_json::from_slice(&fs::read(path)?)?;
        match written.format {
            FORMAT => Ok(written),
            other => Err(io::Error::other(format!("it has format {other}, this version knows {FORMAT}"))),
        }
    };
    match text() {
        Ok(written) => Some(written.replica),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the record of a replica cannot be read: it counts as none");
            None
        }
    }
}

/// As a part of a file's name.
fn encoded(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => text.push(byte.into()),
            other => text.push_str(&format!("%{other:02x}")),
        }
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use uuid::Uuid;

    use super::*;
    use crate::migrate::journal::{Header, Journal, MadeFile, Role};
    use crate::migrate::model::image::ImageStamp;

    fn journal(folder: &Path, vm: &str, peer: &str) -> Journal {
        let header = Header {
            format: 2,
            migration: Uuid::new_v4(),
            role: Role::Destination,
            vm: vm.into(),
            host: "bravo".into(),
            peer: peer.into(),
            began_at: 7,
            began_ns: None,
            running: true,
            keep_source: false,
            retry: None,
            accepted: BTreeSet::new(),
        };
        Journal::create(folder, header).unwrap()
    }

    fn image(path: &str, inode: u64) -> Undo {
        let made = Some(MadeFile { device: 1, inode, born_ns: None });
        Undo::Image { path: PathBuf::from(path), made }
    }

    fn left(after: Uuid) -> LeftAs {
        LeftAs { after, began_at: 7, stamp: ImageStamp { boot_id: "b".into(), files: Vec::new() } }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_run_has_made_stays_and_a_run_under_way_leaves_nothing_to_rely_on() {
        let (state, journals) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let replicas = Replicas::new(state.path());
        let mut first = journal(journals.path(), "web1", "alpha");
        first.will_make(Undo::Image { path: "/srv/.unfinished".into(), made: None }).unwrap();
        first.will_make(image("/srv/a", 1)).unwrap();
        assert!(!replicas.has(first.past()));
        replicas.left(first.past(), left(Uuid::new_v4())).unwrap();
        assert_eq!(replicas.kept("web1", "alpha"), None, "no run has begun");
        replicas.begin(first.past()).unwrap();
        assert!(replicas.has(first.past()));
        let run = first.past().header.migration;
        replicas.left(first.past(), left(run)).unwrap();
        assert_eq!(replicas.kept("web1", "alpha").unwrap().left.unwrap().after, run);

        // The next one makes one image anew and one more; meanwhile nothing is known of any.
        let mut second = journal(journals.path(), "web1", "alpha");
        second.will_make(image("/srv/a", 2)).unwrap();
        second.will_make(image("/srv/b", 3)).unwrap();
        replicas.begin(second.past()).unwrap();
        let kept = replicas.kept("web1", "alpha").unwrap();
        assert_eq!((kept.left, kept.made), (None, vec![image("/srv/a", 2), image("/srv/b", 3)]));
        assert!(!replicas.has(first.past()) && replicas.has(second.past()));
        assert_eq!(replicas.kept("web1", "charlie"), None);

        replicas.begin(journal(journals.path(), "web1", "charlie").past()).unwrap();
        replicas.begin(journal(journals.path(), "web2", "alpha").past()).unwrap();
        replicas.guest_is_here("web1");
        let vms: Vec<String> = replicas.all().1.into_iter().map(|kept| kept.vm).collect();
        assert_eq!(vms, ["web2"], "whoever it was kept for");
    }

    #[test]
    fn a_record_that_cannot_be_believed_is_none() {
        let state = tempfile::tempdir().unwrap();
        let replicas = Replicas::new(state.path());
        let replica = SourceReplica::new("../web 1", "bravo@example", 7);
        replicas.remember(&replica).unwrap();
        let path = state.path().join("replicas/source...%2fweb%201@bravo%40example.json");
        assert_eq!(replicas.source("../web 1", "bravo@example"), Some(replica.clone()));
        let text = fs::read_to_string(&path).unwrap();
        // Of another VM under this one's name, of a later version, torn.
        for other in [
            text.replace("web 1", "web 2"),
            text.replace("\"format\":1", "\"format\":2"),
            text[..text.len() / 2].into(),
        ] {
            fs::write(&path, other).unwrap();
            assert_eq!(replicas.source("../web 1", "bravo@example"), None);
        }
        replicas.remember(&replica).unwrap();
        assert_eq!(replicas.source("../web 1", "bravo@example"), Some(replica));
        replicas.forget_source("../web 1", "bravo@example").unwrap();
        replicas.forget_source("../web 1", "bravo@example").unwrap();
        let long = SourceReplica::new(&"v".repeat(300), "bravo", 7);
        assert!(replicas.remember(&long).is_err() && replicas.all().0.is_empty());
    }
}
