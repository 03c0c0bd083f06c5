//! What a destination grants: an export and a channel for each disk that is copied.

use std::time::Duration;

use tokio::time::timeout;

use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::model::plan::FIRST_DISK_CHANNEL;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::{DiskSpec, Export, Offer};
use crate::qemu::{self, NbdError};

/// Below those of disks.
const NO_CHANNEL: u16 = 0;

/// How long it may take to see which images read as zeroes.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// Exports for the offered disks that are copied, in their order. What comes in band needs none.
pub(crate) fn exports(offer: &Offer) -> Vec<Export> {
    let copied = offer.disks.iter().filter(|d| d.is_copied() && offer.in_band.is_none());
    copied
        .zip(FIRST_DISK_CHANNEL..)
        .map(|(d, channel)| Export { disk: d.name.clone(), export: d.name.clone(), channel, is_fresh: false })
        .collect()
}

/// Exports for the disks that are compared instead; no stream leads to them.
pub(crate) fn compared(offer: &Offer) -> Vec<Export> {
    let export = |d: &DiskSpec| Export {
        disk: d.name.clone(),
        export: d.name.clone(),
        channel: NO_CHANNEL,
        is_fresh: false,
    };
    offer.compared().map(export).collect()
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
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use crate::migrate::model::in_band::InBand;

    #[test]
    fn only_what_is_copied_has_an_export() {
        let spec = |name: &str, read_only| DiskSpec {
            name: name.into(),
            virtual_size: 10,
            format: "raw".into(),
            read_only,
            left_out: name == "disk1",
            incremental: false,
            bitmaps: None,
            place: None,
        };
        let disks = vec![spec("cd0", true), spec("disk1", false), spec("disk0", false)];
        let told = r#"{"vm":"web1","disks":[],"running":true,"qemu":""}"#;
        let offer = Offer { disks, ..serde_json::from_str(told).unwrap() };
        let granted = exports(&offer);
        assert_eq!(granted.len(), 1);
        assert_eq!((granted[0].disk.as_str(), granted[0].channel), ("disk0", FIRST_DISK_CHANNEL));
        assert_eq!(exports(&Offer { in_band: Some(InBand::Blk), ..offer }), []);
    }
}
