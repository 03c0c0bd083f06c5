//! The images below a guest's disk as the QEMU that uses them sees them: which file or block device
//! each one is, whatever it is called, and what another host would know it by.
//!
//! A path says little: QEMU may live in another root folder or mount namespace, and the file behind a
//! path changes. What counts is what the process has open (`/proc/PID/fd`). Where this agent may not
//! look, an image is not seen, and which file it is is not claimed. What all files of its place have in
//! common is told by its path then (`named_file.rs`): what the host does with them.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::graph::Layer;
use super::host_crypt::{self, HostEncryption};
use super::host_use::{device_used, used_by_host};
use super::named_file::{self, Named};
use super::transit::{Transit, transit};
use super::{mounted, storage};

/// An image below a disk: a layer that nothing is below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub filename: String,
    /// Its driver, such as `file`, `host_device` or `rbd`.
    pub driver: String,
    /// It is reached through a backing file only.
    pub backing: bool,
    pub read_only: bool,
    /// QEMU has made it for itself, and removes it at its end.
    pub temporary: bool,
    /// What the agent sees of it.
    pub seen: Option<Seen>,
    /// What the host does with it, by what the agent sees or by its path. None of an image that is no file and no
    /// device of this host, or of which that is not known.
    pub on_host: Option<OnHost>,
    /// How what QEMU sends to it is kept from being read.
    pub transit: Transit,
    /// Names that are the same wherever the same storage is used; empty when none is known.
    pub keys: Vec<String>,
}

impl Image {
    /// Whether it is a file or a device of this host.
    pub(crate) fn is_local(&self) -> bool {
        storage::local_path(&self.driver, &self.filename).is_some()
    }

    /// Whether this host encrypts it, whatever QEMU does.
    pub(crate) fn host_encryption(&self) -> HostEncryption {
        self.on_host.as_ref().map_or(HostEncryption::Unknown, |host| host.encryption)
    }
}

/// What this host does with a file or block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OnHost {
    /// How the host itself uses it: it has it mounted, for example.
    pub used: Option<String>,
    /// Whether the host encrypts what lies there.
    pub encryption: HostEncryption,
}

/// A file or block device that a QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its path for this agent. None when it has none, as in another mount namespace.
    pub path: Option<PathBuf>,
    pub device: u64,
    pub inode: u64,
    pub is_file: bool,
    pub allocated: u64,
    /// Bytes that are free on its file system for whom QEMU runs as; none for a block device.
    pub free: Option<u64>,
}

/// The files that a process has open.
#[derive(Debug, Default)]
pub(super) struct OpenFiles {
    root: Option<PathBuf>,
    cwd: Option<PathBuf>,
    /// By the path that the kernel tells, as this agent would see it.
    by_path: BTreeMap<PathBuf, OpenFile>,
    pid: i32,
    /// What the process has mounted; none where that is not told.
    mountinfo: Option<String>,
    /// The agent may see what is open.
    may_look: bool,
    /// Images that the agent has just made, by the paths that QEMU knows them by.
    made: Vec<PathBuf>,
}

#[derive(Debug)]
struct OpenFile {
    metadata: Metadata,
    deleted: bool,
    /// In `/proc/PID/fd`.
    fd_path: PathBuf,
}

