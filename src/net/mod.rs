//! TLS, connections, the driver that owns a session, stream handles and pumps. Knows no QEMU.
//!
//! ```text
//! dial, accept ──► Established ──► session_thread ──► driver (owns mux::Session and the socket)
//!                                                       ▲ commands          │ chunks, ends
//!                                                       └── Stream handles ◄┘
//!                                        local socket ◄──► Pump ◄──► Stream
//! ```
//!
//! The layers; each imports only from those below it:
//!
//! ```text
//! all sessions         pool, lanes; trust; stream_owner; pending_handshakes, single_flight, duplicate_agent
//! a session begins     accept; session_thread; driver: tls_socket, black_hole
//! who takes a stream   pump: inbox, nbd_requests; message, purposes
//! handles              session; stream
//! within a session     frozen; link, stream_port: stream_inbox; message_budget
//! a connection begins  resume; dial; endpoint, hello_exchange, addresses
//! a connection         connection; session_key; connect_error; record
//! a handshake          handshake; tls; handshake_failure, certificate_dates; credentials; identity
//! ```

pub mod accept;
pub(crate) mod addresses;
mod black_hole;
mod certificate_dates;
mod coming_sessions;
pub mod compress;
pub mod connect_error;
mod connection;
pub mod cpu_time;
pub mod credentials;
mod dial;
mod driver;
mod duplicate_agent;
pub mod endpoint;
pub mod expiry;
pub mod frozen;
pub mod handshake;
pub mod handshake_failure;
mod hello_exchange;
pub mod identity;
mod inbox;
pub mod lanes;
mod link;
pub mod message;
pub mod message_budget;
pub mod naming;
pub mod nbd_requests;
mod pending_handshakes;
pub mod pool;
pub mod probe;
pub mod pump;
pub mod purposes;
mod record;
mod resume;
pub mod session;
mod session_key;
mod session_thread;
mod single_flight;
pub mod stream;
mod stream_inbox;
pub mod stream_owner;
mod stream_port;
pub mod tls;
mod tls_socket;
pub mod trust;
pub mod waits;
