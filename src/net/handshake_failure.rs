//! Why a TLS handshake failed: the cause in an error of the TLS library or of a socket, in words with
//! a hint, and as a metric's label. Knows no socket and no session.

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError, Error as RustlsError, PeerIncompatible};

use super::identity::IdentityError;

/// Why a handshake failed: the cause, for people and as a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HandshakeFailure {
    /// The peer's certificate was not issued by our CA.
    UnknownCa,
    /// A signature does not verify: another CA of the same name issued the certificate, or the
    /// peer has not got its key.
    BadSignature,
    /// The peer's certificate has expired.
    Expired,
    /// The peer's certificate is not valid yet.
    NotYetValid,
    /// The peer's certificate is on the revocation list.
    Revoked,
    /// Our revocation list does not tell about this certificate, or is itself out of date.
    RevocationUnknown,
    /// The peer's certificate may not be used for this role.
    WrongPurpose,
    /// The peer has proved an identity, but not the one that was dialled.
    WrongIdentity,
    /// The peer's certificate is genuine but gives no single identity.
    NoIdentity,
    /// The peer's certificate is malformed, badly signed or of an unsupported kind.
    BadCertificate,
    /// The peer presented no certificate.
    NoClientCertificate,
    /// The peer does not speak TLS 1.3.
    BadVersion,
    /// The peer does not speak our protocol (ALPN).
    BadProtocol,
    /// The peer shares no cipher suite or key exchange with us.
    NothingInCommon,
    /// The peer refused us; the alert it sent says this much.
    RefusedByPeer(Refusal),
    Timeout,
    /// The connection ended in the middle of the handshake.
    Closed,
    /// What arrived was not a TLS handshake, or broke its rules.
    Garbage,
    /// Anything else; the error's source has it.
    Other,
}

/// What the peer's alert says of our certificate or offer. Alerts are coarse: a certificate
/// that is not valid yet is reported as expired, one with the wrong name as bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// Its CA did not issue our certificate (or its revocation list is out of date).
    UnknownCa,
    /// A signature of ours does not verify there, as when its CA only has our CA's name.
    BadSignature,
    /// Our certificate has expired or is not valid yet by the peer's clock.
    Expired,
    Revoked,
    /// Our certificate is not for this purpose.
    WrongPurpose,
    /// Our certificate is bad in the peer's eyes: malformed or not the name it wanted.
    BadCertificate,
    /// It wants a certificate and we presented none.
    CertificateRequired,
    /// It does not speak TLS 1.3.
    BadVersion,
    /// It does not speak our protocol (ALPN).
    BadProtocol,
    /// No cipher suite or key exchange in common, or it found our handshake faulty.
    HandshakeFailed,
    Other,
}

/// Finds the cause in an error of a socket or of the TLS library.
pub fn classify_handshake_error(error: &io::Error) -> HandshakeFailure {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<RustlsError>());
    if let Some(tls) = inner {
        return classify_tls_error(tls);
    }
    match error.kind() {
        io::ErrorKind::TimedOut => HandshakeFailure::Timeout,
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::NotConnected => HandshakeFailure::Closed,
        _ => HandshakeFailure::Other,
    }
}

/// Finds the cause in an error of the TLS library.
pub fn classify_tls_error(error: &RustlsError) -> HandshakeFailure {
    match error {
        RustlsError::InvalidCertificate(e) => classify_certificate_error(e),
        RustlsError::NoCertificatesPresented => HandshakeFailure::NoClientCertificate,
        RustlsError::AlertReceived(alert) => HandshakeFailure::RefusedByPeer((*alert).into()),
        RustlsError::NoApplicationProtocol => HandshakeFailure::BadProtocol,
        RustlsError::PeerIncompatible(e) => classify_incompatibility(e),
        RustlsError::InvalidMessage(_)
        | RustlsError::InappropriateMessage { .. }
        | RustlsError::InappropriateHandshakeMessage { .. }
        | RustlsError::PeerMisbehaved(_)
        | RustlsError::PeerSentOversizedRecord
        | RustlsError::DecryptError => HandshakeFailure::Garbage,
        _ => HandshakeFailure::Other,
    }
}

