//! Rates: what may be sent in a second, as people and programs write it.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, Serialize};

use crate::ranged::read_within;

/// Bytes per second, at least [`Rate::MIN`].
///
/// As text: a number with `K`, `M`, `G`, `T` (powers of 1000) or `Ki`, `Mi`, `Gi`, `Ti` (of 1024),
/// with or without `B` and `/s`: `100MiB/s`, `1G`, `2500000`. In JSON: the number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "u64")]
pub struct Rate(NonZeroU64);

/// Why a rate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    #[error("\"{0}\" is no rate; write bytes per second, as in 100MiB/s or 1G")]
    Text(String),
    /// So slow that a migration would seem to stand still.
    #[error("{0} bytes per second are too few; the least is 64KiB/s")]
    TooSmall(u64),
}

impl Rate {
    /// The least: a full frame four times a second.
    pub const MIN: u64 = 64 * 1024;

    /// Bytes per second.
    pub fn get(self) -> NonZeroU64 {
        self.0
    }
}

read_within!(Rate: u64, Rate::MIN, u64::MAX);

impl TryFrom<u64> for Rate {
    type Error = RateError;

    fn try_from(bytes_per_s: u64) -> Result<Self, RateError> {
        let enough = NonZeroU64::new(bytes_per_s).filter(|rate| rate.get() >= Self::MIN);
        enough.map(Self).ok_or(RateError::TooSmall(bytes_per_s))
    }
}

impl From<Rate> for u64 {
    fn from(rate: Rate) -> Self {
        rate.0.get()
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let size = text.trim().trim_end_matches("/s").trim_end();
        let bytes = size.parse::<ByteSize>().map_err(|_| RateError::Text(text.into()))?;
        bytes.as_u64().try_into()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", ByteSize(self.0.get()).display().iec())
    }
}

/// A rate written as text in a configuration; for `deserialize_with`.
pub fn from_text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Rate>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rates_as_people_write_them() {
        for (text, bytes) in [
            ("100MiB/s", 100 << 20),
            ("100Mi", 100 << 20),
            ("1G", 1_000_000_000),
            ("1.5 GB/s", 1_500_000_000),
            ("65536", 65_536),
        ] {
            assert_eq!(text.parse::<Rate>().map(u64::from), Ok(bytes), "{text}");
        }
        for text in ["", "fast", "-1M", "10 apples", "/s"] {
            assert_eq!(text.parse::<Rate>(), Err(RateError::Text(text.into())));
        }
        assert_eq!("10K".parse::<Rate>(), Err(RateError::TooSmall(10_000)));
        assert_eq!("0".parse::<Rate>(), Err(RateError::TooSmall(0)));
        assert_eq!("100MiB".parse::<Rate>().unwrap().to_string(), "100.0 MiB/s");
    }
}
