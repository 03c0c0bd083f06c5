//! The file systems that a process has mounted, by its `mountinfo` (proc(5)): where a path leads, and what a file or
//! block device is known by on every host that uses it.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::storage;

/// File systems that one host alone has mounted. Of any other, hosts may share the files.
const LOCAL: [&str; 33] = [
    "aufs",
    "bcachefs",
    "btrfs",
    "devtmpfs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "fuse.bindfs",
    "fuse.encfs",
    "fuse.fuse-overlayfs",
    "fuse.gocryptfs",
    "fuse.mergerfs",
    "fuse.unionfs",
    "fuseblk",
    "hfsplus",
    "hugetlbfs",
    "iso9660",
    "jfs",
    "msdos",
    "nilfs2",
    "ntfs",
    "ntfs3",
    "overlay",
    "ramfs",
    "reiserfs",
    "squashfs",
    "tmpfs",
    "vfat",
    "xfs",
    "zfs",
];

/// The `mountinfo` of a process; none where it may not be read.
pub(super) fn mountinfo(process: &str) -> Option<String> {
    let bytes = fs::read(format!("/proc/{process}/mountinfo")).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Names of a file or block device; the mounts are those of a process in whose mount namespace it has this path.
pub(super) fn keys_of_file(metadata: &Metadata, path: &Path, mountinfo: &str) -> Vec<String> {
    let keys = match metadata.file_type().is_block_device() {
        true => storage::keys_of_device(metadata.rdev(), 0),
        false => keys_of_inode(metadata, path, mountinfo),
    };
    keys.into_iter().map(storage::bounded).collect()
}

fn keys_of_inode(metadata: &Metadata, path: &Path, mountinfo: &str) -> Vec<String> {
    let (device, inode) = (metadata.dev(), metadata.ino());
    let local = storage::boot_id().map(|boot| format!("inode:{boot}:{device}:{inode}"));
    local.into_iter().chain(shared_file(mountinfo, (device, inode), path)).collect()
}

/// A mounted file system, in the kernel's words: `\040` for a space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount<'a> {
    /// Of this mount, within one running kernel.
    pub(super) id: u64,
    /// `MAJOR:MINOR` of the file system. Its files may have others (btrfs, overlay).
    pub(super) number: &'a str,
    /// Which part of the file system it shows.
    root: &'a str,
    point: &'a str,
    pub(super) kind: &'a str,
    source: &'a str,
}

impl Mount<'_> {
    fn point(&self) -> PathBuf {
        plain(self.point)
    }

    /// What was mounted, such as a device's path.
    pub(super) fn source(&self) -> PathBuf {
        plain(self.source)
    }
}

/// All file systems of a `mountinfo`.
pub(super) fn mounts(mountinfo: &str) -> Vec<Mount<'_>> {
    mountinfo.lines().filter_map(mount).collect()
}

/// The file system that an absolute path without links leads to. Of two in one place the later one hides the other.
pub(super) fn holding<'m, 'a>(mounts: &'m [Mount<'a>], path: &Path) -> Option<&'m Mount<'a>> {
    let holds = |mount: &&Mount<'_>| path.starts_with(mount.point());
    mounts.iter().filter(holds).max_by_key(|mount| mount.point().components().count())
}

/// Where such a path leads, in words that are the same in every mount namespace: a file system, and a path in it.
pub(super) fn place<'a>(mounts: &[Mount<'a>], path: &Path) -> Option<(&'a str, PathBuf)> {
    let mount = holding(mounts, path)?;
    Some((mount.number, plain(mount.root).join(path.strip_prefix(mount.point()).ok()?)))
}

