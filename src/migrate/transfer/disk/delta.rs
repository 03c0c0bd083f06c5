//! What a further try copies: of a disk whose copy was whole, only what changed since.
//!
//! # Why it is safe
//!
//! A dirty bitmap B is added to the disk's node *before* its mirror starts. QEMU sets a bit when a
//! write or discard is over, whether it succeeded or not, in B and in the mirror's own bitmap at
//! once. The mirror becomes READY only when its bitmap is empty, nothing of it is in flight and a
//! flush of the target has succeeded (`mirror_run`). So then every part that is not in B is at the
//! destination, flushed, as the guest has it: it was copied after B began and not written since.
//!
//! After that the mirror writes only parts that became dirty again, in chunks of 64 KiB at most,
//! and B has chunks of 64 KiB: whatever a failed, half done or late write can leave undefined at
//! the destination is in B, also where `detect-zeroes` makes zeroes of it. A write that is in
//! flight while something fails gets its bit when it ends; none is when the guest is paused. And
//! no request of an earlier try comes late: the destination lets its exports go, and with them
//! all their requests, or its QEMU has ended, before it says that the earlier try is undone, and
//! it prepares no further one before.
//!
//! That it is still so is checked before each further try (`source/changes.rs`): B is there, so it
//! is the same node in the same QEMU; it records, is not busy, and the disk has the same size and
//! image; and the destination finds its image as that try left it (`image_stamp.rs`). What is not so
//! makes a whole copy, and is said. What is not seen: a disk that somebody shrinks and grows again
//! to its former size between two tries, and a `blockdev-reopen` that puts another image below the
//! same node.
//!
//! # How it is copied
//!
//! In passes: a second bitmap is added, then the first is disabled (in between both record, so
//! nothing is missed); what the first holds is read from an export of the disk, written to the
//! destination and flushed; only then the first is removed. A pass that fails leaves both, and the
//! next one merges them. A part that the guest writes to while it is read is in the second bitmap
//! by the end of that write, so the next pass brings it again. The last pass begins after the
//! guest has been paused, and makes both sides equal.
//!
//! `blockdev-backup` with `sync=bitmap` would do the same, but makes each write of the guest wait
//! for the old data to reach the destination, and *fails the guest's write* when that does not
//! succeed (`on-cbw-error` cannot be chosen for it in QEMU 7.2 to 10.0): a destination that dies
//! would break the guest. `blockdev-mirror` takes no bitmap there. So the agent copies, and the
//! guest never waits for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::journal::Undo;
use crate::migrate::model::plan::CopiedDisk;
use crate::migrate::model::replica::SourceReplica;
use crate::migrate::protocol::message::DiskState;
use crate::qemu::{
    BlockDeviceInfo, BlockDirtyBitmapAdd, BlockDirtyBitmapDisable, BlockDirtyBitmapMerge, BlockDirtyInfo,
    BlockExportAdd, NbdError, NbdReader, NbdWriter, Qmp, QmpError, QueryNamedBlockNodes, REQUEST_BYTES_MAX,
    delete_bitmap, delete_export, names,
};

/// Of our bitmaps: not less than a mirror's, see above.
const GRANULARITY_BYTES: u32 = 64 * 1024;
/// Between two passes when little is left.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// When this little was left by a pass, the next one waits.
const LITTLE_BYTES: u64 = 4 * 1024 * 1024;

/// Why what changed could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("the source's NBD server cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the dirty bitmap that recorded its changes is gone")]
    NotRecorded,
    #[error("it has {source_bytes} bytes and {destination_bytes} at the destination")]
    Size { source_bytes: u64, destination_bytes: u64 },
    /// The task was lost: a defect of our own.
    #[error("copying it was broken off")]
    Broken,
}

/// The bitmaps of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bitmaps {
    pub(crate) node: String,
    names: [String; 2],
}

