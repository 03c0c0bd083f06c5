//! TLS as vmferry speaks it, built once from the host's files: TLS 1.3 only, both sides with
//! certificates of our own CA, no resumption, no 0-RTT. Must not know sockets or sessions;
//! `handshake.rs` runs a handshake with what is made here.
//!
//! There is no switch in this file that makes a connection weaker, and there shall be none.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as RustlsError,
    InconsistentKeys, NamedGroup, OtherError, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::Deserialize;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::credentials::{Credentials, may_sign};
pub use super::credentials::{TlsError, TlsPaths, read_certificates, read_key};
use super::expiry::{Ending, endings};
use super::handshake_failure::{HandshakeFailure, classify_tls_error};
use super::identity::Identity;
use super::naming::Naming;

/// The only application protocol: version 1 of the session protocol.
pub const ALPN: &[u8] = b"vmferry/1";

/// Which library seals records. Key exchange is always aws-lc's, whose X25519MLKEM768 keeps
/// today's recordings safe from tomorrow's quantum computers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aead {
    /// Decided by the processor when the agent starts.
    #[default]
    Auto,
    /// ring.
    Ring,
    /// aws-lc.
    AwsLc,
}

/// Which key exchanges a connection may have. Agents always agree on the one with a post-quantum part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyExchange {
    /// The one with a post-quantum part before all others.
    #[default]
    HybridFirst,
    /// No other.
    HybridOnly,
}

impl Aead {
    /// Resolves `Auto`. On x86-64 with VAES but without AVX-512 ring is about twice as fast at
    /// AES-GCM: aws-lc 1.19 has code for AES-NI and for AVX-512 and none in between, ring
    /// 0.17.14 has it. Everywhere else aws-lc.
    pub fn resolve(self) -> Self {
        match self {
            Self::Auto if vaes_without_avx512() => Self::Ring,
            Self::Auto => Self::AwsLc,
            chosen => chosen,
        }
    }

    /// A provider with this library's cipher suites, the fastest first, and these key exchanges.
    fn provider(self, exchange: KeyExchange) -> CryptoProvider {
        let suites = match self.resolve() {
            Self::Ring => vec![
                ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
                ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
                ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            Self::AwsLc | Self::Auto => vec![
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
        };
        CryptoProvider {
            cipher_suites: suites,
            kx_groups: match exchange {
                KeyExchange::HybridFirst => vec![
                    aws_lc_rs::kx_group::X25519MLKEM768,
                    aws_lc_rs::kx_group::X25519,
                    aws_lc_rs::kx_group::SECP256R1,
                    aws_lc_rs::kx_group::SECP384R1,
                ],
                KeyExchange::HybridOnly => vec![aws_lc_rs::kx_group::X25519MLKEM768],
            },
            ..aws_lc_rs::default_provider()
        }
    }
}

impl fmt::Display for Aead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ring => "ring",
            Self::AwsLc => "aws-lc",
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn vaes_without_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let vaes = has!("vaes") && has!("vpclmulqdq") && has!("avx2");
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
    vaes && !avx512
}

#[cfg(not(target_arch = "x86_64"))]
fn vaes_without_avx512() -> bool {
    false
}

/// Everything a host needs to dial and to be dialled. It is immutable: a reload makes a new
/// one, and [`Tls::reverify`] then tells which live sessions would no longer be accepted.
#[derive(Debug, Clone)]
pub struct Tls {
    /// For connections that we dial.
    pub client: Arc<ClientConfig>,
    /// For connections that we accept.
    pub server: Arc<ServerConfig>,
    /// Our own identity, from our certificate.
    pub identity: Identity,
    /// By which names peers are known, and we are.
    pub naming: Naming,
    /// When our certificate expires.
    pub not_after: OffsetDateTime,
    /// When that and everything else ends that is needed.
    pub endings: Vec<Ending>,
    /// The library that seals, never `Auto`.
    pub aead: Aead,
    verifier: Arc<PeerVerifier>,
}

/// The side that a peer takes in a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It dialled us.
    Client,
    /// We dialled it.
    Server,
}

impl Tls {
    /// Reads the files and checks them as severely as a peer would: dates, purposes, identity,
    /// key, and that our own certificate verifies under our own CA and revocation list.
    /// Errors: a [`TlsError`] that names the file and the remedy.
    pub fn load(paths: &TlsPaths, aead: Aead) -> Result<Self, TlsError> {
        Self::load_named(paths, Naming::Dns, aead)
    }

    /// The same where hosts are known by other names.
    pub fn load_named(paths: &TlsPaths, naming: Naming, aead: Aead) -> Result<Self, TlsError> {
        Self::load_as(paths, naming, (aead, KeyExchange::default()))
    }

