//! Everything that is tested with a real libvirt: two hosts with file systems of their own. A program by
//! itself, so that it is compiled by itself. What is `#[ignore]`d is the long matrix of `make libvirt`.

#[path = "../support/mod.rs"]
mod support;

mod agents;
mod bed;
#[allow(dead_code)]
#[path = "../real/booted.rs"]
mod booted;
mod crowd;
mod deploy;
mod failures;
mod hook;
mod links;
mod matrix;
mod moves;
mod newer;
mod plain;
mod postcopy;
mod scene;
mod ssh;
mod systemd;
mod told;
mod words;