impl Bitmaps {
    pub(crate) fn new(node: &str, migration: Uuid) -> Self {
        let id = migration.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::bitmap(&id, which)) }
    }

    /// Others on the same node, which tell what was written since it was compared.
    pub(crate) fn compared(node: &str, migration: Uuid) -> Self {
        let id = migration.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::compared(&id, which)) }
    }

    /// Those of a replica: they outlive each run of it, and its record tells of them, not a journal.
    pub(crate) fn replica(node: &str, replica: Uuid) -> Self {
        let id = replica.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::replica(&id, which)) }
    }

    pub(crate) fn is_replicas(&self) -> bool {
        self.names.iter().all(|name| names::is_replica(name))
    }

    /// Takes both away.
    pub(crate) async fn end(&self, qmp: &Qmp) -> Result<(), QmpError> {
        for name in &self.names {
            delete_bitmap(qmp, &self.node, name).await?;
        }
        Ok(())
    }

    pub(crate) fn undo(&self) -> [Undo; 2] {
        self.names.clone().map(|name| Undo::Bitmap { node: self.node.clone(), name })
    }

    /// Begins to record afresh.
    pub(crate) async fn begin(&self, qmp: &Qmp) -> Result<(), QmpError> {
        self.end(qmp).await?;
        self.add(qmp, &self.names[0]).await
    }

    /// Whether what is recorded can be relied on; if not, why.
    pub(crate) async fn doubt(&self, qmp: &Qmp) -> Result<Option<&'static str>, QmpError> {
        let ours = self.ours(qmp).await?;
        Ok(if !ours.iter().any(|b| b.recording) {
            Some("no bitmap records its changes any more")
        } else if ours.iter().any(|b| b.inconsistent) {
            Some("the bitmap of its changes is inconsistent")
        } else if ours.iter().any(|b| b.busy) {
            Some("something uses the bitmap of its changes")
        } else if ours.iter().any(|b| b.granularity < u64::from(GRANULARITY_BYTES)) {
            Some("the bitmap of its changes is not ours")
        } else {
            None
        })
    }

    async fn ours(&self, qmp: &Qmp) -> Result<Vec<BlockDirtyInfo>, QmpError> {
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        let bitmaps = nodes.into_iter().filter(|n| n.node_name == self.node).flat_map(|n| n.dirty_bitmaps);
        Ok(bitmaps.filter(|b| self.names.contains(&b.name)).collect())
    }

    async fn add(&self, qmp: &Qmp, name: &str) -> Result<(), QmpError> {
        let (node, name) = (self.node.clone(), name.to_owned());
        qmp.execute(BlockDirtyBitmapAdd { node, name, granularity: GRANULARITY_BYTES }).await?;
        Ok(())
    }

    /// Has the other bitmap record from now on; what was recorded until now, and how much it is.
    pub(crate) async fn freeze(&self, qmp: &Qmp) -> Result<(String, u64), DeltaError> {
        let ours = self.ours(qmp).await?;
        let now = ours.iter().find(|b| b.recording).ok_or(DeltaError::NotRecorded)?.name.clone();
        // What a pass that failed has left.
        for left in ours.iter().filter(|b| b.name != now) {
            let merge = BlockDirtyBitmapMerge {
                node: self.node.clone(),
                target: now.clone(),
                bitmaps: vec![left.name.clone()],
            };
            qmp.execute(merge).await?;
            delete_bitmap(qmp, &self.node, &left.name).await?;
        }
        let next = if now == self.names[0] { &self.names[1] } else { &self.names[0] };
        self.add(qmp, next).await?;
        qmp.execute(BlockDirtyBitmapDisable { node: self.node.clone(), name: now.clone() }).await?;
        let frozen = self.ours(qmp).await?.into_iter().find(|b| b.name == now);
        Ok((now, frozen.ok_or(DeltaError::NotRecorded)?.count))
    }
}

/// A disk that is followed from try to try.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Followed {
    /// As it was when that began.
    pub(crate) disk: CopiedDisk,
    pub(crate) bitmaps: Bitmaps,
    /// Everything at the destination equals the source's but for what the bitmaps hold.
    pub(crate) in_step: bool,
    /// Why it is not, where the destination said so. What a try has doubted stays in doubt for the next, which the
    /// destination compares with that try alone.
    #[serde(default)]
    pub(crate) doubt: Option<String>,
}

impl Followed {
    pub(crate) fn new(disk: &CopiedDisk, bitmaps: Bitmaps, in_step: bool) -> Self {
        Self { disk: disk.clone(), bitmaps, in_step, doubt: None }
    }

    /// What changed since, at least; none where the whole disk would have to be copied.
    pub(crate) async fn changed_bytes(&self, disk: &CopiedDisk, qmp: &Qmp) -> Result<Option<u64>, QmpError> {
        let is_known = self.in_step && self.doubt.is_none() && self.disk.is_same_image(disk);
        if !is_known || self.bitmaps.doubt(qmp).await?.is_some() {
            return Ok(None);
        }
        Ok(self.bitmaps.ours(qmp).await?.iter().map(|bitmap| bitmap.count).max())
    }

