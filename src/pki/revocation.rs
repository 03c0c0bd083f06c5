//! The revocation list of a CA. The list is its own record: every change reads it, adds to it
//! and signs the whole anew. Nothing ever leaves it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::authority::Authority;
use super::error::PkiError;
use super::files;
use super::report::{CertificateReport, hex, inspect};
use super::request::validity;
use crate::printable::printable;

/// Validity of a revocation list unless asked otherwise, in days. When it is over, hosts that
/// use the list refuse every peer until they have a newer one.
pub const CRL_DAYS: u32 = 365;

/// Longest serial number of a certificate (RFC 5280 §4.1.2.2).
const SERIAL_BYTES_MAX: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revoke {
    /// Nothing new: sign the list again, so that it lives on.
    Nothing,
    /// Everything ever issued to a host.
    Host(String),
    /// One certificate, by its serial number in hexadecimal (colons allowed).
    Serial(String),
}

/// The list as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    pub path: PathBuf,
    /// Serial numbers that were added.
    pub added: Vec<String>,
    /// The folder has no record of a certificate with the serial number that was asked for.
    pub unrecorded: bool,
    pub total: usize,
    pub next_update: OffsetDateTime,
}

/// Adds to the revocation list in `dir/crl.pem` and signs it for `days`.
/// Errors: `NeverIssued` if nothing was issued to that host, `BadSerial` for what is no serial number; `NoCa`
/// and its like if the CA can't sign.
pub fn revoke(dir: &Path, what: &Revoke, days: u32) -> Result<List, PkiError> {
    let _lock = lock(dir)?;
    sign(dir, what, days)
}

/// The same for who holds the folder's lock. While one CA replaces another each signs a list of all: serial
/// numbers are random, so one in the list of a CA that has not issued it does no harm.
pub(super) fn sign(dir: &Path, what: &Revoke, days: u32) -> Result<List, PkiError> {
    let authorities = Authority::all(dir)?;
    let path = dir.join("crl.pem");
    let (mut revoked, number) = read_list(&path)?;
    let (this_update, next_update) = validity(days)?;
    let next_update = authorities.iter().fold(next_update, |until, ca| until.min(ca.not_after));
    let mut added = Vec::new();
    let (serials, unrecorded) = serials_of(dir, what)?;
    for serial in serials {
        let known = revoked.iter().any(|r| r.serial_number.as_ref() == serial);
        if !known {
            added.push(hex(&serial));
            revoked.push(entry(&serial, OffsetDateTime::now_utc()));
        }
    }
    let total = revoked.len();
    let making = |source| PkiError::Making { name: "revocation list".to_owned(), source };
    let mut pem = String::new();
    for ca in &authorities {
        let params = CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: SerialNumber::from(number + 1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(again).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&ca.issuer).map_err(making)?;
        pem.push_str(&list.pem().map_err(making)?);
    }
    files::replace(&path, pem.as_bytes(), files::PUBLIC)?;
    Ok(List { path, added, unrecorded, total, next_update })
}

/// Whether the list has a serial number.
pub(super) fn is_revoked(dir: &Path, serial: &str) -> Result<bool, PkiError> {
    let (revoked, _) = read_list(&dir.join("crl.pem"))?;
    Ok(revoked.iter().any(|entry| hex(entry.serial_number.as_ref()) == serial))
}

fn again(entry: &RevokedCertParams) -> RevokedCertParams {
    self::entry(entry.serial_number.as_ref(), entry.revocation_time)
}

/// Two who revoke at once must not lose one another's entry.
pub(super) fn lock(dir: &Path) -> Result<Flock<File>, PkiError> {
    let folder = File::open(dir).map_err(files::at("open", dir))?;
    Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| files::at("lock", dir)(errno.into()))
}

