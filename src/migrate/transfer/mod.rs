//! How the bytes of a migration move: its streams, its share of the bandwidth, one file per way of copying.

pub mod bandwidth;
pub(crate) mod disk;
pub(crate) mod frozen;
pub(crate) mod ram;
pub(crate) mod streams;
pub(crate) mod verify;
