//! How disks cross inside QEMU's own stream, by QEMU's words for it. Pure.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The old way of QEMU, up to 9.0: blocks of the disks between those of the RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InBand {
    /// All of each disk.
    Blk,
    /// Of each disk what lies above its backing file, which the destination has already.
    Inc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("disks go in band as `blk` or as `inc`")]
pub struct InBandError;

impl InBand {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Inc => "inc",
        }
    }
}

impl FromStr for InBand {
    type Err = InBandError;

    fn from_str(text: &str) -> Result<Self, InBandError> {
        [Self::Blk, Self::Inc].into_iter().find(|way| way.name() == text).ok_or(InBandError)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_qemus() {
        for way in [InBand::Blk, InBand::Inc] {
            assert_eq!(way.name().parse::<InBand>().unwrap(), way);
            assert_eq!(serde_json::to_value(way).unwrap(), way.name());
        }
        assert!("all".parse::<InBand>().is_err());
    }
}
