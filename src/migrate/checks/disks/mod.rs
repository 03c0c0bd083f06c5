//! The disks of both machines, compared before anything is moved: which one is which, whether what
//! the guest has may be copied there, and whether it arrives where it should. Changes nothing.
//!
//! ```text
//! source       offered, source_findings ──(Offer)──► destination  pair, destination_findings
//! ```

pub(crate) mod bitmaps;
mod cache;
mod compare;
mod encryption;
mod flash;
mod images;
pub(crate) mod in_band;
mod incremental;
mod left_out;
mod offered;
mod pairing;
mod room;
mod sharing;
mod source;

pub(crate) use compare::destination_findings;
pub(crate) use flash::offered as offered_flash;
pub(crate) use left_out::unknown as unknown_names;
pub(crate) use offered::{allocated, offered};
pub(crate) use pairing::pair;
pub(crate) use source::source_findings;

/// Disks that one migration may copy.
pub(crate) const DISKS_MAX: usize = 256;

#[cfg(test)]
mod sample {
    use crate::migrate::protocol::message::{DiskPlace, DiskSpec};
    use crate::qemu::{Disk, Image, Transit};

    /// A disk of the destination with an id of its own.
    pub(crate) fn have(name: &str, size: u64, format: &str) -> Disk {
        Disk {
            name: name.into(),
            id: Some(name.into()),
            node_name: name.into(),
            virtual_size: size,
            format: format.into(),
            layers_known: true,
            ..Disk::default()
        }
    }

    /// The same, offered.
    pub(crate) fn want(name: &str, size: u64, format: &str) -> DiskSpec {
        let place = DiskPlace { id: Some(name.into()), ..DiskPlace::default() };
        DiskSpec {
            name: name.into(),
            virtual_size: size,
            format: format.into(),
            read_only: false,
            left_out: false,
            incremental: false,
            bitmaps: None,
            place: Some(place),
        }
    }

    pub(crate) fn image(keys: &[&str]) -> Image {
        Image {
            filename: "/srv/disk.raw".into(),
            driver: "file".into(),
            backing: false,
            read_only: false,
            temporary: false,
            seen: None,
            on_host: None,
            transit: Transit::None,
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        }
    }
}
