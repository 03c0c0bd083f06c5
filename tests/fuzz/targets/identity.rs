//! Certificates' names.

use rustls_pki_types::CertificateDer;
use vmferry::net::identity::{IDENTITY_BYTES_MAX, Identity, IdentityError};
use vmferry::net::naming::{Naming, TrustDomain, any_identity};

/// A certificate of any bytes, and a name of any text.
pub(crate) fn names(data: &[u8]) {
    let chain = [CertificateDer::from(data)];
    let by_any = any_identity(&chain);
    let domain: TrustDomain = "corp.example".parse().expect("a trust domain");
    for naming in [Naming::Dns, Naming::Uri(domain)] {
        match naming.identity(&chain) {
            Ok(identity) => {
                sound(&identity);
                assert!(by_any.is_some(), "{identity}");
            }
            Err(error) => safe(&error),
        }
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(domain) = text.parse::<TrustDomain>() {
        sound(&domain.to_string().parse().expect("a plain name"));
    }
    match text.parse::<Identity>() {
        Ok(identity) => {
            assert!(identity.as_str().eq_ignore_ascii_case(text));
            sound(&identity);
        }
        Err(error) => safe(&error),
    }
}

/// One host's name, the same however it is written.
fn sound(identity: &Identity) {
    let name = identity.as_str();
    assert!((1..=IDENTITY_BYTES_MAX).contains(&name.len()), "{name:?}");
    assert!(!name.contains(['*', '/', ':', ' ', '\0']) && name.is_ascii(), "{name:?}");
    assert!(!name.chars().any(|c| c.is_control() || c.is_ascii_uppercase()), "{name:?}");
    assert!(name.parse::<std::net::IpAddr>().is_err(), "{name:?}");
    assert_eq!(name.parse::<Identity>().as_ref(), Ok(identity));
    assert_eq!(name.to_uppercase().parse::<Identity>().as_ref(), Ok(identity));
    assert!(identity.server_name().is_ok());
}

/// What is told of a name that is none can be shown.
fn safe(error: &IdentityError) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control) && text.len() < 5 * IDENTITY_BYTES_MAX, "{text:?}");
}
