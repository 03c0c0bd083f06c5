//! A migration as programs and people see it, and how one is asked for.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Problem;
use super::{Accepted, DowntimeLimit, Phase, Rate, Retry, Role, Weight};
use crate::migrate::{bandwidth, progress};

/// `POST /v1/migrations`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    #[serde(default)]
    pub options: Options,
}

/// How a migration is to be done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Leave the source's QEMU, paused for ever, instead of ending it.
    pub keep_source: bool,
    /// Slow the guest down when its RAM changes faster than it can be sent.
    pub auto_converge: bool,
    /// Longest pause that QEMU plans for the rest of the RAM, in milliseconds.
    pub downtime_limit_ms: DowntimeLimit,
    /// How often to begin again after a failure that may pass.
    pub retry: Retry,
    /// Compress what is sent of the disks.
    pub compress: bool,
    /// Bytes per second that it may send, RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    /// Its part among migrations to the same host.
    pub weight: Weight,
    pub strict: bool,
    /// Kinds of problems that do not keep it from going on.
    pub accept: BTreeSet<Accepted>,
}

impl From<Options> for crate::migrate::Options {
    fn from(options: Options) -> Self {
        Self {
            keep_source: options.keep_source,
            auto_converge: options.auto_converge,
            downtime_limit_ms: options.downtime_limit_ms,
            retry: options.retry,
            compress: options.compress,
            limit_bytes_per_s: options.limit_bytes_per_s,
            weight: options.weight,
            strict: options.strict,
            accept: options.accept,
        }
    }
}

/// A migration at one moment, as this host sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Migration {
    /// Its identity on both hosts.
    pub id: Uuid,
    pub vm: String,
    pub role: Role,
    /// The other host, as its certificate names it.
    pub peer: String,
    /// This host, as its certificate names it.
    #[serde(default)]
    pub host: String,
    pub phase: Phase,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Milliseconds since the beginning; stands still at the end.
    pub elapsed_ms: u64,
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
    /// Set when it is begun again after a failure.
    #[serde(default)]
    pub tries: Option<Tries>,
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
    pub fn new(known: progress::Progress, host: &str) -> Self {
        Self {
            id: known.id,
            vm: known.vm,
            role: known.role,
            peer: known.peer,
            host: host.into(),
            phase: known.phase,
            began_at: known.began_at,
            elapsed_ms: known.elapsed_ms,
            disks: known.disks.into_iter().map(Disk::from).collect(),
            ram: known.ram.map(Ram::from),
            reconnecting: known.reconnecting.map(Reconnecting::from),
            slow: known.slow,
            rate_bytes_per_s: known.rate_bytes_per_s,
            tries: known.tries.map(Tries::from),
            share: known.share.map(Wish::from),
            paused: known.paused,
            downtime: known.downtime.map(Downtime::from),
            notes: known.notes,
            outcome: known.outcome.map(Outcome::from),
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

/// One disk's copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    /// Its name on both hosts.
    pub name: String,
    /// Bytes to copy so far known; grows while the guest writes.
    pub total_bytes: u64,
    pub done_bytes: u64,
    /// Whether the mirror follows the guest's writes.
    pub ready: bool,
    /// Bytes on the disk's stream, both directions.
    pub stream_bytes: u64,
    /// Bytes that compression has kept off it.
    #[serde(default)]
    pub saved_bytes: u64,
}

impl From<progress::DiskProgress> for Disk {
    fn from(disk: progress::DiskProgress) -> Self {
        let progress::DiskProgress { name, total_bytes, done_bytes, ready, stream_bytes, saved_bytes } = disk;
        Self { name, total_bytes, done_bytes, ready, stream_bytes, saved_bytes }
    }
}

/// The RAM's copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ram {
    /// The guest's RAM in bytes.
    pub total_bytes: u64,
    /// Bytes not yet copied, or dirtied again.
    pub remaining_bytes: u64,
    /// Bytes on the RAM stream, both directions.
    pub stream_bytes: u64,
    pub passes: u64,
}

