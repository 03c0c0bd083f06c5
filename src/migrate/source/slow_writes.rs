//! A guest that writes to a disk faster than the disk is copied is slowed down, unless its operator has said never.
//! When is `model/convergence.rs`'s matter. Two means, by what its QEMU can do.
//!
//! **Write-blocking** (QEMU 8.2): a write is over for the guest when the destination has it as well, so what is left
//! to copy grows no more. QEMU's mirror would go on filling the link with the rest, and each write would wait behind
//! up to 16 MiB of it; so the mirror gets half of what it copied before until it has caught up. While the connection
//! is away such writes stand still. It ends with the mirror, whatever becomes of the migration.
//!
//! **A limit** of the device's writes, measured so that half of what is copied is left for what is behind, and
//! measured again while that is not enough. The guest never waits for the destination. How it was before is in the
//! journal. It is also what a disk gets of which this agent copies the changes, whatever QEMU can do: that has no
//! mirror. Changes that are copied for a replica end with what was recorded, and nothing is slowed for them.

use std::time::{Duration, Instant};

use super::failure::Failure;
use super::state::Source;
use crate::migrate::journal::Undo;
use crate::migrate::model::convergence::{Outrun, Written, is_in_step};
use crate::migrate::model::plan::Way;
use crate::migrate::model::progress::{DiskProgress, Slowed};
use crate::migrate::transfer::disk::mirror;
use crate::qemu::{
    Abilities, BlockSetIoThrottle, IoThrottle, Unthrottled, io_throttle, names, written_bytes,
};

/// So often a guest's writes are found not to be what a copy is outrun by.
const IN_VAIN_MAX: u32 = 3;
/// What the guest writes is measured over so long.
const MEASURED_OVER: Duration = Duration::from_secs(2);

/// Slows the guest down where nothing else ends the copy of its disks, and lets those that have caught up have
/// all of the link.
pub(crate) async fn look(source: &mut Source) -> Result<(), Failure> {
    if source.context.request.options.never_slow_writes {
        return Ok(());
    }
    let slowing = &mut source.copy.slowing;
    if source.peer.is_away() {
        slowing.convergence.forget();
        slowing.measured.clear();
        return Ok(());
    }
    let disks = source.context.progress.now().disks;
    free(source, &disks).await?;
    limit_measured(source, &disks).await?;
    let pause = Duration::from_millis(source.context.request.options.downtime_limit_ms.into());
    let copied: Vec<_> = disks.iter().filter(|disk| is_open(source, disk)).collect();
    let outrun = source.copy.slowing.convergence.look(Instant::now(), copied.into_iter(), pause);
    if outrun.is_empty() {
        return Ok(());
    }
    let qmp = &source.guest.qmp;
    let can_block = source.reconnect_policy().ask(|| Abilities::ask(qmp)).await?.block_job_change;
    source.copy.slowing.convergence.forget();
    for outrun in &outrun {
        let is_mirrored = source.copy.mirrors().any(|job| job == names::job_id(&outrun.disk));
        match can_block && is_mirrored {
            true => block(source, outrun).await?,
            false => measure(source, &outrun.disk, &disks).await?,
        }
    }
    Ok(())
}

/// Whether a disk's copy is under way and may still need it.
fn is_open(source: &Source, disk: &DiskProgress) -> bool {
    let copy = &source.copy;
    let plan = copy.plan.disks.iter().find(|plan| plan.disk.name == disk.name);
    let replicates = source.context.request.options.replicate;
    let has_to_end = |way: Way| way.is_mirror() || (way == Way::Changes && !replicates);
    let is_copied = plan.is_some_and(|plan| has_to_end(plan.way) && copy.is_under_way(plan));
    is_copied
        && disk.slowed != Some(Slowed::WriteBlocking)
        && copy.slowing.vain.get(&disk.name).is_none_or(|times| *times < IN_VAIN_MAX)
}

/// Says it, once.
fn tell(source: &Source, disk: &str, slowed: Slowed, text: String) {
    tracing::warn!("{text}");
    source.context.progress.update(|p| {
        if let Some(known) = p.disks.iter_mut().find(|known| known.name == disk)
            && known.slowed.replace(slowed).is_none()
        {
            p.notes.push(text);
        }
    });
}

async fn block(source: &mut Source, outrun: &Outrun) -> Result<(), Failure> {
    let (qmp, job) = (&source.guest.qmp, names::job_id(&outrun.disk));
    let rate = outrun.bytes_per_s;
    if !source.reconnect_policy().ask(|| mirror::block_writes(qmp, &job, rate)).await? {
        return Ok(());
    }
    let text = format!(
        "the guest writes to disk {} faster than it is copied ({}/s): from now on its writes to it wait for the \
         destination, up to the end of the migration",
        outrun.disk,
        kib(rate)
    );
    tell(source, &outrun.disk, Slowed::WriteBlocking, text);
    Ok(())
}

