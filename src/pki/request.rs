//! What is asked of a CA, and what becomes of it: names, validity, serial numbers. Reads and writes nothing.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use rcgen::{SanType, SerialNumber};
use time::{Duration, OffsetDateTime};

use super::error::{DAYS_MAX, EXTRA_NAMES_MAX, PkiError};
use crate::net::identity::{Identity, SELECTOR_SCHEME};
use crate::net::naming::{TrustDomain, URI_SCHEME};

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
    /// A name as a report on a certificate has it.
    pub(super) fn of_certificate(text: &str) -> Result<Self, PkiError> {
        match text.strip_prefix("URI:").filter(|uri| uri.starts_with(URI_SCHEME)) {
            Some(uri) => {
                let bad = |_| PkiError::BadName { name: text.to_owned() };
                Ok(Self(SanType::URI(uri.try_into().map_err(bad)?)))
            }
            None => text.parse(),
        }
    }

    /// The URI name by which hosts of a trust domain know this one.
    /// Errors: `BadName` if it cannot be written in a certificate.
    pub fn in_trust_domain(domain: &TrustDomain, name: &Identity) -> Result<Self, PkiError> {
        let uri = domain.uri(name);
        let bad = |_| PkiError::BadName { name: uri.clone() };
        Ok(Self(SanType::URI(uri.as_str().try_into().map_err(bad)?)))
    }
}

/// The identity first; and where other DNS names stand beside it, the URI that picks it.
pub(super) fn alt_names(request: &HostRequest) -> Result<Vec<SanType>, PkiError> {
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

pub(super) fn validity(days: u32) -> Result<(OffsetDateTime, OffsetDateTime), PkiError> {
    if !(1..=DAYS_MAX).contains(&days) {
        return Err(PkiError::BadDays { days });
    }
    let now = OffsetDateTime::now_utc();
    Ok((now - BACKDATED, now + Duration::days(days.into())))
}

/// Positive, never zero, and always of the same length.
pub(super) fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut bytes = [0; SERIAL_BYTES];
    getrandom::fill(&mut bytes).map_err(|e| PkiError::Random(io::Error::other(e)))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
