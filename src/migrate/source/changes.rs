//! The source's hooks for further tries: follows each disk's changes while there may be one, and
//! decides of each disk whether a further try copies the whole or what changed since.
//!
//! What is copied, and why that is enough, is in `delta.rs`. What becomes of the bitmaps between
//! two tries is in `retry.rs`.

use super::failure::Failure;
use super::replica;
use super::state::Source;
use crate::migrate::guest::nbd_server::{self, NbdServer};
use crate::migrate::guest::undo;
use crate::migrate::journal::Undo;
use crate::migrate::model::label::Label;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::plan::{CopiedDisk, Way};
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Export;
use crate::migrate::transfer::disk::bitmaps::Bitmaps;
use crate::migrate::transfer::disk::error::DeltaError;
use crate::migrate::transfer::disk::tracking::Followed;
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::purpose;
use crate::net::pump::PumpState;
use crate::qemu::{Abilities, Qmp, QmpError, QueryMigrateCapabilities, names, nbd_server_runs};

/// Plans to copy only what changed of the disks of which that is enough. Says why of the others.
pub(crate) async fn choose_ways(source: &mut Source) -> Result<(), Failure> {
    let tracking = &source.copy.tracking;
    let has_copies = source.context.request.retry.is_some() || !tracking.disks.is_empty();
    if !has_copies && tracking.stale.is_none() {
        return replica::remember(source);
    }
    let mut chosen = Vec::new();
    for at in 0..source.copy.plan.disks.len() {
        let disk = source.copy.plan.disks[at].disk.clone();
        match doubt(source, &disk).await? {
            None => chosen.push(at),
            Some(doubt) => {
                let followed = source.copy.tracking.disks.get_mut(&disk.name);
                followed.into_iter().for_each(|followed| followed.is_doubted(&doubt));
                source.context.note(again(&disk, &doubt));
            }
        }
    }
    let doubt = if chosen.is_empty() { None } else { serve(source).await? };
    for at in chosen {
        let plan = &mut source.copy.plan.disks[at];
        match &doubt {
            None => plan.way = Way::Changes,
            Some(doubt) => {
                let followed = source.copy.tracking.disks.get_mut(&plan.disk.name);
                followed.into_iter().for_each(|followed| followed.is_doubted(doubt));
                source.context.note(again(&plan.disk, doubt));
            }
        }
    }
    // Before anything is written there.
    replica::remember(source)
}

fn again(disk: &CopiedDisk, doubt: &str) -> String {
    format!("{}: {} is copied again: {doubt}", disk.name, disk.all_of_it())
}

/// Why a disk must be copied as a whole.
async fn doubt(source: &Source, disk: &CopiedDisk) -> Result<Option<String>, Failure> {
    let tracking = &source.copy.tracking;
    let Some(followed) = tracking.disks.get(&disk.name) else {
        let none = || "there is no whole copy of it whose changes were recorded".to_owned();
        return Ok(Some(tracking.stale.clone().unwrap_or_else(none)));
    };
    if followed.doubt.is_some() {
        return Ok(followed.doubt.clone());
    }
    if !followed.in_step {
        return Ok(Some("its copy was not whole when the try before failed".into()));
    }
    if !followed.disk.is_same_image(disk) {
        return Ok(Some("it is another image at the source, or has another size".into()));
    }
    let qmp = &source.guest.qmp;
    Ok(source.reconnect_policy().ask(|| followed.bitmaps.doubt(qmp)).await?.map(str::to_owned))
}

/// Starts the server from which this agent reads the source's disks, unless there is one; why it cannot.
pub(crate) async fn serve(source: &mut Source) -> Result<Option<String>, Failure> {
    if source.copy.delta.server().is_some() {
        return Ok(None);
    }
    let qmp = &source.guest.qmp;
    // Of an earlier process of this agent, which nobody can connect to any more. It goes with its exports; the
    // migration of the RAM may be under way.
    if undo::leftovers(source.journal.past()).nbd_server
        && let Err(error) = nbd_server::close(qmp, &[]).await
    {
        return Ok(Some(format!("the source's QEMU does not end an earlier NBD server: {}", chain(&error))));
    }
    if source.reconnect_policy().ask(|| nbd_server_runs(qmp)).await? {
        return Ok(Some("the source's QEMU has an NBD server of somebody else's".into()));
    }
    let folder = source.context.host.config.runtime_dir.join("nbd");
    let abilities = source.reconnect_policy().ask(|| Abilities::ask(qmp)).await?;
    match NbdServer::start(qmp, &mut source.journal, &folder, &[], &abilities).await {
        Ok(server) => {
            source.copy.delta.serve(server);
            Ok(None)
        }
        Err(error) => Ok(Some(format!("the source's QEMU gives no NBD server: {}", chain(&error)))),
    }
}

