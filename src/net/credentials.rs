//! The certificate files of this host: reads them, and finds everything that can be wrong
//! with them before a socket opens. Must not know connections; TLS settings are `tls.rs`'s.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use serde::Deserialize;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate, X509Error};
use zeroize::{Zeroize, Zeroizing};

use super::identity::{Identity, IdentityError};
use super::naming::Naming;

/// Largest certificate, key or revocation list file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Where the files are. All are PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsPaths {
    /// The CA certificate or certificates (several while one CA replaces another). No other
    /// CA is trusted, the system's least of all.
    pub ca: PathBuf,
    /// This host's certificate, then intermediate certificates if there are any.
    pub cert: PathBuf,
    /// The private key of `cert`; readable by its owner only.
    pub key: PathBuf,
    /// Revocation lists. When given, every certificate of every peer must be covered by one
    /// that has not expired.
    #[serde(default)]
    pub crl: Option<PathBuf>,
}

/// What is wrong with this host's TLS files. Each text names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("can't read the {what} `{}`; check the path and that the agent's user may read it", path.display())]
    Unreadable {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the {what} `{}` is not a plain file of at most {FILE_BYTES_MAX} bytes; check the path", path.display())]
    NotAFile { what: &'static str, path: PathBuf },
    #[error("`{}` holds no {what} in PEM form (a block that starts with -----BEGIN); convert it, or swap the paths if they are mixed up", path.display())]
    NotPem {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("`{}` holds a certificate that can't be decoded; it is damaged, copy or issue it again", path.display())]
    Undecodable { path: PathBuf },
    #[error("others may read the private key `{}` (mode {mode:04o}); run `chmod 600 {}` and, if the host has other users, issue a new key", path.display(), path.display())]
    KeyExposed { path: PathBuf, mode: u32 },
    #[error("the private key `{}` can't be used; `vmferry certs host` makes one that can", path.display())]
    KeyUnusable {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("the private key `{}` does not belong to the certificate `{}`; take both from the same folder", key.display(), cert.display())]
    KeyMismatch { cert: PathBuf, key: PathBuf },
    #[error("the certificate `{}` does not say who this host is", path.display())]
    NoIdentity {
        path: PathBuf,
        #[source]
        source: IdentityError,
    },
    #[error("the certificate `{}` expired at {not_after}, and this host's clock says {now}; renew it (`vmferry certs host NAME --force`) or set this host's clock right", path.display())]
    Expired { path: PathBuf, not_after: OffsetDateTime, now: OffsetDateTime },
    #[error("the certificate `{}` is not valid before {not_before}, and this host's clock says {now}; set this host's clock right", path.display())]
    NotYetValid { path: PathBuf, not_before: OffsetDateTime, now: OffsetDateTime },
    /// Extended key usage lacks a role, or all of it is lacking, or the key may not sign; every agent both dials and
    /// is dialled.
    #[error("the certificate `{}` may not be used for {missing}; an agent needs serverAuth and clientAuth in the extended key usage, and digitalSignature where there is a key usage", path.display())]
    WrongPurpose { path: PathBuf, missing: &'static str },
    #[error("`{}` holds a certificate that is not a CA's; it must hold CA certificates only", path.display())]
    NotACa { path: PathBuf },
    #[error("the certificate `{}` does not verify under the CA `{}`, so no peer of this CA would accept it; issue it with this CA, or add the intermediate certificates to it", cert.display(), ca.display())]
    NotIssuedByCa {
        cert: PathBuf,
        ca: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("the certificate `{}` is revoked by `{}`; issue a new one for this host", cert.display(), crl.display())]
    Revoked { cert: PathBuf, crl: PathBuf },
    #[error("the revocation list `{}` has expired or does not cover the issuer of `{}`; fetch or make a current one", crl.display(), cert.display())]
    RevocationUnknown { cert: PathBuf, crl: PathBuf },
    #[error("the revocation list `{}` can't be used", path.display())]
    BadCrl {
        path: PathBuf,
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    #[error("the CA certificate `{}` can't be used", path.display())]
    BadCa {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the TLS library refused our settings")]
    Settings(#[source] rustls::Error),
}

/// What the files hold, each piece checked by itself.
pub(super) struct Credentials {
    pub(super) cas: Vec<CertificateDer<'static>>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// Overwritten also where the rest is refused.
    pub(super) key: Zeroizing<PrivateKeyDer<'static>>,
    pub(super) crls: Vec<CertificateRevocationListDer<'static>>,
    pub(super) identity: Identity,
    pub(super) not_after: OffsetDateTime,
}

impl Credentials {
    /// Reads and checks all files. What takes several files together (key and certificate,
    /// certificate and CA) is checked by whoever has a crypto library at hand.
    pub(super) fn read(paths: &TlsPaths, naming: &Naming, now: OffsetDateTime) -> Result<Self, TlsError> {
        let cas = read_cas(&paths.ca, now)?;
        let chain = read_certificates("certificate", &paths.cert)?;
        let not_after = check_own_certificate(&chain, &paths.cert, now)?;
        let identity = own_identity(&chain, naming, &paths.cert)?;
        let crls = match &paths.crl {
            Some(path) => read_pem("revocation list", path)?,
            None => Vec::new(),
        };
        Ok(Self { cas, chain, key: Zeroizing::new(read_key(&paths.key)?), crls, identity, not_after })
    }
}

/// What is wrong with each file by itself, all of it and not only the first.
pub(crate) fn problems(paths: &TlsPaths, naming: &Naming, now: OffsetDateTime) -> Vec<TlsError> {
    let mut problems = Vec::new();
    problems.extend(read_cas(&paths.ca, now).err());
    match read_certificates("certificate", &paths.cert) {
        Err(problem) => problems.push(problem),
        Ok(chain) => {
            problems.extend(check_own_certificate(&chain, &paths.cert, now).err());
            problems.extend(own_identity(&chain, naming, &paths.cert).err());
        }
    }
    problems.extend(read_key(&paths.key).map(|mut key| key.zeroize()).err());
    let crl = paths.crl.as_deref();
    problems.extend(
        crl.and_then(|path| read_pem::<CertificateRevocationListDer<'_>>("revocation list", path).err()),
    );
    problems
}

fn own_identity(chain: &[CertificateDer<'_>], naming: &Naming, path: &Path) -> Result<Identity, TlsError> {
    naming.identity(chain).map_err(|source| TlsError::NoIdentity { path: path.to_owned(), source })
}

/// Reads the certificates of a PEM file, in their order; at least one.
/// Errors: `Unreadable`, `NotAFile` or `NotPem`, which name the file as a `what`.
pub fn read_certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    read_pem(what, path)
}

/// Reads a private key, after a look at who else may read it.
/// Errors: `KeyExposed`, or those of [`read_certificates`].
pub fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (text, mode) = read_file("private key", path)?;
    if mode & 0o077 != 0 {
        return Err(TlsError::KeyExposed { path: path.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|source| TlsError::NotPem {
        what: "private key",
        path: path.to_owned(),
        source,
    })
}

fn read_pem<T: PemObject>(what: &'static str, path: &Path) -> Result<Vec<T>, TlsError> {
    let (text, _) = read_file(what, path)?;
    let not_pem = |source| TlsError::NotPem { what, path: path.to_owned(), source };
    let found: Vec<T> = T::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(not_pem)?;
    if found.is_empty() {
        return Err(not_pem(pem::Error::NoItemsFound));
    }
    Ok(found)
}

/// Content and permission bits, both of the file that was opened and not of its name. The content may be a
/// private key's, and is overwritten when it is dropped.
fn read_file(what: &'static str, path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), TlsError> {
    let unreadable = |source| TlsError::Unreadable { what, path: path.to_owned(), source };
    // A name that is no plain file must not block in open(2), as a FIFO would.
    let plain = fs::metadata(path).map_err(unreadable)?.is_file();
    let file = plain.then(|| File::open(path)).transpose().map_err(unreadable)?;
    let not_a_file = || TlsError::NotAFile { what, path: path.to_owned() };
    let mut file = file.ok_or_else(not_a_file)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
        return Err(not_a_file());
    }
    // Large enough at once: what grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(metadata.len() as usize + 1));
    file.by_ref().take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(unreadable)?;
    Ok((text, metadata.permissions().mode() & 0o7777))
}

/// The CA certificates that may be trusted now. The verifier treats whatever it is given as a
/// CA and never looks at an anchor's dates, so both are checked here. While one CA replaces
/// another the old one may expire in the file; only a file without a living CA is an error.
fn read_cas(path: &Path, now: OffsetDateTime) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let mut living = Vec::new();
    let mut last_problem = None;
    for ca in read_certificates("CA certificate", path)? {
        let parsed = parse(&ca, path)?;
        if !parsed.is_ca() {
            return Err(TlsError::NotACa { path: path.to_owned() });
        }
        match check_dates(&parsed, path, now) {
            Ok(_) => living.push(ca),
            Err(problem) => last_problem = Some(problem),
        }
    }
    match last_problem {
        Some(problem) if living.is_empty() => Err(problem),
        Some(problem) => {
            tracing::warn!(%problem, "a CA certificate is left out");
            Ok(living)
        }
        None => Ok(living),
    }
}

fn check_own_certificate(
    chain: &[CertificateDer<'_>],
    path: &Path,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, TlsError> {
    let undecodable = || TlsError::Undecodable { path: path.to_owned() };
    let leaf = parse(chain.first().ok_or_else(undecodable)?, path)?;
    let not_after = check_dates(&leaf, path, now)?;
    let usage = leaf.extended_key_usage().map_err(|_| undecodable())?;
    let may_sign = may_sign(&leaf).map_err(|_| undecodable())?;
    let missing = match usage {
        Some(usage) if usage.value.server_auth && usage.value.client_auth && may_sign => {
            return Ok(not_after);
        }
        Some(usage) if usage.value.server_auth && usage.value.client_auth => "the signature of a handshake",
        Some(usage) if usage.value.server_auth => "the client's role",
        _ => "the server's role",
    };
    Err(TlsError::WrongPurpose { path: path.to_owned(), missing })
}

/// Whether the key may sign handshakes, which is all that TLS 1.3 has it do. One of which nothing is said may
/// (RFC 5280, 4.2.1.3; RFC 8446, 4.4.2.2).
/// Errors: the extension is there twice, or cannot be decoded.
pub(super) fn may_sign(cert: &X509Certificate<'_>) -> Result<bool, X509Error> {
    Ok(cert.key_usage()?.is_none_or(|usage| usage.value.digital_signature()))
}

fn check_dates(
    cert: &X509Certificate<'_>,
    path: &Path,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, TlsError> {
    let not_before = cert.validity().not_before.to_datetime();
    let not_after = cert.validity().not_after.to_datetime();
    let path = path.to_owned();
    if now < not_before {
        Err(TlsError::NotYetValid { path, not_before, now })
    } else if now > not_after {
        Err(TlsError::Expired { path, not_after, now })
    } else {
        Ok(not_after)
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>, path: &Path) -> Result<X509Certificate<'a>, TlsError> {
    X509Certificate::from_der(der)
        .map(|(_, cert)| cert)
        .map_err(|_| TlsError::Undecodable { path: path.to_owned() })
}
