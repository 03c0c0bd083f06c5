//! Whether the host itself encrypts what lies on a block device or in a file: nothing in QEMU tells of it. A device
//! does by dm-crypt below it, a file also by its file system (fscrypt, eCryptfs, gocryptfs and the like).

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::major;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use super::block_devices::{self, SYSTEM, text};
use super::mounted::{self, Mount};

/// Devices below each other.
const DEPTH_MAX: usize = 8;
/// Of dm-crypt's family, and without encryption.
const CLEAR: [&str; 3] = ["CRYPT-VERITY", "CRYPT-INTEGRITY", "CRYPT-SUBDEV"];
/// Names of devices that have no other below them here, and of which only who makes them knows where they keep
/// their data: zvols, and devices of a network or of a program.
const OPAQUE: [&str; 5] = ["zd", "nbd", "rbd", "drbd", "ublkb"];
/// File systems that encrypt all files in them.
const ENCRYPTING: [&str; 4] = ["ecryptfs", "fuse.cryfs", "fuse.encfs", "fuse.gocryptfs"];
/// File systems in memory.
const IN_MEMORY: [&str; 4] = ["devtmpfs", "hugetlbfs", "ramfs", "tmpfs"];

/// Whether a host encrypts something. What nobody can tell is not taken for no.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HostEncryption {
    Yes,
    No,
    #[default]
    Unknown,
}

impl HostEncryption {
    /// Of what may lie in any of these: one that is not encrypted is enough for no. Of nothing: yes.
    pub(crate) fn of_parts(parts: impl IntoIterator<Item = Self>) -> Self {
        parts.into_iter().fold(Self::Yes, |so_far, part| match (so_far, part) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            _ => Self::Yes,
        })
    }

    /// Of what is put together from these: one that is encrypted is enough for yes. Of nothing: no.
    pub(crate) fn of_any(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().fold(Self::No, |so_far, one| match (so_far, one) {
            (Self::Yes, _) | (_, Self::Yes) => Self::Yes,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            _ => Self::No,
        })
    }
}

/// Of the block device with this number.
pub(super) fn of_device(number: u64) -> HostEncryption {
    Host { system: SYSTEM.into() }.of_number(number, 0)
}

/// Of the file or block device at this path, with the mounts of whoever has opened or looked it up there.
pub(super) fn of_path(path: &Path, metadata: &Metadata, mounts: &[Mount<'_>]) -> HostEncryption {
    Host { system: SYSTEM.into() }.of_path(path, metadata, mounts, 0)
}

/// What tells where a file lies.
struct File<'a> {
    /// That the kernel has it on. Its major number is 0 where that is none of `/sys`.
    device: u64,
    /// By its file system's word it takes a key to read it (fscrypt).
    by_file_system: bool,
    mount: Option<&'a Mount<'a>>,
}

struct Host {
    /// `/sys`.
    system: PathBuf,
}

