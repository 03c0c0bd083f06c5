//! A mirror that somebody has completed (`block-job-complete`) puts the guest's disk onto the
//! destination's image, over this migration's stream. What the guest has written since is there alone, so
//! the disk is copied back before that stream is cut.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::migrate::model::plan::{CopiedDisk, DiskPlan};
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::ProgressSink;
use crate::qemu::{
    BlockJobComplete, BlockdevMirror, JobDismiss, MirrorSyncMode, Qmp, QmpError, QueryBlock, QueryBlockJobs,
    QueryJobs, names,
};

/// How long QEMU may take to say which nodes the guest's disks are.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the copy.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Why a disk was not copied back.
#[derive(Debug, thiserror::Error)]
enum NotBack {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("its copy failed: {0}")]
    Job(String),
    #[error("its copy made no progress for {} s", .0.as_secs())]
    Stalled(Duration),
}

/// Takes back the guest's disks that are the destination's images by somebody's doing. What could not
/// be taken back, in words. Nothing may move for `stall` at most.
pub(crate) async fn take_back(
    qmp: &Qmp,
    disks: &[DiskPlan],
    stall: Duration,
    progress: &ProgressSink,
) -> Vec<String> {
    let Ok(blocks) = qmp.execute_within(QueryBlock, LOOK_DEADLINE).await else { return Vec::new() };
    let is_on =
        |node: &str| blocks.iter().any(|block| block.inserted.as_ref().is_some_and(|i| i.node_name == node));
    let mut left = Vec::new();
    let disks = disks.iter().map(|plan| &plan.disk);
    for disk in disks.filter(|disk| is_on(&names::node_name(&disk.name))) {
        tracing::warn!(disk = disk.name, "somebody completed its mirror: it is copied back");
        match copy_back(qmp, disk, stall).await {
            Ok(()) => {
                let note = format!(
                    "somebody had completed the mirror of disk {}: what the guest wrote to the destination's \
                     image was copied back",
                    disk.name
                );
                progress.update(|p| p.notes.push(note));
            }
            Err(e) => left.push(format!(
                "disk {} of the guest is the destination's image, since somebody completed its mirror; what the \
                 guest has written since is there alone, and could not be copied back: {}",
                disk.name,
                chain(&e)
            )),
        }
    }
    left
}

async fn copy_back(qmp: &Qmp, disk: &CopiedDisk, stall: Duration) -> Result<(), NotBack> {
    // The journal tells of this name already.
    let id = names::job_id(&disk.name);
    dismiss(qmp, &id).await?;
    let node = names::node_name(&disk.name);
    qmp.execute(BlockdevMirror::new(&id, &node, &disk.node_name, MirrorSyncMode::Full)).await?;
    let (mut copied, mut since) = (0, Instant::now());
    loop {
        let jobs = qmp.execute(QueryBlockJobs).await?;
        let job = jobs.into_iter().find(|job| job.device == id);
        let job = job.ok_or_else(|| NotBack::Job("it is gone".into()))?;
        if let Some(error) = job.error {
            return Err(NotBack::Job(error));
        }
        if job.ready {
            break;
        }
        if job.offset != copied {
            (copied, since) = (job.offset, Instant::now());
        }
        if since.elapsed() > stall {
            return Err(NotBack::Stalled(stall));
        }
        sleep(LOOK_EVERY).await;
    }
    qmp.execute(BlockJobComplete { device: id.clone() }).await?;
    let since = Instant::now();
    loop {
        let jobs = qmp.execute(QueryJobs).await?;
        match jobs.into_iter().find(|job| job.id == id) {
            Some(job) if job.status.is_over() => match job.error {
                Some(error) => return Err(NotBack::Job(error)),
                None => break,
            },
            Some(_) if since.elapsed() > stall => return Err(NotBack::Stalled(stall)),
            Some(_) => sleep(LOOK_EVERY).await,
            None => return Ok(()),
        }
    }
    dismiss(qmp, &id).await?;
    Ok(())
}

/// Takes a job that has concluded off QEMU's list, if it is there.
async fn dismiss(qmp: &Qmp, id: &str) -> Result<(), QmpError> {
    match qmp.execute(JobDismiss { id: id.to_owned() }).await {
        Err(e) if !e.is_not_found_job() => Err(e),
        _ => Ok(()),
    }
}
