//! The words of a migration as plain values: no I/O, no clock, no QEMU.

pub(crate) mod bandwidth;
pub(crate) mod comparison;
pub(crate) mod convergence;
pub(crate) mod disk_choice;
pub(crate) mod forecast;
pub(crate) mod image;
pub(crate) mod in_band;
pub(crate) mod incremental;
pub(crate) mod label;
pub mod leftover;
pub(crate) mod meanwhile;
pub(crate) mod options;
pub mod phase;
pub mod plan;
pub mod prediction;
pub mod problem;
pub mod progress;
pub(crate) mod replica;
pub(crate) mod role;
pub(crate) mod sample;
pub(crate) mod slowed;
pub(crate) mod slowness;
pub mod timeline;
pub(crate) mod witness;