/// Copies what changed of a disk, from now until the guest is paused.
pub(crate) async fn start_delta(
    source: &mut Source,
    disk: &CopiedDisk,
    export: &Export,
) -> Result<(), Failure> {
    let Some(followed) = source.copy.tracking.disks.get(&disk.name) else { return Ok(()) };
    let bitmaps = followed.bitmaps.clone();
    let theirs = start_disk_stream(source, disk, export).await?;
    source.journal.will_make(Undo::Export(names::export_id(&disk.name)))?;
    let started = source.copy.delta.start(&source.guest.qmp, &disk.name, bitmaps, &export.export, theirs);
    started.map_err(|source| Failure::Delta { disk: disk.name.clone(), source })?;
    tracing::info!(disk = disk.name, "only what changed since it was copied is copied");
    Ok(())
}

/// Goes on with the copies of changes that an earlier process of this agent has left, and makes ready for those that it
/// had only planned. What they read from is this process's own.
pub(crate) async fn go_on(source: &mut Source) -> Result<(), Failure> {
    let phase = source.clock.phase;
    let goes_on =
        (Phase::Mirror..=Phase::Switchover).contains(&phase) && source.copy.delta.server().is_none();
    let Some(first) = source.copy.first_open_change().filter(|_| goes_on) else { return Ok(()) };
    let failed = |(disk, source)| Failure::Delta { disk, source };
    if let Some(lost) = source.copy.lost_change() {
        return Err(failed((lost, DeltaError::Broken)));
    }
    if let Some(doubt) = serve(source).await? {
        return Err(failed((first, DeltaError::NoServerBecause(doubt))));
    }
    source.copy.delta.go_on(&source.guest.qmp).map_err(failed)?;
    tracing::info!(disk = first, "the copy of changes goes on where the process before has stopped");
    Ok(())
}

/// Opens a disk's stream; the end of it that whoever copies the disk writes to.
pub(crate) async fn start_disk_stream(
    source: &mut Source,
    disk: &CopiedDisk,
    export: &Export,
) -> Result<std::os::fd::OwnedFd, Failure> {
    let label = Label::Disk(disk.name.clone());
    let (lane, stream) = source.open(&label, purpose::NBD, export.channel).await?;
    let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
    source.copy.streams.start_as(label, &lane, ours, stream, PumpState::new(source.peer.disk_coding()));
    Ok(theirs)
}

/// Follows a disk from before its copy begins, for its replica, or if there may be a further try. A QEMU that
/// does not let us is no reason to fail.
pub(crate) async fn follow(source: &mut Source, disk: &CopiedDisk) -> Result<(), Failure> {
    source.copy.tracking.disks.remove(&disk.name);
    let replica = source.copy.tracking.replica.as_ref().map(|replica| replica.id);
    let replica = replica.filter(|_| source.context.request.options.replicate);
    if replica.is_none() && !source.context.has_successor() {
        return Ok(());
    }
    let (qmp, request) = (&source.guest.qmp, &source.context.request);
    if source.reconnect_policy().ask(|| sends_bitmaps(qmp)).await? {
        // They would go along, to a QEMU that knows nothing of them.
        tracing::info!("QEMU is set to migrate dirty bitmaps: none of ours is made");
        return Ok(());
    }
    let id = request.retry.as_ref().map_or(request.id, |r| r.first);
    let bitmaps = match replica {
        Some(replica) => Bitmaps::replica(&disk.node_name, replica),
        None => Bitmaps::new(&disk.node_name, id),
    };
    for undo in bitmaps.undo().into_iter().filter(|_| replica.is_none()) {
        source.journal.will_make(undo)?;
    }
    match bitmaps.begin(qmp).await {
        Ok(()) => {
            let followed = Followed::new(disk, bitmaps, false);
            source.copy.tracking.disks.insert(disk.name.clone(), followed);
        }
        Err(e) if e.desc().is_some() => {
            tracing::info!(disk = disk.name, error = chain(&e), "a further try will copy the whole disk");
        }
        Err(e) => return Err(e.into()),
    }
    Ok(())
}

async fn sends_bitmaps(qmp: &Qmp) -> Result<bool, QmpError> {
    let capabilities = qmp.execute(QueryMigrateCapabilities).await?;
    Ok(capabilities.iter().any(|c| c.capability == "dirty-bitmaps" && c.state))
}
