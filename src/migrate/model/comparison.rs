//! How far the comparison of both sides' disks (`--verify`) has come, and what it found.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The comparison of both sides' disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Comparison {
    /// What is compared, in bytes: all of the disks that are copied, or a sample.
    pub of_bytes: u64,
    /// Of that, known to be equal on both hosts.
    pub equal_bytes: u64,
    /// Known to differ.
    pub different_bytes: u64,
    /// What the guest has written after the last comparison, at most; known at the switchover.
    pub written_bytes: Option<u64>,
    /// What both hosts have hashed, each part as often as it was.
    pub hashed_bytes: u64,
    /// How long it took.
    pub elapsed_ms: u64,
}

impl Comparison {
    /// What is known at the switchover.
    pub(crate) fn in_words(&self) -> String {
        let Self { of_bytes, equal_bytes, written_bytes, .. } = *self;
        let unknown = of_bytes.saturating_sub(equal_bytes);
        let left_alone = match unknown {
            0 => String::new(),
            bytes => format!("; {} were written again too soon to be compared", kib(bytes)),
        };
        let since = match written_bytes {
            Some(0) => "; the guest wrote nothing after that".to_owned(),
            Some(bytes) => {
                format!("; up to {}, written after that, were copied and not compared", kib(bytes))
            }
            None => "; how much the guest wrote after that is not known".to_owned(),
        };
        format!(
            "compared: {} of {} are equal on both hosts{left_alone}{since}",
            kib(equal_bytes),
            kib(of_bytes)
        )
    }
}

fn kib(bytes: u64) -> String {
    if bytes < 10 << 20 { format!("{} KiB", bytes.div_ceil(1024)) } else { format!("{} MiB", bytes >> 20) }
}
