//! Disks that the guest cannot write to are not copied. If that was asked for, their contents are compared with what the
//! destination has, before anything is copied: both sides hash all of them, each as its own QEMU shows it, and only
//! hashes travel.
//!
//! Another process of this agent begins anew.

use std::sync::Arc;

use super::bases::{batches, first_difference};
use super::changes;
use super::failure::Failure;
use super::state::Source;
use super::verify::{guarded, heed, not_comparable};
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::journal::Undo;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::transfer::disk::error::DeltaError;
use crate::qemu::{BlockExportAdd, Disk, NbdReader, delete_export, names};

/// Compares them all, if that was asked for. A difference is a failure.
pub(crate) async fn compare(source: &mut Source) -> Result<(), Failure> {
    if !source.context.request.options.compare_read_only {
        return Ok(());
    }
    let disks = crate::qemu::disks(&source.guest.qmp).await?;
    let disks: Vec<Disk> = disks.into_iter().filter(|disk| disk.read_only && !disk.firmware).collect();
    if disks.is_empty() {
        source.context.note("no disk is read-only: none is compared instead of copied".into());
        return Ok(());
    }
    if let Some(doubt) = changes::serve(source).await? {
        return Err(Failure::Problems(vec![not_comparable(&doubt)]));
    }
    let Some(server) = source.copy.delta.server() else { return Ok(()) };
    for disk in &disks {
        tracing::info!(disk = disk.name, bytes = disk.virtual_size, "the read-only disk is compared");
        let mut reader = open(source, disk, &server).await?;
        let all = 0..disk.virtual_size;
        for batch in batches(std::slice::from_ref(&all)) {
            heed(source).await?;
            if let Some(at) = first_difference(source, &disk.name, &mut reader, &batch).await? {
                return Err(differs(disk, &batch[at]));
            }
        }
        drop(reader);
        close(source, disk).await?;
        source.context.note(format!("{}: read-only, the same on both hosts", disk.name));
    }
    Ok(())
}

/// An export of the disk, to this agent alone.
async fn open(source: &mut Source, disk: &Disk, server: &Arc<NbdServer>) -> Result<NbdReader, Failure> {
    // Of an earlier process.
    close(source, disk).await?;
    let id = names::compared_export(&disk.name);
    source.journal.will_make(Undo::Export(id.clone()))?;
    let (qmp, server, node_name) = (source.guest.qmp.clone(), Arc::clone(server), disk.node_name.clone());
    let open = async move {
        let name = id.clone();
        let add = BlockExportAdd {
            id,
            node_name,
            name,
            writable: false,
            bitmaps: Vec::new(),
            allocation_depth: false,
        };
        let name = add.name.clone();
        qmp.execute(add).await?;
        Ok(NbdReader::plain(server.connect().map_err(DeltaError::Connect)?, &name).await?)
    };
    guarded(source, &disk.name, open).await
}

/// The caller has let its reader go.
async fn close(source: &Source, disk: &Disk) -> Result<(), Failure> {
    let (qmp, id) = (source.guest.qmp.clone(), names::compared_export(&disk.name));
    guarded(source, &disk.name, async move { Ok(delete_export(&qmp, &id).await?) }).await
}

fn differs(disk: &Disk, part: &std::ops::Range<u64>) -> Failure {
    let text = format!(
        "the read-only disk {} has other contents at the destination: bytes {} to {} differ. Nothing was copied",
        disk.name,
        part.start,
        part.end - 1
    );
    let remedy = "give the destination a copy of the source's, or move the VM without `--compare-read-only`";
    Failure::Problems(vec![Problem::new(ProblemKind::ReadOnlyDiffers, text, remedy)])
}
