//! Ways of copying the RAM, one file per way.

pub(crate) mod precopy;
