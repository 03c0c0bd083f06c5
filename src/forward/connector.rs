//! Connecting to a target's socket, within a deadline.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::limits::{CONNECT_DEADLINE, CONNECT_POLL};
use super::listener::prepare_tcp;
use crate::config::LocalSocket;
use crate::mux::Code;

/// Why a target could not be connected to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    /// It has not taken the connection in time.
    #[error("its queue of connections was full for {} s", CONNECT_DEADLINE.as_secs())]
    Timeout,
    /// What must be there beside it is not.
    #[error("{} is not there beside it", .0.display())]
    Alone(PathBuf),
    /// The operating system's answer.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl TargetError {
    /// What the peer is told.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Timeout => Code::TargetTimeout,
            Self::Alone(_) => Code::TargetAlone,
            Self::Io(e) => match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Code::TargetAbsent,
                io::ErrorKind::ConnectionRefused => Code::TargetRefused,
                _ => Code::ConnectFailed,
            },
        }
    }
}

/// A connection to `target`. When this returns, the target has it in its queue.
pub(crate) async fn connect(target: &LocalSocket) -> Result<OwnedFd, TargetError> {
    connect_as(target, Links::Followed).await
}

/// The same for the socket of a grant, in a folder that others may write to as well: a link in its place would lead to
/// whatever this agent may connect to, and is as good as no socket.
pub(crate) async fn connect_granted(target: &LocalSocket) -> Result<OwnedFd, TargetError> {
    connect_as(target, Links::Refused).await
}

/// What becomes of a link in the place of a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    Followed,
    Refused,
}

async fn connect_as(target: &LocalSocket, links: Links) -> Result<OwnedFd, TargetError> {
    let connecting = async {
        match target {
            LocalSocket::Unix(path) if links == Links::Refused => connect_itself(path).await,
            LocalSocket::Unix(path) => connect_unix(path).await,
            LocalSocket::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                prepare_tcp(&stream);
                Ok(stream.into_std()?.into())
            }
        }
    };
    match timeout(CONNECT_DEADLINE, connecting).await {
        Ok(connected) => Ok(connected?),
        Err(_) => Err(TargetError::Timeout),
    }
}

/// The socket of that name and nothing that is in its place a moment later: it is connected by its inode.
async fn connect_itself(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it is no socket"));
    }
    connect_unix(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).await
}

/// A unix socket whose queue is full says so at once (unix(7), EAGAIN), and is asked again.
async fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => return Ok(socket.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(CONNECT_POLL).await,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_grants_socket_is_no_link_to_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let [own, other, link] = ["ram", "vmferry.sock", "link"].map(|name| folder.path().join(name));
        let (_own, others) = (UnixListener::bind(&own).unwrap(), UnixListener::bind(&other).unwrap());
        others.set_nonblocking(true).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        connect_granted(&LocalSocket::Unix(own)).await.unwrap();
        let refused = connect_granted(&LocalSocket::Unix(link.clone())).await.unwrap_err();
        assert_eq!(refused.code(), Code::TargetAbsent, "{refused}");
        assert!(others.accept().is_err(), "nobody has connected to it");
        // The configuration's own may be a link.
        connect(&LocalSocket::Unix(link)).await.unwrap();
        assert!(others.accept().is_ok());
    }
}
