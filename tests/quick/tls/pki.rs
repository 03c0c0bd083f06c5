//! Certificates for the tests, good and bad in every way that the product must notice. Made
//! with the certificate library directly: the judge is not the accused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};
use vmferry::net::credentials::TlsPaths;
use vmferry::net::tls::{Aead, Tls, TlsError};
use x509_parser::prelude::{FromDer, X509Certificate};

/// A CA that signs whatever it is asked to.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) cert: CertificateDer<'static>,
}

/// What a host certificate shall look like; `host` gives a good one to spoil.
#[derive(Clone)]
pub(crate) struct Wish {
    pub(crate) sans: Vec<SanType>,
    pub(crate) from_days: i64,
    pub(crate) to_days: i64,
    pub(crate) purposes: Vec<ExtendedKeyUsagePurpose>,
    /// None: the certificate does not say.
    pub(crate) usages: Vec<KeyUsagePurpose>,
    pub(crate) serial: u64,
}

/// A certificate with its key.
pub(crate) struct Host {
    pub(crate) cert: CertificateDer<'static>,
    pub(crate) key: KeyPair,
}

pub(crate) fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) fn good(name: &str) -> Wish {
    Wish {
        sans: vec![dns(name)],
        from_days: -1,
        to_days: 30,
        purposes: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        usages: vec![KeyUsagePurpose::DigitalSignature],
        serial: 7,
    }
}

pub(crate) fn days(n: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + Duration::days(n)
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        Self::valid(name, -2, 60)
    }

    pub(crate) fn valid(name: &str, from_days: i64, to_days: i64) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (days(from_days), days(to_days));
        let cert = params.self_signed(&key).unwrap().into();
        let issuer = Issuer::new(params, key);
        Self { issuer, cert }
    }

    /// That of `vmferry certs`.
    pub(crate) fn read(dir: &Path) -> Self {
        let (pem, key) = (dir.join("ca-cert.pem"), fs::read_to_string(dir.join("ca-key.pem")).unwrap());
        let cert = CertificateDer::from_pem_file(&pem).unwrap();
        let issuer = Issuer::from_ca_cert_der(&cert, KeyPair::from_pem(&key).unwrap()).unwrap();
        Self { issuer, cert }
    }

    /// Another one of the same name.
    pub(crate) fn twin(&self) -> Self {
        let (_, cert) = X509Certificate::from_der(&self.cert).unwrap();
        Self::new(cert.subject().iter_common_name().next().unwrap().as_str().unwrap())
    }

    pub(crate) fn issue(&self, wish: &Wish) -> Host {
        self.issue_until(wish, days(wish.to_days))
    }

    /// One that ends then.
    pub(crate) fn issue_until(&self, wish: &Wish, ends: OffsetDateTime) -> Host {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "ignored");
        params.subject_alt_names.clone_from(&wish.sans);
        params.extended_key_usages.clone_from(&wish.purposes);
        params.key_usages.clone_from(&wish.usages);
        params.serial_number = Some(wish.serial.into());
        (params.not_before, params.not_after) = (days(wish.from_days), ends);
        let cert = params.signed_by(&key, &self.issuer).unwrap().into();
        Host { cert, key }
    }

    pub(crate) fn host(&self, name: &str) -> Host {
        self.issue(&good(name))
    }

    /// A revocation list for these serial numbers, as PEM.
    pub(crate) fn crl(&self, serials: &[u64], to_days: i64) -> String {
        CertificateRevocationListParams {
            this_update: days(-2),
            next_update: days(to_days),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(|s| revoked(*s)).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.cert.clone()).unwrap();
        Arc::new(roots)
    }
}

fn revoked(serial: u64) -> RevokedCertParams {
    RevokedCertParams {
        serial_number: serial.into(),
        revocation_time: days(-1),
        reason_code: None,
        invalidity_date: None,
    }
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    pem_lines(label, &openssl_base64(der))
}

