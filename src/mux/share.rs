//! Shares: what of the session each migration may use, as its operator wants it. Plain data.

use super::SharedLimit;

/// The ordinary weight of a migration.
pub const SHARE_WEIGHT_DEFAULT: u16 = 100;

/// What a migration may send, in this direction. It changes nothing at the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Its part among the migrations that have something to send, in proportion to theirs.
    pub weight: u16,
    /// Over all its streams, in all sessions that are given the same; `None` for no limit.
    pub limit: Option<SharedLimit>,
    /// Its guest stands still: it goes before all others, and its RAM before its disks.
    pub ahead: bool,
}

impl Default for Share {
    fn default() -> Self {
        Self { weight: SHARE_WEIGHT_DEFAULT, limit: None, ahead: false }
    }
}