impl OpenFiles {
    /// Looks; empty when this agent may not. Waits for no disk but for those of network file systems.
    pub(super) fn of(pid: i32) -> Self {
        let mut by_path = BTreeMap::new();
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let mut may_look = entries.is_ok();
        for entry in entries.into_iter().flatten().flatten() {
            let fd_path = entry.path();
            let target = match std::fs::read_link(&fd_path) {
                Ok(target) => target,
                Err(e) => {
                    // Under Landlock the numbers are to be seen, and no more.
                    may_look &= e.kind() != std::io::ErrorKind::PermissionDenied;
                    continue;
                }
            };
            let Some(path) = target.to_str().filter(|path| path.starts_with('/')) else { continue };
            let Ok(metadata) = std::fs::metadata(&fd_path) else { continue };
            let (path, deleted) = match path.strip_suffix(" (deleted)") {
                Some(path) if metadata.nlink() == 0 => (path, true),
                _ => (path, false),
            };
            by_path.insert(PathBuf::from(path), OpenFile { metadata, deleted, fd_path });
        }
        let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).ok();
        let mountinfo = mounted::mountinfo(&pid.to_string());
        Self { root: link("root"), cwd: link("cwd"), by_path, pid, mountinfo, may_look, made: Vec::new() }
    }

    /// The same of a QEMU that was started on images which this agent has made for it.
    #[must_use]
    pub(super) fn with_made(self, made: Vec<PathBuf>) -> Self {
        Self { made, ..self }
    }

    /// The open file that QEMU calls by this name.
    fn find(&self, filename: &str) -> Option<&OpenFile> {
        if self.by_path.is_empty() {
            return None;
        }
        let path = Path::new(filename);
        let absolute = if path.is_absolute() { self.below_root(path) } else { self.cwd.as_ref()?.join(path) };
        if let Some(open) = self.by_path.get(&absolute) {
            return Some(open);
        }
        // By way of a link, or renamed since: found by what is behind the name, if QEMU has that open.
        let link = match path.is_absolute() {
            true => format!("/proc/{}/root{filename}", self.pid),
            false => format!("/proc/{}/cwd/{filename}", self.pid),
        };
        let named = std::fs::metadata(link).ok()?;
        self.by_path.values().find(|open| is_same(&open.metadata, &named))
    }

    /// Names of the file that QEMU calls by this name, if it has it open.
    pub(super) fn keys_of(&self, filename: &str) -> Vec<String> {
        let open = self.find(filename);
        open.map_or_else(Vec::new, |open| self.keys(open))
    }

    fn keys(&self, open: &OpenFile) -> Vec<String> {
        let path = self.by_path.iter().find(|(_, other)| std::ptr::eq(*other, open)).map(|(path, _)| path);
        let mountinfo = self.mountinfo.as_deref().unwrap_or_default();
        mounted::keys_of_file(&open.metadata, path.map_or(Path::new(""), PathBuf::as_path), mountinfo)
    }

    /// What the host does with the file or device that QEMU calls by this name.
    fn on_host(&self, name: &str, open: Option<&OpenFile>) -> Option<OnHost> {
        let theirs = self.mountinfo.as_deref().map(mounted::mounts);
        if let Some(open) = open {
            let mounts = theirs.as_deref().unwrap_or_default();
            return Some(OnHost {
                used: used_by_host(&open.metadata),
                encryption: host_crypt::of_path(&open.fd_path, &open.metadata, mounts),
            });
        }
        if self.may_look {
            return None;
        }
        let own = mounted::mountinfo("self")?;
        let own = mounted::mounts(&own);
        let path = Path::new(name);
        let named = match &theirs {
            Some(theirs) => named_file::find(path, &own, theirs)?,
            None if self.made.iter().any(|made| made == path) => Named::Path(path.to_owned()),
            None => return None,
        };
        match named {
            Named::Path(path) => {
                let metadata = std::fs::metadata(&path).ok()?;
                let encryption = host_crypt::of_path(&path, &metadata, &own);
                Some(OnHost { used: used_by_host(&metadata), encryption })
            }
            Named::Device(number) => {
                Some(OnHost { used: device_used(number), encryption: host_crypt::of_device(number) })
            }
        }
    }

    /// What QEMU sees at this path, open or not.
    pub(super) fn metadata_of(&self, path: &str) -> Option<Metadata> {
        std::fs::metadata(format!("/proc/{}/root{path}", self.pid)).ok()
    }

    fn below_root(&self, path: &Path) -> PathBuf {
        match &self.root {
            Some(root) if root != Path::new("/") => root.join(path.strip_prefix("/").unwrap_or(path)),
            _ => path.to_owned(),
        }
    }

    fn path_of(&self, wanted: &OpenFile) -> Option<PathBuf> {
        let known =
            self.by_path.iter().find(|(_, open)| std::ptr::eq(*open, wanted)).map(|(path, _)| path)?;
        // In another mount namespace the same path may lead to another file, or nowhere.
        let found = std::fs::metadata(known).ok()?;
        is_same(&found, &wanted.metadata).then(|| known.clone())
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    let special = one.file_type().is_block_device() && other.file_type().is_block_device();
    if special { one.rdev() == other.rdev() } else { (one.dev(), one.ino()) == (other.dev(), other.ino()) }
}

/// The images among these layers.
pub(super) fn images(layers: &[Layer], files: &OpenFiles) -> Vec<Image> {
    layers.iter().filter(|layer| layer.is_leaf).map(|layer| image(layer, files)).collect()
}

/// The same where nothing could be looked at.
pub(super) fn unseen(layers: &[Layer]) -> Vec<Image> {
    images(layers, &OpenFiles::default())
}

