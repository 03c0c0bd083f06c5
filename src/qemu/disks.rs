//! The guest's disks as both hosts can speak about them: a name and an address that are the same on
//! source and destination, whatever the nodes are called, and all that is below each of them.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use super::address::Addresses;
use super::client::Qmp;
use super::commands::{BlockDeviceInfo, BlockInfo, CacheInfo, QueryBlock};
use super::error::QmpError;
use super::graph::{Base, Encryption, Graph, Layer, encryption_of_chain};
use super::image::{self, Image, OpenFiles};
use super::transit::{self, Transit};
use super::write_through::{self, WriteThrough};

/// How long the file systems of images may take to answer.
const SEE_DEADLINE: Duration = Duration::from_secs(5);

/// Types of devices for which QEMU takes no permission to write.
const CD_ROMS: [&str; 2] = ["ide-cd", "scsi-cd"];

/// A disk of the guest with something in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// Of `A-Z a-z 0-9 . _ -` only, unique within the machine. The id of the guest's device, or
    /// made of its address.
    pub name: String,
    /// The id that somebody gave the guest's device, or the drive that no device uses.
    pub id: Option<String>,
    /// Where the guest's device is plugged in; see `address.rs`.
    pub address: Option<String>,
    /// The type of the guest's device, such as `scsi-hd`; empty when no device uses the drive.
    pub device: String,
    /// The name of its drive; empty with `-blockdev`.
    pub drive: String,
    /// QEMU's path or id of the guest's device; empty when no device uses the drive.
    pub qdev: String,
    /// The node at the top, `#block...` when QEMU chose the name.
    pub node_name: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Such as `raw` or `qcow2`.
    pub format: String,
    /// The guest can't write to it: its node is read-only, or its device is a CD-ROM's.
    pub read_only: bool,
    /// A medium in a drive, such as a CD-ROM.
    pub removable: bool,
    /// Others than the guest may write to its image as well (`share-rw=on`): it is one of several VMs.
    pub shareable: bool,
    /// The machine's firmware flash: the guest's device state carries its contents.
    pub firmware: bool,
    /// The image, as QEMU names it.
    pub filename: Option<String>,
    /// It stands on a backing file.
    pub backing: bool,
    /// Its topmost image: the node below filters.
    pub image_node: String,
    /// What its topmost image stands on.
    pub base: Option<Base>,
    /// What it occupies on its host, in bytes.
    pub actual_size: Option<u64>,
    /// How what the guest sees lies in the images: the formats on the way to them; none where that is not told.
    pub layout: Option<String>,
    /// The guest's flushes do not reach the image (`cache=unsafe`).
    pub no_flush: bool,
    /// What the guest has written may wait in its host's memory when QEMU has stopped it: nothing forces it to the storage.
    pub held_back: bool,
    /// At the moment the guest's device has no write cache, and its driver nothing to flush; why that is so.
    pub write_through: Option<WriteThrough>,
    /// The best encryption of anything below the device.
    pub encryption: Encryption,
    /// The least encryption of what is written to it from now on.
    pub protection: Encryption,
    /// All nodes below the device, the top one first.
    pub layers: Vec<Layer>,
    /// Whether [`layers`](Self::layers) is all: not with a QEMU that does not tell what is below a node.
    pub layers_known: bool,
    /// The images at the bottom.
    pub images: Vec<Image>,
}

impl Disk {
    /// Whether its device writes to no medium, although the medium's node may allow it.
    pub fn is_cd_rom(&self) -> bool {
        CD_ROMS.contains(&self.device.as_str())
    }
}

/// The guest's disks in QEMU's order, empty drives left out. Works on a running source as on a
/// destination that waits in `inmigrate`, with `-blockdev` as with `-drive`.
pub async fn disks(qmp: &Qmp) -> Result<Vec<Disk>, QmpError> {
    disks_on_made(qmp, Vec::new()).await
}