fn classify_certificate_error(error: &CertificateError) -> HandshakeFailure {
    use CertificateError as E;
    match error {
        E::UnknownIssuer => HandshakeFailure::UnknownCa,
        E::BadSignature => HandshakeFailure::BadSignature,
        E::Expired | E::ExpiredContext { .. } => HandshakeFailure::Expired,
        E::NotValidYet | E::NotValidYetContext { .. } => HandshakeFailure::NotYetValid,
        E::Revoked => HandshakeFailure::Revoked,
        E::UnknownRevocationStatus | E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            HandshakeFailure::RevocationUnknown
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => HandshakeFailure::WrongPurpose,
        E::NotValidForName | E::NotValidForNameContext { .. } => HandshakeFailure::WrongIdentity,
        E::Other(other) if other.0.downcast_ref::<IdentityError>().is_some() => HandshakeFailure::NoIdentity,
        _ => HandshakeFailure::BadCertificate,
    }
}

fn classify_incompatibility(error: &PeerIncompatible) -> HandshakeFailure {
    use PeerIncompatible as P;
    match error {
        P::ServerDoesNotSupportTls12Or13
        | P::ServerTlsVersionIsDisabledByOurConfig
        | P::SupportedVersionsExtensionRequired
        | P::Tls12NotOffered
        | P::Tls12NotOfferedOrEnabled => HandshakeFailure::BadVersion,
        _ => HandshakeFailure::NothingInCommon,
    }
}

impl From<AlertDescription> for Refusal {
    fn from(alert: AlertDescription) -> Self {
        use AlertDescription as A;
        match alert {
            A::UnknownCA => Self::UnknownCa,
            A::DecryptError => Self::BadSignature,
            A::CertificateExpired => Self::Expired,
            A::CertificateRevoked => Self::Revoked,
            A::UnsupportedCertificate => Self::WrongPurpose,
            A::BadCertificate | A::CertificateUnknown | A::AccessDenied => Self::BadCertificate,
            A::CertificateRequired | A::NoCertificate => Self::CertificateRequired,
            A::ProtocolVersion => Self::BadVersion,
            A::NoApplicationProtocol => Self::BadProtocol,
            A::HandshakeFailure | A::InsufficientSecurity | A::IllegalParameter => Self::HandshakeFailed,
            _ => Self::Other,
        }
    }
}

