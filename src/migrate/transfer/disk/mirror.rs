//! A whole disk by QEMU's `blockdev-mirror`, onto an export of the destination's: all of it, and from then on
//! what the guest writes.
//!
//! `blockdev-add` leads an NBD handshake, which blocks QEMU's main loop and with it the guest. So this agent leads
//! it with the destination before (`handshake.rs`), and QEMU's own is with this agent. Only a `block-job-cancel`
//! that is not forced finishes a mirror in step, with the guest at rest.
//!
//! `blockdev-mirror` blocks QEMU's main loop, and with it the guest, until what earlier mirrors are writing
//! has been written: up to 16 MiB for each, which a link of 1 MiB/s carries in 16 s. So each mirror is paused
//! at once, the next begins when it is at rest, and all are resumed when the last has begun.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::migrate::journal::Undo;
use crate::migrate::model::plan::{CopiedDisk, Export};
use crate::qemu::{
    BlockJobCancel, BlockJobChange, BlockJobSetSpeed, BlockdevAdd, BlockdevMirror, JobDismiss, JobPause,
    JobResume, MirrorCopyMode, MirrorSyncMode, Qmp, QmpError, QueryJobs, names,
};

/// How long a finished job may take to conclude.
const CONCLUDE_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Of a file system's blocks.
const GRANULARITY_BYTES_MIN: u64 = 4096;
/// What QEMU chooses by itself for an image without clusters.
const GRANULARITY_BYTES_QEMU: u32 = 64 * 1024;
/// The least that a mirror which waits with the guest's writes copies in a second besides.
const SPEED_BYTES_MIN: u64 = 256 * 1024;
/// QEMU keeps two bits for each part of a disk: 16 MiB for so many.
const PARTS_MAX: u64 = 1 << 26;

/// Why a mirror did not end as it should.
#[derive(Debug)]
pub(crate) enum MirrorError {
    Qmp(QmpError),
    Failed { disk: String, error: String },
    Lasts { disk: String, after: Duration },
}

impl From<QmpError> for MirrorError {
    fn from(error: QmpError) -> Self {
        Self::Qmp(error)
    }
}

/// What QEMU has of a disk's mirror, by its names.
pub(crate) struct Mirror<'a> {
    disk: &'a CopiedDisk,
    pub(crate) fd: String,
    node: String,
    pub(crate) job: String,
}

impl<'a> Mirror<'a> {
    pub(crate) fn of(disk: &'a CopiedDisk) -> Self {
        let name = &disk.name;
        let (fd, node, job) = (names::nbd_fdname(name), names::node_name(name), names::job_id(name));
        Self { disk, fd, node, job }
    }

    /// What a journal must undo.
    pub(crate) fn undo(&self) -> [Undo; 3] {
        [Undo::Fd(self.fd.clone()), Undo::Node(self.node.clone()), Undo::Job(self.job.clone())]
    }

    /// Adds the destination's export as a node, by a descriptor that QEMU has.
    pub(crate) fn add(&self, export: &str) -> BlockdevAdd {
        BlockdevAdd::nbd_on_fd(&self.node, &self.fd, export)
    }

    /// Begins to copy to that node. `can_skip`: this QEMU can be told that the target reads as zeroes.
    pub(crate) fn begin(&self, export: &Export, can_skip: bool) -> BlockdevMirror {
        let is_top = self.disk.base.is_some();
        let sync = if is_top { MirrorSyncMode::Top } else { MirrorSyncMode::Full };
        let mirror = BlockdevMirror::new(&self.job, &self.disk.node_name, &self.node, sync);
        let fine = export.is_fresh || is_top;
        let granularity = fine.then(|| granularity(self.disk.virtual_size)).flatten();
        BlockdevMirror { granularity, target_is_zero: export.is_fresh && can_skip && !is_top, ..mirror }
    }
}

/// The least that is copied to a fresh image, and of a topmost image alone: what is a hole at the source stays one
/// there if it is no smaller. None where QEMU's own choice is as good.
fn granularity(size: u64) -> Option<u32> {
    let wanted = size.div_ceil(PARTS_MAX).next_power_of_two().max(GRANULARITY_BYTES_MIN);
    u32::try_from(wanted).ok().filter(|wanted| *wanted < GRANULARITY_BYTES_QEMU)
}

/// Makes a mirror wait for the others to begin. False when it is over.
pub(crate) async fn pause(qmp: &Qmp, job: &str) -> Result<bool, QmpError> {
    accepted(qmp.execute(JobPause { id: job.to_owned() }).await)
}

