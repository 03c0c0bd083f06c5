//! Why what changed of a disk could not be copied.

use std::io;

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
