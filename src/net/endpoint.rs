//! What this agent brings into every connection: credentials, limits, socket options. Opens none.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use super::connect_error::ConnectError;
use super::session_key::random;
use super::tls::Tls;
use crate::mux::Config;
use crate::mux::hello::{Hello, Mode};

/// How long a session goes on without a connection, unless told otherwise (WIRE §4).
pub const RESUME_DEADLINE: Duration = Duration::from_secs(60);
/// Bytes that may lie unsent in the kernel: what is sealed late can still be overtaken.
const NOTSENT_LOWAT_BYTES: u32 = 64 * 1024;

/// What this agent brings into every connection.
#[derive(Debug)]
pub struct Endpoint {
    tls: RwLock<Arc<Tls>>,
    instance: [u8; 16],
    config: Config,
    dead_peer: Duration,
    resume_within: Duration,
    congestion: Option<String>,
}

impl Endpoint {
    /// An endpoint with the given credentials; `dead_peer` bounds a silent connection.
    pub fn new(tls: Tls, config: Config, dead_peer: Duration) -> Result<Self, ConnectError> {
        let instance = random()?;
        let (tls, resume_within) = (RwLock::new(Arc::new(tls)), RESUME_DEADLINE);
        Ok(Self { tls, instance, config, dead_peer, resume_within, congestion: None })
    }

    /// Goes by the name of an earlier process, whose sessions it has taken up.
    pub fn with_instance(self, instance: [u8; 16]) -> Self {
        Self { instance, ..self }
    }

    /// The name of this process to its peers.
    pub fn instance(&self) -> [u8; 16] {
        self.instance
    }

    /// Sessions go on without a connection for this long instead of [`RESUME_DEADLINE`].
    pub fn with_resume(self, resume_within: Duration) -> Self {
        Self { resume_within, ..self }
    }

    /// Asks for this congestion control on every connection instead of the system's default
    /// (tcp(7), TCP_CONGESTION).
    pub fn with_congestion(self, name: &str) -> Self {
        Self { congestion: Some(name.to_owned()), ..self }
    }

    /// The credentials in use for new connections.
    pub fn tls(&self) -> Arc<Tls> {
        let tls = self.tls.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(&tls)
    }

    /// Uses other credentials for new connections.
    pub fn set_tls(&self, tls: Tls) {
        *self.tls.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(tls);
    }

    /// The protocol's limits.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How long sessions go on without a connection.
    pub fn resume_within(&self) -> Duration {
        self.resume_within
    }

    pub(super) fn hello(&self, mode: Mode) -> Hello {
        Hello::new(&self.config, self.instance, mode)
    }

    /// Options that a bulk and latency connection needs; failing ones cost only speed.
    pub(super) fn prepare(&self, tcp: &TcpStream) {
        let socket = SockRef::from(tcp);
        let keepalive = TcpKeepalive::new().with_time(self.dead_peer).with_interval(Duration::from_secs(1));
        let options = [
            socket.set_tcp_nodelay(true),
            socket.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES),
            socket.set_tcp_user_timeout(Some(self.dead_peer)),
            socket.set_tcp_keepalive(&keepalive),
            self.congestion.as_ref().map_or(Ok(()), |name| socket.set_tcp_congestion(name.as_bytes())),
        ];
        for error in options.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "a socket option was refused");
        }
    }
}
