//! A migration's folder, with its owner and mode, and how it is taken away again.
//!
//! At the source the agent makes the sockets and everybody may pass through, because libvirt and QEMU are
//! other users. At the destination QEMU makes them, so its group may write there. The folder stays the
//! agent's: so it can take away what others have made or taken over in it.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group};

use super::state::{Channel, Role};

/// Of the folder that all migrations have theirs in: anybody may pass.
const ABOVE_MODE: u32 = 0o711;
const SOURCE_MODE: u32 = 0o711;
const DESTINATION_MODE: u32 = 0o770;

/// Makes it.
///
/// # Errors
/// Also if it is there already: it is made once, by either role.
pub(super) fn make(folder: &Path, role: Role, qemu_group: Option<&str>) -> io::Result<()> {
    // One that is there is somebody's choice.
    if let Some(above) = folder.parent().filter(|above| !above.exists()) {
        DirBuilder::new().recursive(true).mode(ABOVE_MODE).create(above)?;
        set_mode(above, ABOVE_MODE)?;
    }
    DirBuilder::new().mode(0o700).create(folder)?;
    let made = match role {
        Role::Source => set_mode(folder, SOURCE_MODE),
        Role::Destination => give(folder, qemu_group).and_then(|()| set_mode(folder, DESTINATION_MODE)),
    };
    made.inspect_err(|_| drop(std::fs::remove_dir(folder)))
}

/// The agent's umask is not to decide.
fn set_mode(folder: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(folder, Permissions::from_mode(mode))
}

fn give(folder: &Path, group: Option<&str>) -> io::Result<()> {
    let Some(name) = group else { return Ok(()) };
    let found: Option<Gid> = Group::from_name(name)?.map(|group| group.gid);
    let gid =
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no group {name}")))?;
    Ok(nix::unistd::chown(folder, None, Some(gid))?)
}

/// Takes it away with the sockets in it; what could not be.
pub(super) fn remove(folder: &Path) -> Vec<String> {
    let mut left: Vec<String> =
        Channel::ALL.into_iter().filter_map(|c| remove_socket(&c.socket(folder))).collect();
    match std::fs::remove_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => left.push(format!("{}: {e}", folder.display())),
        _ => {}
    }
    left
}

fn remove_socket(path: &Path) -> Option<String> {
    let gone = match std::fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::other("is no socket, and is left alone")),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Some(format!("{}: {e}", path.display())),
        _ => None,
    }
}

/// Where a migration's folder is, below that of all.
pub(super) fn of(all: &Path, id: uuid::Uuid) -> PathBuf {
    all.join(id.simple().to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_folder_is_made_once_and_taken_away_with_its_sockets_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let folder = of(&dir.path().join("libvirt"), uuid::Uuid::nil());
        make(&folder, Role::Source, None).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, SOURCE_MODE);
        let again = make(&folder, Role::Destination, None).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let _socket = UnixListener::bind(Channel::Ram.socket(&folder)).unwrap();
        assert_eq!(remove(&folder), Vec::<String>::new());
        assert!(!folder.exists());
        assert_eq!(remove(&folder), Vec::<String>::new(), "what is gone is gone");

        make(&folder, Role::Destination, None).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, DESTINATION_MODE);
        std::fs::write(Channel::Nbd.socket(&folder), "not a socket").unwrap();
        let left = remove(&folder);
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(Channel::Nbd.socket(&folder).exists());
    }
}