fn pem_lines(label: &str, body: &str) -> String {
    format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
}

/// Base64 in lines of 64 characters; three lines of arithmetic need no dependency.
fn openssl_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let n = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let shown = i <= chunk.len();
            let digit = ALPHABET[(n >> (18 - 6 * i) & 63) as usize] as char;
            text.push(if shown { digit } else { '=' });
        }
    }
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|l| std::str::from_utf8(l).unwrap()).collect();
    lines.join("\n")
}

/// Writes a host's files as an agent's configuration names them.
pub(crate) fn write(dir: &Path, ca: &CertificateDer<'_>, host: &Host) -> TlsPaths {
    let paths = TlsPaths {
        ca: dir.join("ca-cert.pem"),
        cert: dir.join("cert.pem"),
        key: dir.join("key.pem"),
        crl: None,
    };
    fs::create_dir_all(dir).unwrap();
    fs::write(&paths.ca, pem("CERTIFICATE", ca)).unwrap();
    fs::write(&paths.cert, pem("CERTIFICATE", &host.cert)).unwrap();
    fs::write(&paths.key, host.key.serialize_pem()).unwrap();
    chmod(&paths.key, 0o600);
    paths
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub(crate) fn load(dir: &Path, ca: &CertificateDer<'_>, host: &Host) -> Result<Tls, TlsError> {
    Tls::load(&write(dir, ca, host), Aead::Auto)
}

/// The product's own settings for a good host.
pub(crate) fn agent(ca: &Ca, name: &str) -> Tls {
    let dir = tempfile::tempdir().unwrap();
    load(dir.path(), &ca.cert, &ca.host(name)).unwrap()
}

/// The same with a revocation list.
pub(crate) fn agent_with_crl(ca: &Ca, name: &str, crl: &str) -> Result<Tls, TlsError> {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = write(dir.path(), &ca.cert, &ca.host(name));
    let path = dir.path().join("crl.pem");
    fs::write(&path, crl).unwrap();
    paths.crl = Some(path);
    Tls::load(&paths, Aead::Auto)
}

fn key(host: &Host) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(host.key.serialize_der()).into()
}

/// A client that checks the server and presents whatever it is given.
pub(crate) fn raw_client(ca: &Ca, host: Option<&Host>, alpn: &[&[u8]]) -> ClientConfig {
    raw_client_of(aws_lc_rs::default_provider(), ca, host, alpn)
}

/// The same without a key exchange that has a post-quantum part.
pub(crate) fn classical_client(ca: &Ca, host: &Host, alpn: &[&[u8]]) -> ClientConfig {
    raw_client_of(classical(), ca, Some(host), alpn)
}

fn classical() -> CryptoProvider {
    let kx_groups = vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
    CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() }
}

fn raw_client_of(provider: CryptoProvider, ca: &Ca, host: Option<&Host>, alpn: &[&[u8]]) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(ca.roots());
    let mut config = match host {
        Some(h) => builder.with_client_auth_cert(vec![h.cert.clone()], key(h)).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config
}

/// A server that checks its clients and presents whatever it is given.
pub(crate) fn raw_server(ca: &Ca, host: &Host, alpn: &[&[u8]]) -> ServerConfig {
    raw_server_of(aws_lc_rs::default_provider(), ca, host, alpn)
}

/// The same without a key exchange that has a post-quantum part.
pub(crate) fn classical_server(ca: &Ca, host: &Host, alpn: &[&[u8]]) -> ServerConfig {
    raw_server_of(classical(), ca, host, alpn)
}

fn raw_server_of(provider: CryptoProvider, ca: &Ca, host: &Host, alpn: &[&[u8]]) -> ServerConfig {
    let provider = Arc::new(provider);
    let verifier = WebPkiClientVerifier::builder_with_provider(ca.roots(), provider.clone()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![host.cert.clone()], key(host))
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config
}
