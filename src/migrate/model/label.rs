//! What a data stream carries.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a stream carries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Label {
    Disk(String),
    Ram,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(name) => write!(f, "disk {name}"),
            Self::Ram => f.write_str("RAM"),
        }
    }
}