/// The same of a QEMU that was started on images which this agent has just made: those it knows by their paths.
pub async fn disks_on_made(qmp: &Qmp, made: Vec<PathBuf>) -> Result<Vec<Disk>, QmpError> {
    let blocks = qmp.execute(QueryBlock).await?;
    let graph = Graph::ask(qmp).await?;
    let mut disks: Vec<Disk> = blocks.into_iter().filter_map(disk).collect();
    let mut addresses = Addresses::new(qmp);
    for disk in &mut disks {
        disk.layers = graph.layers(&disk.node_name);
        disk.layers_known = graph.is_known();
        let best = disk.layers.iter().map(|layer| layer.encryption).max().unwrap_or_default();
        disk.encryption = disk.encryption.max(best);
        disk.image_node = graph.topmost(&disk.node_name).to_owned();
        disk.base = graph.base(&disk.node_name);
        disk.layout = graph.layout(&disk.node_name);
        disk.no_flush |= graph.loses_flushes(&disk.node_name);
        disk.held_back = graph.holds_back(&disk.node_name);
        disk.protection = graph.protection(&disk.node_name);
        if let Some(path) = qom_path(&disk.qdev) {
            disk.device = addresses.type_of(&path).await?.unwrap_or_default();
            disk.firmware = disk.device.starts_with("cfi.pflash");
            disk.read_only |= disk.is_cd_rom();
            disk.address = addresses.of(&path).await?;
            disk.shareable = addresses.is_on(&path, "share-rw").await?;
            if disk.write_through.is_some() {
                disk.write_through = Some(write_through::reason(qmp, &path, &disk.device).await?);
            }
        }
        if disk.id.is_none() {
            disk.name = disk.address.as_deref().map_or_else(|| std::mem::take(&mut disk.name), tame);
        }
    }
    separate(&mut disks);
    see_images(qmp, &mut disks, made).await;
    let untold = |image: &&mut Image| transit::is_untold(&image.driver, &image.filename);
    let mut untold: Vec<_> = disks.iter_mut().flat_map(|disk| &mut disk.images).filter(untold).collect();
    if !untold.is_empty() && transit::has_credentials(qmp).await? {
        untold.iter_mut().for_each(|image| image.transit = Transit::Untold);
    }
    Ok(disks)
}

/// Looks at the images. A file system that does not answer is looked at in vain.
async fn see_images(qmp: &Qmp, disks: &mut [Disk], made: Vec<PathBuf>) {
    let pid = qmp.process().pid();
    let layers: Vec<Vec<Layer>> = disks.iter().map(|disk| disk.layers.clone()).collect();
    let look = tokio::task::spawn_blocking(move || {
        let files = pid.map(OpenFiles::of).unwrap_or_default().with_made(made);
        layers.iter().map(|layers| image::images(layers, &files)).collect::<Vec<_>>()
    });
    let seen = tokio::time::timeout(SEE_DEADLINE, look).await.ok().and_then(Result::ok);
    match seen {
        Some(seen) => disks.iter_mut().zip(seen).for_each(|(disk, images)| disk.images = images),
        None => disks.iter_mut().for_each(|disk| disk.images = image::unseen(&disk.layers)),
    }
}

fn disk(block: BlockInfo) -> Option<Disk> {
    let BlockInfo { device, qdev, removable, inserted, .. } = block;
    let BlockDeviceInfo {
        node_name,
        drv,
        ro,
        file,
        backing_file,
        backing_file_depth,
        image,
        cache: CacheInfo { writeback, no_flush, .. },
        ..
    } = inserted?;
    let image = image?;
    let encryption = encryption_of_chain(&drv, &image);
    let filename = [image.filename, file].into_iter().find(|name| !name.is_empty());
    let write_through = (!writeback && !qdev.is_empty()).then_some(WriteThrough::Here);
    Some(Disk {
        name: name(&device, &qdev),
        id: id(&device, &qdev).map(str::to_owned),
        drive: device,
        qdev,
        node_name,
        virtual_size: image.virtual_size,
        format: drv,
        read_only: ro,
        removable,
        filename,
        backing: image.backing_filename.is_some() || backing_file.is_some() || backing_file_depth > 0,
        actual_size: image.actual_size,
        encryption,
        no_flush,
        write_through,
        ..Disk::default()
    })
}

