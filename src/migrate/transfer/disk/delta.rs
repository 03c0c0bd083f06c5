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
//! Another process of this agent goes on between any two bytes: the connection to the destination is left to it in
//! the middle of a request (`qemu::Writing`), and the pass where the next part begins. What was read of the source and
//! not begun to be written is read again.
//!
//! `blockdev-backup` with `sync=bitmap` would do the same, but makes each write of the guest wait
//! for the old data to reach the destination, and *fails the guest's write* when that does not
//! succeed (`on-cbw-error` cannot be chosen for it in QEMU 7.2 to 10.0): a destination that dies
//! would break the guest. `blockdev-mirror` takes no bitmap there. So the agent copies, and the
//! guest never waits for it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::bitmaps::Bitmaps;
use super::copied::{Copied, Counts};
use super::copier::{Copier, Pass, Stopped};
use super::error::DeltaError;
use crate::migrate::guest::nbd_server::NbdServer;
use crate::qemu::{BlockDeviceInfo, LeftWriter, NbdWriter, Qmp};

/// The copy of one disk between two processes.
#[derive(Debug)]
pub(crate) struct LeftCopy {
    pub(crate) writer: LeftWriter,
    /// The pass under way.
    pub(crate) pass: Option<Pass>,
    /// Both sides are equal, and it has ended.
    pub(crate) is_over: bool,
    pub(crate) counts: Counts,
}

/// The disks of which only changes are copied.
#[derive(Debug)]
pub(crate) struct Delta {
    tasks: JoinSet<(String, Result<Stopped, DeltaError>)>,
    at_rest: watch::Sender<bool>,
    stop: CancellationToken,
    pub(crate) disks: BTreeMap<String, Arc<Copied>>,
    /// The source's server, once there is one.
    server: Option<Arc<NbdServer>>,
    /// The connections of disks that are equal: ended, they would look like a failure.
    equal: Vec<(String, LeftWriter)>,
    /// Those of an earlier process that nobody goes on with yet.
    left: BTreeMap<String, LeftCopy>,
}

impl Delta {
    pub(crate) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            at_rest: watch::Sender::new(false),
            stop: CancellationToken::new(),
            disks: BTreeMap::new(),
            server: None,
            equal: Vec::new(),
            left: BTreeMap::new(),
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
    pub(crate) fn start(
        &mut self,
        qmp: &Qmp,
        disk: &str,
        bitmaps: Bitmaps,
        export: &str,
        socket: OwnedFd,
    ) -> Result<(), DeltaError> {
        let copied = Arc::new(Copied::new(bitmaps.clone(), Counts::default()));
        let writer = NbdWriter::new(socket, export)?;
        self.spawn(qmp, disk, bitmaps, copied, None, writer)
    }

    fn spawn(
        &mut self,
        qmp: &Qmp,
        disk: &str,
        bitmaps: Bitmaps,
        copied: Arc<Copied>,
        pass: Option<Pass>,
        writer: NbdWriter,
    ) -> Result<(), DeltaError> {
        let server = self.server.clone().ok_or(DeltaError::NoServer)?;
        self.disks.insert(disk.to_owned(), Arc::clone(&copied));
        let (qmp, at_rest, name) = (qmp.clone(), self.at_rest.subscribe(), disk.to_owned());
        let copier = Copier { qmp, disk: disk.to_owned(), bitmaps, server, copied, at_rest, pass };
        let stop = self.stop.clone();
        self.tasks.spawn(async move { (name, copier.run_until(stop, writer).await) });
        Ok(())
    }

    /// The next disk that is equal on both sides, or the failure of one. Cancelling loses nothing.
    pub(crate) async fn next(&mut self) -> (String, Result<(), DeltaError>) {
        match self.tasks.join_next().await {
            Some(Ok((disk, Ok(stopped)))) => match stopped.writer.leave() {
                Ok(writer) => {
                    self.equal.push((disk.clone(), writer));
                    (disk, Ok(()))
                }
                Err(e) => (disk, Err(e.into())),
            },
            Some(Ok((disk, Err(e)))) => (disk, Err(e)),
            Some(Err(_)) => (String::new(), Err(DeltaError::Broken)),
            None => std::future::pending().await,
        }
    }

    /// Stops all copying between two bytes, and leaves it to another process. A disk that has just failed is left out:
    /// its copy will be missed.
    pub(crate) async fn leave(&mut self) -> BTreeMap<String, LeftCopy> {
        self.stop.cancel();
        let mut left = std::mem::take(&mut self.left);
        let equal = std::mem::take(&mut self.equal);
        let mut all: Vec<_> = equal.into_iter().map(|(disk, writer)| (disk, writer, None, true)).collect();
        while let Some(stopped) = self.tasks.join_next().await {
            let Ok((disk, Ok(Stopped { writer, pass, is_over }))) = stopped else { continue };
            let Ok(writer) = writer.leave() else { continue };
            all.push((disk, writer, pass, is_over));
        }
        for (disk, writer, pass, is_over) in all {
            let counts = self.disks.get(&disk).map(|copied| copied.counts()).unwrap_or_default();
            left.insert(disk, LeftCopy { writer, pass, is_over, counts });
        }
        left
    }

    /// What an earlier process has left of a disk's copy. Nothing is done with it before [`go_on`](Self::go_on).
    pub(crate) fn take_up(&mut self, disk: &str, bitmaps: Bitmaps, left: LeftCopy) {
        self.disks.insert(disk.to_owned(), Arc::new(Copied::new(bitmaps, left.counts)));
        match left.is_over {
            true => self.equal.push((disk.to_owned(), left.writer)),
            false => drop(self.left.insert(disk.to_owned(), left)),
        }
    }

    /// Whether both sides of a disk are equal, and its copy has ended.
    pub(crate) fn is_equal(&self, disk: &str) -> bool {
        self.equal.iter().any(|(equal, _)| equal == disk)
    }

    /// Goes on with all of it.
    pub(crate) fn go_on(&mut self, qmp: &Qmp) -> Result<(), (String, DeltaError)> {
        while let Some((disk, left)) = self.left.pop_first() {
            let went_on = self.disks.get(&disk).cloned().ok_or(DeltaError::Broken).and_then(|copied| {
                let writer = NbdWriter::go_on(left.writer)?;
                self.spawn(qmp, &disk, copied.bitmaps().clone(), copied, left.pass, writer)
            });
            went_on.map_err(|e| (disk, e))?;
        }
        Ok(())
    }

    /// The guest is paused, or what it has written until now is enough: each disk gets its last pass.
    pub(crate) fn finish(&self) {
        self.at_rest.send_replace(true);
    }

    /// What QEMU says of all nodes.
    pub(crate) fn learn(&self, nodes: &[BlockDeviceInfo]) {
        self.disks.values().for_each(|copied| copied.learn(nodes));
    }

    /// Whether a disk has had a pass.
    pub(crate) fn copied_once(&self, disk: &str) -> bool {
        self.disks.get(disk).is_some_and(|c| c.once.load(Relaxed))
    }

    /// Whether nothing need move at this moment.
    pub(crate) fn is_idle(&self) -> bool {
        self.disks.values().all(|c| c.is_idle())
    }

    /// Ends all copying; what is under way is dropped.
    pub(crate) async fn abort(&mut self) {
        self.left.clear();
        self.tasks.shutdown().await;
    }
}
