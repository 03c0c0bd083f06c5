//! How a guest's writes to a disk are made slower.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a guest's writes to a disk are made slower, so that its copy comes to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Slowed {
    /// Each write waits until the destination has it as well.
    WriteBlocking,
    /// It may write only so much in a second.
    Throttled,
}

impl Slowed {
    pub const ALL: [Self; 2] = [Self::WriteBlocking, Self::Throttled];

    /// A bounded label.
    pub fn name(self) -> &'static str {
        match self {
            Self::WriteBlocking => "write-blocking",
            Self::Throttled => "throttled",
        }
    }

    /// For people, after the disk.
    pub fn words(self) -> &'static str {
        match self {
            Self::WriteBlocking => "the guest's writes wait for the destination",
            Self::Throttled => "the guest's writes are limited",
        }
    }
}