/// Begins to measure what the guest writes to a disk.
async fn measure(source: &mut Source, disk: &str, disks: &[DiskProgress]) -> Result<(), Failure> {
    let now = written(source, disk, disks).await?;
    let slowing = &mut source.copy.slowing;
    match now {
        Some((_, _, now)) => drop(slowing.measured.insert(disk.to_owned(), now)),
        None => slowing.in_vain(disk, IN_VAIN_MAX),
    }
    Ok(())
}

/// The device of a disk, how it is limited, and what the guest has written to it; none where QEMU does not say.
async fn written(
    source: &Source,
    name: &str,
    disks: &[DiskProgress],
) -> Result<Option<(String, IoThrottle, Written)>, Failure> {
    let (qmp, policy) = (&source.guest.qmp, || source.reconnect_policy());
    let plan = source.copy.plan.disks.iter().find(|plan| plan.disk.name == name);
    let (Some(plan), Some(disk)) = (plan, disks.iter().find(|disk| disk.name == name)) else {
        return Ok(None);
    };
    let found = policy().ask(|| io_throttle(qmp, &plan.disk.node_name)).await?;
    let Some((device, limits)) = found else { return Ok(None) };
    let bytes = policy().ask(|| written_bytes(qmp, &device)).await?;
    Ok(bytes.map(|bytes| (device, limits, Written::of(Instant::now(), bytes, disk))))
}

/// Limits what was measured for long enough.
async fn limit_measured(source: &mut Source, disks: &[DiskProgress]) -> Result<(), Failure> {
    let is_due = |began: &Written| began.at.elapsed() >= MEASURED_OVER;
    let measured = &source.copy.slowing.measured;
    let due: Vec<_> = measured
        .iter()
        .filter(|(_, began)| is_due(began))
        .map(|(disk, began)| (disk.clone(), *began))
        .collect();
    for (disk, began) in due {
        source.copy.slowing.measured.remove(&disk);
        let Some((device, limits, now)) = written(source, &disk, disks).await? else { continue };
        let in_passes = source.copy.delta.disks.contains_key(&disk);
        match began.limit_until(&now, in_passes) {
            Some(limit) => throttle(source, &disk, device, limits, limit).await?,
            None => {
                tracing::info!(disk, "what the guest writes is not what outruns the copy");
                source.copy.slowing.in_vain(&disk, 1);
            }
        }
        source.copy.slowing.convergence.forget();
    }
    Ok(())
}

async fn throttle(
    source: &mut Source,
    disk: &str,
    device: String,
    now: IoThrottle,
    bytes_per_s: u64,
) -> Result<(), Failure> {
    let group = names::throttle_group(disk);
    let undo =
        Undo::Throttle(Unthrottled { device: device.clone(), group: group.clone(), before: now.clone() });
    if now.group.as_ref() != Some(&group) {
        source.journal.will_make(undo)?;
    } else if now.bps_wr <= bytes_per_s {
        tracing::warn!(disk, "what the guest writes is limited as far as it may be, and outruns the copy");
        source.copy.slowing.in_vain(disk, IN_VAIN_MAX);
        return Ok(());
    }
    let command = BlockSetIoThrottle { id: device, limits: now.with_writes(bytes_per_s, &group) };
    let qmp = &source.guest.qmp;
    match source.reconnect_policy().ask(|| qmp.execute(command.clone())).await {
        Ok(_) => {}
        // A device that takes none.
        Err(Failure::Qmp(e)) if e.desc().is_some() => {
            tracing::warn!(disk, error = %e, "what the guest writes cannot be limited");
            source.copy.slowing.in_vain(disk, IN_VAIN_MAX);
            return Ok(());
        }
        Err(e) => return Err(e),
    }
    let text = format!(
        "the guest writes to disk {disk} faster than it is copied: from now on it may write no more than {}/s to it, \
         up to the end of the migration",
        kib(bytes_per_s)
    );
    tell(source, disk, Slowed::Throttled, text);
    Ok(())
}

fn kib(bytes: u64) -> String {
    if bytes < 10 << 20 { format!("{} KiB", bytes.div_ceil(1024)) } else { format!("{} MiB", bytes >> 20) }
}

/// Mirrors that have caught up follow the guest alone, and take nothing from it.
async fn free(source: &mut Source, disks: &[DiskProgress]) -> Result<(), Failure> {
    let is_blocking = |disk: &&DiskProgress| disk.slowed == Some(Slowed::WriteBlocking);
    for disk in disks.iter().filter(is_blocking).filter(|disk| is_in_step(disk, 0, Duration::ZERO)) {
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
    let mut blocking = disks.iter().filter(|disk| disk.slowed == Some(Slowed::WriteBlocking));
    blocking.any(|disk| !slowing.caught_up.contains(&disk.name))
        || slowing.convergence.is_open()
        || !slowing.measured.is_empty()
}