impl From<progress::RamProgress> for Ram {
    fn from(ram: progress::RamProgress) -> Self {
        let progress::RamProgress { total_bytes, remaining_bytes, stream_bytes, passes } = ram;
        Self { total_bytes, remaining_bytes, stream_bytes, passes }
    }
}

/// The tries of a migration that may be begun again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tries {
    /// The try that is under way, or waited for; counted from one.
    pub number: u32,
    /// How many there may be.
    pub of: u32,
    /// What this try is called in journals and at the destination, or the last one was.
    pub migration: Uuid,
    /// Milliseconds until it begins; none when it has begun.
    pub next_in_ms: Option<u64>,
    /// Why the last one failed.
    pub last_failure: Option<String>,
    /// Bytes on the streams of those before this one, both directions.
    pub earlier_stream_bytes: u64,
}

impl From<progress::Tries> for Tries {
    fn from(tries: progress::Tries) -> Self {
        let progress::Tries { number, of, migration, next_in_ms, last_failure, earlier_stream_bytes } = tries;
        Self { number, of, migration, next_in_ms, last_failure, earlier_stream_bytes }
    }
}

/// What a migration may send.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Wish {
    /// Bytes per second over RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    pub weight: Weight,
}

impl From<bandwidth::Wish> for Wish {
    fn from(bandwidth::Wish { limit_bytes_per_s, weight }: bandwidth::Wish) -> Self {
        Self { limit_bytes_per_s, weight }
    }
}

/// How long the guest stood still, and on what. Milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Downtime {
    /// From the source's pause to the word that the guest runs at the destination.
    pub total_ms: u64,
    /// Finishing the mirrors and closing the exports.
    pub disks_ms: u64,
    /// The rest of the RAM and the devices' state.
    pub device_ms: u64,
    /// The journal, the word to the destination and the guest's start there.
    pub start_ms: u64,
    /// Of that, the destination's `before_start` command.
    pub hook_ms: Option<u64>,
}

impl From<progress::Downtime> for Downtime {
    fn from(downtime: progress::Downtime) -> Self {
        let progress::Downtime { total_ms, disks_ms, device_ms, start_ms, hook_ms } = downtime;
        Self { total_ms, disks_ms, device_ms, start_ms, hook_ms }
    }
}

/// A connection that was lost and is waited for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reconnecting {
    /// For how long already, in seconds.
    pub for_s: u64,
    /// For how long at most.
    pub of_s: u64,
    pub cause: String,
}

impl From<progress::Reconnecting> for Reconnecting {
    fn from(progress::Reconnecting { for_s, of_s, cause }: progress::Reconnecting) -> Self {
        Self { for_s, of_s, cause }
    }
}

/// How a migration ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Outcome {
    /// The guest is at the destination.
    Moved {
        /// What is left to clean up by hand; mostly nothing.
        leftovers: Vec<String>,
    },
    /// The guest is where it was.
    Failed {
        phase: Phase,
        /// The cause and its causes.
        cause: String,
        /// What would have to be mended first, each with its remedy.
        #[serde(default)]
        problems: Vec<Problem>,
        /// Whether an operator asked for it.
        cancelled: bool,
        /// What is left to clean up by hand; mostly nothing.
        leftovers: Vec<String>,
    },
    /// Handed over, and the destination's word is missing.
    Undecided {
        /// What is missing and what is done about it.
        cause: String,
    },
}

impl Outcome {
    /// The exit code of `vmferry migrate`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Moved { leftovers } if leftovers.is_empty() => 0,
            Self::Moved { .. } => 3,
            Self::Failed { .. } => 1,
            Self::Undecided { .. } => 4,
        }
    }
}

impl From<progress::Outcome> for Outcome {
    fn from(outcome: progress::Outcome) -> Self {
        match outcome {
            progress::Outcome::Moved { leftovers } => Self::Moved { leftovers },
            progress::Outcome::Failed { phase, cause, problems, cancelled, leftovers } => {
                let problems = problems.into_iter().map(Problem::from).collect();
                Self::Failed { phase, cause, problems, cancelled, leftovers }
            }
            progress::Outcome::Undecided { cause } => Self::Undecided { cause },
        }
    }
}
