//! `[drain]`: how many VMs leave this host at once when it is emptied.

use serde::Deserialize;

/// More at once than anybody can mean.
const AT_ONCE_MAX: usize = 64;

/// The most; a drain may ask for fewer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrainConfig {
    /// From this host.
    pub at_once: usize,
    /// To each peer.
    pub at_once_per_peer: usize,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { at_once: 4, at_once_per_peer: 2 }
    }
}

impl DrainConfig {
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        for (key, number) in [("at_once", self.at_once), ("at_once_per_peer", self.at_once_per_peer)] {
            if !(1..=AT_ONCE_MAX).contains(&number) {
                return Err((format!("drain.{key}"), format!("{number} is outside 1–{AT_ONCE_MAX}")));
            }
        }
        Ok(())
    }
}