fn image(layer: &Layer, files: &OpenFiles) -> Image {
    let local = storage::local_path(&layer.driver, &layer.filename);
    let open = local.as_deref().and_then(|path| files.find(path));
    let keys = match open {
        Some(open) => files.keys(open),
        None => storage::keys_of_network(&layer.driver, &layer.filename),
    };
    Image {
        filename: layer.filename.clone(),
        driver: layer.driver.clone(),
        backing: layer.backing,
        read_only: layer.read_only,
        temporary: open.map_or_else(|| local.as_deref().is_some_and(is_named_temporary), |open| open.deleted),
        seen: open.map(|open| seen(open, files)),
        on_host: local.as_deref().and_then(|path| files.on_host(path, open)),
        transit: transit(&layer.driver, &layer.filename),
        keys,
    }
}

/// QEMU's own name for them, where the agent cannot see that the file has no name any more.
fn is_named_temporary(path: &str) -> bool {
    let name = ["/var/tmp/vl.", "/tmp/vl."].iter().find_map(|begin| path.strip_prefix(begin));
    name.is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn seen(open: &OpenFile, files: &OpenFiles) -> Seen {
    let is_file = open.metadata.is_file();
    let free = is_file.then(|| statvfs(&open.fd_path).ok()).flatten();
    Seen {
        path: files.path_of(open),
        device: open.metadata.dev(),
        inode: open.metadata.ino(),
        is_file,
        allocated: open.metadata.blocks().saturating_mul(512),
        free: free.map(|fs| fs.blocks_available().saturating_mul(fs.fragment_size())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    fn layer(path: &Path) -> Layer {
        Layer {
            node_name: "vda".into(),
            driver: "file".into(),
            backing: false,
            is_leaf: true,
            read_only: false,
            written_by_others: false,
            encryption: super::super::Encryption::None,
            filename: path.display().to_string(),
            actual_size: None,
            bitmaps: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    #[test]
    fn only_what_a_process_has_open_is_seen_and_by_any_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link, other) =
            (folder.path().join("a.raw"), folder.path().join("link"), folder.path().join("b.raw"));
        let open = std::fs::File::create(&path).unwrap();
        std::fs::write(&other, "x").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let look = |path: &Path| images(&[layer(path)], &OpenFiles::of(pid)).remove(0);

        let seen = look(&path).seen.unwrap();
        assert_eq!(seen.inode, open.metadata().unwrap().ino());
        assert_eq!(seen.path.as_deref(), Some(&*std::fs::canonicalize(&path).unwrap()));
        assert!(seen.free.is_some());
        // Others write to the same file system.
        let (by_link, seen) =
            [look(&link).seen.unwrap(), seen].map(|seen| Seen { free: None, ..seen }).into();
        assert_eq!(by_link, seen);
        assert_eq!(look(&link).keys, look(&path).keys);
        assert!(!look(&path).keys.is_empty());
        assert_eq!(look(&other).seen, None, "nobody has it open");

        // Another file takes its place: the name no longer leads to what is open.
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(look(&path).seen.map(|seen| seen.path), Some(None));
        drop(open);
    }

    #[test]
    fn what_the_host_does_with_a_file_is_told_by_its_path_where_nothing_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.raw");
        let _open = std::fs::File::create(&path).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let seen = images(&[layer(&path)], &OpenFiles::of(pid)).remove(0).on_host.unwrap();
        let on_host = |mountinfo: Option<&str>, made: &[&Path], may_look| {
            let made = made.iter().map(|path| path.to_path_buf()).collect();
            let mountinfo = mountinfo.map(str::to_owned);
            let files = OpenFiles { mountinfo, made, may_look, ..OpenFiles::default() };
            let image = images(&[layer(&path)], &files).remove(0);
            assert!(image.seen.is_none() && image.keys.is_empty(), "{image:?}");
            image.on_host
        };
        let own = mounted::mountinfo("self").unwrap();
        let elsewhere = Some("1 0 0:99 / / rw - overlay overlay rw");
        assert_eq!(on_host(Some(&own), &[], false), Some(seen.clone()));
        assert_eq!(on_host(Some(&own), &[], true), None, "QEMU does not have it open");
        assert_eq!(on_host(elsewhere, &[], false), None);
        assert_eq!(on_host(elsewhere, &[&path], false), None, "it was made in another place");
        assert_eq!(on_host(None, &[], false), None);
        assert_eq!(on_host(None, &[&path], false), Some(seen));
    }

    #[test]
    fn the_names_of_qemus_temporary_files_are_known() {
        assert!(is_named_temporary("/var/tmp/vl.1C4NZ3"));
        assert!(!is_named_temporary("/srv/vl.backup"));
        assert!(!is_named_temporary("/var/tmp/vl.raw"));
    }
}
