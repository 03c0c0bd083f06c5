//! Ways of copying a disk, one file per way.

pub(crate) mod delta;
pub(crate) mod mirror;
pub(crate) mod pivoted;