/// Without the kernel's escapes.
fn plain(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let escaped = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The names of a file, if it is on a file system that several hosts may have mounted.
fn shared_file(mountinfo: &str, (device, inode): (u64, u64), path: &Path) -> Vec<String> {
    let number = format!("{}:{}", major(device), minor(device));
    let mut mounts = mounts(mountinfo);
    mounts.retain(|mount| mount.number == number);
    // One file system may be mounted in several places.
    let holds = |mount: &&Mount<'_>| path.starts_with(mount.point);
    let by_path = mounts.iter().filter(holds).max_by_key(|mount| mount.point.len());
    let Some(mount) = by_path.or(mounts.first()) else { return Vec::new() };
    let source = mount.source.to_ascii_lowercase();
    let kind = if mount.kind == "nfs4" { "nfs" } else { mount.kind };
    let mut names = Vec::new();
    match kind {
        "nfs" | "cifs" | "smb3" | "ceph" | "lustre" | "fuse.glusterfs" | "beegfs" => {
            names.push(format!("{kind}:{source}:{inode}"));
        }
        // On a block device that several hosts have attached.
        "ocfs2" | "gfs2" => {
            let keys = storage::keys_of_device(device, 0);
            let device = keys.iter().find(|key| !key.starts_with("dev:"));
            names.extend(device.map(|device| format!("{kind}:{device}:{inode}")));
        }
        kind if LOCAL.contains(&kind) => return Vec::new(),
        _ => {}
    }
    if by_path.is_some() {
        names.extend(alike(mount, kind, inode, path).into_iter().flatten());
    }
    names
}

/// A host may reach the same server by another name, and a server may count files in another way for each host.
fn alike(mount: &Mount<'_>, kind: &str, inode: u64, path: &Path) -> Option<[String; 2]> {
    let below = path.strip_prefix(mount.point).ok()?.to_str()?;
    let source = mount.source.to_ascii_lowercase();
    let full = [source.trim_end_matches('/'), mount.root.trim_matches('/'), below];
    let full = full.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
    let without_server = full.split_once(":/").or_else(|| full.strip_prefix("//")?.split_once('/'));
    let without_server = without_server.map_or(full.as_str(), |(_, path)| path);
    Some([format!("like:{kind}:{without_server}:{inode}"), format!("like:{kind}:{full}")])
}

fn mount(line: &str) -> Option<Mount<'_>> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let (number, root, point) = (left.nth(1)?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, source) = (right.next()?, right.next()?);
    Some(Mount { id, number, root, point, kind, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(lines: &str, device: (u64, u64), path: &str) -> Vec<String> {
        shared_file(lines, (nix::sys::stat::makedev(device.0, device.1), 7), Path::new(path))
    }

    fn alike(one: &[String], other: &[String]) -> bool {
        one.iter().any(|name| other.contains(name))
    }

    #[test]
    fn a_file_of_a_network_file_system_is_known_by_its_export_and_inode() {
        let line = "36 28 0:45 / /srv/vm rw,relatime shared:1 - nfs4 Store:/export rw,vers=4.2,addr=10.0.0.9";
        let found = names(line, (0, 45), "/srv/vm/web1/a.raw");
        assert_eq!(
            found,
            ["nfs:store:/export:7", "like:nfs:export/web1/a.raw:7", "like:nfs:store:/export/web1/a.raw"]
        );
        assert_eq!(names(line, (0, 46), "/srv/vm/web1/a.raw"), [""; 0]);
        assert_eq!(names("nonsense", (0, 0), "/x"), [""; 0]);
    }

    #[test]
    fn what_only_one_host_has_mounted_has_no_such_name_and_anything_else_has() {
        let of = |kind: &str| names(&format!("29 1 0:5 / / rw - {kind} /dev/root rw"), (0, 5), "/a.raw");
        for local in ["ext4", "btrfs", "tmpfs", "overlay", "zfs", "fuse.mergerfs"] {
            assert_eq!(of(local), [""; 0], "{local}");
        }
        for shared in ["gpfs", "virtiofs", "9p", "fuse.sshfs", "fuse.mfs", "fuse.juicefs", "of-tomorrow"] {
            assert!(!of(shared).is_empty(), "{shared}");
        }
    }

    #[test]
    fn a_path_leads_to_one_place_in_whatever_namespace() {
        let whole =
            "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 0:9 /@vm /srv/my\\040vm rw - btrfs /dev/sdb rw";
        let bound =
            "90 80 254:0 /srv /data rw master:1 - ext4 /dev/vda rw\n91 80 0:44 / / rw - overlay overlay rw";
        let (whole, bound) = (mounts(whole), mounts(bound));
        assert_eq!(whole.len(), 2);
        let of = |mounts: &[Mount<'_>], path: &str| {
            place(mounts, Path::new(path)).map(|(number, path)| format!("{number} {}", path.display()))
        };
        assert_eq!(of(&whole, "/srv/my vm/a.raw").as_deref(), Some("0:9 /@vm/a.raw"));
        assert_eq!(of(&whole, "/srv/my vms/a.raw"), of(&bound, "/data/my vms/a.raw"));
        assert_ne!(of(&whole, "/srv/a.raw"), of(&bound, "/srv/a.raw"));
        assert_eq!(of(&bound[..1], "/srv/a.raw"), None, "nothing is mounted there");
        let hidden =
            "1 0 254:0 / / rw - ext4 a rw\n2 1 7:0 / /srv rw - xfs b rw\n3 2 0:7 / /srv rw - zfs p/d rw";
        assert_eq!(holding(&mounts(hidden), Path::new("/srv/a.raw")).map(|mount| mount.kind), Some("zfs"));
        assert_eq!(whole[1].source(), Path::new("/dev/sdb"));
    }

    #[test]
    fn one_file_is_recognised_by_whatever_way_it_is_mounted() {
        let gluster = |server| format!("36 28 0:45 / /vm rw - fuse.glusterfs {server}:/vol rw");
        let one = names(&gluster("one"), (0, 45), "/vm/a.raw");
        assert!(alike(&one, &names(&gluster("two"), (0, 45), "/vm/a.raw")), "each host mounts from itself");
        let whole = names("36 28 0:45 / /mnt rw - nfs store:/srv rw", (0, 45), "/mnt/vm/a.raw");
        let part = names("9 28 0:46 / /vm rw - nfs store:/srv/vm rw", (0, 46), "/vm/a.raw");
        let bound = names("9 28 0:46 /vm /vm rw - nfs store:/srv rw", (0, 46), "/vm/a.raw");
        assert!(alike(&whole, &part) && alike(&whole, &bound), "{whole:?} {part:?} {bound:?}");
        let cifs = |server| format!("36 28 0:45 / /vm rw - cifs //{server}/share rw");
        assert!(alike(
            &names(&cifs("a"), (0, 45), "/vm/a.raw"),
            &names(&cifs("10.0.0.1"), (0, 45), "/vm/a.raw")
        ));
        let other = names("36 28 0:45 / /mnt rw - nfs store:/srv rw", (0, 45), "/mnt/vm/b.raw");
        // The same number of a file elsewhere on the server is the same file there.
        assert!(!other.iter().filter(|name| name.starts_with("like:")).any(|name| whole.contains(name)));
    }
}
