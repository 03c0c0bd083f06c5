//! Who a host is: the one name that its certificate gives it. Owns the rule by which that
//! name is read from DNS names; `naming` has the other one, and says which of them counts. Must not know sockets,
//! sessions, or what a peer may do.
//!
//! # The rule
//!
//! A host's identity is a DNS name in the subject alternative names (SAN) of its certificate.
//! The common name, IP addresses and every other kind of name are ignored.
//!
//! * One DNS name: that is the identity.
//! * Several DNS names (a certificate shared with other services): ambiguous, unless exactly
//!   one URI name `vmferry:NAME` stands beside them and NAME is one of those DNS names. The
//!   URI only picks among names the CA has vouched for; it can't add one, so the CA's name
//!   constraints keep their force. `vmferry://…` is another scheme, and ignored.
//! * A wildcard is never an identity: it would let one host be every host.
//!
//! Names are compared without regard to case and kept in lower case.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::{CertificateDer, DnsName, ServerName};
use serde::{Deserialize, Serialize};

/// Scheme of the URI name that picks the identity among several DNS names.
pub const SELECTOR_SCHEME: &str = "vmferry:";

/// Longest identity in bytes (the longest DNS name in text form, RFC 1035 §2.3.4).
pub const IDENTITY_BYTES_MAX: usize = 253;

/// A host's identity: a valid DNS name in lower case, no wildcard, no trailing dot, and not
/// something that reads as an IP address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity(String);

/// Why a certificate or a text gives no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("no certificate was presented")]
    NoCertificate,
    #[error("the certificate can't be decoded")]
    Undecodable,
    #[error(
        "the certificate has no DNS name among its subject alternative names; \
         issue one with `vmferry certs host NAME`"
    )]
    NoName,
    /// Several DNS names and nothing that picks one.
    #[error(
        "the certificate has several DNS names ({names}); keep one, \
         or add the URI name `vmferry:NAME` that says which is the host's identity"
    )]
    Ambiguous { names: String },
    /// The selector names something that is not among the DNS names, or there are several.
    #[error(
        "the certificate's URI name `vmferry:…` must occur once and repeat one of its DNS names ({names})"
    )]
    BadSelector { names: String },
    #[error(
        "the certificate has no URI name `vmferry://{of}/host/NAME`; \
         issue one with `vmferry certs host NAME --trust-domain {of}`"
    )]
    NoUri { of: String },
    #[error(
        "the certificate has {count} URI names that begin with vmferry://; keep one, of trust domain {of}"
    )]
    SeveralUris { count: usize, of: String },
    /// Of another trust domain, or not of the form.
    #[error("the certificate's URI name `{uri}` is not of the form vmferry://{of}/host/NAME")]
    BadUri { uri: String, of: String },
    #[error("`{name}` can't be a trust domain: a plain DNS name is needed, as in corp.example")]
    BadTrustDomain { name: String },
    /// Not a name that can be an identity (wildcard, IP address, bad characters, too long).
    #[error("`{name}` can't be a host's identity: a plain DNS name is needed, no wildcard, no address")]
    BadName { name: String },
}

impl Identity {
    /// The name, in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in the form in which a TLS client says whom it wants to reach.
    /// Errors: `BadName` if the TLS library disagrees with our own check, which a test excludes.
    pub fn server_name(&self) -> Result<ServerName<'static>, IdentityError> {
        ServerName::try_from(self.0.clone()).map_err(|_| bad_name(&self.0))
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let plain = text.len() <= IDENTITY_BYTES_MAX
            && !text.ends_with('.')
            && DnsName::try_from(text).is_ok()
            && matches!(ServerName::try_from(text), Ok(ServerName::DnsName(_)));
        if plain { Ok(Self(text.to_ascii_lowercase())) } else { Err(bad_name(text)) }
    }
}

impl TryFrom<String> for Identity {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, IdentityError> {
        text.parse()
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Reads the identity out of a certificate chain by the rule of this module. Only the
/// first certificate, the host's own, counts. The chain must already be verified: this
/// function checks no signature, no date and no purpose.
/// Errors: one `IdentityError` for each way in which the rule is not met.
pub(super) fn dns_identity(certs: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
    let leaf = certs.first().ok_or(IdentityError::NoCertificate)?;
    let cert = webpki::EndEntityCert::try_from(leaf).map_err(|_| IdentityError::Undecodable)?;
    let dns: Vec<&str> = cert.valid_dns_names().collect();
    let selectors: Vec<&str> = cert
        .valid_uri_names()
        .filter_map(|uri| uri.strip_prefix(SELECTOR_SCHEME))
        .filter(|rest| !rest.starts_with("//"))
        .collect();
    pick(&dns, &selectors)
}

fn pick(dns: &[&str], selectors: &[&str]) -> Result<Identity, IdentityError> {
    match (dns, selectors) {
        ([], _) => Err(IdentityError::NoName),
        ([only], []) => only.parse(),
        (_, []) => Err(IdentityError::Ambiguous { names: printable_list(dns) }),
        (_, [selector]) if dns.iter().any(|name| name.eq_ignore_ascii_case(selector)) => selector.parse(),
        _ => Err(IdentityError::BadSelector { names: printable_list(dns) }),
    }
}

/// Names a peer has chosen end up in our logs: at most four of them, nothing unprintable.
fn printable_list(names: &[&str]) -> String {
    const SHOWN_MAX: usize = 4;
    let mut list: Vec<String> = names.iter().take(SHOWN_MAX).map(|n| printable(n)).collect();
    if names.len() > SHOWN_MAX {
        list.push(format!("and {} more", names.len() - SHOWN_MAX));
    }
    list.join(", ")
}

pub(super) fn printable(text: &str) -> String {
    text.escape_default().take(IDENTITY_BYTES_MAX).collect()
}

fn bad_name(text: &str) -> IdentityError {
    IdentityError::BadName { name: printable(text) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_dns_names_are_identities() {
        for good in ["bravo", "Bravo.Example.ORG", "h-1.rack_2.example", "xn--bcher-kva"] {
            let identity: Identity = good.parse().unwrap();
            assert_eq!(identity.as_str(), good.to_ascii_lowercase());
            assert!(identity.server_name().is_ok(), "{good}");
        }
        let long = "a.".repeat(127) + "ab";
        for bad in [
            "",
            ".",
            "*.example",
            "bravo.",
            "10.0.0.1",
            "fd77::1",
            "a b",
            "a/b",
            "a..b",
            "-a",
            "ü",
            "a\n",
            "bravo:9907",
            &long,
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn one_name_or_a_selected_one() {
        assert_eq!(pick(&["Alpha"], &[]).unwrap().as_str(), "alpha");
        assert_eq!(pick(&["a", "b"], &["B"]).unwrap().as_str(), "b");
        assert_eq!(pick(&["a"], &["a"]).unwrap().as_str(), "a");
        assert_eq!(pick(&[], &["a"]), Err(IdentityError::NoName));
        assert!(matches!(pick(&["a", "b"], &[]), Err(IdentityError::Ambiguous { .. })));
        assert!(matches!(pick(&["a", "b"], &["c"]), Err(IdentityError::BadSelector { .. })));
        assert!(matches!(pick(&["a", "b"], &["a", "b"]), Err(IdentityError::BadSelector { .. })));
        assert!(matches!(pick(&["*.a"], &[]), Err(IdentityError::BadName { .. })));
        assert!(matches!(pick(&["*.a", "b"], &["*.a"]), Err(IdentityError::BadName { .. })));
    }
}
