//! A listening unix socket that has its mode before anybody can connect to it, whatever the umask.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Connections that may wait to be accepted: the standard library's number.
const BACKLOG: i32 = 128;

/// A socket that has its name, and refuses everybody.
pub(super) struct Bound(Socket);

/// Makes the socket `path` for those whom `mode` lets in.
/// Errors: the operating system's, also where something has that name.
pub(super) fn bind(path: &Path, mode: u32) -> io::Result<Bound> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(Bound(socket))
}

impl Bound {
    /// Refuses nobody any more.
    pub(super) fn listen(self) -> io::Result<UnixListener> {
        self.0.listen(BACKLOG)?;
        UnixListener::from_std(std::os::unix::net::UnixListener::from(std::os::fd::OwnedFd::from(self.0)))
    }
}
