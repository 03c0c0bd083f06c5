//! What the source says of its disks to the other host.

use super::bitmaps;
use super::images::is_nothing;
use crate::migrate::model::disk_choice::is_copyable;
use crate::migrate::model::options::Options;
use crate::migrate::model::plan;
use crate::migrate::protocol::message::{DiskPlace, DiskSpec, Storage};
use crate::qemu::{Disk, HostEncryption, Image, Layer, Transit, WriteThrough};

/// Bytes that the names of all storages may take in one offer.
const STORAGE_BYTES_MAX: usize = 96 * 1024;
/// What one of them takes in JSON beside its name.
const STORAGE_BYTES_BESIDES: usize = 32;

/// The disks but for firmware flash, whose contents travel with the RAM.
pub(crate) fn offered(disks: &[Disk], options: &Options) -> Vec<DiskSpec> {
    let mut room = STORAGE_BYTES_MAX;
    disks.iter().filter(|disk| !disk.firmware).map(|disk| spec(disk, options, &mut room)).collect()
}

fn spec(disk: &Disk, options: &Options, room: &mut usize) -> DiskSpec {
    let (storages, hides_storage) = storages(disk, room);
    let place = DiskPlace {
        id: disk.id.clone(),
        address: disk.address.clone(),
        drive: Some(disk.drive.clone()).filter(|name| !name.is_empty()),
        backing: disk.backing,
        encryption: disk.encryption,
        host_encrypts: host_encryption(disk, options) == HostEncryption::Yes,
        host_encryption_unknown: host_encryption(disk, options) == HostEncryption::Unknown,
        encrypted_in_transit: copied_images(disk, options)
            .any(|image| matches!(image.transit, Transit::Encrypted | Transit::Untold)),
        no_flush: disk.no_flush,
        stored: disk.no_flush && !disk.held_back,
        write_through: disk.write_through == Some(WriteThrough::Here),
        layout: disk.layout.clone(),
        allocated: allocated(disk, options),
        storages,
        hides_storage,
    };
    let left_out = options.disks.leaves_out(disk);
    DiskSpec {
        name: disk.name.clone(),
        virtual_size: disk.virtual_size,
        format: disk.format.clone(),
        read_only: disk.read_only,
        left_out,
        bitmaps: bitmaps::offered(disk)
            .filter(|_| is_copyable(disk) && !left_out && options.in_band.is_none()),
        incremental: is_copyable(disk) && !left_out && is_incremental(disk, options),
        place: Some(place),
    }
}

/// Of the images that become one at the destination.
fn host_encryption(disk: &Disk, options: &Options) -> HostEncryption {
    if disk.images.is_empty() {
        return HostEncryption::Unknown;
    }
    let images = copied_images(disk, options).filter(|image| !is_nothing(image));
    HostEncryption::of_any(images.map(Image::host_encryption))
}

/// The images of a disk, its backing files included unless only its topmost image is copied.
fn copied_images<'a>(disk: &'a Disk, options: &Options) -> impl Iterator<Item = &'a Image> {
    let is_incremental = is_incremental(disk, options);
    disk.images.iter().filter(move |image| !(image.backing && is_incremental))
}

fn is_incremental(disk: &Disk, options: &Options) -> bool {
    plan::base(disk, options.incremental.as_ref()).is_some()
}

/// What the images of a disk occupy together, its backing files included unless only its topmost image is copied;
/// at most its size.
pub(crate) fn allocated(disk: &Disk, options: &Options) -> Option<u64> {
    let is_copied = |layer: &&Layer| layer.is_leaf && !(layer.backing && is_incremental(disk, options));
    let images = disk.layers.iter().filter(is_copied).map(|layer| layer.actual_size);
    let sum = images.into_iter().try_fold(0_u64, |sum, size| Some(sum.saturating_add(size?)));
    let top = if disk.layers_known && !disk.layers.is_empty() { sum } else { disk.actual_size };
    Some(top?.min(disk.virtual_size))
}

