//! Everything that is tested with real QEMUs, in network namespaces as hosts. One program, so that
//! the bed is compiled once. Tests share two cores, and each has hosts of its own.

#[path = "../faults/mod.rs"]
mod faults;
#[path = "../support/mod.rs"]
mod support;

mod attacked;
mod bed;
mod bed_plain;
mod booted;
mod chaos;
mod check;
mod compress;
mod confined;
mod disks;
mod drain;
mod failures;
mod grants;
mod judge;
mod lanes;
mod limit;
mod local;
mod machine;
mod meanwhile;
mod monitor;
mod moves;
mod network;
mod ownership;
mod package;
mod qemu_ends;
mod recover;
mod refusals;
mod reload;
mod retry;
mod stop;
mod successor;
mod survives;
mod systemd;
mod versions;
mod witness;
