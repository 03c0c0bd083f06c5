//! What a destination grants: an export and a channel for each disk that is copied.

use crate::migrate::model::plan::FIRST_DISK_CHANNEL;
use crate::migrate::protocol::message::{DiskSpec, Export};

/// Exports for the offered disks that are copied, in their order.
pub(crate) fn exports(offered: &[DiskSpec]) -> Vec<Export> {
    let copied = offered.iter().filter(|d| d.is_copied());
    copied
        .zip(FIRST_DISK_CHANNEL..)
        .map(|(d, channel)| Export { disk: d.name.clone(), export: d.name.clone(), channel })
        .collect()
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
            place: None,
        };
        let granted = exports(&[spec("cd0", true), spec("disk1", false), spec("disk0", false)]);
        assert_eq!(granted.len(), 1);
        assert_eq!((granted[0].disk.as_str(), granted[0].channel), ("disk0", FIRST_DISK_CHANNEL));
    }
}
