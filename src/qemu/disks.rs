//! The guest's disks as both hosts can speak about them: a name that is the same on source and
//! destination, whatever the nodes are called.

use super::client::Qmp;
use super::commands::{BlockDeviceInfo, BlockInfo, QueryBlock};
use super::error::QmpError;
use std::collections::HashMap;

/// A disk of the guest with something in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The same on both hosts if their machines are built alike; of `A-Z a-z 0-9 . _ -` only,
    /// unique within the machine. Comes from the guest's device, not from the image.
    pub name: String,
    /// QEMU's path or id of the guest's device; empty when no device uses the drive.
    pub qdev: String,
    /// The node at the top, `#block...` when QEMU chose the name.
    pub node_name: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Such as `raw` or `qcow2`.
    pub format: String,
    /// The guest can't write to it.
    pub read_only: bool,
    /// A medium in a drive, such as a CD-ROM.
    pub removable: bool,
    /// The machine's firmware flash: the guest's device state carries its contents.
    pub firmware: bool,
    /// The image, as QEMU names it.
    pub filename: Option<String>,
    /// It stands on a backing file.
    pub backing: bool,
    /// What it occupies on its host, in bytes.
    pub actual_size: Option<u64>,
}

/// The guest's disks in QEMU's order, empty drives left out. Works on a running source as on a
/// destination that waits in `inmigrate`, with `-blockdev` as with `-drive`.
///
/// # Errors
/// Those of [`Qmp::execute`].
pub async fn disks(qmp: &Qmp) -> Result<Vec<Disk>, QmpError> {
    let blocks = qmp.execute(QueryBlock).await?;
    let mut disks: Vec<Disk> = blocks.into_iter().filter_map(disk).collect();
    separate(&mut disks);
    Ok(disks)
}

fn disk(block: BlockInfo) -> Option<Disk> {
    let BlockInfo { device, qdev, removable, inserted, .. } = block;
    let BlockDeviceInfo { node_name, drv, ro, file, backing_file, backing_file_depth, image, .. } = inserted?;
    let image = image?;
    let filename = [image.filename, file].into_iter().find(|name| !name.is_empty());
    Some(Disk {
        name: name(&device, &qdev),
        firmware: qdev.contains("system.flash") || device.starts_with("pflash"),
        qdev,
        node_name,
        virtual_size: image.virtual_size,
        format: drv,
        read_only: ro,
        removable,
        filename,
        backing: image.backing_filename.is_some() || backing_file.is_some() || backing_file_depth > 0,
        actual_size: image.actual_size,
    })
}

/// The id of the guest's device; for a device without one the `-drive` name, else its place.
fn name(device: &str, qdev: &str) -> String {
    let below = qdev.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    let id = below.or_else(|| (!qdev.starts_with('/')).then_some(qdev));
    let chosen = id.filter(|id| !id.is_empty()).unwrap_or(if device.is_empty() { qdev } else { device });
    tame(chosen)
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
    let mut taken = std::collections::HashSet::new();
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
