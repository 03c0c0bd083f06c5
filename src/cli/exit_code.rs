//! What the program's exit code says. Of a migration it is `Outcome::exit_code`.

/// Failed, and the VM runs on the source.
pub(super) const EXIT_FAILED: u8 = 1;
/// Usage or configuration.
pub(super) const EXIT_USAGE: u8 = 2;
/// Something is left to clean up.
pub(super) const EXIT_LEFT: u8 = 3;
/// Nobody knows whose a virtual machine is.
pub(super) const EXIT_UNDECIDED: u8 = 4;
