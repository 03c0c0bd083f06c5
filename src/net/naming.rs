//! By which of the names in a certificate a host is known: the rule, and the trust domain that may be part of
//! it. Must not know sockets, sessions, or what a peer may do.
//!
//! # The rule
//!
//! Without a trust domain (`tls.trust_domain` in the configuration) a DNS name counts, by the rule of
//! `identity`. URI names that begin with `vmferry://` are as good as not there.
//!
//! With trust domain T one URI name counts, and DNS names are as good as not there:
//!
//! ```text
//! vmferry://T/host/NAME        NAME is the identity: a plain DNS name, as everywhere
//! ```
//!
//! * The certificate has exactly one URI name that begins with `vmferry://`. Two are ambiguous, also where only
//!   one of them is of this trust domain. Other URI names (`spiffe://…`, `https://…`) are ignored.
//! * It has no port, user, query, fragment, percent-encoding or further part.
//! * Without one there is no identity: a certificate that the same authority has issued to a web server, with
//!   DNS names only, is nobody here.
//! * Scheme, T and NAME are compared without regard to case and kept in lower case.
//!
//! A certificate may have both, a DNS name and the URI with the same NAME: it is good on hosts with and
//! without the trust domain, so that hosts can be changed over one after the other.
//!
//! The library judges a server's names by DNS only. With a trust domain it is asked whether the certificate is
//! good for a *client*, in both roles, and this rule does the rest: every certificate must be for both roles.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use serde::Deserialize;

use super::identity::{Identity, IdentityError, dns_identity, printable};

/// Scheme of the URI names, with what separates it from the trust domain.
pub const URI_SCHEME: &str = "vmferry://";

/// Between a trust domain and the host's name.
const HOST: &str = "/host/";

/// Within which names are unique; a DNS name in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TrustDomain(Identity);

/// By which names hosts are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Naming {
    /// By a DNS name.
    #[default]
    Dns,
    /// By a URI name of this trust domain.
    Uri(TrustDomain),
}

impl TrustDomain {
    /// The URI name of a host.
    pub fn uri(&self, name: &Identity) -> String {
        format!("{URI_SCHEME}{self}{HOST}{name}")
    }

    /// The host that a URI name is of.
    fn host_of(&self, uri: &str) -> Option<Identity> {
        let (domain, name) = without_scheme(uri)?.split_once(HOST)?;
        let is_ours = domain.eq_ignore_ascii_case(self.0.as_str());
        if is_ours { name.parse().ok() } else { None }
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let bad = |_| IdentityError::BadTrustDomain { name: printable(text) };
        text.parse().map(Self).map_err(bad)
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, IdentityError> {
        text.parse()
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Option<TrustDomain>> for Naming {
    fn from(domain: Option<TrustDomain>) -> Self {
        domain.map_or(Self::Dns, Self::Uri)
    }
}

impl Naming {
    /// Reads the identity out of a chain by the rule of this module. Only the first certificate, the host's own,
    /// counts. The chain must already be verified: no signature, date or purpose is looked at.
    /// Errors: one `IdentityError` for each way in which the rule is not met.
    pub fn identity(&self, certs: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
        let Self::Uri(domain) = self else { return dns_identity(certs) };
        let leaf = certs.first().ok_or(IdentityError::NoCertificate)?;
        let cert = webpki::EndEntityCert::try_from(leaf).map_err(|_| IdentityError::Undecodable)?;
        let uris: Vec<&str> = cert.valid_uri_names().filter(|uri| without_scheme(uri).is_some()).collect();
        domain.pick(&uris)
    }
}

/// Who a certificate is of by either rule, whatever its trust domain: for people who look at one.
pub fn any_identity(certs: &[CertificateDer<'_>]) -> Option<Identity> {
    let by_uri = || {
        let cert = webpki::EndEntityCert::try_from(certs.first()?).ok()?;
        let mut uris = cert.valid_uri_names().filter_map(without_scheme);
        let (domain, _) = uris.next()?.split_once(HOST)?;
        Naming::Uri(domain.parse().ok()?).identity(certs).ok()
    };
    dns_identity(certs).ok().or_else(by_uri)
}

impl TrustDomain {
    fn pick(&self, uris: &[&str]) -> Result<Identity, IdentityError> {
        let of = self.to_string();
        match uris {
            [] => Err(IdentityError::NoUri { of }),
            [uri] => self.host_of(uri).ok_or_else(|| IdentityError::BadUri { uri: printable(uri), of }),
            _ => Err(IdentityError::SeveralUris { count: uris.len(), of }),
        }
    }
}

/// What stands behind the scheme; `None` if it is another.
fn without_scheme(uri: &str) -> Option<&str> {
    let (scheme, rest) = uri.split_at_checked(URI_SCHEME.len())?;
    scheme.eq_ignore_ascii_case(URI_SCHEME).then_some(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn picked(uris: &[&str]) -> Result<String, IdentityError> {
        let domain: TrustDomain = "Corp.Example".parse().unwrap();
        domain.pick(uris).map(String::from)
    }

    #[test]
    fn one_uri_of_the_trust_domain_is_an_identity() {
        let domain: TrustDomain = "corp.example".parse().unwrap();
        let uri = domain.uri(&"Alpha.rack".parse().unwrap());
        assert_eq!(uri, "vmferry://corp.example/host/alpha.rack");
        assert_eq!(picked(&[&uri]).unwrap(), "alpha.rack");
        assert_eq!(picked(&["VMFERRY://CORP.example/host/ALPHA"]).unwrap(), "alpha");
    }

    #[test]
    fn whatever_else_it_says_is_none() {
        for bad in [
            "vmferry://other.example/host/alpha",
            "vmferry://corp.example.evil/host/alpha",
            "vmferry://evil.corp.example/host/alpha",
            "vmferry://corp.example@evil/host/alpha",
            "vmferry://user@corp.example/host/alpha",
            "vmferry://corp.example:9907/host/alpha",
            "vmferry:///host/alpha",
            "vmferry://corp.example/hosts/alpha",
            "vmferry://corp.example/Host/alpha",
            "vmferry://corp.example//host/alpha",
            "vmferry://corp.example/host/",
            "vmferry://corp.example/host/alpha/",
            "vmferry://corp.example/host/a/host/b",
            "vmferry://corp.example/host/alpha?x",
            "vmferry://corp.example/host/alpha#x",
            "vmferry://corp.example/host/al%70ha",
            "vmferry://corp.example/host/*.rack",
            "vmferry://corp.example/host/10.0.0.1",
            "vmferry://corp.example/host/alpha\0",
            "vmferry://corp.example/host/../alpha",
            "vmferry://",
        ] {
            assert!(matches!(picked(&[bad]), Err(IdentityError::BadUri { .. })), "{bad}");
        }
        assert!(matches!(picked(&[]), Err(IdentityError::NoUri { .. })));
        let good = "vmferry://corp.example/host/alpha";
        for second in [good, "vmferry://other.example/host/alpha", "vmferry://x"] {
            assert!(matches!(picked(&[good, second]), Err(IdentityError::SeveralUris { .. })), "{second}");
        }
    }

    #[test]
    fn a_trust_domain_is_a_plain_name() {
        for bad in ["", "*.example", "10.0.0.1", "a/b", "a:1", "ü", "a."] {
            assert!(bad.parse::<TrustDomain>().is_err(), "{bad}");
        }
    }
}
