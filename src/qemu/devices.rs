//! The guest's devices whose contents lie outside of QEMU's block layer: QEMU moves the device, and
//! nobody moves what is in it.

use super::address::Addresses;
use super::client::Qmp;
use super::commands::QomList;
use super::error::QmpError;

/// Where QEMU keeps the devices that somebody has asked for.
const FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What a device's contents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// A disk behind another process or the host's kernel.
    Disk,
    /// A folder of the host.
    Folder,
    /// A device of the host, to which the guest's writes go without QEMU's block layer.
    HostDevice,
    /// A USB device of the host. QEMU's stream takes it along as if it were at the destination: there it is pulled out of
    /// the guest, and what fits is plugged in.
    HostUsb,
    /// A USB device at the other end of a connection of this QEMU's, which does not go along.
    RedirectedUsb,
}

/// A device whose contents QEMU does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// Its id, or its address.
    pub name: String,
    /// Its type, such as `vhost-user-blk-pci`.
    pub device: String,
    pub contents: Contents,
}

/// The devices whose contents lie outside.
pub async fn outside(qmp: &Qmp) -> Result<Vec<Outside>, QmpError> {
    let mut found = Vec::new();
    let mut addresses = Addresses::new(qmp);
    for folder in FOLDERS {
        for child in qmp.execute(QomList { path: folder.to_owned() }).await? {
            let Some(device) = child.kind.strip_prefix("child<").and_then(|rest| rest.strip_suffix('>'))
            else {
                continue;
            };
            let Some(contents) = contents(device) else { continue };
            let path = format!("{folder}/{}", child.name);
            // One that nobody uses has nothing in it.
            if contents == Contents::RedirectedUsb && !addresses.is_on(&path, "attached").await? {
                continue;
            }
            let name = match folder {
                "/machine/peripheral" => child.name,
                _ => addresses.of(&path).await?.map_or_else(String::new, |address| format!("at {address}")),
            };
            found.push(Outside { name, device: device.to_owned(), contents });
        }
    }
    Ok(found)
}

fn contents(device: &str) -> Option<Contents> {
    let disks = ["vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "vhost-vdpa-device", "vhost-user-vdpa"];
    let folders = ["vhost-user-fs", "virtio-9p", "usb-mtp"];
    let of_host = ["scsi-block", "scsi-generic"];
    let begins = |names: &[&str]| names.iter().any(|name| device.starts_with(name));
    if begins(&disks) {
        Some(Contents::Disk)
    } else if begins(&folders) {
        Some(Contents::Folder)
    } else if begins(&of_host) {
        Some(Contents::HostDevice)
    } else {
        match device {
            "usb-host" => Some(Contents::HostUsb),
            "usb-redir" => Some(Contents::RedirectedUsb),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_is_told_by_the_devices_type() {
        assert_eq!(contents("vhost-user-blk-pci"), Some(Contents::Disk));
        assert_eq!(contents("vhost-scsi-pci-non-transitional"), Some(Contents::Disk));
        assert_eq!(contents("virtio-9p-pci"), Some(Contents::Folder));
        assert_eq!(contents("vhost-user-fs-ccw"), Some(Contents::Folder));
        assert_eq!(contents("scsi-block"), Some(Contents::HostDevice));
        assert_eq!(contents("usb-host"), Some(Contents::HostUsb));
        assert_eq!(contents("usb-redir"), Some(Contents::RedirectedUsb));
        for inside in [
            "virtio-blk-pci",
            "scsi-hd",
            "virtio-scsi-pci",
            "nvme",
            "ide-cd",
            "usb-storage",
            "usb-hub",
            "vhost-vsock-pci",
        ] {
            assert_eq!(contents(inside), None, "{inside}");
        }
    }
}
