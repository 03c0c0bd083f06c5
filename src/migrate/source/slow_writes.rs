//! A guest that writes to a disk faster than the disk is copied is slowed down, unless its operator has said never.
//! When is `model/convergence.rs`'s matter. Off again is the end of the mirror, whatever becomes of the migration.
//!
//! In write-blocking mode a write is over for the guest when the destination has it as well, so what is left to
//! copy grows no more. QEMU's mirror would go on filling the link with the rest, and each write would wait behind
//! up to 16 MiB of it; so the mirror gets half of what it copied before until it has caught up. While the connection
//! is away such writes stand still.

use std::time::{Duration, Instant};

use super::failure::Failure;
use super::state::Source;
use crate::migrate::model::convergence::{Outrun, is_in_step};
use crate::migrate::model::plan::Way;
use crate::migrate::model::progress::{DiskProgress, Slowed};
use crate::migrate::transfer::disk::mirror;
use crate::qemu::{Abilities, names};

/// Slows the guest down where nothing else ends the copy of its disks, and lets those that have caught up have
/// all of the link.
pub(crate) async fn look(source: &mut Source) -> Result<(), Failure> {
    if source.context.request.options.never_slow_writes || source.copy.slowing.cannot {
        return Ok(());
    }
    if source.peer.is_away() {
        source.copy.slowing.convergence.forget();
        return Ok(());
    }
    let disks = source.context.progress.now().disks;
    free(source, &disks).await?;
    let pause = Duration::from_millis(source.context.request.options.downtime_limit_ms.into());
    let copied: Vec<_> = disks.iter().filter(|disk| is_open(source, disk)).collect();
    let outrun = source.copy.slowing.convergence.look(Instant::now(), copied.into_iter(), pause);
    if outrun.is_empty() {
        return Ok(());
    }
    let qmp = &source.guest.qmp;
    let can_block = source.reconnect_policy().ask(|| Abilities::ask(qmp)).await?.block_job_change;
    source.copy.slowing.convergence.forget();
    source.copy.slowing.cannot = !can_block;
    for outrun in outrun.iter().filter(|_| can_block) {
        block(source, outrun).await?;
    }
    Ok(())
}

/// Whether a disk's copy is under way and may still need it.
fn is_open(source: &Source, disk: &DiskProgress) -> bool {
    let plans = &source.copy.plan.disks;
    let is_whole = |name: &str| {
        plans
            .iter()
            .any(|plan| plan.disk.name == name && plan.way == Way::Whole && source.copy.is_under_way(plan))
    };
    disk.slowed.is_none() && is_whole(&disk.name)
}

async fn block(source: &mut Source, outrun: &Outrun) -> Result<(), Failure> {
    let (qmp, job) = (&source.guest.qmp, names::job_id(&outrun.disk));
    let rate = outrun.bytes_per_s;
    if !source.reconnect_policy().ask(|| mirror::block_writes(qmp, &job, rate)).await? {
        return Ok(());
    }
    let disk = &outrun.disk;
    let text = format!(
        "the guest writes to disk {disk} faster than it is copied ({} MiB/s): from now on its writes to it wait for \
         the destination, up to the end of the migration",
        rate >> 20
    );
    tracing::warn!("{text}");
    source.context.progress.update(|p| {
        p.notes.push(text);
        if let Some(known) = p.disks.iter_mut().find(|known| known.name == *disk) {
            known.slowed = Some(Slowed::WriteBlocking);
        }
    });
    Ok(())
}

/// Mirrors that have caught up follow the guest alone, and take nothing from it.
async fn free(source: &mut Source, disks: &[DiskProgress]) -> Result<(), Failure> {
    for disk in disks.iter().filter(|disk| disk.slowed.is_some() && is_in_step(disk, 0, Duration::ZERO)) {
        if source.copy.slowing.caught_up.insert(disk.name.clone()) {
            let (qmp, job) = (&source.guest.qmp, names::job_id(&disk.name));
            source.reconnect_policy().ask(|| mirror::limit(qmp, &job, 0)).await?;
            tracing::info!(disk = disk.name, "the slowed disk is in step");
        }
    }
    Ok(())
}

/// Whether more can be done, or is being done, for a disk that is behind.
pub(crate) fn may_help(source: &Source) -> bool {
    let slowing = &source.copy.slowing;
    let disks = source.context.progress.now().disks;
    let mut slowed = disks.iter().filter(|disk| disk.slowed.is_some());
    slowed.any(|disk| !slowing.caught_up.contains(&disk.name)) || slowing.convergence.is_open()
}
