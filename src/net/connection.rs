//! A connection past TLS and HELLO, and what came out of them: a new session, or one that goes on. Plain
//! values; knows no deadline and no stream.

use std::net::SocketAddr;
use std::time::Instant;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::NamedGroup;
use rustls_pki_types::CertificateDer;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::connect_error::ConnectError;
use super::identity::Identity;
use super::record::Record;
use super::session_key::SessionKey;
use crate::mux::Role;
use crate::mux::hello::Negotiated;

/// What is known of a session's connection. It changes with each one.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    pub address: SocketAddr,
    /// Cipher suite and key exchange, for people.
    pub cipher: String,
    /// How the keys were agreed on; none of a connection that an earlier process had.
    pub group: Option<NamedGroup>,
    /// The certificates with which the peer proved itself, its own first.
    pub chain: Vec<CertificateDer<'static>>,
    pub since: Instant,
    /// Largest TCP segment that the kernel sends, when the connection came about.
    pub segment_bytes: Option<u32>,
}

impl ConnectionInfo {
    /// SHA-256 of the certificate with which the peer proved itself, in hex.
    pub fn fingerprint(&self) -> String {
        let own = self.chain.first().map(|certificate| digest(&SHA256, certificate));
        own.map_or_else(String::new, |d| d.as_ref().iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// A connection past TLS and HELLO. It belongs to no runtime yet.
pub(super) struct Connection {
    pub(super) tcp: std::net::TcpStream,
    pub(super) record: Record,
    pub(super) info: ConnectionInfo,
}

impl Connection {
    pub(super) fn new(
        tcp: TcpStream,
        tls: impl Into<rustls::Connection>,
        address: SocketAddr,
    ) -> Result<Self, ConnectError> {
        let tls = tls.into();
        let chain = tls.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
        let (cipher, since) = (cipher(&tls), Instant::now());
        let segment_bytes = SockRef::from(&tcp).tcp_mss().ok();
        let group = tls.negotiated_key_exchange_group().map(|group| group.name());
        let info = ConnectionInfo { address, cipher, group, chain, since, segment_bytes };
        let tcp = tcp.into_std().map_err(ConnectError::Start)?;
        Ok(Self { tcp, record: Record::new(tls), info })
    }
}

/// A connection on which a new session begins.
pub(super) struct Established {
    pub(super) connection: Connection,
    /// Who is at the other end.
    pub(super) peer: Identity,
    pub(super) role: Role,
    pub(super) negotiated: Negotiated,
    pub(super) key: SessionKey,
    /// Where to dial again, on the side that dialed.
    pub(super) address: Option<String>,
}

/// A connection over which a session goes on.
pub(super) struct Resumed {
    pub(super) connection: Connection,
    /// The last frame that the peer has received.
    pub(super) peer_rx_seq: u64,
}

/// The cipher suite and key exchange of a connection, for people.
fn cipher(tls: &rustls::CommonState) -> String {
    let suite = tls.negotiated_cipher_suite().and_then(|s| s.suite().as_str()).unwrap_or("unknown");
    match tls.negotiated_key_exchange_group() {
        Some(group) => format!("{suite} {:?}", group.name()),
        None => suite.to_owned(),
    }
}
