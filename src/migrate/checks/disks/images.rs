//! Images of disks, in words and by what is written to them.

use crate::qemu::{Disk, Image};

/// Images that the guest's writes go to.
pub(super) fn written(disk: &Disk) -> impl Iterator<Item = &Image> {
    disk.images.iter().filter(|image| !disk.read_only && !image.backing && !image.read_only)
}

/// Drivers that keep nothing anywhere.
pub(super) fn is_nothing(image: &Image) -> bool {
    matches!(image.driver.as_str(), "null-co" | "null-aio")
}

/// Names in a sentence.
pub(super) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}
