//! Why a certificate is not made, or a file of the CA's is not believed.

use std::io;
use std::path::PathBuf;

use time::OffsetDateTime;

use crate::net::identity::IdentityError;

/// Longest validity that is issued, in days.
pub const DAYS_MAX: u32 = 36_500;
/// Most extra names in one certificate.
pub const EXTRA_NAMES_MAX: usize = 32;

/// What can go wrong. Each text names the object and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Something is there already, and it is never overwritten.
    #[error("`{}` is there already and is not overwritten; {remedy}", path.display())]
    Exists {
        /// What is in the way.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The folder holds no CA.
    #[error("`{}` holds no CA (ca-cert.pem and ca-key.pem); make one with `vmferry certs ca --dir {}`", dir.display(), dir.display())]
    NoCa {
        /// The folder.
        dir: PathBuf,
    },
    /// The CA's key is another one's.
    #[error("ca-key.pem in `{}` does not belong to ca-cert.pem; restore the pair from your backup", dir.display())]
    CaMismatch {
        /// The folder.
        dir: PathBuf,
    },
    /// The CA has expired or is not valid yet.
    #[error("the CA in `{}` is valid from {not_before} to {not_after} only; make a new one in another folder, or set the clock right", dir.display())]
    CaNotValid {
        /// The folder.
        dir: PathBuf,
        /// Start of its life.
        not_before: OffsetDateTime,
        /// End of its life.
        not_after: OffsetDateTime,
    },
    /// A validity outside the limits.
    #[error("{days} days are not possible; choose 1 to {DAYS_MAX}")]
    BadDays {
        /// What was asked for.
        days: u32,
    },
    /// A name that can't be in a certificate.
    #[error("`{name}` can't be used as a name; write a DNS name, an IP address, or DNS:…, IP:…, URI:…")]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// More extra names than allowed.
    #[error("{count} extra names are too many; at most {EXTRA_NAMES_MAX} are possible")]
    TooManyNames {
        /// What was asked for.
        count: usize,
    },
    /// A host name that is no identity.
    #[error("a host can't be named so")]
    BadIdentity(#[from] IdentityError),
    /// Nothing was issued under this name or serial number.
    #[error("`{}` has issued nothing for `{what}`; see the folder issued/ in it", dir.display())]
    NeverIssued {
        /// The folder.
        dir: PathBuf,
        /// Name or serial number.
        what: String,
    },
    /// A file of ours does not hold what it should.
    #[error("`{}` is damaged: {problem}; restore it from your backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Certificate files that can't be read.
    #[error(transparent)]
    Files(#[from] crate::net::tls::TlsError),
    /// The file system refused.
    #[error("can't {action} `{}`", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The CA is limited to certain names, and this is none of them.
    #[error("the CA in `{}` can't vouch for `{name}`; its own certificate limits the names it may sign (see `vmferry certs show`)", dir.display())]
    NotPermitted {
        /// The folder.
        dir: PathBuf,
        /// The host's name.
        name: String,
        /// What a peer would say.
        #[source]
        source: rustls::Error,
    },
    /// The certificate library refused.
    #[error("can't make the certificate of `{name}`")]
    Making {
        /// Whose.
        name: String,
        /// The cause.
        #[source]
        source: rcgen::Error,
    },
    /// No random numbers from the system.
    #[error("the system gives no random numbers")]
    Random(#[source] io::Error),
}
