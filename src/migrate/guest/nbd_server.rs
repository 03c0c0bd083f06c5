//! The destination's NBD server: a listening socket that only this agent can reach.
//!
//! The socket's name exists for a moment in a folder of mode 0700; what stays is a descriptor
//! of its inode, through which alone it can be connected (`/proc/self/fd`, QEMU keeps only the
//! listening end). So nobody else on the host can reach the writable exports.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::fcntl::OFlag;

use crate::migrate::journal::{Journal, JournalError, Undo};
use crate::migrate::protocol::message::Export;
use crate::qemu::{
    Abilities, BlockExportAdd, NbdServerStart, NbdServerStop, Qmp, QmpError, QueryBlockExports, names,
};

/// A client more would wait for its handshake, and with it the source's main loop. QEMU's default is
/// 100; only this agent can connect, once for each disk.
const CONNECTIONS_MAX: u32 = 1024;

/// Why the server does not run, or does not end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NbdServerError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error("exports of the guest's disks are still open: {}", .0.join(", "))]
    ExportsOpen(Vec<String>),
}

/// A running NBD server in the destination's QEMU.
#[derive(Debug)]
pub(crate) struct NbdServer {
    /// An `O_PATH` descriptor of the listening socket; none if it was lost between two processes.
    socket: Option<File>,
}

impl NbdServer {
    /// Starts the server and exports each disk's node under the granted name, to be written to or not.
    ///
    /// A QEMU that can has no limit for a client's handshake, which may have to wait for other streams on
    /// a slow link: only this agent connects, and who asked for the stream has deadlines of its own.
    pub(crate) async fn start(
        qmp: &Qmp,
        journal: &mut Journal,
        folder: &Path,
        exports: &[(&Export, String, bool)],
        abilities: &Abilities,
    ) -> Result<Self, NbdServerError> {
        let (listener, socket) = private_listener(folder)?;
        journal.will_make(Undo::Fd(names::NBD_LISTEN_FDNAME.into()))?;
        journal.will_make(Undo::NbdServer)?;
        qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await?;
        let start = NbdServerStart {
            max_connections: Some(CONNECTIONS_MAX),
            handshake_max_seconds: abilities.handshake_max_seconds.then_some(0),
            ..NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME)
        };
        qmp.execute(start).await?;
        for (export, node_name, writable) in exports {
            let id = names::export_id(&export.disk);
            journal.will_make(Undo::Export(id.clone()))?;
            let add = BlockExportAdd {
                id,
                node_name: node_name.clone(),
                name: export.export.clone(),
                writable: *writable,
                bitmaps: Vec::new(),
                allocation_depth: false,
            };
            qmp.execute(add).await?;
        }
        Ok(Self { socket: Some(socket) })
    }

    /// Connects a client. QEMU before 10.0 drops one that has not shaken hands within 10 s, so this is
    /// done only when the source's stream is there.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        let lost = || io::Error::other("the agent has no descriptor of QEMU's NBD socket any more");
        let path = format!("/proc/self/fd/{}", self.socket.as_ref().ok_or_else(lost)?.as_raw_fd());
        UnixStream::connect(path).map(OwnedFd::from)
    }

    /// Leaves the server to another process.
    pub(crate) fn into_socket(self) -> Option<OwnedFd> {
        self.socket.map(OwnedFd::from)
    }

    /// Takes up a server that an earlier process has started. Without its socket no stream can be
    /// connected to it any more; those that are go on, and it can be stopped.
    pub(crate) fn from_socket(vm: &str, socket: Option<OwnedFd>) -> Self {
        if socket.is_none() {
            tracing::error!(
                vm,
                "the NBD server's socket did not come along: no further disk can be connected"
            );
        }
        Self { socket: socket.map(File::from) }
    }
}

/// Stops QEMU's NBD server with our `exports`, and makes sure that none of them is there any more: a
/// guest whose disks are written to by somebody else as well must not run. May be done again: QEMU says of a second
/// stop that no server runs.
///
/// Clients are past their handshakes, so no QEMU hangs on it.
pub(crate) async fn close(qmp: &Qmp, exports: &[Export]) -> Result<(), NbdServerError> {
    match qmp.execute_until_answered(NbdServerStop).await {
        Err(e) if e.is_nbd_server_not_running() => {}
        stopped => drop(stopped?),
    }
    let open = qmp.execute(QueryBlockExports).await?.into_iter().map(|export| export.id);
    let ours: Vec<String> = exports.iter().map(|export| names::export_id(&export.disk)).collect();
    let open: Vec<String> = open.filter(|id| ours.contains(id)).collect();
    if open.is_empty() { Ok(()) } else { Err(NbdServerError::ExportsOpen(open)) }
}

fn private_listener(folder: &Path) -> io::Result<(OwnedFd, File)> {
    // Also where something has cleaned up the folder that it is in.
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let path = folder.join(uuid::Uuid::new_v4().to_string());
    let listener = UnixListener::bind(&path)?;
    let socket = OpenOptions::new().read(true).custom_flags(OFlag::O_PATH.bits()).open(&path);
    std::fs::remove_file(&path)?;
    Ok((listener.into(), socket?))
}
