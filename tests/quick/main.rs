//! Everything that is tested without a guest: the whole program's parts, by what they promise to
//! others. One program, so that its dependencies are linked once. Needs no root; `qmp_real` runs
//! QEMUs of its own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failure here is a failure of the test"
)]

mod api;
mod attacks;
mod audit;
mod certs;
mod doctor;
mod documentation;
mod enrol;
#[allow(unreachable_pub)]
mod forward;
mod fuzzed;
mod journals;
mod manual;
mod nbd_handshake;
mod nbd_server;
mod observe;
mod ping;
mod qmp;
mod qmp_real;
mod resume;
mod rig;
mod service;
mod sessions;
mod tls;
mod traces;
mod witness;
