//! The files of the destination's images, and how a try has left them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk and the files of its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) disk: String,
    #[serde(default)]
    pub(crate) files: Vec<ImageFile>,
    /// Why these are not all of them.
    #[serde(default = "not_noted")]
    pub(crate) doubt: Option<String>,
}

/// A file that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageFile {
    pub(crate) path: PathBuf,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// An image that was noted by an agent of an earlier version.
#[allow(clippy::unnecessary_wraps, reason = "the default of an optional field")]
fn not_noted() -> Option<String> {
    Some("the destination's agent did not note which files its image has".into())
}

/// All of a destination's disks, when a try was over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    /// Of the host, at that time.
    pub(crate) boot_id: String,
    /// The disks that could be seen.
    pub(crate) files: Vec<FileStamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileStamp {
    pub(crate) disk: String,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) bytes: u64,
    pub(crate) written_s: i64,
    pub(crate) written_ns: i64,
}

impl FileStamp {
    pub(crate) fn of(disk: &str, file: &Metadata) -> Self {
        Self {
            disk: disk.to_owned(),
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            written_s: file.mtime(),
            written_ns: file.mtime_nsec(),
        }
    }

    /// Whether it is this file, as it is now.
    pub(crate) fn is_of(&self, file: &Metadata) -> bool {
        *self == Self::of(&self.disk, file)
    }
}
