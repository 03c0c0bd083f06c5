//! The way to a peer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::net::probe::BYTES_MAX as PROBE_BYTES_MAX;
use crate::ranged::Within;

/// What may be sent to measure how fast it goes.
pub type ProbeBytes = Within<0, PROBE_BYTES_MAX>;

/// `POST /v1/peers/{name}/ping`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PingRequest {
    /// So many bytes are sent to measure how fast it goes; 8 MiB if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ProbeBytes>,
}

/// What was found of the way to a peer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Ping {
    /// Its name in the configuration.
    pub peer: String,
    /// Its identity in the configuration; who is reached has proved it.
    pub identity: String,
    /// None when it could not be reached.
    pub reached: Option<Reached>,
    /// Why it could not be, or why no probe went through.
    pub cause: Option<String>,
}

/// A session with it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Reached {
    pub address: String,
    /// Whether this host dials it.
    pub dialed: bool,
    /// Until there was a session with a connection; none where there was one already.
    pub connected_in_ms: Option<f64>,
    /// Cipher suite and key exchange.
    pub cipher: String,
    /// SHA-256 of its certificate.
    pub certificate: String,
    /// Largest TCP segment; none where that is not known.
    pub segment_bytes: Option<u32>,
    /// Smallest round trip of the session seen lately.
    pub rtt_ms: Option<f64>,
    /// None where its agent answers no probe.
    pub probe: Option<Probe>,
}

/// What a probe has found out.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Probe {
    /// Of its program.
    pub version: String,
    /// Versions of the session protocol that it speaks.
    pub protocol_min: u16,
    pub protocol_max: u16,
    /// From the question to the answer.
    pub round_trip_ms: f64,
    pub sent_bytes: u64,
    /// Beside whatever else was sent, and within limits.
    pub bytes_per_s: u64,
}
