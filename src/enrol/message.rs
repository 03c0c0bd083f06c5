//! What a new host and the CA's machine say to each other, and how they prove that they have the ticket's secret.
//!
//! A message is a length of four bytes, big-endian, and JSON. Each side says one, then the host a single byte:
//! that it has stored what it got.

use std::io;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::ticket::{bytes_of, hex};
use crate::json;
use crate::printable::bounded;

/// Longest request: the request for a certificate in hexadecimal, and a proof.
pub const REQUEST_BYTES_MAX: u32 = 16 * 1024;
/// Longest answer: certificates, and the list of what is revoked.
pub const ANSWER_BYTES_MAX: u32 = 4 * 1024 * 1024;
/// What the host says when it has stored everything.
pub(super) const STORED: u8 = b'k';

/// Label of the exported keying material (RFC 5705 §4).
const EXPORTER_LABEL: &[u8] = b"EXPORTER-vmferry-enrol";

/// Keying material of one TLS connection, the same at both ends and nowhere else.
pub type Exported = [u8; 32];

/// What the new host asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// A request for a certificate (PKCS #10, DER), in hexadecimal.
    pub csr: String,
    pub proof: String,
}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    Granted(Granted),
    Refused { text: String },
}

/// What it gets: certificates as PEM, the list of what is revoked, and the proof that they come from the inviter.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Granted {
    pub cert: String,
    pub ca: String,
    pub crl: Option<String>,
    pub proof: String,
}

impl Request {
    /// Proves the secret on this connection.
    pub fn new(csr: &[u8], secret: &[u8; 32], exported: &Exported) -> Self {
        Self { csr: hex(csr), proof: hex(sign(secret, &claim(b"request", exported, &[csr])).as_ref()) }
    }

    /// The request for a certificate, if it comes from somebody who has the secret, on this connection. Takes the
    /// same time whatever is wrong with the proof.
    pub fn proved(&self, secret: &[u8; 32], exported: &Exported) -> Option<Vec<u8>> {
        let csr = bytes_of(&self.csr)?;
        let claim = claim(b"request", exported, &[&csr]);
        is_proof(secret, &claim, &self.proof).then_some(csr)
    }
}

impl Granted {
    /// The same with its proof.
    pub fn prove(mut self, secret: &[u8; 32], exported: &Exported) -> Self {
        self.proof = hex(sign(secret, &self.claim(exported)).as_ref());
        self
    }

    /// Whether it comes from somebody who has the secret, on this connection.
    pub fn is_proved(&self, secret: &[u8; 32], exported: &Exported) -> bool {
        is_proof(secret, &self.claim(exported), &self.proof)
    }

    fn claim(&self, exported: &Exported) -> Vec<u8> {
        let crl = self.crl.as_deref().unwrap_or_default();
        claim(b"answer", exported, &[self.cert.as_bytes(), self.ca.as_bytes(), crl.as_bytes()])
    }
}

fn claim(role: &[u8], exported: &Exported, parts: &[&[u8]]) -> Vec<u8> {
    let mut claim = [b"vmferry enrolment ", role, exported.as_slice()].concat();
    parts.iter().for_each(|part| claim.extend_from_slice(digest(&SHA256, part).as_ref()));
    claim
}

fn sign(secret: &[u8; 32], claim: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), claim)
}

fn is_proof(secret: &[u8; 32], claim: &[u8], proof: &str) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    bytes_of(proof).is_some_and(|proof| hmac::verify(&key, claim, &proof).is_ok())
}

/// Keying material of an established connection.
pub(super) fn export<D>(tls: &rustls::ConnectionCommon<D>) -> io::Result<Exported> {
    tls.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(io::Error::other)
}

/// Sends one message.
pub(super) async fn send(to: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    to.write_all(&length.to_be_bytes()).await?;
    to.write_all(&json).await?;
    to.flush().await
}

/// The next message, of `most` bytes. Memory is taken for what has come, not for what was announced.
pub async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin), most: u32) -> io::Result<T> {
    let length = from.read_u32().await?;
    if length > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    let mut json = Vec::new();
    from.take(length.into()).read_to_end(&mut json).await?;
    if json.len() < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // It may repeat what was said.
    json::read(&json).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, bounded(&error.to_string())))
}
