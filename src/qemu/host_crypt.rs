//! Whether the host itself encrypts what lies on a block device or in a file (dm-crypt): nothing in QEMU tells of it.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

const DEVICES: &str = "/sys/dev/block";
/// Devices below each other.
const DEPTH_MAX: usize = 8;
/// Of dm-crypt's family, and without encryption.
const CLEAR: [&str; 3] = ["CRYPT-VERITY", "CRYPT-INTEGRITY", "CRYPT-SUBDEV"];

/// None where that is not to be seen: on a network, or on a file system of several devices.
pub(super) fn encrypted_by_host(metadata: &Metadata) -> Option<bool> {
    of_file(Path::new(DEVICES), metadata, 0)
}

fn of_file(devices: &Path, metadata: &Metadata, depth: usize) -> Option<bool> {
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    let folder = devices.join(format!("{}:{}", major(device), minor(device)));
    of_device(devices, &fs::canonicalize(folder).ok()?, depth)
}

/// By its folder in `/sys`, without links on the way to it.
fn of_device(devices: &Path, folder: &Path, depth: usize) -> Option<bool> {
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    };
    if depth >= DEPTH_MAX {
        return None;
    }
    if folder.join("partition").exists() {
        return of_device(devices, folder.parent()?, depth + 1);
    }
    if read("dm/uuid").is_some_and(|id| id.starts_with("CRYPT-") && !CLEAR.iter().any(|c| id.starts_with(c)))
    {
        return Some(true);
    }
    if let Some(file) = read("loop/backing_file") {
        return of_file(devices, &fs::metadata(file).ok()?, depth + 1);
    }
    let below: Vec<PathBuf> = fs::read_dir(folder.join("slaves"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    // On several devices it may lie on any of them.
    let mut all = below.iter().map(|path| of_device(devices, &fs::canonicalize(path).ok()?, depth + 1));
    match below.is_empty() {
        true => Some(false),
        false => all.try_fold(true, |so_far, one| Some(so_far && one?)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A device with this id and these below it.
    fn device(root: &Path, name: &str, id: Option<&str>, below: &[&str]) -> PathBuf {
        let folder = root.join(name);
        fs::create_dir_all(folder.join("dm")).unwrap();
        fs::create_dir_all(folder.join("slaves")).unwrap();
        if let Some(id) = id {
            fs::write(folder.join("dm/uuid"), format!("{id}\n")).unwrap();
        }
        below
            .iter()
            .for_each(|b| symlink(root.join(b), folder.join("slaves").join(b.replace('/', "-"))).unwrap());
        folder
    }

    #[test]
    fn dm_crypt_is_found_below_volumes_partitions_and_arrays() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let of = |name: &str, id: Option<&str>, below: &[&str]| {
            of_device(&root, &device(&root, name, id, below), 0)
        };
        assert_eq!(of("sda", None, &[]), Some(false));
        fs::create_dir_all(root.join("sda/sda1")).unwrap();
        fs::write(root.join("sda/sda1/partition"), "1\n").unwrap();
        assert_eq!(of_device(&root, &root.join("sda/sda1"), 0), Some(false));
        assert_eq!(of("crypt", Some("CRYPT-LUKS2-1234-luks"), &["sda/sda1"]), Some(true));
        assert_eq!(of("sdb", None, &[]), Some(false));
        assert_eq!(of("verity", Some("CRYPT-VERITY-12-v"), &["sdb"]), Some(false));
        assert_eq!(of("lv", Some("LVM-1"), &["crypt"]), Some(true));
        assert_eq!(of("clear", Some("LVM-2"), &["sdb"]), Some(false));
        assert_eq!(of("mixed", Some("LVM-3"), &["crypt", "sdb"]), Some(false), "it may lie on either");
        assert_eq!(of("lost", Some("LVM-4"), &["gone"]), None);
        let mut above = "sdb".to_owned();
        for depth in 0..DEPTH_MAX {
            let name = format!("deep{depth}");
            device(&root, &name, None, &[&above]);
            above = name;
        }
        assert_eq!(of_device(&root, &root.join(above), 0), None, "no circle is followed for ever");
    }

    #[test]
    fn what_lies_on_no_device_of_this_host_is_not_known() {
        assert_eq!(encrypted_by_host(&fs::metadata("/proc/self/stat").unwrap()), None);
    }
}