/// The id that somebody gave the guest's device; of a drive that no device uses, its own.
fn id<'a>(device: &'a str, qdev: &'a str) -> Option<&'a str> {
    let below = qdev.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    let id = below.or_else(|| (!qdev.starts_with('/')).then_some(qdev)).filter(|id| !id.is_empty());
    // `none0` and the like are QEMU's own, by the order of options.
    let numbered = device.trim_end_matches(|c: char| c.is_ascii_digit()) == "none";
    id.or_else(|| (qdev.is_empty() && !device.is_empty() && !numbered).then_some(device))
}

fn name(device: &str, qdev: &str) -> String {
    tame(id(device, qdev).unwrap_or(if device.is_empty() { qdev } else { device }))
}

/// Where the guest's device is in QEMU's tree of objects.
fn qom_path(qdev: &str) -> Option<String> {
    match qdev {
        "" => None,
        path if path.starts_with('/') => Some(path.to_owned()),
        id => Some(format!("/machine/peripheral/{id}")),
    }
}

/// Replaces what an export's or node's name can't have.
fn tame(name: &str) -> String {
    let name = name.strip_prefix("/machine/").unwrap_or(name);
    let keeps = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.chars().map(|c| if keeps(c) { c } else { '-' }).collect()
}

/// Makes names unique: by the device's place first, then by a number in QEMU's order.
fn separate(disks: &mut [Disk]) {
    let mut seen: HashMap<String, usize> = HashMap::new();
    for disk in disks.iter() {
        *seen.entry(disk.name.clone()).or_default() += 1;
    }
    for disk in disks.iter_mut().filter(|disk| seen[&disk.name] > 1) {
        disk.name = tame(&disk.qdev);
    }
    let mut taken = HashSet::new();
    for disk in disks.iter_mut() {
        let wanted = disk.name.clone();
        let mut number = 2;
        while !taken.insert(disk.name.clone()) {
            disk.name = format!("{wanted}-{number}");
            number += 1;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn the_name_comes_from_the_guests_device() {
        let cases = [
            ("", "/machine/peripheral/disk0/virtio-backend", "disk0"),
            ("virtio0", "/machine/peripheral/disk0/virtio-backend", "disk0"),
            ("virtio0", "/machine/peripheral-anon/device[1]/virtio-backend", "virtio0"),
            (
                "",
                "/machine/peripheral-anon/device[1]/virtio-backend",
                "peripheral-anon-device-1--virtio-backend",
            ),
            ("", "scsi0-0-0-0", "scsi0-0-0-0"),
            ("ide0-hd0", "/machine/unattached/device[21]", "ide0-hd0"),
            ("lonely", "", "lonely"),
            ("", "ua-\u{fc}/..\n", "ua--"),
        ];
        for (device, qdev, expected) in cases {
            let got = name(device, qdev);
            assert!(got.starts_with(expected), "{device:?} {qdev:?}: {got:?}");
            assert!(got.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{got:?}");
        }
    }

    #[test]
    fn names_never_clash() {
        let block = |qdev: &str| {
            let text =
                format!(r#"{{"device":"","qdev":"{qdev}","inserted":{{"image":{{"virtual-size":1}}}}}}"#);
            disk(serde_json::from_str(&text).unwrap()).unwrap()
        };
        let mut disks = vec![block("a+b"), block("a b"), block("a/b"), block("c")];
        separate(&mut disks);
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["a-b", "a-b-2", "a-b-3", "c"]);
    }
}
