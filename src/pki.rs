//! Makes and checks the certificates that hosts trust each other by: one CA, one certificate
//! per host that serves both roles, one revocation list. Knows no network, and writes nothing
//! outside the folder it is given.
//!
//! The folder of a CA:
//!
//! ```text
//! ca-cert.pem           for every host
//! ca-key.pem            0600; the one secret that must not leave this folder
//! crl.pem               revocation list, once something was revoked; for every host
//! hosts/NAME/           0700; the files of one host, as they are copied to it
//! issued/SERIAL.pem     every certificate ever issued, for revocation
//! ```

mod error;
mod files;
pub mod report;
pub mod revocation;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::FromDer;

use crate::net::identity::{Identity, SELECTOR_SCHEME};
use crate::net::naming::{Naming, TrustDomain};
use crate::net::tls::verify_under;
pub use error::{DAYS_MAX, EXTRA_NAMES_MAX, PkiError};
use files::{Entry, PRIVATE, PUBLIC};

/// Validity of a CA unless asked otherwise, in days.
pub const CA_DAYS: u32 = 3650;
/// Validity of a host certificate unless asked otherwise, in days.
pub const HOST_DAYS: u32 = 825;

/// A new certificate is valid from this long ago, for hosts whose clocks are a little slow.
const BACKDATED: Duration = Duration::hours(1);
/// Random bytes in a serial number; RFC 5280 §4.1.2.2 allows 20.
const SERIAL_BYTES: usize = 16;

/// What a new CA shall be.
#[derive(Debug, Clone)]
pub struct CaRequest {
    /// Its name; by default one with random digits, since two CAs of the same name are hard
    /// to tell apart when a host trusts the wrong one.
    pub name: Option<String>,
    pub days: u32,
    /// When not empty, the CA can vouch only for names that are or end in one of these DNS
    /// domains (RFC 5280 §4.2.1.10 name constraints).
    pub domains: Vec<String>,
}

/// What a host's certificate shall be.
#[derive(Debug, Clone)]
pub struct HostRequest {
    pub name: Identity,
    /// Further names, for other programs that use the same certificate.
    pub names: Vec<ExtraName>,
    /// Validity in days; never beyond the CA's.
    pub days: u32,
    /// Replace what is there: new key, new certificate, same CA.
    pub force: bool,
}

/// A further name in a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraName(SanType);

/// A certificate that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The folder that holds it.
    pub dir: PathBuf,
    pub cert: PathBuf,
    pub not_after: OffsetDateTime,
    /// True if the CA's own end of life cut it short.
    pub cut_short: bool,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Where the replaced files were left because something unknown lay beside them.
    pub left_over: Option<PathBuf>,
}

impl FromStr for ExtraName {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let bad = || PkiError::BadName { name: text.escape_default().take(256).collect() };
        let (kind, name) = match text.split_once(':') {
            Some((kind @ ("DNS" | "IP" | "URI"), name)) => (kind, name),
            _ if text.parse::<IpAddr>().is_ok() => ("IP", text),
            _ => ("DNS", text),
        };
        let san = match kind {
            "IP" => SanType::IpAddress(name.parse().map_err(|_| bad())?),
            "URI" if name.starts_with(SELECTOR_SCHEME) || !name.contains(':') => return Err(bad()),
            "URI" => SanType::URI(name.try_into().map_err(|_| bad())?),
            _ => {
                let name: Identity = name.parse().map_err(|_| bad())?;
                SanType::DnsName(name.as_str().try_into().map_err(|_| bad())?)
            }
        };
        Ok(Self(san))
    }
}

impl ExtraName {
    /// The URI name by which hosts of a trust domain know this one.
    /// Errors: `BadName` if it cannot be written in a certificate.
    pub fn in_trust_domain(domain: &TrustDomain, name: &Identity) -> Result<Self, PkiError> {
        let uri = domain.uri(name);
        let bad = |_| PkiError::BadName { name: uri.clone() };
        Ok(Self(SanType::URI(uri.as_str().try_into().map_err(bad)?)))
    }
}