fn storages(disk: &Disk, room: &mut usize) -> (Vec<Storage>, bool) {
    let mut storages = Vec::new();
    let mut hides = !disk.layers_known;
    for image in disk.images.iter().filter(|image| !is_nothing(image)) {
        hides |= image.keys.is_empty();
        for key in &image.keys {
            let Some(rest) = room.checked_sub(key.len() + STORAGE_BYTES_BESIDES) else {
                hides = true;
                break;
            };
            *room = rest;
            let written = !disk.read_only && !image.backing && !image.read_only;
            storages.push(Storage { key: key.clone(), written });
        }
    }
    (storages, hides)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image};
    use crate::qemu::OnHost;

    #[test]
    fn an_offer_stays_small_and_says_what_it_leaves_out() {
        let long = "x".repeat(1000);
        let images = || (0..4).map(|_| image(&[&long])).collect::<Vec<Image>>();
        let disks: Vec<Disk> =
            (0..256).map(|n| Disk { images: images(), ..have(&n.to_string(), 1, "raw") }).collect();
        let specs = offered(&disks, &Options::default());
        let places: Vec<_> = specs.iter().map(|spec| spec.place.as_ref().unwrap()).collect();
        let bytes: usize = places.iter().flat_map(|p| &p.storages).map(|s| s.key.len()).sum();
        assert!(bytes <= STORAGE_BYTES_MAX);
        assert!(!places[0].hides_storage && places[255].hides_storage);
    }

    #[test]
    fn firmware_is_not_offered_and_an_unknown_image_is_hidden() {
        let flash = Disk { firmware: true, ..have("flash", 1, "raw") };
        let unseen = Disk { images: vec![image(&[])], ..have("disk0", 1, "raw") };
        let specs = offered(&[flash, unseen], &Options::default());
        assert_eq!(specs.len(), 1);
        assert!(specs[0].place.as_ref().unwrap().hides_storage);
    }

    #[test]
    fn whether_the_host_encrypts_is_offered_in_three_words() {
        use HostEncryption::{No, Unknown, Yes};
        let on = |encryption| {
            let on_host = Some(OnHost { used: None, encryption });
            Image { on_host, ..image(&[]) }
        };
        let told = |images: Vec<Image>| {
            let disk = Disk { images, ..have("disk0", 1, "raw") };
            let place = offered(&[disk], &Options::default()).remove(0).place.unwrap();
            (place.host_encrypts, place.host_encryption_unknown)
        };
        assert_eq!(told(vec![on(Yes)]), (true, false));
        assert_eq!(told(vec![on(No)]), (false, false));
        assert_eq!(told(vec![on(Unknown)]), (false, true));
        assert_eq!(told(vec![image(&[])]), (false, true), "what is not seen is not taken for no");
        assert_eq!(told(Vec::new()), (false, true), "nor what QEMU does not tell");
        let backing = Image { backing: true, ..on(Yes) };
        assert_eq!(told(vec![on(Unknown), backing]), (true, false), "it becomes part of the copy");
        assert_eq!(told(vec![on(No), on(Unknown)]), (false, true));
        let nothing = Image { driver: "null-co".into(), ..image(&[]) };
        assert_eq!(told(vec![nothing]), (false, false));
    }

    #[test]
    fn what_is_encrypted_on_its_way_is_offered_as_such() {
        for (transit, expected) in [
            (Transit::Encrypted, true),
            (Transit::InClear, false),
            (Transit::Unknown, false),
            (Transit::None, false),
        ] {
            let remote = Image { transit, ..image(&[]) };
            let disk = Disk { images: vec![remote], ..have("disk0", 1, "raw") };
            let place = offered(&[disk], &Options::default()).remove(0).place.unwrap();
            assert_eq!(place.encrypted_in_transit, expected, "{transit:?}");
        }
    }
}
