//! TLS, connections, the driver that owns a session, stream handles and pumps. Knows no QEMU.

pub mod credentials;
pub mod handshake;
pub mod identity;
pub mod tls;
