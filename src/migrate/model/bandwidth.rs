//! What a migration may send, as its operator wants it.

use serde::{Deserialize, Serialize};

use crate::rate::Rate;
pub use crate::weight::{Weight, WeightError};

/// What an operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Bytes per second over RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    pub weight: Weight,
}
