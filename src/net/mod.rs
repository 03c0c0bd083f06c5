//! TLS, connections, the driver that owns a session, stream handles and pumps. Knows no QEMU.
