//! A certificate that is refused for its dates: what the certificate says, and what this host's clock
//! says. Which of the two is wrong only a person can tell. Knows no socket.

use rustls::{CertificateError, Error as RustlsError};
use rustls_pki_types::UnixTime;
use time::OffsetDateTime;

/// Both dates in words; `None` for a refusal that has to do with no date.
pub(super) fn both_dates(error: &RustlsError) -> Option<String> {
    let RustlsError::InvalidCertificate(error) = error else { return None };
    let (now, words, date) = match error {
        CertificateError::NotValidYetContext { time, not_before } => {
            (time, "the certificate is valid from", not_before)
        }
        CertificateError::ExpiredContext { time, not_after } => {
            (time, "the certificate is valid until", not_after)
        }
        CertificateError::ExpiredRevocationListContext { time, next_update } => {
            (time, "the revocation list is valid until", next_update)
        }
        _ => return None,
    };
    Some(format!("{words} {}, and this host's clock says {}", shown(date), shown(now)))
}

fn shown(at: &UnixTime) -> String {
    let seconds = i64::try_from(at.as_secs()).ok();
    let date = seconds.and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    // A date beyond the calendar is the certificate's to answer for.
    date.map_or_else(|| format!("{} s after 1970", at.as_secs()), |date| date.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    #[test]
    fn both_dates_are_named_however_odd() {
        let words = |error| both_dates(&RustlsError::InvalidCertificate(error)).unwrap_or_default();
        let early = CertificateError::NotValidYetContext { time: at(0), not_before: at(86_400) };
        let said = words(early);
        assert!(said.contains("from 1970-01-02") && said.contains("clock says 1970-01-01"), "{said}");
        let late = CertificateError::ExpiredContext { time: at(u64::MAX), not_after: at(0) };
        let said = words(late);
        assert!(said.contains("until 1970-01-01") && said.contains("18446744073709551615 s"), "{said}");
        assert_eq!(words(CertificateError::BadSignature), "");
    }
}
