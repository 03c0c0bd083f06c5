//! Amounts of bytes as people write them.

use std::fmt;

use bytesize::ByteSize;
use serde::Deserialize;

/// Bytes. As text: a number with `K`, `M`, `G`, `T` (powers of 1000) or `Ki`, `Mi`, `Gi`, `Ti` (of 1024), with or
/// without `B`: `2TiB`, `500G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(u64);

/// Not an amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no size; write bytes, as in 2TiB or 500G")]
pub struct SizeError(String);

impl Size {
    /// The bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl TryFrom<String> for Size {
    type Error = SizeError;

    fn try_from(text: String) -> Result<Self, SizeError> {
        let parsed = text.trim().parse::<ByteSize>();
        parsed.map(|size| Self(size.as_u64())).map_err(|_| SizeError(text))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", ByteSize(self.0).display().iec())
    }
}
