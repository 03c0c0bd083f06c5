//! What is left when a migration has ended, and should not be.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that is left. To programs and people it is its words; whoever cleans up later decides on the kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
#[schemars(inline)]
pub enum Leftover {
    /// The guest, which should run here and was not seen to.
    Guest(String),
    Other(String),
}

impl From<String> for Leftover {
    fn from(words: String) -> Self {
        Self::Other(words)
    }
}

impl From<Leftover> for String {
    fn from(leftover: Leftover) -> Self {
        match leftover {
            Leftover::Guest(words) | Leftover::Other(words) => words,
        }
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Guest(words) | Self::Other(words)) = self;
        f.write_str(words)
    }
}

/// The same in words.
pub(crate) fn words(leftovers: Vec<Leftover>) -> Vec<String> {
    leftovers.into_iter().map(String::from).collect()
}
