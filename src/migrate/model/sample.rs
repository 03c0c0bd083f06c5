//! How much of the disks is compared before the switchover. Pure.

use std::str::FromStr;

use serde::Serialize;

use crate::ranged::read_within;

/// A part of each disk in percent: 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "u32")]
pub struct DiskSample(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("how much is compared is 1% to 100%")]
pub struct DiskSampleError;

impl DiskSample {
    pub fn all() -> Self {
        Self(100)
    }

    pub fn percent(self) -> u32 {
        self.0
    }

    pub fn is_all(self) -> bool {
        self.0 == 100
    }
}

read_within!(DiskSample: u32, 1, 100);

impl TryFrom<u32> for DiskSample {
    type Error = DiskSampleError;

    fn try_from(percent: u32) -> Result<Self, DiskSampleError> {
        if (1..=100).contains(&percent) { Ok(Self(percent)) } else { Err(DiskSampleError) }
    }
}

impl From<DiskSample> for u32 {
    fn from(sample: DiskSample) -> Self {
        sample.0
    }
}

impl FromStr for DiskSample {
    type Err = DiskSampleError;

    fn from_str(text: &str) -> Result<Self, DiskSampleError> {
        let percent: u32 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| DiskSampleError)?;
        percent.try_into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_percentage() {
        assert_eq!("10%".parse::<DiskSample>().unwrap().percent(), 10);
        assert!("100".parse::<DiskSample>().unwrap().is_all());
        for wrong in ["0%", "101%", "", "%", "-1%", "1.5%", "ten"] {
            assert!(wrong.parse::<DiskSample>().is_err(), "{wrong}");
        }
    }
}
