//! Writing files that must never be half there, overwritten by accident, or readable by
//! others for a moment. Must not know what a certificate is.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::error::PkiError;

/// Permission bits of a private key.
pub(super) const PRIVATE: u32 = 0o600;
/// Permission bits of what everybody may read.
pub(super) const PUBLIC: u32 = 0o644;

/// Largest text file that is read back, in bytes.
const TEXT_BYTES_MAX: u64 = 1024 * 1024;

/// One name in a folder that is published whole.
pub(super) enum Entry {
    File { name: &'static str, content: Vec<u8>, mode: u32 },
    Link { name: &'static str, target: &'static str },
}

impl Entry {
    pub(super) fn file(name: &'static str, content: &[u8], mode: u32) -> Self {
        let content = content.to_vec();
        Self::File { name, content, mode }
    }

    pub(super) fn link(name: &'static str, target: &'static str) -> Self {
        Self::Link { name, target }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::File { name, .. } | Self::Link { name, .. } => name,
        }
    }

    fn write(&self, dir: &Path) -> Result<(), PkiError> {
        match self {
            Self::File { name, content, mode } => write_here(&dir.join(name), content, *mode),
            Self::Link { name, target } => {
                let path = dir.join(name);
                symlink(target, &path).map_err(at("create", &path))
            }
        }
    }
}

pub(super) fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PkiError + 'a {
    move |source| PkiError::Io { action, path: path.to_owned(), source }
}

/// A dangling link is in the way as well.
pub(super) fn must_not_exist(path: &Path, remedy: &'static str) -> Result<(), PkiError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(at("look at", path)(e)),
        Ok(_) => Err(PkiError::Exists { path: path.to_owned(), remedy }),
    }
}

/// Creates what is missing of the path with mode 0700; what is there stays as it is.
pub(super) fn create_private_dir(dir: &Path) -> Result<(), PkiError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(dir).map_err(at("create the folder", dir))
}

pub(super) fn read_text(path: &Path) -> Result<String, PkiError> {
    let size = fs::metadata(path).map_err(at("read", path))?.len();
    if size > TEXT_BYTES_MAX {
        return Err(PkiError::Damaged { path: path.to_owned(), problem: "it is far too large" });
    }
    fs::read_to_string(path).map_err(at("read", path))
}

/// The PEM blocks of a text, each with its line end; what stands between them is left out.
pub(super) fn blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        if line.starts_with("-----BEGIN ") {
            open = Some(String::new());
        }
        if let Some(block) = &mut open {
            block.push_str(line);
            block.push('\n');
        }
        if line.starts_with("-----END ") {
            blocks.extend(open.take());
        }
    }
    blocks
}

/// Writes a file that must not be there yet. It appears whole or not at all, and of two
/// writers one fails.
pub(super) fn write_new(
    path: &Path,
    content: &[u8],
    mode: u32,
    remedy: &'static str,
) -> Result<(), PkiError> {
    let temporary = beside(path)?;
    let written = write_here(&temporary, content, mode).and_then(|()| {
        fs::hard_link(&temporary, path).map_err(|source| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                let path = path.to_owned();
                PkiError::Exists { path, remedy }
            } else {
                at("create", path)(source)
            }
        })
    });
    // Gone on success as well: the file has its own name now.
    let _ = fs::remove_file(&temporary);
    written.and_then(|()| sync_parent(path))
}

/// Writes or replaces a file, at once.
pub(super) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    let temporary = beside(path)?;
    let written = write_here(&temporary, content, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(at("replace", path)));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_parent(path))
}

/// Makes a folder (0700) with these entries appear at once; with `force` it takes the place
/// of an older one at once, and the older one's entries of the same names are deleted.
/// Returns the older folder's new place if something unknown lay in it.
pub(super) fn publish_dir(
    target: &Path,
    entries: &[Entry],
    force: bool,
) -> Result<Option<PathBuf>, PkiError> {
    let staged = beside(target)?;
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder.create(&staged).map_err(at("create", &staged))?;
    let published = fill(&staged, entries).and_then(|()| swap_in(&staged, target, force));
    let replaced = match published {
        Ok(replaced) => replaced,
        Err(error) => {
            remove_known(&staged, entries);
            return Err(error);
        }
    };
    sync_parent(target)?;
    if replaced && !remove_known(&staged, entries) {
        return Ok(Some(staged));
    }
    Ok(None)
}

fn fill(dir: &Path, entries: &[Entry]) -> Result<(), PkiError> {
    for entry in entries {
        entry.write(dir)?;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(at("write", dir))
}

/// True if an older folder stands in `staged`'s place afterwards.
fn swap_in(staged: &Path, target: &Path, force: bool) -> Result<bool, PkiError> {
    let rename = |flags| renameat2(AT_FDCWD, staged, AT_FDCWD, target, flags);
    match rename(RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(false),
        Err(nix::Error::EEXIST) if force => {
            rename(RenameFlags::RENAME_EXCHANGE).map(|()| true).map_err(|e| at("replace", target)(e.into()))
        }
        Err(nix::Error::EEXIST) => Err(PkiError::Exists {
            path: target.to_owned(),
            remedy: "add --force to renew it with a new key",
        }),
        Err(e) => Err(at("create", target)(e.into())),
    }
}

/// Deletes our entries and then the folder; false if something else is in it.
fn remove_known(dir: &Path, entries: &[Entry]) -> bool {
    for entry in entries {
        let _ = fs::remove_file(dir.join(entry.name()));
    }
    fs::remove_dir(dir).is_ok()
}

/// Creates a file that has its final mode from the first moment on, and is on disk at the end.
fn write_here(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        // The umask may have taken away what others should have, such as reading a certificate.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(at("write", path))
}

pub(super) fn sync_parent(path: &Path) -> Result<(), PkiError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    File::open(dir).and_then(|d| d.sync_all()).map_err(at("write", dir))
}

/// A name beside `path` that nobody else uses.
pub(super) fn beside(path: &Path) -> Result<PathBuf, PkiError> {
    let random = getrandom::u64().map_err(|e| PkiError::Random(io::Error::other(e)))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(path.with_file_name(format!(".{name}.{random:016x}")))
}
