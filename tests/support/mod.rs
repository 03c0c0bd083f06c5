//! The test bed of everything that is tested with real QEMUs: two hosts made of network
//! namespaces, guests that prove their own writes, agents, captures and the proofs themselves.
//! Used by the tests (`tests/real`) and by the demo. It must not use vmferry's own library:
//! the judge is not the accused. Blocking throughout; every wait has a deadline.
//!
//! Everything fails by `anyhow::Error`, so that the demo can report what a test would panic on.

// Each test uses its own part of the bed.
#![allow(dead_code, unused_imports, unreachable_pub)]

pub mod agent;
pub mod block;
pub mod capture;
pub mod console;
pub mod etcd;
pub mod firewall;
pub mod lab;
pub mod metrics;
pub mod net;
pub mod pair;
pub mod pcap;
pub mod plain;
pub mod process;
pub mod proof;
pub mod qmp;
pub mod saved;
pub mod vm;
pub mod volume;
pub mod watcher;

pub use agent::{Agent, AgentSpec, Credentials, PeerEntry, VmEntry, VmferryRun};
pub use capture::Capture;
pub use etcd::Etcd;
pub use lab::{Lab, Paths, Version, with_lab};
pub use metrics::Metrics;
pub use net::{Host, Net, Way};
pub use pair::{Guest, Pair};
pub use pcap::Traffic;
pub use qmp::Qmp;
pub use vm::{DiskFormat, Vm, VmSpec};
pub use volume::Volume;
pub use watcher::Watcher;