    /// The same with these key exchanges.
    pub fn load_as(
        paths: &TlsPaths,
        naming: Naming,
        (aead, exchange): (Aead, KeyExchange),
    ) -> Result<Self, TlsError> {
        let Credentials { cas, chain, key, crls, identity, not_after } =
            Credentials::read(paths, &naming, OffsetDateTime::now_utc())?;
        let aead = aead.resolve();
        let provider = Arc::new(aead.provider(exchange));
        let endings = endings(&chain, &cas, &crls);
        let roots = root_store(&cas, paths)?;
        let verifier = PeerVerifier::new(roots, &crls, naming.clone(), &provider)
            .map(Arc::new)
            .map_err(|source| verifier_error(source, paths))?;
        let now = UnixTime::now();
        verifier
            .check(&chain, PeerRole::Client, &identity, now)
            .and_then(|()| verifier.check(&chain, PeerRole::Server, &identity, now))
            .map_err(|source| own_chain_error(source, paths))?;

        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Settings)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|source| key_error(source, paths))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Settings)?
            .with_client_cert_verifier(verifier.clone())
            .with_single_cert(chain, key.clone_key())
            .map_err(|source| key_error(source, paths))?;
        Ok(Self {
            client: Arc::new(client_settings(client)),
            server: Arc::new(server_settings(server)),
            identity,
            naming,
            not_after,
            endings,
            aead,
            verifier,
        })
    }

    /// Judges by the present CA, revocation list and clock a peer's chain.
    /// Errors: the reason for which a handshake with this peer would fail now.
    pub fn reverify(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
        peer: &Identity,
    ) -> Result<(), HandshakeFailure> {
        self.verifier.check(chain, role, peer, UnixTime::now()).map_err(|e| classify_tls_error(&e))
    }

    /// The same of one that was accepted earlier. It was valid then: a clock that was put back since is taken to be no
    /// earlier than the chain.
    /// Errors: those of [`Tls::reverify`], but for a chain that is not valid yet.
    pub fn reverify_accepted(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
        peer: &Identity,
    ) -> Result<(), HandshakeFailure> {
        match self.reverify(chain, role, peer) {
            Err(HandshakeFailure::NotYetValid) => {
                let judged = self.verifier.check(chain, role, peer, begin(chain));
                judged.map_err(|e| classify_tls_error(&e))
            }
            judged => judged,
        }
    }

    /// Whether a connection would come about now by a key exchange of this group. Of one that is no more it is not
    /// known.
    /// Errors: the reason for which its handshake would fail.
    pub(super) fn permits(&self, group: Option<NamedGroup>) -> Result<(), HandshakeFailure> {
        let groups = &self.client.crypto_provider().kx_groups;
        match group.is_none_or(|group| groups.iter().any(|ours| ours.name() == group)) {
            true => Ok(()),
            false => Err(HandshakeFailure::NothingInCommon),
        }
    }
}

/// R12 of the protocol: resumption would skip the certificate and revocation checks, so every
/// redial is a full mutual handshake. The server name is not sent: it would travel in clear.
fn client_settings(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    config
}

fn server_settings(mut config: ServerConfig) -> ServerConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

fn root_store(cas: &[CertificateDer<'static>], paths: &TlsPaths) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots
            .add(ca.clone())
            .map_err(|source| TlsError::BadCa { path: paths.ca.clone(), source: source.into() })?;
    }
    Ok(Arc::new(roots))
}

fn verifier_error(source: rustls::server::VerifierBuilderError, paths: &TlsPaths) -> TlsError {
    match &paths.crl {
        Some(path) => TlsError::BadCrl { path: path.clone(), source },
        None => TlsError::BadCa { path: paths.ca.clone(), source: source.into() },
    }
}

fn own_chain_error(source: RustlsError, paths: &TlsPaths) -> TlsError {
    let cert = paths.cert.clone();
    match (classify_tls_error(&source), &paths.crl) {
        (HandshakeFailure::Revoked, Some(crl)) => TlsError::Revoked { cert, crl: crl.clone() },
        (HandshakeFailure::RevocationUnknown, Some(crl)) => {
            TlsError::RevocationUnknown { cert, crl: crl.clone() }
        }
        _ => TlsError::NotIssuedByCa { cert, ca: paths.ca.clone(), source },
    }
}

fn key_error(source: RustlsError, paths: &TlsPaths) -> TlsError {
    match source {
        RustlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            TlsError::KeyMismatch { cert: paths.cert.clone(), key: paths.key.clone() }
        }
        source => TlsError::KeyUnusable { path: paths.key.clone(), source },
    }
}

