//! What a migration may send, as its operator wants it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rate::Rate;
pub use crate::weight::{Weight, WeightError};

/// What an operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wish {
    /// Bytes per second over RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    /// Its part among the migrations to the same host.
    pub weight: Weight,
}
