//! Makes and checks the certificates that hosts trust each other by: one CA, one certificate
//! per host that serves both roles, one revocation list. Knows no network, and writes nothing
//! outside the folder it is given.
//!
//! The folder of a CA:
//!
//! ```text
//! ca-cert.pem           for every host; its first certificate is the one that signs
//! ca-key.pem            0600; the one secret that must not leave this folder; while one CA replaces another the
//!                       keys of both, the older one's first
//! crl.pem               revocation list, once something was revoked; for every host
//! hosts/NAME/           0700; the files of one host, as they are copied to it
//! issued/SERIAL.pem     every certificate ever issued, for revocation
//! ```

mod authority;
pub mod enrolment;
mod error;
mod files;
pub mod host_files;
pub mod renewal;
pub mod report;
mod request;
pub mod revocation;
pub mod rotation;
mod step;

use std::path::Path;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, GeneralSubtree, IsCa, KeyPair, KeyUsagePurpose,
    NameConstraints, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use time::OffsetDateTime;

use crate::net::identity::Identity;
use crate::net::naming::Naming;
use crate::net::tls::verify_under;
use authority::Authority;
pub use error::{DAYS_MAX, EXTRA_NAMES_MAX, PkiError};
use files::{Entry, PRIVATE, PUBLIC};
pub use request::{CA_DAYS, CaRequest, ExtraName, HOST_DAYS, HostRequest, Made};
use request::{random_serial, validity};

/// Makes a CA in `dir`, which is created (0700) if it is not there.
/// Errors: `Exists` if any of its files is there; nothing is touched then.
pub fn create_ca(dir: &Path, request: &CaRequest) -> Result<Made, PkiError> {
    let (key_path, cert_path) = (dir.join("ca-key.pem"), dir.join("ca-cert.pem"));
    for path in [&cert_path, &key_path] {
        files::must_not_exist(path, "choose another folder for a new CA")?;
    }
    let ca = NewCa::make(request)?;
    files::create_private_dir(dir)?;
    // The key first: a certificate without its key would look like a CA that works.
    let remedy = "choose another folder for a new CA";
    files::write_new(&key_path, ca.key_pem.as_bytes(), PRIVATE, remedy)?;
    files::write_new(&cert_path, ca.cert_pem.as_bytes(), PUBLIC, remedy)?;
    Ok(Made {
        dir: dir.to_owned(),
        cert: cert_path,
        not_after: ca.not_after,
        cut_short: false,
        serial: ca.serial,
        left_over: None,
    })
}

/// A CA that is not in any folder yet.
struct NewCa {
    key_pem: String,
    cert_pem: String,
    serial: String,
    not_after: OffsetDateTime,
}

impl NewCa {
    fn make(request: &CaRequest) -> Result<Self, PkiError> {
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
        Ok(Self {
            key_pem: key.serialize_pem(),
            cert_pem: cert.pem(),
            serial: report::hex(serial.as_ref()),
            not_after,
        })
    }
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
    let making = |source| PkiError::Making { name: request.name.to_string(), source };
    let key = new_key().map_err(making)?;
    let (cert, made) = issue(dir, &ca, request, &key)?;
    let left_over = files::publish_dir(&target, &host_entries(&ca.cert_pem, &cert, &key), request.force)?;
    Ok(Made { left_over, ..made })
}

/// Signs a host's certificate for whoever has the key, and puts it on record.
fn issue(
    dir: &Path,
    ca: &Authority,
    request: &HostRequest,
    key: &impl PublicKeyData,
) -> Result<(Certificate, Made), PkiError> {
    let target = dir.join("hosts").join(request.name.as_str());
    let (cert, made) = ca.sign_host(request, &target, key)?;
    verify_under(&ca.cert, cert.der(), &Naming::Dns, &request.name).map_err(|source| {
        PkiError::NotPermitted { dir: dir.to_owned(), name: request.name.to_string(), source }
    })?;
    files::create_private_dir(&dir.join("hosts"))?;
    files::create_private_dir(&dir.join("issued"))?;
    // On record before it is in use: what is not on record can't be revoked by name.
    let record = dir.join("issued").join(format!("{}.pem", made.serial));
    files::write_new(&record, cert.pem().as_bytes(), PUBLIC, "try again")?;
    Ok((cert, made))
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
