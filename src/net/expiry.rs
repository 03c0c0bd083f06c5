//! When the files end that a host speaks with, and which of these ends deserve a word. Knows no file.

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

/// An end that is nearer than this is near, unless the whole life is short.
pub const SOON: Duration = Duration::days(30);
/// Of a short life the last part of so many.
const LAST_PART: i32 = 3;

/// What may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// This host's own certificate.
    Certificate,
    /// One between it and the CA.
    Intermediate,
    /// The CA's that lives longest.
    Authority,
    /// The revocation list that ends first.
    RevocationList,
}

/// A life and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    pub kind: Kind,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Kind {
    /// For people, with what to do about it.
    pub fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Certificate => (
                "this host's certificate",
                "renew it (`vmferry certs renew`), copy it here and `systemctl reload vmferry`",
            ),
            Self::Intermediate => (
                "an intermediate certificate behind this host's",
                "have this host's certificate issued by its successor",
            ),
            Self::Authority => (
                "the last CA certificate that this host trusts",
                "replace the CA (`vmferry certs rotate-ca`) before that day",
            ),
            Self::RevocationList => (
                "a revocation list",
                "renew it (`vmferry certs revoke --dir DIR`), copy it here and `systemctl reload vmferry`; after its end every peer is refused",
            ),
        }
    }
}

impl Ending {
    /// Whether somebody should act: within 30 days, of a short life within its last third.
    pub fn is_soon(&self, now: OffsetDateTime) -> bool {
        let last_part = (self.not_after - self.not_before) / LAST_PART;
        self.not_after - now < SOON.min(last_part)
    }
}

/// The ends of a host's own chain, of the CAs that it trusts, and of its lists.
pub(super) fn endings(
    chain: &[CertificateDer<'_>],
    cas: &[CertificateDer<'_>],
    lists: &[CertificateRevocationListDer<'_>],
) -> Vec<Ending> {
    let mut all: Vec<Ending> = chain.first().and_then(|c| of(Kind::Certificate, c)).into_iter().collect();
    let above = chain.iter().skip(1).filter_map(|cert| of(Kind::Intermediate, cert));
    all.extend(above.min_by_key(|ending| ending.not_after));
    let trusted = cas.iter().filter_map(|cert| of(Kind::Authority, cert));
    all.extend(trusted.max_by_key(|ending| ending.not_after));
    all.extend(lists.iter().filter_map(of_list).min_by_key(|ending| ending.not_after));
    all
}

fn of(kind: Kind, der: &CertificateDer<'_>) -> Option<Ending> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let life = cert.validity();
    let (not_before, not_after) = (life.not_before.to_datetime(), life.not_after.to_datetime());
    Some(Ending { kind, not_before, not_after })
}

fn of_list(der: &CertificateRevocationListDer<'_>) -> Option<Ending> {
    let (_, list) = CertificateRevocationList::from_der(der.as_ref()).ok()?;
    let not_after = list.next_update()?.to_datetime();
    Some(Ending { kind: Kind::RevocationList, not_before: list.last_update().to_datetime(), not_after })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thirty_days_are_soon_and_of_a_short_life_its_last_third() {
        let now = OffsetDateTime::UNIX_EPOCH;
        let ending = |lived: i64, left: i64| Ending {
            kind: Kind::Certificate,
            not_before: now - Duration::hours(lived),
            not_after: now + Duration::hours(left),
        };
        for (lived, left, soon) in [
            (24 * 700, 24 * 31, false),
            (24 * 700, 24 * 29, true),
            (1, 23, false),
            (15, 9, false),
            (17, 7, true),
            (24, -1, true),
        ] {
            assert_eq!(ending(lived, left).is_soon(now), soon, "{lived} h lived, {left} h left");
        }
    }
}
