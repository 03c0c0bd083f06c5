//! Connecting to a target's socket, within a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

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
    let connecting = async {
        match target {
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
