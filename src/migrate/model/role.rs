//! Which part a host plays in a migration.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which part this host plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The guest comes from here.
    Source,
    Destination,
}

impl Role {
    /// As shown to people and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}
