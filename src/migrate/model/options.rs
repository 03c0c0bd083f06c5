//! How a migration is to be done, as its operator wants it.

use std::collections::BTreeSet;

use schemars::JsonSchema;

use super::bandwidth::Weight;
use super::disk_choice::{DiskChoice, DisksAtOnce};
use super::in_band::InBand;
use super::incremental::Incremental;
use super::problem::{Accepted, Policy};
use super::sample::DiskSample;
use crate::ranged::read_within;
use crate::rate::Rate;

/// How often a migration that failed is begun again: 0 to [`Retry::MAX`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(into = "u32")]
pub struct Retry(u32);

/// More retries than anybody can mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} retries are too many; at most {max} are made", max = Retry::MAX)]
pub struct RetryTooLarge(u32);

impl Retry {
    /// The most.
    pub const MAX: u32 = 100;

    /// Tries in all, the first included.
    pub fn tries(self) -> u32 {
        self.0 + 1
    }
}

read_within!(Retry: u32, 0, Retry::MAX.into());

impl TryFrom<u32> for Retry {
    type Error = RetryTooLarge;

    fn try_from(retries: u32) -> Result<Self, RetryTooLarge> {
        if retries > Self::MAX { Err(RetryTooLarge(retries)) } else { Ok(Self(retries)) }
    }
}

impl From<Retry> for u32 {
    fn from(retry: Retry) -> Self {
        retry.0
    }
}

/// The longest pause that QEMU may plan for the rest of the RAM, in milliseconds: 0 to
/// [`DowntimeLimit::MAX_MS`], which is QEMU's own limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(into = "u64")]
pub struct DowntimeLimit(u64);

/// QEMU would refuse it, after the disks have been copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a downtime limit of {0} ms is beyond QEMU's limit; the longest is {max} ms", max = DowntimeLimit::MAX_MS)]
pub struct DowntimeLimitError(u64);

impl DowntimeLimit {
    /// The longest, in milliseconds.
    pub const MAX_MS: u64 = 2_000_000;
}

impl Default for DowntimeLimit {
    fn default() -> Self {
        Self(300)
    }
}

read_within!(DowntimeLimit: u64, 0, DowntimeLimit::MAX_MS);

impl TryFrom<u64> for DowntimeLimit {
    type Error = DowntimeLimitError;

    fn try_from(ms: u64) -> Result<Self, DowntimeLimitError> {
        if ms <= Self::MAX_MS { Ok(Self(ms)) } else { Err(DowntimeLimitError(ms)) }
    }
}

impl From<DowntimeLimit> for u64 {
    fn from(limit: DowntimeLimit) -> Self {
        limit.0
    }
}

/// How a migration is to be done.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Leave the source's QEMU, paused for ever, instead of ending it.
    pub keep_source: bool,
    /// Slow the guest down when its RAM changes faster than it can be sent.
    pub auto_converge: bool,
    /// Longest pause that QEMU plans for the rest of the RAM, in milliseconds.
    pub downtime_limit_ms: DowntimeLimit,
    /// Let no write of the guest's wait, also when it writes faster than its disks can be copied.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub never_slow_writes: bool,
    /// How often to begin again after a failure that may pass.
    pub retry: Retry,
    /// Compress what is sent of the disks: for links that are slower than a core compresses.
    pub compress: bool,
    /// Bytes per second that it may send, RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    /// Its part among migrations to the same host.
    pub weight: Weight,
    /// Which disks are copied.
    #[serde(skip_serializing_if = "DiskChoice::is_all")]
    pub disks: DiskChoice,
    /// How many of them are copied whole at the same time; none for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks_at_once: Option<DisksAtOnce>,
    /// Of which of them only the topmost image is copied; none for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incremental: Option<Incremental>,
    /// How much of them is compared on both hosts before the switchover; none for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<DiskSample>,
    /// Disks that the guest cannot write to are compared on both hosts before anything is copied.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub compare_read_only: bool,
    /// Only bring a replica of the disks at the destination into step; the guest stays.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub replicate: bool,
    /// The disks cross inside QEMU's own stream, in this way; none for streams of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_band: Option<InBand>,
    /// They do not, also where a QEMU has no usable NBD: it is refused then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub never_in_band: bool,
    /// Warnings are problems.
    pub strict: bool,
    /// Kinds of problems that do not keep it from going on.
    #[schemars(with = "Vec<Accepted>")]
    pub accept: BTreeSet<Accepted>,
}

impl Options {
    /// What its operator has decided about findings.
    pub fn policy(&self) -> Policy {
        Policy { strict: self.strict, accept: self.accept.clone() }
    }
}
