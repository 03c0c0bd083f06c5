//! Ways of copying a disk, one file per way; what `delta` is made of is beside it.

pub(crate) mod bitmaps;
pub(crate) mod copied;
pub(crate) mod copier;
pub(crate) mod delta;
pub(crate) mod error;
pub(crate) mod frozen;
pub(crate) mod handshake;
pub(crate) mod mirror;
pub(crate) mod pivoted;
pub(crate) mod tracking;