/// Makes a CA in `dir`, which is created (0700) if it is not there.
/// Errors: `Exists` if any of its files is there; nothing is touched then.
pub fn create_ca(dir: &Path, request: &CaRequest) -> Result<Made, PkiError> {
    let (key_path, cert_path) = (dir.join("ca-key.pem"), dir.join("ca-cert.pem"));
    for path in [&cert_path, &key_path] {
        files::must_not_exist(path, "choose another folder for a new CA")?;
    }
    let serial = random_serial()?;
    let name = match &request.name {
        Some(name) => name.clone(),
        None => format!("vmferry CA {}", &serial.to_string().replace(':', "")[..8]),
    };
    let (not_before, not_after) = validity(request.days)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, &name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = name_constraints(&request.domains)?;
    params.serial_number = Some(serial.clone());
    (params.not_before, params.not_after) = (not_before, not_after);
    let making = |source| PkiError::Making { name: name.clone(), source };
    let key = new_key().map_err(making)?;
    let cert = params.self_signed(&key).map_err(making)?;

    files::create_private_dir(dir)?;
    // The key first: a certificate without its key would look like a CA that works.
    let remedy = "choose another folder for a new CA";
    files::write_new(&key_path, key.serialize_pem().as_bytes(), PRIVATE, remedy)?;
    files::write_new(&cert_path, cert.pem().as_bytes(), PUBLIC, remedy)?;
    Ok(Made {
        dir: dir.to_owned(),
        cert: cert_path,
        not_after,
        cut_short: false,
        serial: report::hex(serial.as_ref()),
        left_over: None,
    })
}

/// Issues a host's certificate with a new key, into `dir/hosts/NAME`. All its files appear at
/// once, and with `force` they replace the old ones at once.
/// Errors: `Exists` without `force`; `NoCa` and its like if the CA can't sign.
pub fn issue_host(dir: &Path, request: &HostRequest) -> Result<Made, PkiError> {
    let target = dir.join("hosts").join(request.name.as_str());
    if !request.force {
        let remedy = "add --force to renew it with a new key";
        files::must_not_exist(&target, remedy)?;
    }
    let ca = Authority::open(dir)?;
    let (key, cert, made) = ca.sign_host(request, &target)?;
    verify_under(&ca.cert, cert.der(), &Naming::Dns, &request.name).map_err(|source| {
        PkiError::NotPermitted { dir: dir.to_owned(), name: request.name.to_string(), source }
    })?;
    files::create_private_dir(&dir.join("hosts"))?;
    files::create_private_dir(&dir.join("issued"))?;
    // On record before it is in use: what is not on record can't be revoked by name.
    let record = dir.join("issued").join(format!("{}.pem", made.serial));
    files::write_new(&record, cert.pem().as_bytes(), PUBLIC, "try again")?;
    let left_over = files::publish_dir(&target, &host_entries(&ca.cert_pem, &cert, &key), request.force)?;
    Ok(Made { left_over, ..made })
}

/// The files of one host. vmferry needs the first three; QEMU's `tls-creds-x509` and libvirt
/// look for fixed names, which are links so that the key exists only once.
fn host_entries(ca_pem: &str, cert: &Certificate, key: &KeyPair) -> Vec<Entry> {
    vec![
        Entry::file("ca-cert.pem", ca_pem.as_bytes(), PUBLIC),
        Entry::file("cert.pem", cert.pem().as_bytes(), PUBLIC),
        Entry::file("key.pem", key.serialize_pem().as_bytes(), PRIVATE),
        Entry::link("server-cert.pem", "cert.pem"),
        Entry::link("server-key.pem", "key.pem"),
        Entry::link("client-cert.pem", "cert.pem"),
        Entry::link("client-key.pem", "key.pem"),
    ]
}

/// An opened CA: certificate and key belong together and are valid now.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert: CertificateDer<'static>,
    cert_pem: String,
    not_after: OffsetDateTime,
}

