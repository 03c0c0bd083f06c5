//! What is in certificate files, for people and as JSON; and what is wrong with a host's set
//! of files. Reads only.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::error::PkiError;
use crate::error_chain::chain;
use crate::net::credentials::{self, TlsPaths};
use crate::net::expiry::SOON;
use crate::net::naming::{Naming, any_identity};
use crate::net::tls::{Aead, PeerRole, Tls};
use crate::printable::printable;

/// One certificate of a file.
#[derive(Debug, Clone, Serialize)]
pub struct CertificateReport {
    pub path: PathBuf,
    /// Its place in the file, from 1.
    pub place: usize,
    pub subject: String,
    /// Subject alternative names, as `DNS:…`, `IP:…`, `URI:…`.
    pub names: Vec<String>,
    /// The host's identity by its DNS name, else by its URI name `vmferry://…`, or `None` (as for a CA).
    pub identity: Option<String>,
    pub issuer: String,
    /// True for a CA's certificate.
    pub is_ca: bool,
    /// Serial number in hexadecimal.
    pub serial: String,
    #[serde(with = "time::serde::rfc3339")]
    pub not_before: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub not_after: OffsetDateTime,
    /// Whole days until its end; negative when it is over.
    pub days_left: i64,
    /// Key usage, in the words of RFC 5280.
    pub key_usage: Vec<&'static str>,
    /// Extended key usage, in the words of RFC 5280.
    pub extended_key_usage: Vec<String>,
    /// SHA-256 of the whole certificate in hexadecimal.
    pub fingerprint_sha256: String,
}

/// Reads every certificate of a PEM file.
/// Errors: `Files` if it can't be read, `Damaged` if something in it is no certificate.
pub fn inspect(path: &Path) -> Result<Vec<CertificateReport>, PkiError> {
    credentials::read_certificates("certificate", path)?
        .iter()
        .enumerate()
        .map(|(index, der)| report(path, index + 1, der))
        .collect()
}

fn report(path: &Path, place: usize, der: &CertificateDer<'_>) -> Result<CertificateReport, PkiError> {
    let damaged =
        |_| PkiError::Damaged { path: path.to_owned(), problem: "a certificate in it can't be decoded" };
    let (_, cert) = X509Certificate::from_der(der).map_err(damaged)?;
    let not_after = cert.validity().not_after.to_datetime();
    let identity = any_identity(std::slice::from_ref(der));
    Ok(CertificateReport {
        path: path.to_owned(),
        place,
        subject: printable(&cert.subject().to_string()),
        names: names(&cert),
        identity: identity.filter(|_| !cert.is_ca()).map(String::from),
        issuer: printable(&cert.issuer().to_string()),
        is_ca: cert.is_ca(),
        serial: hex(cert.raw_serial()),
        not_before: cert.validity().not_before.to_datetime(),
        not_after,
        days_left: (not_after - OffsetDateTime::now_utc()).whole_days(),
        key_usage: key_usage(&cert),
        extended_key_usage: extended_key_usage(&cert),
        fingerprint_sha256: hex(digest(&SHA256, der).as_ref()),
    })
}

/// Everything that keeps these files from working together, each with its remedy; and remarks
/// on what works today but deserves a look. Problems of single files come first; what takes
/// several files together is judged once each by itself is good.
#[derive(Debug, Default)]
pub struct Findings {
    /// Reasons for which connections fail.
    pub problems: Vec<String>,
    pub remarks: Vec<String>,
}

/// Judges a host's files, and certificates of its peers by the host's CA.
pub fn check(paths: &TlsPaths, naming: &Naming, peers: &[PathBuf]) -> Findings {
    let mut findings = Findings::default();
    let single = credentials::problems(paths, naming, OffsetDateTime::now_utc());
    findings.problems.extend(single.iter().map(|p| chain(p)));
    if findings.problems.is_empty() {
        match Tls::load_named(paths, naming.clone(), Aead::Auto) {
            Ok(tls) => check_peers(&tls, peers, &mut findings),
            Err(error) => findings.problems.push(chain(&error)),
        }
    }
    for path in [&paths.ca, &paths.cert].into_iter().chain(peers) {
        remark(path, &mut findings.remarks);
    }
    findings
}

