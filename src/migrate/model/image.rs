//! The files of the destination's images, and how a try has left them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk and the files of its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(in crate::migrate) disk: String,
    #[serde(default)]
    pub(in crate::migrate) files: Vec<ImageFile>,
    /// Why these are not all of them.
    #[serde(default = "not_noted")]
    pub(in crate::migrate) doubt: Option<String>,
}

/// A file that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::migrate) struct ImageFile {
    pub(in crate::migrate) path: PathBuf,
    pub(in crate::migrate) device: u64,
    pub(in crate::migrate) inode: u64,
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
    pub(in crate::migrate) boot_id: String,
    /// The disks that could be seen.
    pub(in crate::migrate) files: Vec<FileStamp>,
}

/// One image file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::migrate) struct FileStamp {
    pub(in crate::migrate) disk: String,
    pub(in crate::migrate) device: u64,
    pub(in crate::migrate) inode: u64,
    pub(in crate::migrate) bytes: u64,
    pub(in crate::migrate) written_s: i64,
    pub(in crate::migrate) written_ns: i64,
}