/// Whether a peer that trusts `ca` would accept this certificate in both roles.
pub(crate) fn verify_under(
    ca: &CertificateDer<'static>,
    leaf: &CertificateDer<'_>,
    naming: &Naming,
    identity: &Identity,
) -> Result<(), RustlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = PeerVerifier::new(Arc::new(roots), &[], naming.clone(), &provider)
        .map_err(|e| RustlsError::General(e.to_string()))?;
    let chain = std::slice::from_ref(leaf);
    let now = UnixTime::now();
    verifier.check(chain, PeerRole::Client, identity, now)?;
    verifier.check(chain, PeerRole::Server, identity, now)
}

/// The library's verifiers, and after them our rules of purpose and identity: the library is content with
/// a certificate that names no purpose, with any name among several and with wildcards, and looks at no name
/// of a client at all.
#[derive(Debug)]
struct PeerVerifier {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
    naming: Naming,
}

impl PeerVerifier {
    fn new(
        roots: Arc<RootCertStore>,
        crls: &[rustls_pki_types::CertificateRevocationListDer<'static>],
        naming: Naming,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, rustls::server::VerifierBuilderError> {
        let mut clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            // Every peer has one certificate; naming our CA to strangers helps nobody.
            .clear_root_hint_subjects()
            .with_crls(crls.iter().cloned());
        let mut servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(crls.iter().cloned());
        if !crls.is_empty() {
            clients = clients.enforce_revocation_expiration();
            servers = servers.enforce_revocation_expiration();
        }
        Ok(Self { clients: clients.build()?, servers: servers.build()?, naming })
    }

    fn check(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
        peer: &Identity,
        now: UnixTime,
    ) -> Result<(), RustlsError> {
        let (leaf, rest) = chain.split_first().ok_or(RustlsError::NoCertificatesPresented)?;
        let name = peer.server_name().map_err(no_identity)?;
        match role {
            PeerRole::Client => self.verify_client_cert(leaf, rest, now).map(drop)?,
            PeerRole::Server => self.verify_server_cert(leaf, rest, &name, &[], now).map(drop)?,
        }
        self.expect_identity(leaf, &name)
    }

    /// The certificate's identity is exactly `expected`.
    fn expect_identity(
        &self,
        leaf: &CertificateDer<'_>,
        expected: &ServerName<'_>,
    ) -> Result<(), RustlsError> {
        let identity = self.naming.identity(std::slice::from_ref(leaf)).map_err(no_identity)?;
        if identity.as_str().eq_ignore_ascii_case(&expected.to_str()) {
            return Ok(());
        }
        Err(CertificateError::NotValidForNameContext {
            expected: expected.to_owned(),
            presented: vec![identity.into()],
        }
        .into())
    }
}

/// When the last of a chain's certificates becomes valid; what cannot be read is judged elsewhere.
fn begin(chain: &[CertificateDer<'_>]) -> UnixTime {
    let of = |cert: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(cert).ok()?;
        u64::try_from(parsed.validity().not_before.timestamp()).ok()
    };
    let last = chain.iter().filter_map(of).max().unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(last))
}

/// The certificate says that it is for this role, and does not say that its key may not sign a handshake. The
/// library takes one that does not say what it is for to be for everything, and does not look at its key usage.
fn expect_purpose(leaf: &CertificateDer<'_>, role: PeerRole) -> Result<(), RustlsError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| CertificateError::BadEncoding)?;
    let usage = parsed.extended_key_usage().map_err(|_| CertificateError::BadEncoding)?;
    let is_named = usage.is_some_and(|usage| match role {
        PeerRole::Client => usage.value.client_auth,
        PeerRole::Server => usage.value.server_auth,
    });
    let may_sign = may_sign(&parsed).map_err(|_| CertificateError::BadEncoding)?;
    if is_named && may_sign { Ok(()) } else { Err(CertificateError::InvalidPurpose.into()) }
}

fn no_identity(source: super::identity::IdentityError) -> RustlsError {
    CertificateError::Other(OtherError(Arc::new(source))).into()
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        match self.naming {
            Naming::Dns => {
                let servers = &self.servers;
                servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
            }
            // The library would look for a DNS name.
            Naming::Uri(_) => {
                self.clients.verify_client_cert(end_entity, intermediates, now)?;
            }
        }
        expect_purpose(end_entity, PeerRole::Server)?;
        self.expect_identity(end_entity, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        ServerCertVerifier::verify_tls12_signature(&*self.servers, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        ServerCertVerifier::verify_tls13_signature(&*self.servers, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(&*self.servers)
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, RustlsError> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now)?;
        expect_purpose(end_entity, PeerRole::Client)?;
        self.naming.identity(std::slice::from_ref(end_entity)).map_err(no_identity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}
