//! Certificate files, and the TLS settings that are made of them. They are read when they have changed, so that renewed
//! ones need no restart and the private key is not read for each connection.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, Error, InconsistentKeys, RootCertStore};
use zeroize::Zeroizing;

use super::error::ConnectionError;
use crate::error_chain::chain;
use crate::net::tls::{TlsError, read_certificates, read_key};

/// What is seen of a file without reading it: device, inode, size, change of contents and of anything.
type Seen = (u64, u64, u64, (i64, i64), (i64, i64));
/// What was seen of all files together.
type Stamp = Vec<Option<Seen>>;

/// Certificate files.
#[derive(Debug)]
pub(super) struct Files {
    ca: Option<PathBuf>,
    /// Certificate and key.
    own: Option<(PathBuf, PathBuf)>,
    read: Mutex<Read>,
}

#[derive(Debug, Default)]
struct Read {
    /// What is in use, and what was seen of the files before they were read.
    in_use: Option<(Stamp, Arc<ClientConfig>)>,
    /// What was seen of those that were not taken in its place.
    refused: Option<Stamp>,
}

impl Files {
    pub(super) fn new(ca: Option<PathBuf>, own: Option<(PathBuf, PathBuf)>) -> Self {
        Self { ca, own, read: Mutex::default() }
    }

    /// For a new connection. New files that cannot be used are not taken where there are settings already.
    pub(super) fn settings(&self) -> Result<Arc<ClientConfig>, ConnectionError> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.stamp();
        let in_use = read.in_use.clone();
        if let Some((stamp, settings)) = &in_use
            && (*stamp == now || read.refused.as_ref() == Some(&now))
        {
            return Ok(Arc::clone(settings));
        }
        match (self.settings_anew().map(Arc::new), in_use) {
            (Ok(settings), _) => {
                *read = Read { in_use: Some((now, Arc::clone(&settings))), refused: None };
                Ok(settings)
            }
            (Err(e), Some((_, before))) => {
                let cause = chain(&e);
                tracing::warn!(
                    cause,
                    "files of the witness have changed and are not taken; the old ones stay in use"
                );
                read.refused = Some(now);
                Ok(before)
            }
            (Err(e), None) => Err(e),
        }
    }

    /// Reads them.
    pub(super) fn settings_anew(&self) -> Result<ClientConfig, ConnectionError> {
        let mut roots = RootCertStore::empty();
        if let Some(ca) = &self.ca {
            for certificate in read_certificates("CA certificate of the witness", ca)? {
                roots.add(certificate).map_err(ConnectionError::Settings)?;
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(ConnectionError::Settings)?
            .with_root_certificates(roots);
        let mut settings = match &self.own {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let own = SingleCertAndKey::from(own(cert, key)?);
                builder.with_client_cert_resolver(Arc::new(own))
            }
        };
        settings.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A certificate is judged at each connection.
        settings.resumption = Resumption::disabled();
        Ok(settings)
    }

    fn stamp(&self) -> Stamp {
        let own = self.own.iter().flat_map(|(cert, key)| [cert, key]);
        self.ca.iter().chain(own).map(|file| seen(file)).collect()
    }
}

/// A certificate with its private key, of which no copy is left that is not overwritten when it is dropped, but in the
/// TLS library.
fn own(cert: &Path, key: &Path) -> Result<CertifiedKey, ConnectionError> {
    let certificates = read_certificates("certificate for the witness", cert)?;
    let secret = Zeroizing::new(read_key(key)?);
    let signing = any_supported_type(&secret)
        .map_err(|source| ConnectionError::Key { path: key.to_owned(), source })?;
    let own = CertifiedKey::new(certificates, signing);
    match own.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(own),
        Err(Error::InconsistentKeys(_)) => {
            Err(TlsError::KeyMismatch { cert: cert.to_owned(), key: key.to_owned() }.into())
        }
        Err(source) => Err(ConnectionError::Settings(source)),
    }
}

fn seen(file: &Path) -> Option<Seen> {
    let data = std::fs::metadata(file).ok()?;
    let (contents, anything) = ((data.mtime(), data.mtime_nsec()), (data.ctime(), data.ctime_nsec()));
    Some((data.dev(), data.ino(), data.size(), contents, anything))
}
