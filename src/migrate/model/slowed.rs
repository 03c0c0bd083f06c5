//! How a guest's writes to a disk are made slower.

use serde::{Deserialize, Serialize};

/// How a guest's writes to a disk are made slower, so that its copy comes to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slowed {
    /// Each write waits until the destination has it as well.
    WriteBlocking,
}

impl Slowed {
    pub const ALL: [Self; 1] = [Self::WriteBlocking];

    /// A bounded label.
    pub fn name(self) -> &'static str {
        match self {
            Self::WriteBlocking => "write-blocking",
        }
    }

    /// For people, after the disk.
    pub fn words(self) -> &'static str {
        match self {
            Self::WriteBlocking => "the guest's writes wait for the destination",
        }
    }
}
