//! A host's own files as an agent reads them: written beside each other first, judged, and then put in their places.

use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::error::PkiError;
use super::files::{self, PRIVATE, PUBLIC};
use crate::net::credentials::TlsPaths;
use crate::net::tls::{Aead, Tls, TlsError};

/// All that there may be.
const NAMES: [&str; 4] = ["ca-cert.pem", "cert.pem", "key.pem", "crl.pem"];

/// A folder that may take a host's files.
pub struct HostFiles {
    dir: PathBuf,
}

/// Files that are not in their places yet; dropped, they are gone.
pub struct Staged {
    dir: PathBuf,
    folder: PathBuf,
    names: Vec<&'static str>,
}

impl HostFiles {
    /// Creates the folder if it is not there.
    /// Errors: `Exists` without `force` if there is a key or a certificate.
    pub fn in_folder(dir: &Path, force: bool) -> Result<Self, PkiError> {
        if !force {
            for name in ["key.pem", "cert.pem"] {
                files::must_not_exist(
                    &dir.join(name),
                    "add --force to replace this host's key and certificate",
                )?;
            }
        }
        files::create_private_dir(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Writes those that are not empty into a folder of their own.
    pub fn stage(&self, contents: &[(&'static str, &str)]) -> Result<Staged, PkiError> {
        let folder = files::beside(&self.dir.join("joining"))?;
        files::create_private_dir(&folder)?;
        let mut staged = Staged { dir: self.dir.clone(), folder, names: Vec::new() };
        for (name, content) in contents.iter().filter(|(_, content)| !content.is_empty()) {
            let mode = if *name == "key.pem" { PRIVATE } else { PUBLIC };
            files::write_new(&staged.path(name), content.as_bytes(), mode, "try again")?;
            staged.names.push(name);
        }
        Ok(staged)
    }
}

impl Staged {
    /// Where a file is as long as it is not in its place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether an agent would start with them.
    /// Errors: why it would not.
    pub fn load(&self, with_list: bool) -> Result<(), TlsError> {
        self.tls(with_list).map(drop)
    }

    fn tls(&self, with_list: bool) -> Result<Tls, TlsError> {
        let [ca, cert, key, crl] = NAMES.map(|name| self.path(name));
        Tls::load(&TlsPaths { ca, cert, key, crl: with_list.then_some(crl) }, Aead::Auto)
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> Result<OffsetDateTime, PkiError> {
        let found = super::report::inspect(&self.dir.join("cert.pem"))?;
        let first = found.first().map(|report| report.not_after);
        let path = self.dir.join("cert.pem");
        first.ok_or(PkiError::Damaged { path, problem: "its certificate can't be decoded" })
    }

    /// Puts them in their places, the key first: an agent that reads meanwhile goes on with the old ones, as they do
    /// not fit together.
    pub fn publish(&self) -> Result<Vec<PathBuf>, PkiError> {
        let mut names = self.names.clone();
        names.sort_by_key(|name| (*name != "key.pem", *name));
        let mut placed = Vec::new();
        for name in names {
            let (from, to) = (self.path(name), self.dir.join(name));
            std::fs::rename(&from, &to).map_err(files::at("replace", &to))?;
            files::sync_parent(&to)?;
            placed.push(to);
        }
        Ok(placed)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for name in NAMES {
            let _ = std::fs::remove_file(self.path(name));
        }
        let _ = std::fs::remove_dir(&self.folder);
    }
}