fn check_peers(tls: &Tls, peers: &[PathBuf], findings: &mut Findings) {
    for path in peers {
        let problems = &mut findings.problems;
        match credentials::read_certificates("peer's certificate", path) {
            Err(error) => problems.push(chain(&error)),
            Ok(certificates) => match tls.naming.identity(&certificates) {
                Err(error) => problems.push(format!("`{}`: {}", path.display(), error)),
                Ok(identity) => {
                    for (role, what) in
                        [(PeerRole::Server, "dialling it"), (PeerRole::Client, "being dialled by it")]
                    {
                        if let Err(failure) = tls.reverify(&certificates, role, &identity) {
                            problems.push(format!("`{}`: {what} fails: {failure}", path.display()));
                        }
                    }
                }
            },
        }
    }
}

/// What is no obstacle to vmferry.
fn remark(path: &Path, remarks: &mut Vec<String>) {
    for cert in inspect(path).unwrap_or_default() {
        let file = path.display();
        if (0..SOON.whole_days()).contains(&cert.days_left) {
            let renewal = if cert.is_ca { "replace it now (`vmferry certs rotate-ca`)" } else { "renew it" };
            remarks.push(format!("`{file}` ends in {} days; {renewal}", cert.days_left));
        }
        if !cert.is_ca && !cert.key_usage.contains(&"keyEncipherment") {
            remarks.push(format!(
                "`{file}` lacks keyEncipherment in its key usage; vmferry does not mind, \
                 QEMU's own TLS refuses it"
            ));
        }
    }
}

fn names(cert: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(san)) = cert.subject_alternative_name() else {
        return Vec::new();
    };
    san.value.general_names.iter().map(name).collect()
}

fn name(name: &GeneralName<'_>) -> String {
    printable(&match name {
        GeneralName::DNSName(text) => format!("DNS:{text}"),
        GeneralName::URI(text) => format!("URI:{text}"),
        GeneralName::IPAddress(bytes) => match address(bytes) {
            Some(address) => format!("IP:{address}"),
            None => format!("IP:{}", hex(bytes)),
        },
        other => other.to_string(),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn key_usage(cert: &X509Certificate<'_>) -> Vec<&'static str> {
    let Ok(Some(usage)) = cert.key_usage() else {
        return Vec::new();
    };
    let usage = usage.value;
    let table = [
        (usage.digital_signature(), "digitalSignature"),
        (usage.non_repudiation(), "nonRepudiation"),
        (usage.key_encipherment(), "keyEncipherment"),
        (usage.data_encipherment(), "dataEncipherment"),
        (usage.key_agreement(), "keyAgreement"),
        (usage.key_cert_sign(), "keyCertSign"),
        (usage.crl_sign(), "cRLSign"),
        (usage.encipher_only(), "encipherOnly"),
        (usage.decipher_only(), "decipherOnly"),
    ];
    let known = table.into_iter().filter(|(has, _)| *has);
    known.map(|(_, word)| word).collect()
}

fn extended_key_usage(cert: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(usage)) = cert.extended_key_usage() else {
        return Vec::new();
    };
    let usage = usage.value;
    let table = [
        (usage.any, "anyExtendedKeyUsage"),
        (usage.server_auth, "serverAuth"),
        (usage.client_auth, "clientAuth"),
        (usage.code_signing, "codeSigning"),
        (usage.email_protection, "emailProtection"),
        (usage.time_stamping, "timeStamping"),
        (usage.ocsp_signing, "OCSPSigning"),
    ];
    let known = table.into_iter().filter(|(has, _)| *has);
    let known = known.map(|(_, word)| word.to_owned());
    known.chain(usage.other.iter().map(ToString::to_string)).collect()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
