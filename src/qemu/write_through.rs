//! Disks without a write cache: what the guest has written is kept when the write has ended, and its driver flushes
//! nothing. QEMU's stream brings along what the driver was told, and not that it is so: a driver of virtio-blk or SCSI
//! that has once read that there is no cache flushes nothing at the destination either.

use serde_json::Value;

use super::client::Qmp;
use super::commands::XQueryVirtioStatus;
use super::error::QmpError;

/// The type of the device of which QEMU itself sets the mode by what the driver in the guest knows.
const VIRTIO_BLK: &str = "virtio-blk-device";
/// What a driver has agreed on that reads and sets the mode by itself.
const SETS_MODE: &str = "VIRTIO_BLK_F_CONFIG_WCE";

/// Why a disk has no write cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteThrough {
    /// It was set up so, or the guest has set it so: on this host alone.
    Here,
    /// The driver of virtio-blk in the guest, a firmware's mostly, knows of no cache and no flush, or there is none yet.
    /// QEMU goes by that on whatever host the guest runs.
    Driver,
}

/// Why the disk of this device has none.
pub(super) async fn reason(qmp: &Qmp, path: &str, device: &str) -> Result<WriteThrough, QmpError> {
    if device != VIRTIO_BLK {
        return Ok(WriteThrough::Here);
    }
    match qmp.execute(XQueryVirtioStatus { path: path.to_owned() }).await {
        Ok(status) => Ok(by_driver(&status)),
        // A QEMU before 7.2.
        Err(e) if e.desc().is_some() => Ok(WriteThrough::Here),
        Err(e) => Err(e),
    }
}

/// By what the device and the driver have agreed on; what is not told counts as the worse.
fn by_driver(status: &Value) -> WriteThrough {
    let agreed = status["guest-features"]["dev-features"].as_array();
    let sets = |agreed: &Vec<Value>| {
        agreed.iter().any(|feature| feature.as_str().is_some_and(|name| name.starts_with(SETS_MODE)))
    };
    match agreed.is_some_and(|agreed| !sets(agreed)) {
        true => WriteThrough::Driver,
        false => WriteThrough::Here,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// In the words of QEMU 7.2 and 10.
    #[test]
    fn a_driver_that_knows_of_the_mode_is_told_from_one_that_does_not() {
        let status =
            |features: Value| json!({"guest-features": {"transports": [], "dev-features": features}});
        let linux = status(json!([
            "VIRTIO_BLK_F_CONFIG_WCE: Cache writeback and writethrough modes supported",
            "VIRTIO_BLK_F_FLUSH: Flush command supported"
        ]));
        assert_eq!(by_driver(&linux), WriteThrough::Here);
        let firmware = status(json!(["VIRTIO_BLK_F_BLK_SIZE: Block size of disk available"]));
        assert_eq!(by_driver(&firmware), WriteThrough::Driver);
        assert_eq!(by_driver(&status(json!([]))), WriteThrough::Driver, "nobody has read the mode yet");
        for untold in [json!({}), json!(null), status(json!("all of them"))] {
            assert_eq!(by_driver(&untold), WriteThrough::Here, "{untold}");
        }
    }
}
