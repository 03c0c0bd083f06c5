//! vmferry moves running QEMU virtual machines with local disks between hosts, encrypted,
//! through one port. `ARCHITECTURE.md` has the picture; each module says what it owns and
//! what it must not know.

#![warn(clippy::too_many_lines)]

pub mod access;
pub mod agent;
pub mod api;
pub mod audit;
pub mod cli;
pub mod config;
pub mod control_streams;
pub mod doctor;
pub mod drain;
pub mod enrol;
pub mod error_chain;
pub mod forward;
pub mod json;
pub mod libvirt;
mod log;
pub mod metrics;
pub mod migrate;
pub mod mux;
pub mod net;
pub mod peer_refusals;
pub mod pki;
pub mod printable;
pub mod private_memory;
pub mod qemu;
pub mod ranged;
pub mod rate;
pub mod size;
pub mod traces;
pub mod weight;
pub mod witness;

/// Sessions take and return megabytes each millisecond on threads of their own. glibc gives their
/// memory back to the kernel and takes it again all the time, at the cost of page faults; this
/// allocator waits for ten seconds (`bench/`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
