//! What a destination grants: an export and a channel for each disk that is copied.

use std::time::Duration;

use tokio::time::timeout;

use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::model::plan::FIRST_DISK_CHANNEL;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::{DiskSpec, Export};
use crate::qemu::{self, NbdError};

/// How long it may take to see which images read as zeroes.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// Exports for the offered disks that are copied, in their order.
pub(crate) fn exports(offered: &[DiskSpec]) -> Vec<Export> {
    let copied = offered.iter().filter(|d| d.is_copied());
    copied
        .zip(FIRST_DISK_CHANNEL..)
        .map(|(d, channel)| Export { disk: d.name.clone(), export: d.name.clone(), channel, is_fresh: false })
        .collect()
}

/// Sees which of the images that were made for this migration read as zeroes, so that the source need not write
/// any. One of which that is not known in time is taken for one that does not.
pub(crate) async fn look_for_zeroes(nbd: &NbdServer, exports: &mut [Export], is_made: impl Fn(&str) -> bool) {
    let look = async {
        for export in exports.iter_mut().filter(|export| is_made(&export.disk)) {
            export.is_fresh = reads_as_zeroes(nbd, export).await.unwrap_or_else(|error| {
                tracing::info!(disk = export.disk, error = chain(&error), "zeroes are written to it as well");
                false
            });
        }
    };
    if timeout(LOOK_DEADLINE, look).await.is_err() {
        tracing::info!("whether the images are empty was not known in time: zeroes are written as well");
    }
}

async fn reads_as_zeroes(nbd: &NbdServer, export: &Export) -> Result<bool, NbdError> {
    qemu::reads_as_zeroes(nbd.connect()?, &export.export).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_copied_has_an_export() {
        let spec = |name: &str, read_only| DiskSpec {
            name: name.into(),
            virtual_size: 10,
            format: "raw".into(),
            read_only,
            left_out: name == "disk1",
            incremental: false,
            place: None,
        };
        let granted = exports(&[spec("cd0", true), spec("disk1", false), spec("disk0", false)]);
        assert_eq!(granted.len(), 1);
        assert_eq!((granted[0].disk.as_str(), granted[0].channel), ("disk0", FIRST_DISK_CHANNEL));
    }
}
