//! Where this host's libvirt listens, and whose its QEMUs are. Looks, and changes nothing.

use std::path::{Path, PathBuf};

use nix::unistd::{Group, User};

/// Where libvirt's monolithic daemon listens, and its QEMU daemon.
const SOCKETS: [&str; 2] = ["/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"];
/// QEMU's group with Debian's libvirt, and with Fedora's.
const QEMU_GROUPS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// The socket of this host's libvirt: the one that answers, else the one that is there, else Debian's.
pub(super) fn socket(configured: Option<&Path>) -> PathBuf {
    if let Some(path) = configured {
        return path.to_owned();
    }
    let all = || SOCKETS.iter().map(Path::new);
    // Of a daemon that starts with its first connection the socket answers, too.
    let answers = all().find(|path| std::os::unix::net::UnixStream::connect(path).is_ok());
    answers.or_else(|| all().find(|path| path.exists())).unwrap_or(Path::new(SOCKETS[0])).to_owned()
}

/// The group of libvirt's QEMUs; none if neither is known here.
pub(super) fn qemu_group(configured: Option<&str>) -> Option<String> {
    let is_there = |name: &&str| matches!(Group::from_name(name), Ok(Some(_)));
    configured.or_else(|| QEMU_GROUPS.iter().copied().find(is_there)).map(str::to_owned)
}

/// What keeps a libvirt on this host from taking a migration that comes through the agent.
pub(super) fn lacks(socket: Option<&Path>, qemu_group: Option<&str>) -> Vec<String> {
    let mut lacks = Vec::new();
    if let Some(socket) = socket
        && let Err(e) = std::os::unix::net::UnixStream::connect(socket)
    {
        lacks.push(format!(
            "the agent cannot connect to {}: {e}; is libvirt's daemon running, and the agent's user in the group that \
             may (`unix_sock_group` in libvirtd.conf)",
            socket.display()
        ));
    }
    match qemu_group {
        None => lacks.push("neither a group libvirt-qemu nor qemu is there: set `qemu_group` in [libvirt]".into()),
        Some(group) if !may_use(group) => lacks.push(format!(
            "the agent's user is not in the group {group}, so QEMU could not make its sockets where the agent reaches them"
        )),
        Some(_) => {}
    }
    lacks
}

/// Whether this process may give files to that group.
pub(super) fn may_use(group: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let Ok(Some(group)) = Group::from_name(group) else { return false };
    let own = nix::unistd::getgroups().unwrap_or_default();
    own.contains(&group.gid) || nix::unistd::getegid() == group.gid
}

/// Whether the system knows this process's user: libvirt asks who its client is.
pub(super) fn is_known_user() -> bool {
    matches!(User::from_uid(nix::unistd::geteuid()), Ok(Some(_)))
}
