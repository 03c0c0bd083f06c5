//! Why a certificate is not made, or a file of the CA's is not believed.

use std::io;
use std::path::PathBuf;

use time::OffsetDateTime;

use super::step::Step;
use crate::net::identity::IdentityError;

/// Longest validity that is issued, in days.
pub const DAYS_MAX: u32 = 36_500;
/// Most extra names in one certificate.
pub const EXTRA_NAMES_MAX: usize = 32;

/// What can go wrong. Each text names the object and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("`{}` is there already and is not overwritten; {remedy}", path.display())]
    Exists { path: PathBuf, remedy: &'static str },
    #[error("`{}` holds no CA (ca-cert.pem and ca-key.pem); make one with `vmferry certs ca --dir {}`", dir.display(), dir.display())]
    NoCa { dir: PathBuf },
    #[error("ca-key.pem in `{}` does not belong to ca-cert.pem; restore the pair from your backup", dir.display())]
    CaMismatch { dir: PathBuf },
    #[error("the CA in `{}` is valid from {not_before} to {not_after} only; make a new one in another folder, or set the clock right", dir.display())]
    CaNotValid { dir: PathBuf, not_before: OffsetDateTime, not_after: OffsetDateTime },
    /// A validity outside the limits.
    #[error("{days} days are not possible; choose 1 to {DAYS_MAX}")]
    BadDays { days: u32 },
    #[error("`{name}` can't be used as a name; write a DNS name, an IP address, or DNS:…, IP:…, URI:…")]
    BadName { name: String },
    /// More extra names than allowed.
    #[error("{count} extra names are too many; at most {EXTRA_NAMES_MAX} are possible")]
    TooManyNames { count: usize },
    #[error("a host can't be named so")]
    BadIdentity(#[from] IdentityError),
    #[error("`{}` has no certificate of `{name}` that could be renewed; issue one with `vmferry certs host`", dir.display())]
    NoHost { dir: PathBuf, name: String },
    #[error(
        "the certificate of `{name}` is revoked, so its key gets no other; give it a new one (--new-key)"
    )]
    RevokedKey { name: String },
    #[error(
        "the key of `{name}` was never here, so no new one is made here; invite it again with `vmferry certs invite {name} --force`"
    )]
    KeyElsewhere { name: String },
    #[error("what `{name}` asks for is refused: {problem}")]
    BadRequest { name: String, problem: &'static str },
    #[error("that is not the next step of `{}`: {}", dir.display(), in_words(*step))]
    NotNow { dir: PathBuf, step: Step },
    #[error(
        "these hosts have no certificate of the new CA: {names}; renew them with `vmferry certs renew`, or take away their folders in hosts/"
    )]
    HostsLeft { names: String },
    #[error("`{}` has issued nothing for `{what}`; see the folder issued/ in it", dir.display())]
    NeverIssued { dir: PathBuf, what: String },
    #[error(
        "`{text}` is no certificate's serial number: up to 20 bytes in hexadecimal, colons allowed, as `vmferry certs show` has it"
    )]
    BadSerial { text: String },
    #[error("`{}` is damaged: {problem}; restore it from your backup", path.display())]
    Damaged { path: PathBuf, problem: &'static str },
    #[error(transparent)]
    Files(#[from] crate::net::tls::TlsError),
    #[error("can't {action} `{}`", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The CA is limited to certain names, and this is none of them.
    #[error("the CA in `{}` can't vouch for `{name}`; its own certificate limits the names it may sign (see `vmferry certs show`)", dir.display())]
    NotPermitted {
        dir: PathBuf,
        name: String,
        #[source]
        source: rustls::Error,
    },
    #[error("can't make the certificate of `{name}`")]
    Making {
        name: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("the system gives no random numbers")]
    Random(#[source] io::Error),
}

fn in_words(step: Step) -> &'static str {
    match step {
        Step::None => "no CA replaces another there; `rotate-ca begin` is",
        Step::Begun => "a new CA is there and does not issue yet; `rotate-ca switch` is",
        Step::Switched => "the new CA issues and the old one is still trusted; `rotate-ca end` is",
    }
}
