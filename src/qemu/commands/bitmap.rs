//! Dirty bitmaps: which parts of a disk were written since.
//!
//! A bit is set when a write is over, whether it succeeded or not, in every enabled bitmap of the
//! node at once. So a bitmap that is added before another is disabled leaves no gap between them.

use super::{Empty, commands};
use serde::{Deserialize, Serialize};

commands! {
    BlockDirtyBitmapAdd = "block-dirty-bitmap-add" -> Empty;
    BlockDirtyBitmapDisable = "block-dirty-bitmap-disable" -> Empty;
    BlockDirtyBitmapMerge = "block-dirty-bitmap-merge" -> Empty;
    BlockDirtyBitmapRemove = "block-dirty-bitmap-remove" -> Empty;
}

/// Adds an empty bitmap that records from now on and is never stored in the image.
#[derive(Debug, Clone, Serialize)]
pub struct BlockDirtyBitmapAdd {
    pub node: String,
    /// The bitmap's name, unique on the node.
    pub name: String,
    /// Bytes per bit, a power of two.
    pub granularity: u32,
}

/// Records no longer; what it holds it keeps.
#[derive(Debug, Clone, Serialize)]
pub struct BlockDirtyBitmapDisable {
    pub node: String,
    pub name: String,
}

/// Adds what some bitmaps of the node hold to another of them.
#[derive(Debug, Clone, Serialize)]
pub struct BlockDirtyBitmapMerge {
    pub node: String,
    pub target: String,
    /// The others; they stay as they are.
    pub bitmaps: Vec<String>,
}

/// Removes a bitmap that nothing uses.
#[derive(Debug, Clone, Serialize)]
pub struct BlockDirtyBitmapRemove {
    pub node: String,
    pub name: String,
}

/// A bitmap as `query-block` shows it with its node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockDirtyInfo {
    /// Its name; anonymous ones belong to jobs.
    #[serde(default)]
    pub name: String,
    /// Bytes that it holds dirty.
    pub count: u64,
    pub granularity: u64,
    /// It records what the guest writes.
    #[serde(default)]
    pub recording: bool,
    /// Something uses it, so it can be neither changed nor removed.
    #[serde(default)]
    pub busy: bool,
    /// It is stored in the image when that is closed.
    #[serde(default)]
    pub persistent: bool,
    /// It was not stored when its image was closed, and is worthless.
    #[serde(default)]
    pub inconsistent: bool,
}
