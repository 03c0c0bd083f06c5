//! Of which disks only the topmost image is copied. Pure.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Of which disks only the topmost image is copied: the destination has what it stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Incremental {
    /// Of all that stand on something. The others are copied whole.
    All,
    Only(#[schemars(with = "Vec<String>")] BTreeSet<String>),
}

impl Incremental {
    pub(crate) fn takes(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
        }
    }

    /// The disks that are named one by one.
    pub(crate) fn named(&self) -> impl Iterator<Item = &str> {
        let names = match self {
            Self::All => None,
            Self::Only(names) => Some(names),
        };
        names.into_iter().flatten().map(String::as_str)
    }
}