    /// It has to be copied as a whole.
    pub(crate) fn is_doubted(&mut self, doubt: &str) {
        self.in_step = false;
        self.doubt.get_or_insert_with(|| doubt.to_owned());
    }
}

/// What one try knows for the next.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tracking {
    pub(crate) disks: BTreeMap<String, Followed>,
    /// The last try that the destination had prepared.
    pub(crate) after: Option<Uuid>,
    /// The replica that these disks have at the destination, or are to have.
    #[serde(default)]
    pub(crate) replica: Option<SourceReplica>,
    /// Why nothing of it can be relied on.
    #[serde(default)]
    pub(crate) stale: Option<String>,
}

impl Tracking {
    /// Whether less than all has to be copied.
    pub(crate) fn has_whole(&self) -> bool {
        self.disks.values().any(|f| f.in_step)
    }

    /// Whether a further try could copy less, by what would go otherwise. A replica's bitmaps stay anyway.
    pub(crate) fn is_worth_keeping(&self) -> bool {
        self.disks.values().any(|f| f.in_step && !f.bitmaps.is_replicas())
    }

    /// What the destination says of the images since the try before.
    pub(crate) fn learn(&mut self, states: &[DiskState]) {
        for followed in self.disks.values_mut().filter(|followed| followed.in_step) {
            match states.iter().find(|state| state.disk == followed.disk.name) {
                None => {
                    followed.is_doubted("the destination does not say whether its image is as it was left")
                }
                Some(DiskState { doubt: Some(doubt), .. }) => followed.is_doubted(doubt),
                Some(_) => {}
            }
        }
    }

    /// A mirror has become ready: what is at the destination is worth keeping from now on.
    pub(crate) fn in_step(&mut self, job: &str) {
        let of_job = |(name, _): &(&String, &mut Followed)| names::job_id(name) == job;
        if let Some((_, followed)) = self.disks.iter_mut().find(of_job) {
            followed.in_step = true;
        }
    }

    /// What a journal must undo.
    pub(crate) fn undo(&self) -> Vec<Undo> {
        let followed = self.disks.values().filter(|f| !f.bitmaps.is_replicas());
        followed.flat_map(|f| f.bitmaps.undo()).collect()
    }
}

/// How far one disk is, for whoever looks.
#[derive(Debug)]
pub(crate) struct Copied {
    bitmaps: Bitmaps,
    /// Bytes written to the destination.
    pub(crate) bytes: AtomicU64,
    /// Of them, those of the pass under way.
    passed: AtomicU64,
    /// What that pass has to copy in all.
    frozen: AtomicU64,
    /// What was recorded for the next one when QEMU was asked last.
    recorded: AtomicU64,
    /// The first pass is over.
    pub(crate) once: AtomicBool,
    /// Passes that are over.
    pub(crate) passes: AtomicU64,
    /// Little is left, so it waits.
    idle: AtomicBool,
}

impl Copied {
    fn new(bitmaps: Bitmaps) -> Self {
        let none = || AtomicU64::new(0);
        let [bytes, passed, frozen, recorded, passes] = [none(), none(), none(), none(), none()];
        let (once, idle) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { bitmaps, bytes, passed, frozen, recorded, once, passes, idle }
    }

    /// Bytes that are still to be copied: of the pass under way, and what the guest has written since it began.
    /// Which may be the same, so it is no less than there is.
    pub(crate) fn left(&self) -> u64 {
        let of_pass = self.frozen.load(Relaxed).saturating_sub(self.passed.load(Relaxed));
        of_pass.saturating_add(self.recorded.load(Relaxed))
    }

    fn begin_pass(&self, bytes: u64) {
        self.passed.store(0, Relaxed);
        self.frozen.store(bytes, Relaxed);
        self.recorded.store(0, Relaxed);
    }

    fn end_pass(&self) {
        self.frozen.store(0, Relaxed);
        self.once.store(true, Relaxed);
        self.passes.fetch_add(1, Relaxed);
    }

    fn wrote(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        self.passed.fetch_add(bytes, Relaxed);
    }

    /// What QEMU says of its bitmaps.
    fn learn(&self, nodes: &[BlockDeviceInfo]) {
        let ours = nodes.iter().filter(|n| n.node_name == self.bitmaps.node).flat_map(|n| &n.dirty_bitmaps);
        let ours = ours.filter(|b| self.bitmaps.names.contains(&b.name));
        let (recording, frozen): (Vec<_>, Vec<_>) = ours.partition(|b| b.recording);
        let bytes = |bitmaps: &[&BlockDirtyInfo]| bitmaps.iter().map(|b| b.count).sum::<u64>();
        self.frozen.store(bytes(&frozen), Relaxed);
        self.recorded.store(bytes(&recording), Relaxed);
    }
}

