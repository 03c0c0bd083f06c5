//! The ways of copying a disk.

pub(crate) mod delta;