/// Lets a mirror that waits copy. False when it does not wait.
pub(crate) async fn resume(qmp: &Qmp, job: &str) -> Result<bool, QmpError> {
    accepted(qmp.execute(JobResume { id: job.to_owned() }).await)
}

/// Has the guest's writes wait until the destination has them, and leaves them half of what was copied in a
/// second; false where the job is over. May be asked for again.
pub(crate) async fn block_writes(qmp: &Qmp, job: &str, bytes_per_s: u64) -> Result<bool, QmpError> {
    limit(qmp, job, (bytes_per_s / 2).max(SPEED_BYTES_MIN)).await?;
    let change = BlockJobChange { id: job.to_owned(), copy_mode: MirrorCopyMode::WriteBlocking };
    accepted(qmp.execute(change).await)
}

/// Limits what a mirror copies by itself in a second; 0 is no limit.
pub(crate) async fn limit(qmp: &Qmp, job: &str, speed: u64) -> Result<bool, QmpError> {
    accepted(qmp.execute(BlockJobSetSpeed { device: job.to_owned(), speed }).await)
}

fn accepted<T>(done: Result<T, QmpError>) -> Result<bool, QmpError> {
    match done {
        Ok(_) => Ok(true),
        Err(e) if e.desc().is_some() => Ok(false),
        Err(e) => Err(e),
    }
}

/// Finishes a mirror in step. May be asked for again.
pub(crate) async fn finish(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    match qmp.execute(BlockJobCancel { device: job.to_owned(), force: false }).await {
        // Asked for already, by an earlier process.
        Err(e) if e.is_job_past_that() => Ok(()),
        done => done.map(drop),
    }
}

/// Takes finished mirrors off QEMU's list. One that failed after all is an error.
pub(crate) async fn dismiss(qmp: &Qmp, disks: impl Iterator<Item = String>) -> Result<(), MirrorError> {
    let until = Instant::now() + CONCLUDE_DEADLINE;
    for disk in disks {
        let id = names::job_id(&disk);
        loop {
            let jobs = qmp.execute(QueryJobs).await?;
            match jobs.into_iter().find(|j| j.id == id) {
                None => break,
                Some(job) if job.status.is_over() => {
                    if let Some(error) = job.error {
                        return Err(MirrorError::Failed { disk, error });
                    }
                    qmp.execute(JobDismiss { id }).await?;
                    break;
                }
                Some(_) if Instant::now() > until => {
                    return Err(MirrorError::Lasts { disk, after: CONCLUDE_DEADLINE });
                }
                Some(_) => sleep(LOOK_EVERY).await,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use crate::migrate::model::plan::Base;

    #[test]
    fn only_a_fresh_target_is_called_empty_and_only_where_qemu_knows_the_word() {
        let disk =
            CopiedDisk { name: "vda".into(), node_name: "n".into(), virtual_size: 1 << 30, base: None };
        let began = |is_fresh, can_skip| {
            let export = Export { disk: "vda".into(), export: "vda".into(), channel: 1, is_fresh };
            serde_json::to_value(Mirror::of(&disk).begin(&export, can_skip)).unwrap()
        };
        let skips = |is_fresh, can_skip| began(is_fresh, can_skip).get("target-is-zero").cloned();
        assert_eq!(skips(true, true), Some(true.into()));
        assert_eq!([skips(true, false), skips(false, true), skips(false, false)], [None, None, None]);
        assert_eq!(began(true, false)["granularity"], 4096);
        assert!(began(false, true).get("granularity").is_none());
        assert_eq!(began(false, true)["sync"], "full");
        let base = Some(Base { top_node: "n".into(), node_name: "below".into() });
        let on_base = CopiedDisk { base, ..disk };
        let export = Export { disk: "vda".into(), export: "vda".into(), channel: 1, is_fresh: false };
        let began = serde_json::to_value(Mirror::of(&on_base).begin(&export, true)).unwrap();
        assert_eq!((&began["sync"], &began["granularity"]), (&"top".into(), &4096.into()));
    }

    #[test]
    fn what_qemu_remembers_of_a_disk_stays_small() {
        let of_gib = |gib: u64| granularity(gib << 30);
        assert_eq!([of_gib(1), of_gib(256), of_gib(257)], [Some(4096), Some(4096), Some(8192)]);
        assert_eq!([of_gib(2048), of_gib(4096), of_gib(1 << 30)], [Some(32768), None, None]);
    }
}