/// Entries and number of the present lists; none and 0 if there is no list yet.
fn read_list(path: &Path) -> Result<(Vec<RevokedCertParams>, u64), PkiError> {
    if fs::symlink_metadata(path).is_err() {
        return Ok((Vec::new(), 0));
    }
    let damaged = |problem| PkiError::Damaged { path: path.to_owned(), problem };
    let text = files::read_text(path)?;
    let none = || damaged("it holds no revocation list");
    let (mut entries, mut last) = (Vec::<RevokedCertParams>::new(), None);
    for der in CertificateRevocationListDer::pem_slice_iter(text.as_bytes()) {
        let der = der.map_err(|_| none())?;
        let (_, list) = CertificateRevocationList::from_der(der.as_ref())
            .map_err(|_| damaged("its revocation list can't be decoded"))?;
        let number = list.crl_number().and_then(|n| u64::try_from(n).ok());
        last = last.max(Some(number.ok_or_else(|| damaged("its revocation list has no number"))?));
        let known: BTreeSet<Vec<u8>> = entries.iter().map(|e| e.serial_number.as_ref().to_vec()).collect();
        let further = list.iter_revoked_certificates().filter(|r| !known.contains(r.raw_serial()));
        entries.extend(further.map(|r| entry(r.raw_serial(), r.revocation_date.to_datetime())));
    }
    Ok((entries, last.ok_or_else(none)?))
}

fn entry(serial: &[u8], revocation_time: OffsetDateTime) -> RevokedCertParams {
    RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time,
        reason_code: None,
        invalidity_date: None,
    }
}

/// What to revoke, and whether the folder has no record of it. A serial number needs none: a certificate of
/// this CA may have been issued elsewhere with its key, before a backup was restored or by a thief.
fn serials_of(dir: &Path, what: &Revoke) -> Result<(BTreeSet<Vec<u8>>, bool), PkiError> {
    match what {
        Revoke::Nothing => Ok((BTreeSet::new(), false)),
        Revoke::Host(name) => {
            let of_host = issued(dir)?.into_iter().filter(|cert| is_named(cert, name));
            let found: BTreeSet<_> = of_host.filter_map(|cert| from_hex(&cert.serial)).collect();
            if found.is_empty() {
                return Err(PkiError::NeverIssued { dir: dir.to_owned(), what: name.clone() });
            }
            Ok((found, false))
        }
        Revoke::Serial(text) => {
            let serial = serial_number(text)?;
            let mut recorded = issued(dir)?.into_iter().filter_map(|cert| from_hex(&cert.serial));
            let unrecorded = !recorded.any(|known| known == serial);
            Ok((BTreeSet::from([serial]), unrecorded))
        }
    }
}

/// A serial number as certificates have it: the bytes of a positive DER integer.
fn serial_number(text: &str) -> Result<Vec<u8>, PkiError> {
    let digits = text.trim().replace(':', "");
    let digits = if digits.len() % 2 == 1 { format!("0{digits}") } else { digits };
    let bad = || PkiError::BadSerial { text: printable(text) };
    let bytes = from_hex(&digits).ok_or_else(bad)?;
    let significant = bytes.iter().position(|byte| *byte != 0).ok_or_else(bad)?;
    let mut serial = bytes[significant..].to_vec();
    if serial[0] & 0x80 != 0 {
        serial.insert(0, 0);
    }
    if serial.len() > SERIAL_BYTES_MAX { Err(bad()) } else { Ok(serial) }
}

fn is_named(cert: &CertificateReport, name: &str) -> bool {
    let identity = cert.identity.as_deref();
    identity.is_some_and(|i| i.eq_ignore_ascii_case(name))
}

fn issued(dir: &Path) -> Result<Vec<CertificateReport>, PkiError> {
    let dir = dir.join("issued");
    let mut all = Vec::new();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        Err(e) => return Err(files::at("read", &dir)(e)),
    };
    for entry in entries {
        let path = entry.map_err(files::at("read", &dir))?.path();
        if path.extension().is_some_and(|e| e == "pem") {
            all.extend(inspect(&path)?);
        }
    }
    Ok(all)
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    // `from_str_radix` takes a sign as well.
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
