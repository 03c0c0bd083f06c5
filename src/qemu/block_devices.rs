//! Block devices of this kernel, by their numbers and by the names that they have in `/dev`. An agent may have another
//! `/dev` than the host (`PrivateDevices=` of systemd); `/sys` is the same for all.

use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{major, makedev, minor};

pub(super) const SYSTEM: &str = "/sys";

/// The folder of a block device in this `/sys`, without links on the way to it.
pub(super) fn folder_of(system: &Path, number: u64) -> Option<PathBuf> {
    fs::canonicalize(system.join("dev/block").join(format!("{}:{}", major(number), minor(number)))).ok()
}

/// The same by the path that the host has it at: by the kernel's name for it, or by that of the device mapper's table
/// (`/dev/mapper/NAME`, `/dev/GROUP/VOLUME`).
pub(super) fn folder_named(system: &Path, path: &Path) -> Option<PathBuf> {
    let name = path.strip_prefix("/dev").ok()?;
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return None;
    }
    let (name, all) = (name.to_str().filter(|name| !name.is_empty())?, system.join("class/block"));
    if let Ok(found) = fs::canonicalize(all.join(name.replace('/', "!"))) {
        return Some(found);
    }
    let table = Table::named(name)?;
    let devices = fs::read_dir(&all).into_iter().flatten().flatten().map(|entry| entry.path());
    fs::canonicalize(devices.into_iter().find(|device| table.is_of(device))?).ok()
}

/// Whether the device that has this folder is at that path of the host.
pub(super) fn is_named(folder: &Path, path: &Path) -> bool {
    let Some(name) = path.strip_prefix("/dev").ok().and_then(Path::to_str) else { return false };
    let kernels = name.replace('/', "!");
    folder.file_name().is_some_and(|own| *own == *kernels)
        || Table::named(name).is_some_and(|table| table.is_of(folder))
}

/// A table of the device mapper.
struct Table {
    name: String,
    /// How its identifier begins.
    begin: &'static str,
}

impl Table {
    /// By a path below `/dev`.
    fn named(path: &str) -> Option<Self> {
        let (folder, volume) = path.split_once('/').filter(|(_, rest)| !rest.contains('/'))?;
        let doubled = |name: &str| name.replace('-', "--");
        Some(match folder {
            "mapper" => Self { name: volume.to_owned(), begin: "" },
            group => Self { name: format!("{}-{}", doubled(group), doubled(volume)), begin: "LVM-" },
        })
    }

    fn is_of(&self, device: &Path) -> bool {
        let is_named = text(&device.join("dm/name")).is_some_and(|name| name == self.name);
        is_named && text(&device.join("dm/uuid")).unwrap_or_default().starts_with(self.begin)
    }
}

/// The number of the device that has this folder.
pub(super) fn number(folder: &Path) -> Option<u64> {
    let text = text(&folder.join("dev"))?;
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// A file of `/sys`.
pub(super) fn text(file: &Path) -> Option<String> {
    Some(fs::read_to_string(file).ok()?.trim_end_matches('\n').to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_device_is_found_by_each_name_that_it_has() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let device = |name: &str, number: &str, table: Option<[&str; 2]>| {
            let folder = root.join("devices").join(name);
            fs::create_dir_all(folder.join("dm")).unwrap();
            fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
            if let Some([table, id]) = table {
                fs::write(folder.join("dm/name"), format!("{table}\n")).unwrap();
                fs::write(folder.join("dm/uuid"), format!("{id}\n")).unwrap();
            }
            for place in ["class/block", "dev/block"] {
                fs::create_dir_all(root.join(place)).unwrap();
                let link = if place.starts_with("dev") { number } else { name };
                symlink(&folder, root.join(place).join(link)).unwrap();
            }
            folder
        };
        let plain = device("sda1", "8:1", None);
        let crypt = device("dm-0", "253:0", Some(["luks-1", "CRYPT-LUKS2-1"]));
        let volume = device("dm-1", "253:1", Some(["my--group-web1--root", "LVM-1"]));
        device("dm-2", "253:2", Some(["other-web1", "CRYPT-PLAIN-2"]));
        let named = |path: &str| folder_named(&root, Path::new(path));
        assert_eq!(named("/dev/sda1"), Some(plain.clone()));
        assert_eq!(named("/dev/mapper/luks-1"), Some(crypt.clone()));
        assert_eq!(named("/dev/dm-0"), Some(crypt));
        assert_eq!(named("/dev/my-group/web1-root"), Some(volume));
        for other in ["/dev/other/web1", "/dev/sda2", "/dev", "/dev/../sda1", "/srv/sda1", "/dev/mapper/x/y"]
        {
            assert_eq!(named(other), None, "{other}");
        }
        assert_eq!(number(&plain), Some(makedev(8, 1)));
        assert_eq!(folder_of(&root, makedev(8, 1)), Some(plain));
        assert_eq!(folder_of(&root, makedev(8, 2)), None);
    }
}
