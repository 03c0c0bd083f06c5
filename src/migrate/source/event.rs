//! What happens while a phase waits.

use crate::migrate::model::label::Label;
use crate::migrate::transfer::disk::error::DeltaError;
use crate::net::pump::PumpEnd;
use crate::qemu::EventKind;

/// Something that happened while a phase waits.
pub(crate) enum Event {
    /// The source's QEMU says so.
    Qemu(EventKind),
    /// The destination has the whole guest.
    Loaded,
    /// A data stream has ended.
    StreamEnded(Label, PumpEnd),
    /// What changed of a disk is copied, down to the last of it.
    Copied(String, Result<(), DeltaError>),
    /// It is time to look how far QEMU is.
    Tick,
}
