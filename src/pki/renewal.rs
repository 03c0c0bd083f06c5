//! A further certificate for a host that has one: the same names and the same key, which need not be here. The
//! CA that signs may be another one by now.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::SubjectPublicKeyInfo;
use time::Duration;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::authority::Authority;
use super::report::{CertificateReport, inspect};
use super::{ExtraName, HostRequest, Made, PkiError, files, issue, issue_host, revocation};
use crate::net::credentials::read_certificates;
use crate::net::identity::{Identity, SELECTOR_SCHEME};

/// What a renewal shall be.
#[derive(Debug, Clone, Copy)]
pub struct Renewal {
    /// Validity in days; never beyond the CA's.
    pub days: u32,
    /// With another key, which is made here.
    pub new_key: bool,
}

/// The names of all hosts in the folder, by its `hosts/`.
pub fn hosts(dir: &Path) -> Result<Vec<Identity>, PkiError> {
    let folder = dir.join("hosts");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(files::at("read", &folder)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(files::at("read", &folder))?;
        let name = entry.file_name().to_str().and_then(|name| name.parse::<Identity>().ok());
        names.extend(name.filter(|_| entry.path().join("cert.pem").exists()));
    }
    names.sort();
    Ok(names)
}

/// Whether a host's certificate ends within that time.
pub fn ends_within(dir: &Path, name: &Identity, within: Duration) -> Result<bool, PkiError> {
    let (report, _) = current(dir, name)?;
    Ok(report.not_after < time::OffsetDateTime::now_utc() + within)
}

/// Issues a further certificate into `dir/hosts/NAME`, with the names of the one before.
/// Errors: `NoHost` if there is none, `RevokedKey` if that was revoked and the key is to stay, `KeyElsewhere` if a
/// new key is asked for and the old one was never here.
pub fn renew(dir: &Path, name: &Identity, renewal: Renewal) -> Result<Made, PkiError> {
    let (report, path) = current(dir, name)?;
    let folder = dir.join("hosts").join(name.as_str());
    let names = extra_names(&report, name)?;
    let request = HostRequest { name: name.clone(), names, days: renewal.days, force: true };
    if renewal.new_key {
        if !folder.join("key.pem").exists() {
            return Err(PkiError::KeyElsewhere { name: name.to_string() });
        }
        return issue_host(dir, &request);
    }
    if revocation::is_revoked(dir, &report.serial)? {
        return Err(PkiError::RevokedKey { name: name.to_string() });
    }
    let ca = Authority::open(dir)?;
    let undecodable =
        || PkiError::Damaged { path: path.clone(), problem: "its certificate can't be decoded" };
    let certs = read_certificates("certificate", &path)?;
    let leaf = certs.first().ok_or_else(undecodable)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| undecodable())?;
    let making = |source| PkiError::Making { name: name.to_string(), source };
    let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw).map_err(making)?;
    let (cert, made) = issue(dir, &ca, &request, &key)?;
    files::replace(&folder.join("ca-cert.pem"), ca.cert_pem.as_bytes(), files::PUBLIC)?;
    files::replace(&path, cert.pem().as_bytes(), files::PUBLIC)?;
    Ok(made)
}

/// What a host has now, and where.
fn current(dir: &Path, name: &Identity) -> Result<(CertificateReport, PathBuf), PkiError> {
    let path = dir.join("hosts").join(name.as_str()).join("cert.pem");
    if !path.exists() {
        return Err(PkiError::NoHost { dir: dir.to_owned(), name: name.to_string() });
    }
    let report = inspect(&path)?.into_iter().next();
    let is_its = report.filter(|report| report.identity.as_deref() == Some(name.as_str()));
    let problem = "it is not the certificate of the host that its folder is named after";
    is_its.map(|report| (report, path.clone())).ok_or(PkiError::Damaged { path, problem })
}

/// What the certificate names beside the identity. What picks that among DNS names is written anew.
fn extra_names(report: &CertificateReport, name: &Identity) -> Result<Vec<ExtraName>, PkiError> {
    let selector = format!("URI:{SELECTOR_SCHEME}{name}");
    let identity = format!("DNS:{name}");
    let others = report.names.iter().filter(|n| **n != selector && **n != identity);
    others.map(|name| ExtraName::of_certificate(name)).collect()
}
