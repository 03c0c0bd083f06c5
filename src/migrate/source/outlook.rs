//! A look at a guest before it is moved: what would be copied, and how fast it changes. Changes nothing.

use uuid::Uuid;

use crate::migrate::checks::disks;
use crate::migrate::guest::process;
use crate::migrate::host::Host;
use crate::migrate::model::options::Options;
use crate::migrate::model::prediction::{DiskOutlook, Outlook};
use crate::migrate::model::problem::chain;
use crate::qemu::{QueryStatus, RunState, dirty_rate, ram_in_use};

/// Looks at the guest of `vm`; takes a second and more.
///
/// # Errors
/// Why it could not be looked at, in words.
pub async fn outlook(host: &Host, vm: &str, options: &Options) -> Result<Outlook, String> {
    let config = host.vm(vm, "source").map_err(|problem| problem.text)?;
    let _not_meanwhile = host.reserve(vm, Uuid::new_v4()).map_err(|problem| problem.text)?;
    let (qmp, _events) = process::connect(&config).await.map_err(|e| chain(&e))?;
    let asked = async {
        let status = qmp.execute(QueryStatus).await?.status;
        Ok::<_, crate::qemu::QmpError>((status, crate::qemu::disks(&qmp).await?))
    };
    let (status, disks) = asked.await.map_err(|e| chain(&e))?;
    let copied = disks::offered(&disks, options).into_iter().filter(|disk| disk.is_copied());
    let disks = copied.map(|disk| DiskOutlook {
        disk: disk.name,
        virtual_bytes: disk.virtual_size,
        allocated_bytes: disk.place.and_then(|place| place.allocated),
    });
    Ok(Outlook {
        disks: disks.collect(),
        ram_bytes: ram_in_use(&qmp).await,
        ram_dirty_bytes_per_s: if status == RunState::Running { dirty_rate(&qmp).await } else { Some(0) },
    })
}