impl Host {
    fn of_path(
        &self,
        path: &Path,
        metadata: &Metadata,
        mounts: &[Mount<'_>],
        depth: usize,
    ) -> HostEncryption {
        if metadata.file_type().is_block_device() {
            return self.of_number(metadata.rdev(), depth);
        }
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let Ok(told) = statx(CWD, path, AtFlags::empty(), wanted) else { return HostEncryption::Unknown };
        // A kernel before 5.8 does not tell; what its devices do not tell either is not known then.
        let is_told = told.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        let mount = mounts.iter().find(|mount| is_told && mount.id == told.stx_mnt_id);
        let by_file_system = told.stx_attributes.contains(StatxAttributes::ENCRYPTED);
        self.of_file(&File { device: metadata.dev(), by_file_system, mount }, depth)
    }

    fn of_file(&self, file: &File<'_>, depth: usize) -> HostEncryption {
        let kind = file.mount.map_or("", |mount| mount.kind);
        if file.by_file_system || ENCRYPTING.contains(&kind) {
            return HostEncryption::Yes;
        }
        // Its files have the number of its first device, whichever they lie on; and it may encrypt by itself.
        if kind == "bcachefs" {
            return HostEncryption::Unknown;
        }
        if major(file.device) != 0 {
            return self.of_number(file.device, depth);
        }
        match (kind, file.mount) {
            ("btrfs", Some(mount)) => self.of_btrfs(&mount.source(), depth),
            (kind, _) if IN_MEMORY.contains(&kind) => HostEncryption::No,
            // ZFS encrypts by itself, or not; what an overlay lies on may be out of sight; a network's is its server's.
            _ => HostEncryption::Unknown,
        }
    }

    /// By one of its devices: a file may lie on any of them.
    fn of_btrfs(&self, device: &Path, depth: usize) -> HostEncryption {
        let find = || {
            let folder = block_devices::folder_named(&self.system, device).or_else(|| {
                let found = fs::metadata(device).ok()?;
                block_devices::folder_of(&self.system, found.rdev())
            })?;
            let name = folder.file_name()?.to_owned();
            let all = fs::read_dir(self.system.join("fs/btrfs")).ok()?.flatten();
            let mut devices = all.map(|entry| entry.path().join("devices"));
            devices.find(|devices| devices.join(&name).exists())
        };
        let Some(devices) = find() else { return HostEncryption::Unknown };
        self.of_links(&devices, depth).unwrap_or_default()
    }

    /// Of what lies on the devices that this folder has links to; none if there is none.
    fn of_links(&self, folder: &Path, depth: usize) -> Option<HostEncryption> {
        let links: Vec<PathBuf> =
            fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        let of_link = |link: &PathBuf| {
            fs::canonicalize(link)
                .map_or(HostEncryption::Unknown, |device| self.of_folder(&device, depth + 1))
        };
        (!links.is_empty()).then(|| HostEncryption::of_parts(links.iter().map(of_link)))
    }

    fn of_number(&self, number: u64, depth: usize) -> HostEncryption {
        let folder = block_devices::folder_of(&self.system, number);
        folder.map_or(HostEncryption::Unknown, |folder| self.of_folder(&folder, depth))
    }

    /// By its folder in `/sys`, without links on the way to it.
    fn of_folder(&self, folder: &Path, depth: usize) -> HostEncryption {
        if depth >= DEPTH_MAX {
            return HostEncryption::Unknown;
        }
        if folder.join("partition").exists() {
            let whole = folder.parent();
            return whole.map_or(HostEncryption::Unknown, |whole| self.of_folder(whole, depth + 1));
        }
        let table = folder.join("dm").exists().then(|| text(&folder.join("dm/uuid")).unwrap_or_default());
        let is_crypt = |id: &String| id.starts_with("CRYPT-") && !CLEAR.iter().any(|c| id.starts_with(c));
        if table.as_ref().is_some_and(is_crypt) {
            return HostEncryption::Yes;
        }
        if let Some(file) = text(&folder.join("loop/backing_file")) {
            let (Ok(metadata), Some(own)) = (fs::metadata(&file), mounted::mountinfo("self")) else {
                return HostEncryption::Unknown;
            };
            return self.of_path(Path::new(&file), &metadata, &mounted::mounts(&own), depth + 1);
        }
        let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into());
        let below = self.of_links(&folder.join("slaves"), depth);
        let found = below.unwrap_or(match is_opaque(&name) {
            true => HostEncryption::Unknown,
            false => HostEncryption::No,
        });
        // A table that somebody has made by hand may encrypt: only cryptsetup says so in its id.
        match (found, table.as_deref()) {
            (HostEncryption::No, Some("")) => HostEncryption::Unknown,
            _ => found,
        }
    }
}

