//! One CA replaces another, step by step, while hosts of both know each other.
//!
//! ```text
//!             ca-cert.pem        ca-key.pem     who issues    hosts trust
//! before      old                old            old           old
//! begin       old, new           old, new       old           both, once they have ca-cert.pem
//! switch      new, old           old, new       new           both
//! end         new                new            new           new
//! ```
//! Each step is one file that takes another's place at once, and the folder itself says which was the last.

use std::path::Path;

use rustls_pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use super::authority::Authority;
use super::renewal::{Renewal, hosts, renew};
use super::report::inspect;
use super::revocation::{self, Revoke};
pub use super::step::Step;
use super::{CaRequest, Made, NewCa, PkiError, files};
use crate::net::credentials::read_certificates;
use crate::net::identity::Identity;
use crate::net::naming::Naming;
use crate::net::tls::verify_under;

/// The last step that was taken.
pub fn step(dir: &Path) -> Result<Step, PkiError> {
    let all = Authority::all(dir)?;
    let keys = files::blocks(&files::read_text(&dir.join("ca-key.pem"))?).len();
    Ok(match all.first() {
        _ if keys < 2 => Step::None,
        Some(first) if first.key_place + 1 == keys => Step::Switched,
        _ => Step::Begun,
    })
}

/// Makes the new CA; hosts are to trust both from now on. It is limited to the same names as the old one unless
/// others are asked for.
/// Errors: `Rotating` if a step was taken already.
pub fn begin(dir: &Path, request: &CaRequest) -> Result<Made, PkiError> {
    let _lock = revocation::lock(dir)?;
    expect(dir, Step::None)?;
    let old = Authority::open(dir)?;
    let mut request = request.clone();
    if request.domains.is_empty() {
        request.domains = domains(&old.cert);
    }
    let new = NewCa::make(&request)?;
    let keys = files::read_text(&dir.join("ca-key.pem"))?;
    // A key without its certificate signs nothing; the other way round nothing would be signed at all.
    let key_path = dir.join("ca-key.pem");
    let keys = [files::blocks(&keys), files::blocks(&new.key_pem)].concat().concat();
    files::replace(&key_path, keys.as_bytes(), files::PRIVATE)?;
    let certs = [files::blocks(&old.cert_pem), files::blocks(&new.cert_pem)].concat().concat();
    trust(dir, &certs)?;
    Ok(Made {
        dir: dir.to_owned(),
        cert: dir.join("ca-cert.pem"),
        not_after: new.not_after,
        cut_short: false,
        serial: new.serial,
        left_over: None,
    })
}

/// Has the new CA issue from now on, and renews all hosts by it, with the keys that they have.
/// Errors: `NotNow` if that is not the next step.
pub fn switch(dir: &Path, days: u32) -> Result<Vec<Made>, PkiError> {
    let lock = revocation::lock(dir)?;
    if step(dir)? != Step::Switched {
        expect(dir, Step::Begun)?;
        let text = files::read_text(&dir.join("ca-cert.pem"))?;
        let mut certs = files::blocks(&text);
        certs.rotate_right(1);
        trust(dir, &certs.concat())?;
    }
    drop(lock);
    let ca = Authority::open(dir)?;
    let mut made = Vec::new();
    // Said again after it was cut short, it goes on where it was.
    for name in of_others(dir, &ca)? {
        made.push(renew(dir, &name, Renewal { days, new_key: false })?);
    }
    Ok(made)
}

/// Trusts the old CA no more. Its key is deleted; what it has revoked needs no list any more.
/// Errors: `NotNow` if that is not the next step, `HostsLeft` while a host has a certificate of the old CA only.
pub fn end(dir: &Path) -> Result<(), PkiError> {
    let _lock = revocation::lock(dir)?;
    expect(dir, Step::Switched)?;
    let ca = Authority::open(dir)?;
    let left = of_others(dir, &ca)?;
    if !left.is_empty() {
        let names: Vec<_> = left.iter().map(Identity::as_str).collect();
        return Err(PkiError::HostsLeft { names: names.join(", ") });
    }
    let all = files::blocks(&ca.cert_pem);
    let gone: Vec<_> = Authority::all(dir)?.into_iter().skip(1).map(|old| old.cert).collect();
    let certs = read_certificates("CA certificate", &dir.join("ca-cert.pem"))?;
    let kept = all.iter().zip(&certs).filter(|(_, cert)| !gone.contains(cert));
    let kept: String = kept.map(|(block, _)| block.as_str()).collect();
    let keys = files::blocks(&files::read_text(&dir.join("ca-key.pem"))?);
    trust(dir, &kept)?;
    let key = keys.get(ca.key_place).cloned().unwrap_or_default();
    files::replace(&dir.join("ca-key.pem"), key.as_bytes(), files::PRIVATE)?;
    sign_lists(dir)
}

fn expect(dir: &Path, wanted: Step) -> Result<(), PkiError> {
    let found = step(dir)?;
    if found == wanted { Ok(()) } else { Err(PkiError::NotNow { dir: dir.to_owned(), step: found }) }
}

/// Writes whom hosts trust, for the CA and into each host's folder; and lists of all that sign.
fn trust(dir: &Path, certs: &str) -> Result<(), PkiError> {
    files::replace(&dir.join("ca-cert.pem"), certs.as_bytes(), files::PUBLIC)?;
    for name in hosts(dir)? {
        let path = dir.join("hosts").join(name.as_str()).join("ca-cert.pem");
        files::replace(&path, certs.as_bytes(), files::PUBLIC)?;
    }
    sign_lists(dir)
}

/// A host that has lists needs one of each CA that it meets.
fn sign_lists(dir: &Path) -> Result<(), PkiError> {
    match dir.join("crl.pem").exists() {
        true => revocation::sign(dir, &Revoke::Nothing, revocation::CRL_DAYS).map(drop),
        false => Ok(()),
    }
}

/// Hosts whose certificate is not of this CA, and not revoked.
fn of_others(dir: &Path, ca: &Authority) -> Result<Vec<Identity>, PkiError> {
    let mut others = Vec::new();
    for name in hosts(dir)? {
        let path = dir.join("hosts").join(name.as_str()).join("cert.pem");
        let certs = read_certificates("certificate", &path)?;
        let is_ours = certs.first().is_some_and(|c| verify_under(&ca.cert, c, &Naming::Dns, &name).is_ok());
        let serial = inspect(&path)?.into_iter().next().map(|report| report.serial).unwrap_or_default();
        if !is_ours && !revocation::is_revoked(dir, &serial)? {
            others.push(name);
        }
    }
    Ok(others)
}

/// The DNS domains that a CA is limited to.
fn domains(cert: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(cert) else { return Vec::new() };
    let constraints = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::NameConstraints(constraints) => constraints.permitted_subtrees.as_ref(),
        _ => None,
    });
    let dns = |base: &GeneralName<'_>| match base {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    };
    constraints.into_iter().flatten().filter_map(|subtree| dns(&subtree.base)).collect()
}
