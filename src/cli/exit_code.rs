//! What the program's exit code says.

use crate::api::Outcome;

/// Failed, and the VM runs on the source.
pub(super) const EXIT_FAILED: u8 = 1;
/// Usage or configuration.
pub(super) const EXIT_USAGE: u8 = 2;
/// Something is left to clean up.
pub(super) const EXIT_LEFT: u8 = 3;
/// Nobody knows whose a virtual machine is.
pub(super) const EXIT_UNDECIDED: u8 = 4;

/// Nobody reads what is printed any more: as of a program that the kernel ends for it (SIGPIPE).
pub(super) const EXIT_UNREAD: u8 = 141;

/// Of `vmferry migrate`.
pub(super) fn of(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Moved { leftovers } | Outcome::Replicated { leftovers } if leftovers.is_empty() => 0,
        Outcome::Moved { .. } | Outcome::Replicated { .. } => EXIT_LEFT,
        Outcome::Failed { .. } => EXIT_FAILED,
        Outcome::Undecided { .. } => EXIT_UNDECIDED,
    }
}
