//! The end of a replica's run: its copies end while the guest runs on.

use super::failure::Failure;
use super::state::Source;
use super::{copies, replica};
use crate::migrate::transfer::disk::error::DeltaError;
use crate::migrate::transfer::disk::mirror;
use crate::qemu::delete_bitmap;

/// Ends the copies while the guest runs on: what it writes from now on is the next run's.
pub(crate) async fn complete(source: &mut Source) -> Result<(), Failure> {
    // What was recorded until now is what the mirrors have written when they end.
    let mut written = Vec::new();
    let whole = source.copy.plan.disks.iter().filter(|plan| plan.way.is_mirror());
    for name in whole.map(|plan| plan.disk.name.clone()) {
        let Some(followed) = source.copy.tracking.disks.get(&name) else { continue };
        // An earlier process has come so far, and its mirrors may have ended before what was recorded until now: it
        // stays, and the next run copies it again.
        if followed.bitmaps.has_frozen(&source.guest.qmp).await? {
            continue;
        }
        let (bitmap, _) = followed.bitmaps.freeze(&source.guest.qmp).await.map_err(|e| failed(&name, e))?;
        written.push((followed.bitmaps.node.clone(), bitmap));
    }
    copies::finish(source).await?;
    let disks = source.copy.plan.disks.iter().map(|plan| plan.disk.name.clone());
    mirror::dismiss(&source.guest.qmp, disks).await?;
    for (node, bitmap) in written {
        delete_bitmap(&source.guest.qmp, &node, &bitmap).await?;
    }
    if let Some(known) = &mut source.copy.tracking.replica {
        known.in_step_at = Some(replica::now());
    }
    replica::remember(source)
}

fn failed(disk: &str, source: DeltaError) -> Failure {
    Failure::Delta { disk: disk.to_owned(), source }
}
