//! A migration as programs and people see it, and how one is asked for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Comparison, Disk, Downtime, HeldUp, Options, Outcome, Phase, Ram, Reconnecting, Role, Tries, Whole, Wish,
};
use crate::migrate::progress::Progress;

/// What is to be moved, and how: `POST /v1/migrations`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The virtual machine, `[vm.NAME]` on both hosts.
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    #[serde(default)]
    pub options: Options,
}

/// A migration at one moment, as this host sees it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Migration {
    /// Its identity on both hosts.
    pub id: Uuid,
    pub vm: String,
    /// This host's part.
    pub role: Role,
    /// The other host, as its certificate names it.
    pub peer: String,
    /// This host, as its certificate names it.
    #[serde(default)]
    pub host: String,
    /// Where it is.
    pub phase: Phase,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Milliseconds since the beginning; stands still at the end.
    pub elapsed_ms: u64,
    /// The disks that are copied. At the destination their figures are the bytes that have come, until the source says at
    /// the end what it has measured.
    pub disks: Vec<Disk>,
    /// Its RAM, once that is on its way.
    pub ram: Option<Ram>,
    /// Set while the session has no connection.
    #[serde(default)]
    pub reconnecting: Option<Reconnecting>,
    /// Set while the source's QEMU does not answer: what is waited for, in words.
    #[serde(default)]
    pub slow: Option<String>,
    /// Bytes per second over all streams, over about the last second.
    pub rate_bytes_per_s: u64,
    /// Why its copying is not faster, by what was measured lately. None where nothing was measured, as at the destination,
    /// and where nothing is copied.
    #[serde(default)]
    pub held_up_by: Option<HeldUp>,
    /// The whole of it, over all tries, where this host is its source.
    #[serde(default)]
    pub whole: Option<Whole>,
    /// Set when it is begun again after a failure.
    #[serde(default)]
    pub tries: Option<Tries>,
    /// Set when its disks are compared.
    #[serde(default)]
    pub comparison: Option<Comparison>,
    /// What it may send, where this host is its source.
    #[serde(default)]
    pub share: Option<Wish>,
    /// Somebody has paused the guest: it stays so where it ends up.
    #[serde(default)]
    pub paused: bool,
    /// Known at the end.
    pub downtime: Option<Downtime>,
    /// What an operator should know although it did not fail.
    pub notes: Vec<String>,
    /// Set at the end.
    pub outcome: Option<Outcome>,
}

impl Migration {
    /// What `host` knows of it.
    pub fn new(known: Progress, host: &str) -> Self {
        Self {
            id: known.id,
            vm: known.vm,
            role: known.role,
            peer: known.peer,
            host: host.into(),
            phase: known.phase,
            began_at: known.began_at,
            elapsed_ms: known.elapsed_ms,
            disks: known.disks,
            ram: known.ram,
            reconnecting: known.reconnecting,
            slow: known.slow,
            rate_bytes_per_s: known.rate_bytes_per_s,
            held_up_by: known.held_up_by,
            whole: known.whole,
            tries: known.tries,
            comparison: known.comparison,
            share: known.share,
            paused: known.paused,
            downtime: known.downtime,
            notes: known.notes,
            outcome: known.outcome,
        }
    }

    /// Whether nothing more will be heard of it.
    pub fn is_over(&self) -> bool {
        self.outcome.as_ref().is_some_and(|outcome| !matches!(outcome, Outcome::Undecided { .. }))
    }

    /// Bytes on all streams of all tries, both directions.
    pub fn stream_bytes(&self) -> u64 {
        self.tries.as_ref().map_or(0, |t| t.earlier_stream_bytes)
            + self.disks.iter().map(|d| d.stream_bytes).sum::<u64>()
            + self.ram.as_ref().map_or(0, |r| r.stream_bytes)
    }
}