/// The disks of which only changes are copied.
#[derive(Debug)]
pub(crate) struct Delta {
    tasks: JoinSet<(String, Result<NbdWriter, DeltaError>)>,
    at_rest: watch::Sender<bool>,
    pub(crate) disks: BTreeMap<String, Arc<Copied>>,
    /// The source's server, once there is one.
    server: Option<Arc<NbdServer>>,
    /// The connections of disks that are equal: ended, they would look like a failure.
    equal: Vec<NbdWriter>,
}

impl Delta {
    pub(crate) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            at_rest: watch::Sender::new(false),
            disks: BTreeMap::new(),
            server: None,
            equal: Vec::new(),
        }
    }

    pub(crate) fn serve(&mut self, server: NbdServer) {
        self.server = Some(Arc::new(server));
    }

    /// The source's server, once there is one.
    pub(crate) fn server(&self) -> Option<Arc<NbdServer>> {
        self.server.clone()
    }

    /// Begins to copy what changed of a disk, pass after pass, to an NBD server at the other end of
    /// `socket`. The journal knows already how to undo it.
    pub(crate) fn start(&mut self, qmp: &Qmp, disk: &str, bitmaps: Bitmaps, export: &str, socket: OwnedFd) {
        let Some(server) = self.server.clone() else { return };
        let copied = Arc::new(Copied::new(bitmaps.clone()));
        self.disks.insert(disk.to_owned(), Arc::clone(&copied));
        let at_rest = self.at_rest.subscribe();
        let copier = Copier { qmp: qmp.clone(), disk: disk.to_owned(), bitmaps, server, copied, at_rest };
        let (name, export) = (disk.to_owned(), export.to_owned());
        self.tasks.spawn(async move { (name, copier.run(socket, &export).await) });
    }

    /// The next disk that is equal on both sides, or the failure of one. Cancelling loses nothing.
    pub(crate) async fn next(&mut self) -> (String, Result<(), DeltaError>) {
        match self.tasks.join_next().await {
            Some(Ok((disk, Ok(writer)))) => {
                self.equal.push(writer);
                (disk, Ok(()))
            }
            Some(Ok((disk, Err(e)))) => (disk, Err(e)),
            Some(Err(_)) => (String::new(), Err(DeltaError::Broken)),
            None => std::future::pending().await,
        }
    }

    /// The guest is paused, or what it has written until now is enough: each disk gets its last pass.
    pub(crate) fn finish(&self) {
        self.at_rest.send_replace(true);
    }

    /// Whether no disk is under way.
    pub(crate) fn is_over(&self) -> bool {
        self.tasks.is_empty()
    }

    /// What QEMU says of all nodes.
    pub(crate) fn learn(&self, nodes: &[BlockDeviceInfo]) {
        self.disks.values().for_each(|copied| copied.learn(nodes));
    }

    /// Whether every disk has had a pass.
    pub(crate) fn copied_once(&self) -> bool {
        self.disks.values().all(|c| c.once.load(Relaxed))
    }

    /// Whether nothing need move at this moment.
    pub(crate) fn is_idle(&self) -> bool {
        self.disks.values().all(|c| c.idle.load(Relaxed))
    }

    /// Ends all copying; what is under way is dropped.
    pub(crate) async fn abort(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// Copies one disk's changes.
struct Copier {
    qmp: Qmp,
    disk: String,
    bitmaps: Bitmaps,
    server: Arc<NbdServer>,
    copied: Arc<Copied>,
    at_rest: watch::Receiver<bool>,
}

impl Copier {
    /// Until a pass is over that began with the guest at rest, or after all was asked for that a replica is to
    /// have. Returns the connection.
    async fn run(mut self, socket: OwnedFd, export: &str) -> Result<NbdWriter, DeltaError> {
        let mut writer = NbdWriter::connect(socket, export).await?;
        loop {
            let last = *self.at_rest.borrow_and_update();
            let bytes = self.pass(&mut writer).await?;
            if last {
                return Ok(writer);
            }
            if bytes <= LITTLE_BYTES {
                self.copied.idle.store(true, Relaxed);
                let _ = tokio::time::timeout(PASS_EVERY, self.at_rest.changed()).await;
                self.copied.idle.store(false, Relaxed);
            }
        }
    }

    /// Copies what has been recorded until now; how much that was.
    async fn pass(&mut self, writer: &mut NbdWriter) -> Result<u64, DeltaError> {
        let (frozen, bytes) = self.bitmaps.freeze(&self.qmp).await?;
        self.copied.begin_pass(bytes);
        if bytes > 0 {
            self.copy(&frozen, writer).await?;
        }
        delete_bitmap(&self.qmp, &self.bitmaps.node, &frozen).await?;
        self.copied.end_pass();
        Ok(bytes)
    }

    async fn copy(&mut self, frozen: &str, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        let id = names::export_id(&self.disk);
        let add = BlockExportAdd {
            id: id.clone(),
            node_name: self.bitmaps.node.clone(),
            name: self.disk.clone(),
            writable: false,
            bitmaps: vec![frozen.to_owned()],
            allocation_depth: false,
        };
        self.qmp.execute(add).await?;
        let socket = self.server.connect().map_err(DeltaError::Connect)?;
        let mut reader = NbdReader::connect(socket, &self.disk, frozen).await?;
        self.copy_dirty(&mut reader, writer).await?;
        writer.flush().await?;
        drop(reader);
        delete_export(&self.qmp, &id).await?;
        Ok(())
    }

    async fn copy_dirty(&self, reader: &mut NbdReader, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        let (source_bytes, destination_bytes) = (reader.size(), writer.size());
        if source_bytes != destination_bytes {
            return Err(DeltaError::Size { source_bytes, destination_bytes });
        }
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        let mut from = 0;
        while from < source_bytes {
            let (dirty, next) = reader.dirty(from).await?;
            for range in dirty {
                let mut at = range.start;
                while at < range.end {
                    let bytes = (range.end - at).min(REQUEST_BYTES_MAX as u64);
                    let data = &mut buffer[..bytes as usize];
                    reader.read(at, data).await?;
                    self.write(writer, at, data).await?;
                    at += bytes;
                }
            }
            from = next;
        }
        Ok(())
    }

    /// In pieces of the bitmap's, so that zeroes among data are not sent.
    async fn write(&self, writer: &mut NbdWriter, at: u64, data: &[u8]) -> Result<(), DeltaError> {
        let is_zero = |piece: &[u8]| piece.iter().all(|&byte| byte == 0);
        let mut offset = at;
        for run in data
            .chunks(GRANULARITY_BYTES as usize)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let bytes: usize = run.iter().map(|piece| piece.len()).sum();
            let start = (offset - at) as usize;
            writer.write(offset, &data[start..start + bytes]).await?;
            offset += bytes as u64;
            self.copied.wrote(bytes as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use serde_json::json;

    fn nodes(node: &str, bitmaps: &[(&str, u64, bool)]) -> Vec<BlockDeviceInfo> {
        let bitmap = |(name, count, recording): &(&str, u64, bool)| json!({"name": name, "count": count, "granularity": 65536, "recording": recording});
        let bitmaps: Vec<_> = bitmaps.iter().map(bitmap).collect();
        let nodes = json!([{"node-name": node, "drv": "raw", "dirty-bitmaps": bitmaps}]);
        serde_json::from_value(nodes).unwrap()
    }

    #[test]
    fn what_the_guest_writes_during_a_pass_is_left_when_that_is_over() {
        let bitmaps = Bitmaps::new("n0", Uuid::nil());
        let [a, b] = bitmaps.names.clone();
        let copied = Copied::new(bitmaps);
        copied.learn(&nodes("n0", &[(&a, 100, true), ("somebodys", 9000, true)]));
        assert_eq!(copied.left(), 100, "before the first pass");
        copied.begin_pass(100);
        copied.wrote(60);
        assert_eq!(copied.left(), 40);
        copied.learn(&nodes("n0", &[(&a, 100, false), (&b, 70, true)]));
        assert_eq!(copied.left(), 40 + 70);
        copied.wrote(40);
        copied.end_pass();
        assert_eq!(copied.left(), 70, "a pass that was copied leaves what was written meanwhile");
        copied.learn(&nodes("n0", &[(&b, 90, true)]));
        assert_eq!(copied.left(), 90);
        copied.begin_pass(90);
        assert_eq!(copied.left(), 90, "and no more than that, when the next one begins");
        copied.learn(&nodes("n1", &[(&b, 90, true)]));
        assert_eq!(copied.left(), 0, "another node's are not its");
    }
}
