//! A look at a guest before it is moved: what would be copied, and how fast it changes. Changes nothing.

use super::replica;
use crate::migrate::checks::disks;
use crate::migrate::guest::process;
use crate::migrate::host::Host;
use crate::migrate::model::options::Options;
use crate::migrate::model::plan;
use crate::migrate::model::prediction::{DiskOutlook, Outlook};
use crate::migrate::model::problem::chain;
use crate::migrate::transfer::disk::tracking::Tracking;
use crate::qemu::{Disk, Qmp, QmpError, QueryStatus, RunState, dirty_rate, nbd_server_runs, ram_in_use};

/// Looks at the guest of `vm` that would go to `peer`; takes a second and more.
///
/// # Errors
/// Why it could not be looked at, in words.
pub async fn outlook(host: &Host, vm: &str, peer: &str, options: &Options) -> Result<Outlook, String> {
    let config = host.vm(vm, "source").map_err(|problem| problem.text)?;
    let peer = &host.peers.find(peer).map_err(|problem| problem.text)?.identity;
    let _not_meanwhile = host.reserve_for_task(vm, "a forecast").map_err(|problem| problem.text)?;
    let (qmp, _events) = process::connect(&config).await.map_err(|e| chain(&e))?;
    let asked = async {
        let status = qmp.execute(QueryStatus).await?.status;
        let disks = crate::qemu::disks(&qmp).await?;
        let known = replica::known(host, (vm, peer), false, qmp.process());
        Ok::<_, QmpError>((status, looked_at(&qmp, &disks, &known, options).await?))
    };
    let (status, disks) = asked.await.map_err(|e| chain(&e))?;
    Ok(Outlook {
        disks,
        ram_bytes: ram_in_use(&qmp).await,
        ram_dirty_bytes_per_s: if status == RunState::Running { dirty_rate(&qmp).await } else { Some(0) },
    })
}

/// The disks that would be copied.
async fn looked_at(
    qmp: &Qmp,
    disks: &[Disk],
    known: &Tracking,
    options: &Options,
) -> Result<Vec<DiskOutlook>, QmpError> {
    // As for a migration, which reads the source's disks itself for it.
    let can_use = known.has_whole() && options.in_band.is_none() && !nbd_server_runs(qmp).await?;
    let copied = plan::copied(disks, &options.disks, options.incremental.as_ref());
    let mut looked_at = Vec::new();
    for disk in disks::offered(disks, options).into_iter().filter(|disk| disk.is_copied()) {
        let planned = copied.iter().find(|copied| copied.name == disk.name);
        let followed = known.disks.get(&disk.name).filter(|_| can_use);
        let changed_bytes = match (followed, planned) {
            (Some(followed), Some(planned)) => followed.changed_bytes(planned, qmp).await?,
            _ => None,
        };
        looked_at.push(DiskOutlook {
            disk: disk.name,
            virtual_bytes: disk.virtual_size,
            allocated_bytes: disk.place.and_then(|place| place.allocated),
            changed_bytes,
        });
    }
    Ok(looked_at)
}
