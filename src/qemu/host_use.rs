//! Whether the host itself uses a block device or file that a QEMU has open: it has it mounted, swaps to it, or has
//! built something on it. A copy would be written over what is there.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::block_devices::{self, SYSTEM};

/// Whose mounts are looked at: the host's, as far as this agent may, and those that it has itself.
const PROCESSES: [&str; 2] = ["/proc/1", "/proc/self"];
const SWAPS: &str = "/proc/swaps";
/// Partitions, and loop devices on files, below each other.
const DEPTH_MAX: usize = 3;

/// How the host uses it; none as far as this agent sees.
pub(super) fn used_by_host(metadata: &Metadata) -> Option<String> {
    match metadata.file_type().is_block_device() {
        true => device_used(metadata.rdev()),
        false => loops(metadata).into_iter().find_map(|device| of_device(device, 1)),
    }
}

/// The same of a block device by its number.
pub(super) fn device_used(device: u64) -> Option<String> {
    of_device(device, 0)
}

fn of_device(device: u64, depth: usize) -> Option<String> {
    let number = format!("{}:{}", major(device), minor(device));
    let folder = PathBuf::from(SYSTEM).join("dev/block").join(&number);
    let name = fs::canonicalize(&folder).ok();
    let name =
        name.as_deref().and_then(Path::file_name).map_or(number.clone(), |n| n.to_string_lossy().into());
    let mounts =
        PROCESSES.map(|process| fs::read_to_string(format!("{process}/mountinfo")).unwrap_or_default());
    if let Some(place) =
        mounts.iter().flat_map(|all| all.lines()).find_map(|line| mounted(line, &number, device))
    {
        return Some(format!("{name} is mounted there at {place}"));
    }
    let swaps = fs::read_to_string(SWAPS).unwrap_or_default();
    let mut swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    if swaps.any(|path| is_device(path, device)) {
        return Some(format!("{name} is swap space there"));
    }
    if let Some(holder) = names(&folder.join("holders")).next() {
        return Some(format!("{name} is part of {holder} there"));
    }
    if depth >= DEPTH_MAX {
        return None;
    }
    let parts = names(&folder).filter(|name| folder.join(name).join("partition").exists());
    parts
        .filter_map(|part| block_devices::number(&folder.join(part)))
        .find_map(|part| of_device(part, depth + 1))
}

/// Where a line of `mountinfo` has this device mounted.
fn mounted<'a>(line: &'a str, number: &str, device: u64) -> Option<&'a str> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (of_line, place) = (left.next()?, left.nth(1)?);
    // A file system of several devices has a number of its own.
    (of_line == number || is_device(right.split(' ').nth(1)?, device)).then_some(place)
}

fn is_device(path: &str, device: u64) -> bool {
    let is_it = |found: Metadata| found.file_type().is_block_device() && found.rdev() == device;
    let by_name = || {
        let folder = block_devices::folder_of(Path::new(SYSTEM), device);
        folder.is_some_and(|folder| block_devices::is_named(&folder, Path::new(path)))
    };
    path.starts_with("/dev/") && fs::metadata(path).map_or_else(|_| by_name(), is_it)
}

/// The loop devices on a file.
fn loops(file: &Metadata) -> Vec<u64> {
    let all = PathBuf::from(SYSTEM).join("block");
    let found = names(&all).filter(|name| name.starts_with("loop")).filter_map(|name| {
        let folder = all.join(name);
        let backing = fs::read_to_string(folder.join("loop/backing_file")).ok()?;
        let backing = fs::metadata(backing.trim_end_matches('\n')).ok()?;
        let is_same = (backing.dev(), backing.ino()) == (file.dev(), file.ino());
        is_same.then(|| block_devices::number(&folder))?
    });
    found.collect()
}

fn names(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_device_is_found_by_its_number() {
        let line = "36 28 7:3 / /srv/vm rw,relatime shared:1 - ext4 /dev/nowhere rw";
        assert_eq!(mounted(line, "7:3", 0), Some("/srv/vm"));
        assert_eq!(mounted(line, "7:4", 0), None);
        assert_eq!(mounted("nonsense", "7:3", 0), None);
    }

    #[test]
    fn a_file_that_nobody_mounts_is_not_used() {
        let file = tempfile::NamedTempFile::new();
        let metadata = file.as_ref().ok().and_then(|file| file.as_file().metadata().ok());
        assert_eq!(metadata.map(|metadata| used_by_host(&metadata)), Some(None));
    }
}
