//! The words of a migration as plain values: no I/O, no clock, no QEMU.

pub(crate) mod meanwhile;
pub mod phase;
pub mod plan;
pub mod problem;
pub mod progress;
pub(crate) mod request;
