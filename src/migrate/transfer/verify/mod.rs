//! Comparing both sides' disks: what is known to be equal, and the hashes by which it is known.

pub(crate) mod hashes;
pub(crate) mod ledger;
pub(crate) mod transcript;