impl Authority {
    fn open(dir: &Path) -> Result<Self, PkiError> {
        let cert_path = dir.join("ca-cert.pem");
        let key_path = dir.join("ca-key.pem");
        if !cert_path.exists() || !key_path.exists() {
            return Err(PkiError::NoCa { dir: dir.to_owned() });
        }
        let cert_pem = files::read_text(&cert_path)?;
        let damaged = |path: &Path, problem| PkiError::Damaged { path: path.to_owned(), problem };
        let key = KeyPair::from_pem(&files::read_text(&key_path)?)
            .map_err(|_| damaged(&key_path, "it holds no private key that can be used"))?;
        let certs = crate::net::credentials::read_certificates("CA certificate", &cert_path)?;
        let undecodable = || damaged(&cert_path, "its certificate can't be decoded");
        let der = certs.first().ok_or_else(undecodable)?;
        let (_, parsed) =
            x509_parser::certificate::X509Certificate::from_der(der).map_err(|_| undecodable())?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(PkiError::CaMismatch { dir: dir.to_owned() });
        }
        let not_before = parsed.validity().not_before.to_datetime();
        let not_after = parsed.validity().not_after.to_datetime();
        let now = OffsetDateTime::now_utc();
        if now < not_before || now > not_after {
            return Err(PkiError::CaNotValid { dir: dir.to_owned(), not_before, not_after });
        }
        let issuer = Issuer::from_ca_cert_der(der, key).map_err(|_| undecodable())?;
        Ok(Self { issuer, cert: der.clone(), cert_pem, not_after })
    }

    fn sign_host(
        &self,
        request: &HostRequest,
        target: &Path,
    ) -> Result<(KeyPair, Certificate, Made), PkiError> {
        let making = |source| PkiError::Making { name: request.name.to_string(), source };
        let serial = random_serial()?;
        let (not_before, wanted) = validity(request.days)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, request.name.as_str());
        params.subject_alt_names = alt_names(request)?;
        params.is_ca = IsCa::ExplicitNoCa;
        // keyEncipherment means nothing to TLS 1.3 and an EC key, but GnuTLS, and so QEMU,
        // refuses a certificate without it.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        (params.not_before, params.not_after) = (not_before, wanted.min(self.not_after));
        let key = new_key().map_err(making)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(making)?;
        let made = Made {
            dir: target.to_owned(),
            cert: target.join("cert.pem"),
            not_after: params.not_after,
            cut_short: wanted > self.not_after,
            serial: report::hex(serial.as_ref()),
            left_over: None,
        };
        Ok((key, cert, made))
    }
}

/// The identity first; and where other DNS names stand beside it, the URI that picks it.
fn alt_names(request: &HostRequest) -> Result<Vec<SanType>, PkiError> {
    if request.names.len() > EXTRA_NAMES_MAX {
        return Err(PkiError::TooManyNames { count: request.names.len() });
    }
    let ascii = |text: &str| text.try_into().map_err(|_| PkiError::BadName { name: text.to_owned() });
    let mut names = vec![SanType::DnsName(ascii(request.name.as_str())?)];
    for ExtraName(extra) in &request.names {
        if !names.contains(extra) {
            names.push(extra.clone());
        }
    }
    let dns = names.iter().filter(|n| matches!(n, SanType::DnsName(_)));
    if dns.count() > 1 {
        let selector = format!("{SELECTOR_SCHEME}{}", request.name);
        names.push(SanType::URI(ascii(&selector)?));
    }
    Ok(names)
}

fn name_constraints(domains: &[String]) -> Result<Option<NameConstraints>, PkiError> {
    if domains.is_empty() {
        return Ok(None);
    }
    let permitted_subtrees = domains
        .iter()
        .map(|domain| {
            let domain: Identity = domain.parse()?;
            Ok(GeneralSubtree::DnsName(domain.to_string()))
        })
        .collect::<Result<_, PkiError>>()?;
    Ok(Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() }))
}

fn new_key() -> Result<KeyPair, rcgen::Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
}

fn validity(days: u32) -> Result<(OffsetDateTime, OffsetDateTime), PkiError> {
    if !(1..=DAYS_MAX).contains(&days) {
        return Err(PkiError::BadDays { days });
    }
    let now = OffsetDateTime::now_utc();
    Ok((now - BACKDATED, now + Duration::days(days.into())))
}

/// Positive, never zero, and always of the same length.
fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut bytes = [0; SERIAL_BYTES];
    getrandom::fill(&mut bytes).map_err(|e| PkiError::Random(io::Error::other(e)))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
