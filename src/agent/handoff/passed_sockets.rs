//! Sockets that the service manager listens on, and passes to each process in turn (`vmferry.socket`): nobody who
//! connects while the agent is restarted, or has crashed, is refused.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;

use anyhow::{Context, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use std::os::fd::AsRawFd;
use tokio::net::{TcpListener, UnixListener};

/// As they came.
#[derive(Debug, Default)]
pub(crate) struct PassedSockets(Vec<OwnedFd>);

/// By what they are for. Where there is none, the agent makes its own.
#[derive(Debug, Default)]
pub(crate) struct Sorted {
    pub(crate) peers: Vec<TcpListener>,
    pub(crate) local: Option<UnixListener>,
}

impl PassedSockets {
    pub(super) fn new(sockets: Vec<OwnedFd>) -> Self {
        Self(sockets)
    }

    /// TCP is for peers; the local API's is the one at its path.
    /// Errors: there is one that is for nothing.
    pub(crate) fn sort(self, api: &Path) -> anyhow::Result<Sorted> {
        let mut sorted = Sorted::default();
        for fd in self.0 {
            // What the agent starts must not listen with it.
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("a socket of the service manager")?;
            let name: SockaddrStorage = getsockname(fd.as_raw_fd()).context("no socket was passed")?;
            if name.family() == Some(AddressFamily::Unix) {
                let local = StdUnixListener::from(fd);
                let path = local.local_addr()?.as_pathname().map(Path::to_owned);
                ensure!(
                    path.as_deref() == Some(api) && sorted.local.is_none(),
                    "the service manager listens at {}, and the local API is at {} (`runtime_dir` in the configuration)",
                    path.unwrap_or_default().display(),
                    api.display()
                );
                local.set_nonblocking(true)?;
                sorted.local = Some(UnixListener::from_std(local)?);
            } else {
                let listener = std::net::TcpListener::from(fd);
                listener.set_nonblocking(true)?;
                tracing::info!(address = %listener.local_addr()?, "the service manager listens for peers");
                sorted.peers.push(TcpListener::from_std(listener)?);
            }
        }
        Ok(sorted)
    }
}