impl HandshakeFailure {
    /// A short, fixed word for a metric's `reason` label; the set is finite.
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownCa => "unknown_ca",
            Self::BadSignature => "bad_signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Revoked => "revoked",
            Self::RevocationUnknown => "revocation_unknown",
            Self::WrongPurpose => "wrong_purpose",
            Self::WrongIdentity => "wrong_identity",
            Self::NoIdentity => "no_identity",
            Self::BadCertificate => "bad_certificate",
            Self::NoClientCertificate => "no_client_certificate",
            Self::BadVersion => "bad_version",
            Self::BadProtocol => "bad_protocol",
            Self::NothingInCommon => "nothing_in_common",
            Self::RefusedByPeer(refusal) => refusal.label(),
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Garbage => "garbage",
            Self::Other => "other",
        }
    }

    /// True where dialling again by itself may help: nobody has judged anybody yet.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Timeout | Self::Closed)
    }

    /// The cause, and after it what to do.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::UnknownCa => (
                "the peer's certificate was not issued by our CA",
                "give both hosts certificates of one CA, or add the peer's CA to tls.ca",
            ),
            Self::BadSignature => (
                "the peer's certificate or handshake bears a signature that does not verify",
                "probably its CA only has the name of ours: compare their fingerprints with `vmferry certs show`",
            ),
            Self::Expired => {
                ("the peer's certificate has expired", "renew it on the peer, and compare both clocks")
            }
            Self::NotYetValid => {
                ("the peer's certificate is not valid yet", "compare the clocks of both hosts")
            }
            Self::Revoked => {
                ("the peer's certificate is revoked", "issue a new certificate if the host is still trusted")
            }
            Self::RevocationUnknown => (
                "our revocation list is out of date or does not cover the peer's CA",
                "renew the file tls.crl on this host",
            ),
            Self::WrongPurpose => (
                "the peer's certificate is not for this role",
                "extended key usage must hold serverAuth and clientAuth, and key usage, if there is one, digitalSignature",
            ),
            Self::WrongIdentity => (
                "another host answered than the one dialled",
                "compare the peer's `identity` and `address` in our configuration with its certificate",
            ),
            Self::NoIdentity => {
                ("the peer's certificate gives no single identity", "see `vmferry certs show` on the peer")
            }
            Self::BadCertificate => (
                "the peer's certificate is malformed, badly signed or of an unsupported kind",
                "see `vmferry certs check` on the peer",
            ),
            Self::NoClientCertificate => {
                ("the peer presented no certificate", "only agents with a certificate of our CA may connect")
            }
            Self::BadVersion => {
                ("the peer does not speak TLS 1.3", "only TLS 1.3 is accepted, there is no switch for less")
            }
            Self::BadProtocol => (
                "the peer does not speak the protocol `vmferry/1`",
                "is the port right, and is a TLS proxy in between?",
            ),
            Self::NothingInCommon => {
                ("no cipher suite or key exchange in common with the peer", "is a TLS proxy in between?")
            }
            Self::RefusedByPeer(refusal) => refusal.words(),
            Self::Timeout => (
                "the peer did not finish the handshake in time",
                "is the host overloaded, or does a firewall drop large packets?",
            ),
            Self::Closed => ("the connection ended during the handshake", "see the peer's log"),
            Self::Garbage => {
                ("what arrived is not a valid TLS handshake", "is the port right, and is a proxy in between?")
            }
            Self::Other => ("unexpected error", "see the cause"),
        }
    }
}

impl Refusal {
    fn label(self) -> &'static str {
        match self {
            Self::UnknownCa => "peer_unknown_ca",
            Self::BadSignature => "peer_bad_signature",
            Self::Expired => "peer_expired",
            Self::Revoked => "peer_revoked",
            Self::WrongPurpose => "peer_wrong_purpose",
            Self::BadCertificate => "peer_bad_certificate",
            Self::CertificateRequired => "peer_certificate_required",
            Self::BadVersion => "peer_bad_version",
            Self::BadProtocol => "peer_bad_protocol",
            Self::HandshakeFailed => "peer_handshake_failed",
            Self::Other => "peer_other",
        }
    }

    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::UnknownCa => (
                "the peer refused us: its CA did not issue our certificate, or its revocation list is out of date",
                "give both hosts certificates of one CA",
            ),
            Self::BadSignature => (
                "the peer refused us: a signature of ours does not verify there",
                "probably its CA only has the name of ours: compare their fingerprints with `vmferry certs show`",
            ),
            Self::Expired => (
                "the peer refused us: by its clock our certificate is not valid now",
                "renew our certificate, and compare both clocks",
            ),
            Self::Revoked => {
                ("the peer refused us: our certificate is revoked", "issue a new certificate for this host")
            }
            Self::WrongPurpose => (
                "the peer refused us: our certificate is not for this role",
                "extended key usage must hold serverAuth and clientAuth, and key usage, if there is one, digitalSignature",
            ),
            Self::BadCertificate => (
                "the peer refused our certificate",
                "does its configuration name our identity? its log says more",
            ),
            Self::CertificateRequired => {
                ("the peer refused us: it got no certificate", "set tls.cert and tls.key")
            }
            Self::BadVersion => ("the peer does not accept TLS 1.3", "is a TLS proxy in between?"),
            Self::BadProtocol => (
                "the peer does not speak the protocol `vmferry/1`",
                "is the port right, and is a TLS proxy in between?",
            ),
            Self::HandshakeFailed => {
                ("the peer found nothing acceptable in our offer", "is a TLS proxy in between?")
            }
            Self::Other => ("the peer refused us", "its log says more"),
        }
    }
}

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cause, hint) = self.words();
        write!(f, "{cause} (hint: {hint})")
    }
}
