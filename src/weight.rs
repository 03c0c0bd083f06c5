//! Weights: parts of what is sent, as operators write them.

use serde::Serialize;

use crate::mux::SHARE_WEIGHT_DEFAULT;
use crate::ranged::read_within;

/// The part of a migration or a forwarding among those that have something to send: 1 to
/// [`Weight::MAX`], ordinarily 100. Twice the weight is twice the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "u16")]
pub struct Weight(u16);

/// No weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no weight; write 1 to {max}, 100 being ordinary", max = Weight::MAX)]
pub struct WeightError(u16);

impl Weight {
    /// The largest.
    pub const MAX: u16 = 1000;
}

read_within!(Weight: u16, 1, Weight::MAX.into());

impl Default for Weight {
    fn default() -> Self {
        Self(SHARE_WEIGHT_DEFAULT)
    }
}

impl TryFrom<u16> for Weight {
    type Error = WeightError;

    fn try_from(weight: u16) -> Result<Self, WeightError> {
        if (1..=Self::MAX).contains(&weight) { Ok(Self(weight)) } else { Err(WeightError(weight)) }
    }
}

impl From<Weight> for u16 {
    fn from(weight: Weight) -> Self {
        weight.0
    }
}
