//! The key by which the two ends of a session know each other again.
//!
//! A resumption is a full mutual TLS handshake like any other. On top of it each side proves that
//! it holds the session's secret, bound to this very connection (RFC 8446 §7.5), to the session
//! and to the attempt: another process with the same host certificate cannot take a session.
//!
//! ```text
//! secret  HMAC(dialer's share, "vmferry session secret" ‖ acceptor's share ‖ session id)
//! proof   HMAC(secret, exported keying material ‖ session id ‖ attempt ‖ role)
//! ```
//! Knows no socket.

use std::fmt;

use aws_lc_rs::hmac;
use zeroize::Zeroize;

use super::connect_error::ConnectError;
use crate::mux::Role;
use crate::mux::hello::Mode;

/// Label of the exported keying material (RFC 5705 §4).
const EXPORTER_LABEL: &[u8] = b"EXPORTER-vmferry-resume";

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

impl Drop for SessionKey {
    fn drop(&mut self) {
        self.secret.zeroize();
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

/// The HELLO mode of one attempt.
pub(super) fn resume_mode(key: &SessionKey, exported: &Exported, generation: u64, rx_seq: u64) -> Mode {
    let proof = key.proof(exported, generation, Role::Dialer);
    Mode::Resume { session_id: key.id, generation, rx_seq, proof }
}

/// Fresh random bytes, for names and shares of a secret.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ConnectError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(ConnectError::Random)?;
    Ok(bytes)
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
