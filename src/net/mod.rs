//! TLS, connections, the driver that owns a session, stream handles and pumps. Knows no QEMU.
//!
//! ```text
//! connect ──► Established ──► Session::start ──► driver (owns mux::Session and the socket)
//!                                                  ▲ commands          │ chunks, ends
//!                                                  └── Stream handles ◄┘
//!                                   local socket ◄──► Pump ◄──► Stream
//! ```

mod addresses;
mod carrier;
mod clocks;
mod clones;
pub mod compress;
pub mod connect;
pub mod credentials;
mod dialing;
mod driver;
mod edge;
pub mod frozen;
pub mod handshake;
pub mod identity;
pub mod lanes;
mod lobby;
pub mod message;
pub mod pool;
pub mod pump;
pub mod purposes;
mod record;
mod resume;
pub mod session;
pub mod stream;
mod stuck;
pub mod tls;
