//! Which file or block device QEMU means by a path, where this agent may not see what QEMU has open
//! (`/proc/PID/fd`): as another user, under Landlock. The path is walked in the agent's own view, for which it needs no
//! more than to pass through the folders, and every step has to be the same place for QEMU: by the mounts of both
//! processes, which anybody may read. QEMU may live in another mount namespace or root folder, where the same path leads
//! elsewhere; then nothing is found.
//!
//! What is found is what the path leads to *now*. A file that was replaced by another one of its name since QEMU opened it
//! is not told from it. So it is good for what all files of a place have in common, and not for which file it is.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::block_devices::{self, SYSTEM};
use super::mounted::{Mount, holding, place};

/// Links on the way to a file (`path_resolution(7)`).
const LINKS_MAX: usize = 40;
/// File systems that the kernel keeps block devices in.
const DEVICES: &str = "devtmpfs";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    /// Its path in the agent's view, without links.
    Path(PathBuf),
    /// The number of a block device that the agent has no path for.
    Device(u64),
}

/// What QEMU means by this path, by the agent's own mounts and QEMU's.
pub(super) fn find(path: &Path, own: &[Mount<'_>], theirs: &[Mount<'_>]) -> Option<Named> {
    walk(path, own, theirs).map(Named::Path).or_else(|| device(Path::new(SYSTEM), path, theirs))
}

fn walk(path: &Path, own: &[Mount<'_>], theirs: &[Mount<'_>]) -> Option<PathBuf> {
    if !path.is_absolute() {
        return None;
    }
    let is_same = |path: &Path| place(own, path).is_some_and(|here| Some(here) == place(theirs, path));
    let mut left = names(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = left.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(name);
        match fs::read_link(&next) {
            Ok(target) => {
                links += 1;
                if links > LINKS_MAX || !is_same(&next) {
                    return None;
                }
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                left = names(&target).into_iter().chain(left).collect();
            }
            // Whatever else it is, it is no link.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => at = next,
            Err(_) => return None,
        }
    }
    is_same(&at).then_some(at)
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// A device in QEMU's `/dev` where the agent has another one: by its name in `/sys`.
fn device(system: &Path, path: &Path, theirs: &[Mount<'_>]) -> Option<Named> {
    holding(theirs, path).filter(|mount| mount.kind == DEVICES)?;
    let (_, inside) = place(theirs, path)?;
    // The names are the kernel's where all of its folder is there.
    let is_whole = Path::new("/dev").join(inside.strip_prefix("/").ok()?) == path;
    let folder = block_devices::folder_named(system, path).filter(|_| is_whole)?;
    block_devices::number(&folder).map(Named::Device)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::makedev;

    use super::*;
    use crate::qemu::mounted::mounts;

    const HOST: &str = "27 1 254:0 / / rw - ext4 /dev/vda rw\n24 27 0:6 / /dev rw - devtmpfs devtmpfs rw";

    #[test]
    fn a_path_is_followed_as_long_as_it_is_the_same_for_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let path = |name: &str| root.join(name);
        fs::create_dir_all(path("data/vm")).unwrap();
        fs::write(path("data/vm/a.raw"), "").unwrap();
        symlink(path("data"), path("images")).unwrap();
        symlink("../vm/a.raw", path("data/vm/link.raw")).unwrap();
        symlink("circle", path("circle")).unwrap();
        let host = mounts(HOST);
        let file = path("data/vm/a.raw");
        for name in ["data/vm/a.raw", "images/vm/a.raw", "images/vm/link.raw", "data/../images/./vm/a.raw"] {
            assert_eq!(walk(&path(name), &host, &host), Some(file.clone()), "{name}");
        }
        for name in ["data/vm/b.raw", "circle", "data/vm/a.raw/b"] {
            assert_eq!(walk(&path(name), &host, &host), None, "{name}");
        }
        assert_eq!(walk(Path::new("data/vm/a.raw"), &host, &host), None, "in a folder that is not known");

        // The unit's own view of a folder that it may write to.
        let unit = format!(
            "90 80 254:0 / / ro - ext4 /dev/vda rw\n91 90 254:0 {0}/data {0}/data rw - ext4 /dev/vda rw",
            root.display()
        );
        assert_eq!(walk(&path("images/vm/a.raw"), &mounts(&unit), &host), Some(file.clone()));
        // A QEMU in a container: the link, or what it leads to, is another one there.
        let other_root = HOST.replace("254:0", "0:77");
        assert_eq!(walk(&file, &host, &mounts(&other_root)), None);
        let volume =
            format!("{other_root}\n92 27 254:0 {0}/data {0}/data rw - ext4 /dev/vda rw", root.display());
        let volume = mounts(&volume);
        assert_eq!(walk(&file, &host, &volume), Some(file.clone()));
        assert_eq!(walk(&path("images/vm/a.raw"), &host, &volume), None, "the link is the agent's");
        let covered = format!("{HOST}\n93 27 0:9 / {0}/data/vm rw - zfs p/vm rw", root.display());
        assert_eq!(walk(&file, &host, &mounts(&covered)), None);
        assert_eq!(walk(&file, &host, &[]), None, "nothing is known of QEMU's");
    }

    #[test]
    fn a_device_is_known_by_name_where_the_agent_has_another_dev() {
        let folder = tempfile::tempdir().unwrap();
        let system = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(system.join("class/block/dm-3/dm")).unwrap();
        fs::write(system.join("class/block/dm-3/dm/name"), "vg0-web1\n").unwrap();
        fs::write(system.join("class/block/dm-3/dm/uuid"), "LVM-1\n").unwrap();
        fs::write(system.join("class/block/dm-3/dev"), "253:3\n").unwrap();
        let of = |mountinfo: &str, path: &str| device(&system, Path::new(path), &mounts(mountinfo));
        let found = Some(Named::Device(makedev(253, 3)));
        for name in ["/dev/vg0/web1", "/dev/mapper/vg0-web1", "/dev/dm-3"] {
            assert_eq!(of(HOST, name), found, "{name}");
        }
        assert_eq!(of(HOST, "/dev/vg0/web2"), None);
        // libvirt's QEMUs have nodes of somebody's choice in a /dev of their own.
        assert_eq!(of(&HOST.replace("devtmpfs", "tmpfs"), "/dev/dm-3"), None);
        assert_eq!(of(&HOST.replace("0:6 / /dev", "0:6 /mapper /dev"), "/dev/dm-3"), None);
        assert_eq!(of("", "/dev/dm-3"), None);
    }
}
