//! Why what changed of a disk could not be copied, and why there is no connection to copy over.

use std::io;

use crate::net::stream::StreamEnded;
use crate::qemu::{NbdError, QmpError};

/// Why what changed could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("the source's NBD server cannot be reached")]
    Connect(#[source] io::Error),
    #[error("there is no NBD server to read it from")]
    NoServer,
    /// The source's QEMU gives none.
    #[error("{0}")]
    NoServerBecause(String),
    #[error("the dirty bitmap that recorded its changes is gone")]
    NotRecorded,
    #[error("it has {source_bytes} bytes and {destination_bytes} at the destination")]
    Size { source_bytes: u64, destination_bytes: u64 },
    /// The task was lost: a defect of our own.
    #[error("copying it was broken off")]
    Broken,
}

/// Why a disk's stream does not end in its export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("its stream was not accepted")]
    Refused(#[source] StreamEnded),
    #[error("its stream ended")]
    Stream(#[source] StreamEnded),
}
