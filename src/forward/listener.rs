//! The listening socket of a forwarding: made with its owner and mode before anybody can connect, known
//! again by its file, taken away only while it is still the same one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{AtFlags, OFlag};
use nix::unistd::{Gid, Group, Uid, User, fchownat};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::limits::LISTEN_BACKLOG;
use super::spec::Spec;
use crate::config::LocalSocket;

/// Why a forwarding cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another program has the socket, and answers.
    #[error("another program listens on {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// What lies there is not a socket, so it is left alone.
    #[error("{} is there and is no socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The user or the group is not known.
    #[error("there is no {what} {name}")]
    Nobody {
        /// `user` or `group`.
        what: &'static str,
        /// As written.
        name: String,
    },
    /// Owner, group or mode cannot be set.
    #[error("owner and mode of {} cannot be set", path.display())]
    Owner {
        /// The socket.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The operating system's answer.
    #[error("cannot listen on {listen}")]
    Io {
        /// Where.
        listen: LocalSocket,
        /// Its answer.
        source: io::Error,
    },
}

/// A file, as the kernel tells it from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

/// A unix socket's file, as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: FileId,
}

impl SocketFile {
    fn of(path: &Path, file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let id = FileId { device: metadata.dev(), inode: metadata.ino() };
        Ok(Self { path: path.to_owned(), id })
    }

    /// Whether it is still there, and not another one of its name.
    pub(crate) fn is_there(&self) -> bool {
        open_path(&self.path).and_then(|file| Self::of(&self.path, &file)).is_ok_and(|now| now == *self)
    }

    /// Takes it away, if it is still there.
    pub(crate) fn remove(&self) {
        if self.is_there()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(socket = %self.path.display(), %error, "a forwarding's socket cannot be removed");
        }
    }
}

#[derive(Debug)]
enum Accepting {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Listener {
    accepting: Accepting,
    /// Of a unix socket.
    pub(crate) file: Option<SocketFile>,
}

impl Listener {
    /// Makes the socket. A file that an agent left which is no more is taken away first.
    pub(crate) fn bind(spec: &Spec) -> Result<Self, ListenError> {
        let io = |source| ListenError::Io { listen: spec.listen.clone(), source };
        match &spec.listen {
            LocalSocket::Tcp(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None).map_err(io)?;
                socket.set_reuse_address(true).map_err(io)?;
                socket.bind(&(*address).into()).map_err(io)?;
                socket.listen(LISTEN_BACKLOG).map_err(io)?;
                Self::of_socket(socket.into(), &spec.listen, None).map_err(io)
            }
            LocalSocket::Unix(path) => {
                let owner = find_owner(spec)?;
                remove_stale(path).map_err(|e| e.unwrap_or_else_listen(&spec.listen))?;
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(io)?;
                socket.bind(&SockAddr::unix(path).map_err(io)?).map_err(io)?;
                let file =
                    own(path, owner, spec.mode.bits()).inspect_err(|_| drop(std::fs::remove_file(path)));
                let file = file.map_err(|source| ListenError::Owner { path: path.clone(), source })?;
                // Until here everybody was refused.
                socket.listen(LISTEN_BACKLOG).map_err(io)?;
                Self::of_socket(socket.into(), &spec.listen, Some(file)).map_err(io)
            }
        }
    }

    /// Goes on with a socket that listens.
    pub(crate) fn of_socket(
        socket: OwnedFd,
        listen: &LocalSocket,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        let accepting = match listen {
            LocalSocket::Unix(_) => {
                let listener = std::os::unix::net::UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                Accepting::Unix(UnixListener::from_std(listener)?)
            }
            LocalSocket::Tcp(_) => {
                let listener = std::net::TcpListener::from(socket);
                listener.set_nonblocking(true)?;
                Accepting::Tcp(TcpListener::from_std(listener)?)
            }
        };
        Ok(Self { accepting, file })
    }

    /// The next connection. Cancelling loses none.
    pub(crate) async fn accept(&self) -> io::Result<OwnedFd> {
        match &self.accepting {
            Accepting::Unix(listener) => Ok(listener.accept().await?.0.into_std()?.into()),
            Accepting::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                prepare_tcp(&stream);
                Ok(stream.into_std()?.into())
            }
        }
    }

    /// The socket, for another process.
    pub(crate) fn into_socket(self) -> io::Result<OwnedFd> {
        match self.accepting {
            Accepting::Unix(listener) => Ok(listener.into_std()?.into()),
            Accepting::Tcp(listener) => Ok(listener.into_std()?.into()),
        }
    }
}

/// What is small is not held back for more, which a refusal costs only time. However the socket is closed
/// before its pump says otherwise, even with this process, that is a reset and no end in order.
pub(super) fn prepare_tcp(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// What is wrong with a path: with the file there, or the operating system's answer.
enum Stale {
    File(ListenError),
    Io(io::Error),
}

impl Stale {
    fn unwrap_or_else_listen(self, listen: &LocalSocket) -> ListenError {
        match self {
            Self::File(e) => e,
            Self::Io(source) => ListenError::Io { listen: listen.clone(), source },
        }
    }
}

/// Takes a socket away at which nobody listens any more.
fn remove_stale(path: &Path) -> Result<(), Stale> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(Stale::Io)?,
    };
    let path = path.to_owned();
    if !metadata.file_type().is_socket() {
        return Err(Stale::File(ListenError::NotASocket { path }));
    }
    match std::os::unix::net::UnixStream::connect(&path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(&path).map_err(Stale::Io)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Stale::Io(e)),
        Ok(_) => Err(Stale::File(ListenError::InUse { path })),
    }
}

fn open_path(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    File::options().read(true).custom_flags(flags.bits()).open(path)
}

type Owner = (Option<Uid>, Option<Gid>);

/// Gives the socket its mode, then its owner: by its descriptor, so that nobody can put another file in
/// its place meanwhile.
fn own(path: &Path, (user, group): Owner, mode: u32) -> io::Result<SocketFile> {
    let file = open_path(path)?;
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("another file is in its place"));
    }
    let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(by_descriptor, std::fs::Permissions::from_mode(mode))?;
    if user.is_some() || group.is_some() {
        fchownat(&file, "", user, group, AtFlags::AT_EMPTY_PATH)?;
    }
    SocketFile::of(path, &file)
}

fn find_owner(spec: &Spec) -> Result<Owner, ListenError> {
    let user = spec
        .owner
        .as_deref()
        .map(|name| find("user", name, |name| Ok(User::from_name(name)?.map(|u| u.uid.as_raw()))));
    let group = spec
        .group
        .as_deref()
        .map(|name| find("group", name, |name| Ok(Group::from_name(name)?.map(|g| g.gid.as_raw()))));
    Ok((user.transpose()?.map(Uid::from_raw), group.transpose()?.map(Gid::from_raw)))
}

/// A number, or whatever has that name.
fn find(
    what: &'static str,
    name: &str,
    look_up: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, ListenError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let nobody = || ListenError::Nobody { what, name: name.to_owned() };
    look_up(name).ok().flatten().ok_or_else(nobody)
}
