//! How a session goes on over another connection: the key by which its two ends know each other
//! again, and the dialer's way back. Knows no frames but HELLO, no streams.
//!
//! A resumption is a full mutual TLS handshake like any other. On top of it each side proves that
//! it holds the session's secret, bound to this very connection (RFC 8446 §7.5), to the session
//! and to the attempt: another process with the same host certificate cannot take a session.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use aws_lc_rs::hmac;
use backon::{BackoffBuilder, ExponentialBuilder};

use super::connect::{ConnectError, Connection, Endpoint};
use super::identity::Identity;
use crate::mux::hello::Mode;
use crate::mux::{Code, Role};

/// Label of the exported keying material (RFC 5705 §4).
pub(super) const EXPORTER_LABEL: &[u8] = b"EXPORTER-vmferry-resume";
/// Longest pause between two attempts of the dialer: a link that is back is to be noticed soon.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The pauses (WIRE §4): each is half of its length and a random part of the other half, so that
/// agents of one switch do not come back in step. The first is of 50 ms, each further one twice as long.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(25))
    .with_max_delay(Duration::from_millis(500))
    .without_max_times()
    .with_jitter();

/// Keying material of one TLS connection, the same at both ends and nowhere else.
pub(super) type Exported = [u8; 32];

/// A proof that somebody holds a session's secret, on one connection.
pub(super) type Proof = [u8; 32];

/// What the two ends of a session know each other by.
#[derive(Clone)]
pub(crate) struct SessionKey {
    pub(super) id: [u8; 16],
    pub(super) secret: [u8; 32],
    /// The peer's process: a new one has lost the session.
    pub(super) peer_instance: [u8; 16],
    /// The protocol version that the session speaks.
    pub(super) version: u16,
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionKey").field("version", &self.version).finish_non_exhaustive()
    }
}

impl SessionKey {
    /// The key that both sides derive from what each has put into its HELLO.
    pub(super) fn derive(
        id: [u8; 16],
        dialer_share: &[u8; 32],
        acceptor_share: &[u8; 32],
        peer_instance: [u8; 16],
        version: u16,
    ) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, dialer_share);
        let mut secret = [0; 32];
        let mut context = hmac::Context::with_key(&key);
        context.update(b"vmferry session secret");
        context.update(acceptor_share);
        context.update(&id);
        secret.copy_from_slice(context.sign().as_ref());
        Self { id, secret, peer_instance, version }
    }

    /// What `role` sends to prove itself.
    pub(super) fn proof(&self, exported: &Exported, generation: u64, role: Role) -> Proof {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.secret);
        let mut proof = [0; 32];
        proof.copy_from_slice(hmac::sign(&key, &self.claim(exported, generation, role)).as_ref());
        proof
    }

    /// Whether `proof` is that of `role`; takes the same time whatever is wrong with it.
    pub(super) fn is_proof(&self, proof: &Proof, exported: &Exported, generation: u64, role: Role) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.secret);
        hmac::verify(&key, &self.claim(exported, generation, role), proof).is_ok()
    }

    fn claim(&self, exported: &Exported, generation: u64, role: Role) -> Vec<u8> {
        let role = match role {
            Role::Dialer => b'd',
            Role::Acceptor => b'a',
        };
        [&exported[..], &self.id, &generation.to_be_bytes(), &[role]].concat()
    }
}

/// Keying material of an established connection.
pub(super) fn export<D>(tls: &rustls::ConnectionCommon<D>) -> Result<Exported, ConnectError> {
    tls.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(ConnectError::Exporter)
}

/// The peer's word on a resumption.
pub(crate) struct Resumed {
    /// The new connection, past TLS and HELLO.
    pub(super) connection: Connection,
    /// The last frame that the peer has received.
    pub(super) peer_rx_seq: u64,
}

/// The dialer's way back to its peer.
#[derive(Debug, Clone)]
pub(crate) struct Redial {
    pub(super) endpoint: Arc<Endpoint>,
    /// As configured: it is looked up anew each time, so the peer may have moved.
    pub(super) address: String,
    pub(super) peer: Identity,
}

impl Redial {
    /// Tries until the peer takes the session up again. Each attempt has a number of its own,
    /// which `newest` holds before it begins; the newest wins.
    ///
    /// # Errors
    /// The peer's final word: it has no such session any more, or does not take it up.
    pub(super) async fn until_resumed(
        &self,
        key: &SessionKey,
        newest: &AtomicU64,
        rx_seq: u64,
    ) -> Result<Resumed, ConnectError> {
        let mut pauses = PAUSES.build();
        loop {
            let generation = newest.fetch_add(1, Relaxed) + 1;
            match self.endpoint.resume(self, key, generation, rx_seq).await {
                Ok(resumed) => return Ok(resumed),
                Err(e) if is_final(&e) => return Err(e),
                Err(e) => tracing::debug!(
                    peer = %self.peer, attempt = generation, error = %e, "the session cannot be resumed yet"
                ),
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
        }
    }
}

/// Whether asking again cannot help. A certificate that is refused may be renewed meanwhile.
fn is_final(error: &ConnectError) -> bool {
    match error {
        ConnectError::Refused { code, .. } => !matches!(code, Code::Limit | Code::Shutdown),
        ConnectError::Incompatible(_) => true,
        _ => false,
    }
}

/// The HELLO mode of one attempt.
pub(super) fn resume_mode(key: &SessionKey, exported: &Exported, generation: u64, rx_seq: u64) -> Mode {
    let proof = key.proof(exported, generation, Role::Dialer);
    Mode::Resume { session_id: key.id, generation, rx_seq, proof }
}

/// The cipher suite and key exchange of a connection, for people.
pub(super) fn cipher(tls: &rustls::CommonState) -> String {
    let suite = tls.negotiated_cipher_suite().and_then(|s| s.suite().as_str()).unwrap_or("unknown");
    match tls.negotiated_key_exchange_group() {
        Some(group) => format!("{suite} {:?}", group.name()),
        None => suite.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(dialer_share: u8) -> SessionKey {
        SessionKey::derive([1; 16], &[dialer_share; 32], &[3; 32], [4; 16], 1)
    }

    #[test]
    fn both_sides_derive_the_same_secret_and_shares_matter() {
        assert_eq!(key(2).secret, key(2).secret);
        assert_ne!(key(2).secret, key(9).secret);
        let other_id = SessionKey::derive([2; 16], &[2; 32], &[3; 32], [4; 16], 1);
        assert_ne!(key(2).secret, other_id.secret);
    }

    #[test]
    fn a_proof_is_for_one_connection_attempt_and_role() {
        let proof = key(2).proof(&[7; 32], 5, Role::Dialer);
        assert!(key(2).is_proof(&proof, &[7; 32], 5, Role::Dialer));
        assert!(!key(2).is_proof(&proof, &[8; 32], 5, Role::Dialer), "another connection");
        assert!(!key(2).is_proof(&proof, &[7; 32], 6, Role::Dialer), "another attempt");
        assert!(!key(2).is_proof(&proof, &[7; 32], 5, Role::Acceptor), "reflected");
        assert!(!key(9).is_proof(&proof, &[7; 32], 5, Role::Dialer), "another session");
    }

    #[test]
    fn a_key_does_not_show_its_secret() {
        let shown = format!("{:?}", key(2));
        assert!(!shown.contains("secret") && !shown.contains('['), "{shown}");
    }
}