fn is_opaque(name: &str) -> bool {
    let numbered = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    OPAQUE.iter().any(|begin| name.strip_prefix(begin).is_some_and(numbered))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::makedev;

    use super::HostEncryption::{No, Unknown, Yes};
    use super::*;

    /// A `/sys` of our own.
    struct Fake {
        _folder: tempfile::TempDir,
        host: Host,
    }

    impl Fake {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let system = fs::canonicalize(folder.path()).unwrap();
            for name in ["class/block", "dev/block", "fs/btrfs"] {
                fs::create_dir_all(system.join(name)).unwrap();
            }
            Self { _folder: folder, host: Host { system } }
        }

        fn folder(&self, name: &str) -> PathBuf {
            self.host.system.join("devices").join(name)
        }

        /// A device with this id of device mapper's and these below it.
        fn device(&self, name: &str, id: Option<&str>, below: &[&str]) -> HostEncryption {
            let folder = self.folder(name);
            fs::create_dir_all(folder.join("slaves")).unwrap();
            if let Some(id) = id {
                fs::create_dir_all(folder.join("dm")).unwrap();
                fs::write(folder.join("dm/uuid"), format!("{id}\n")).unwrap();
                fs::write(folder.join("dm/name"), format!("{name}\n")).unwrap();
            }
            let link = |below: &&str| {
                symlink(self.folder(below), folder.join("slaves").join(below.replace('/', "-"))).unwrap();
            };
            below.iter().for_each(link);
            let _ = symlink(&folder, self.host.system.join("class/block").join(name.replace('/', "!")));
            self.host.of_folder(&folder, 0)
        }

        /// A file system of these devices.
        fn btrfs(&self, id: &str, devices: &[&str]) {
            let folder = self.host.system.join("fs/btrfs").join(id).join("devices");
            fs::create_dir_all(&folder).unwrap();
            devices.iter().for_each(|name| symlink(self.folder(name), folder.join(name)).unwrap());
        }

        /// A file of a file system that this line of `mountinfo` tells of.
        fn file(&self, line: &str) -> HostEncryption {
            let mounts = mounted::mounts(line);
            let mount = mounts.first();
            self.host.of_file(&File { device: makedev(0, 45), by_file_system: false, mount }, 0)
        }
    }

    #[test]
    fn dm_crypt_is_found_below_volumes_partitions_and_arrays() {
        let fake = Fake::new();
        assert_eq!(fake.device("sda", None, &[]), No);
        fs::create_dir_all(fake.folder("sda/sda1")).unwrap();
        fs::write(fake.folder("sda/sda1/partition"), "1\n").unwrap();
        assert_eq!(fake.host.of_folder(&fake.folder("sda/sda1"), 0), No);
        assert_eq!(fake.device("crypt", Some("CRYPT-LUKS2-1234-luks"), &["sda/sda1"]), Yes);
        assert_eq!(fake.device("sdb", None, &[]), No);
        assert_eq!(fake.device("verity", Some("CRYPT-VERITY-12-v"), &["sdb"]), No);
        assert_eq!(fake.device("lv", Some("LVM-1"), &["crypt"]), Yes);
        assert_eq!(fake.device("clear", Some("LVM-2"), &["sdb"]), No);
        assert_eq!(fake.device("mixed", Some("LVM-3"), &["crypt", "sdb"]), No, "it may lie on either");
        assert_eq!(fake.device("lost", Some("LVM-4"), &["gone"]), Unknown);
        assert_eq!(fake.device("array", None, &["crypt", "lv"]), Yes);
        let mut above = "sdb".to_owned();
        for depth in 0..DEPTH_MAX {
            let name = format!("deep{depth}");
            fake.device(&name, None, &[&above]);
            above = name;
        }
        assert_eq!(fake.host.of_folder(&fake.folder(&above), 0), Unknown, "no circle is followed for ever");
    }

    #[test]
    fn what_a_device_does_not_tell_is_not_taken_for_no() {
        let fake = Fake::new();
        assert_eq!(fake.device("sda", None, &[]), No);
        // `dmsetup create`, as VeraCrypt does it.
        assert_eq!(fake.device("veracrypt1", Some(""), &["sda"]), Unknown);
        for name in ["zd0", "nbd7", "rbd0", "drbd12", "ublkb1"] {
            assert_eq!(fake.device(name, None, &[]), Unknown, "{name}");
        }
        for name in ["vda", "nvme0n1", "md0", "zram0", "nbdx"] {
            assert_eq!(fake.device(name, None, &[]), No, "{name}");
        }
        // Its own disk is below it.
        assert_eq!(fake.device("drbd1", None, &["sda"]), No);
        assert_eq!(fake.host.of_number(makedev(8, 9), 0), Unknown, "a device that is not there");
    }

    #[test]
    fn btrfs_is_encrypted_only_if_all_of_its_devices_are() {
        let fake = Fake::new();
        fake.device("sda", None, &[]);
        fake.device("luks-a", Some("CRYPT-LUKS2-a"), &["sda"]);
        fake.device("luks-b", Some("CRYPT-LUKS2-b"), &["sda"]);
        fake.device("zd0", None, &[]);
        let line = |source: &str| format!("36 28 0:44 /@ /srv/vm rw shared:1 - btrfs {source} rw,subvol=/@");
        assert_eq!(fake.file(&line("/dev/mapper/luks-a")), Unknown, "no such file system");
        fake.btrfs("1", &["luks-a"]);
        assert_eq!(fake.file(&line("/dev/mapper/luks-a")), Yes);
        fake.btrfs("2", &["luks-b", "sda"]);
        assert_eq!(fake.file(&line("/dev/mapper/luks-b")), No);
        assert_eq!(fake.file(&line("/dev/sda")), No);
        fake.btrfs("3", &["zd0"]);
        symlink(fake.folder("luks-a"), fake.host.system.join("fs/btrfs/3/devices/x")).unwrap();
        assert_eq!(fake.file(&line("/dev/zd0")), Unknown);
        assert_eq!(fake.file(&line("/dev/gone")), Unknown);
    }

    #[test]
    fn a_file_is_encrypted_by_its_file_system_too() {
        let fake = Fake::new();
        let of = |kind: &str| fake.file(&format!("36 28 0:45 / /srv/vm rw - {kind} source rw"));
        for kind in ENCRYPTING {
            assert_eq!(of(kind), Yes, "{kind}");
        }
        for kind in IN_MEMORY {
            assert_eq!(of(kind), No, "{kind}");
        }
        for kind in ["overlay", "zfs", "nfs4", "fuse.mergerfs", "virtiofs", "btrfs", "of-tomorrow"] {
            assert_eq!(of(kind), Unknown, "{kind}");
        }
        assert_eq!(fake.file("nonsense"), Unknown);
        let locked = File { device: makedev(8, 1), by_file_system: true, mount: None };
        assert_eq!(fake.host.of_file(&locked, 0), Yes);
        let number = fake.host.system.join("dev/block/8:1");
        fake.device("sda", None, &[]);
        symlink(fake.folder("sda"), number).unwrap();
        assert_eq!(fake.host.of_file(&File { by_file_system: false, ..locked }, 0), No);
    }

    #[test]
    fn what_lies_on_no_device_of_this_host_is_not_known() {
        let own = mounted::mountinfo("self").unwrap();
        let of = |path: &str| of_path(Path::new(path), &fs::metadata(path).unwrap(), &mounted::mounts(&own));
        assert_eq!(of("/proc/self/stat"), Unknown);
    }

    #[test]
    fn parts_and_sums_of_what_is_known_and_what_is_not() {
        let all = [Yes, No, Unknown];
        let table = |fold: &dyn Fn([HostEncryption; 2]) -> HostEncryption| {
            all.map(|one| all.map(|other| fold([one, other])))
        };
        let parts = table(&|both| HostEncryption::of_parts(both));
        assert_eq!(parts, [[Yes, No, Unknown], [No, No, No], [Unknown, No, Unknown]]);
        let any = table(&|both| HostEncryption::of_any(both));
        assert_eq!(any, [[Yes, Yes, Yes], [Yes, No, Unknown], [Yes, Unknown, Unknown]]);
        assert_eq!(HostEncryption::of_any([]), No);
    }
}
