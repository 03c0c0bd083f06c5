//! A certificate for a host whose key is on that host: what it asks for is judged, and signed in the CA's words and
//! not in its own. And the certificate with which the CA's machine shows that it is the CA's.

use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use super::authority::Authority;
use super::files::{self, Entry, PUBLIC};
use super::request::{HostRequest, Made, random_serial};
use super::{PkiError, issue, new_key};
use crate::net::identity::Identity;

/// Longest request for a certificate, in bytes.
pub const REQUEST_BYTES_MAX: usize = 4096;

/// What a host gets.
#[derive(Debug, Clone)]
pub struct Signed {
    pub cert_pem: String,
    /// Whom it trusts.
    pub ca_pem: String,
    /// What is revoked, once something was.
    pub crl_pem: Option<String>,
    pub made: Made,
}

/// A key that was made just now, and the request for a certificate that goes with it.
pub struct NewKey {
    pub key_pem: String,
    pub request: Vec<u8>,
}

impl NewKey {
    /// Of a host of that name.
    pub fn make(name: &Identity) -> Result<Self, PkiError> {
        let making = |source| PkiError::Making { name: name.to_string(), source };
        let key = new_key().map_err(making)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name.as_str());
        let request = params.serialize_request(&key).map_err(making)?;
        Ok(Self { key_pem: key.serialize_pem(), request: request.der().to_vec() })
    }
}

/// What an invitation needs of a CA that can sign now.
/// Errors: `Exists` without `force` if the host has a certificate; `NoCa` and its like if the CA can't sign.
pub fn invitable(dir: &Path, request: &HostRequest) -> Result<[u8; 32], PkiError> {
    if !request.force {
        let target = dir.join("hosts").join(request.name.as_str());
        files::must_not_exist(&target, "add --force to let it have another certificate")?;
    }
    let ca = Authority::open(dir)?;
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest(&SHA256, &ca.cert).as_ref());
    Ok(fingerprint)
}

/// Signs what a host asks for with a request of its own key. Of the request only the key is used; it must be signed
/// by it, name the host, and ask for nothing else.
/// Errors: `BadRequest`; those of [`invitable`].
pub fn sign_request(dir: &Path, request: &HostRequest, asked: &[u8]) -> Result<Signed, PkiError> {
    invitable(dir, request)?;
    let asked = judged(&request.name, asked)?;
    let ca = Authority::open(dir)?;
    let (cert, made) = issue(dir, &ca, request, &asked.public_key)?;
    let cert_pem = cert.pem();
    let entries = [
        Entry::file("ca-cert.pem", ca.cert_pem.as_bytes(), PUBLIC),
        Entry::file("cert.pem", cert_pem.as_bytes(), PUBLIC),
    ];
    let left_over = files::publish_dir(&made.dir, &entries, request.force)?;
    let list = dir.join("crl.pem");
    let crl_pem = list.exists().then(|| files::read_text(&list)).transpose()?;
    Ok(Signed { cert_pem, ca_pem: ca.cert_pem, crl_pem, made: Made { left_over, ..made } })
}

/// A host's request for a certificate, if it asks for what a host of that name may.
/// Errors: `BadRequest`.
pub fn judged(name: &Identity, der: &[u8]) -> Result<CertificateSigningRequestParams, PkiError> {
    let bad = |problem| PkiError::BadRequest { name: name.to_string(), problem };
    if der.len() > REQUEST_BYTES_MAX {
        return Err(bad("it is too long"));
    }
    // The signature shows that who asks has the key.
    let asked = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der.to_vec()))
        .map_err(|_| bad("it cannot be decoded, or is not signed by the key that it names"))?;
    let algorithm = asked.public_key.algorithm();
    if algorithm != &PKCS_ECDSA_P256_SHA256 && algorithm != &PKCS_ECDSA_P384_SHA384 {
        return Err(bad("its key is none of ECDSA P-256 or P-384"));
    }
    let params = &asked.params;
    let common: Vec<_> = params.distinguished_name.iter().collect();
    let is_named = |value: &DnValue| matches!(value, DnValue::Utf8String(text) if text.eq_ignore_ascii_case(name.as_str()));
    if !matches!(common.as_slice(), [(DnType::CommonName, value)] if is_named(value)) {
        return Err(bad("it is not for the name that was invited"));
    }
    let is_its = |san: &SanType| matches!(san, SanType::DnsName(dns) if dns.as_str().eq_ignore_ascii_case(name.as_str()));
    if !params.subject_alt_names.iter().all(is_its) {
        return Err(bad("it asks for other names than the one that was invited"));
    }
    if params.is_ca != IsCa::NoCa || !params.key_usages.is_empty() || !params.extended_key_usages.is_empty() {
        return Err(bad("it asks for more than a name"));
    }
    Ok(asked)
}

/// A certificate for the connection over which hosts ask, with its key, which is nowhere else; and that of the CA
/// behind it. It names nobody, and is for a server alone: no host's is.
pub fn server(
    dir: &Path,
    lifetime: std::time::Duration,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
    let ca = Authority::open(dir)?;
    let making = |source| PkiError::Making { name: "this enrolment".to_owned(), source };
    let key: KeyPair = new_key().map_err(making)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "vmferry enrolment");
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(random_serial()?);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::hours(1), (now + lifetime).min(ca.not_after));
    let cert = params.signed_by(&key, &ca.issuer).map_err(making)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok((vec![cert.der().clone(), ca.cert], key))
}

/// Whether a certificate has the key of a request: what was signed is what was asked for.
pub fn is_for(cert: &CertificateDer<'_>, asked: &[u8]) -> bool {
    let key_of_cert = X509Certificate::from_der(cert).ok().map(|(_, cert)| cert.public_key().raw.to_vec());
    let asked = X509CertificationRequest::from_der(asked).ok();
    let asked = asked.map(|(_, asked)| asked.certification_request_info.subject_pki.raw.to_vec());
    key_of_cert.is_some() && key_of_cert == asked
}
