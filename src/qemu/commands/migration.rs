//! The migration of RAM and device state.

use super::{Empty, commands, plain_commands};
use crate::qemu::states::MigrationStatus;
use serde::{Deserialize, Serialize};

plain_commands! {
    /// How far the migration is. Right at `completed` QEMU 7.2 may still show a downtime and a
    /// total of 0: ask again.
    QueryMigrate = "query-migrate" -> MigrationInfo;
    /// What this QEMU can do in a migration, and what is turned on.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<CapabilityStatus>;
    /// The numbers of a migration.
    QueryMigrateParameters = "query-migrate-parameters" -> MigrationParameters;
    /// How fast the guest changes its RAM, by the last measurement (QEMU 5.2).
    QueryDirtyRate = "query-dirty-rate" -> DirtyRateInfo;
    /// Takes a migration back; the guest goes on by itself. QEMU hangs in here if it is in the
    /// state `device` and the stream stands still.
    MigrateCancel = "migrate_cancel" -> Empty;
}

commands! {
    MigrateSetCapabilities = "migrate-set-capabilities" -> Empty;
    MigrateSetParameters = "migrate-set-parameters" -> Empty;
    Migrate = "migrate" -> Empty;
    MigrateIncoming = "migrate-incoming" -> Empty;
    MigrateContinue = "migrate-continue" -> Empty;
    CalcDirtyRate = "calc-dirty-rate" -> Empty;
}

/// What is looked at of the return of [`QueryMigrate`]. The destination knows only `status`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// How far; it stays after the end until the next one.
    pub status: MigrationStatus,
    /// What has gone wrong, for people. QEMU does not always say.
    pub error_desc: Option<String>,
    pub ram: Option<MigrationStats>,
    /// Of disks that go in band: where QEMU is on its first way over all of them, one after the other. What the
    /// guest writes meanwhile does not count.
    pub disk: Option<MigrationStats>,
    /// How long the pause would be by what QEMU has measured, in milliseconds.
    pub expected_downtime: Option<u64>,
    /// Why this machine cannot be migrated at the moment, for people.
    pub blocked_reasons: Vec<String>,
}

impl MigrationInfo {
    /// Whether it failed because QEMU could not inactivate its images (`bdrv_inactivate_all`). QEMU 10.0
    /// says it like this, and of nothing else in a switchover; 7.2 says nothing.
    pub fn could_not_inactivate(&self) -> bool {
        self.error_desc.as_deref() == Some("Error in migration completion: Bad address")
    }
}

/// Progress of RAM. In bytes unless said.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationStats {
    pub total: u64,
    /// Still to be sent in this pass.
    pub remaining: u64,
    pub transferred: u64,
    /// How many passes have begun.
    pub dirty_sync_count: u64,
    /// Pages that the guest changes in a second, by the last pass.
    pub dirty_pages_rate: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// Begins to measure how fast the guest changes its RAM: QEMU hashes a sample of its pages twice. The guest does
/// not wait for it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CalcDirtyRate {
    /// Seconds between the two, 1 to 60.
    pub calc_time: u32,
}

/// The return of [`QueryDirtyRate`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateInfo {
    /// MiB in a second; none until it is measured.
    #[serde(default)]
    pub dirty_rate: Option<u64>,
    /// `unstarted`, `measuring` or `measured`.
    pub status: String,
}

/// A capability and whether it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityStatus {
    pub capability: String,
    pub state: bool,
}

/// Turns capabilities on and off; the others remain. They outlive the migration.
#[derive(Debug, Clone, Serialize)]
pub struct MigrateSetCapabilities {
    pub capabilities: Vec<CapabilityStatus>,
}

impl MigrateSetCapabilities {
    /// Turns these on.
    pub fn on(names: &[&str]) -> Self {
        let status = |name: &&str| CapabilityStatus { capability: (*name).to_owned(), state: true };
        Self { capabilities: names.iter().map(status).collect() }
    }

    /// Turns these on and all others that are known off.
    pub fn exactly(names: &[&str], known: &[CapabilityStatus]) -> Self {
        let status = |known: &CapabilityStatus| CapabilityStatus {
            state: names.contains(&known.capability.as_str()),
            capability: known.capability.clone(),
        };
        Self { capabilities: known.iter().map(status).collect() }
    }
}

/// Declares parameters that are left alone when they are `None`.
macro_rules! parameters {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)+) => {
        /// The parameters vmferry may change. `None`: leave alone, or not known to this QEMU.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case", default)]
        pub struct MigrationParameters {$(
            $(#[$doc])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $name: Option<$type>,
        )+}

        impl MigrationParameters {
            /// What must be set to come from `now` back to these.
            pub fn differing_from(&self, now: &Self) -> Self {
                Self {$(
                    $name: if self.$name == now.$name { None } else { self.$name.clone() },
                )+}
            }

            /// Without those that `known` does not have.
            pub fn known_to(self, known: &Self) -> Self {
                Self {$(
                    $name: if known.$name.is_some() { self.$name } else { None },
                )+}
            }
        }
    };
}

parameters! {
    /// Bytes per second while the guest runs; 0 is no limit. QEMU's default is 128 MiB.
    max_bandwidth: u64,
    /// The longest pause to aim at, in milliseconds. QEMU's default is 300.
    downtime_limit: u64,
    /// Bytes per second to reckon with for the switchover; 0 is as measured (QEMU 8.2).
    avail_switchover_bandwidth: u64,
    /// Bytes per second in postcopy; 0 is no limit.
    max_postcopy_bandwidth: u64,
    /// Where auto-converge begins, in per cent.
    cpu_throttle_initial: u8,
    /// By how much it goes on, in per cent.
    cpu_throttle_increment: u8,
    /// Whether it goes on in small steps at the end.
    cpu_throttle_tailslow: bool,
    /// Where it stops, in per cent.
    max_cpu_throttle: u8,
    /// How much of what was sent must have been changed again for it to begin, in per cent.
    throttle_trigger_threshold: u8,
    /// The object with QEMU's own TLS credentials; empty for none.
    tls_creds: String,
    /// The name that QEMU's own TLS expects; empty for that of the address.
    tls_hostname: String,
    /// The object that decides whom QEMU's own TLS lets in; empty for none.
    tls_authz: String,
    /// How several channels compress: `none`, `zlib`, `zstd`, ...
    multifd_compression: String,
    /// `normal`, or a way to exchange QEMU on one host (QEMU 8.2).
    mode: String,
    /// Past the page cache into a file (QEMU 9.1).
    direct_io: bool,
    /// Who looks for pages of zeroes: `none`, `legacy`, `multifd` (QEMU 9.0).
    zero_page_detection: String,
    /// The disks of an old in-band block migration go above a shared base (until QEMU 9.0).
    block_incremental: bool,
    /// Which dirty bitmaps go along, with the capability `dirty-bitmaps`. What was once set can be changed only.
    block_bitmap_mapping: Vec<BitmapNode>,
}

/// Dirty bitmaps of a node that go along, and what they are called on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapNode {
    pub node_name: String,
    /// At most 255 bytes, as all of these.
    pub alias: String,
    pub bitmaps: Vec<BitmapAlias>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapAlias {
    pub name: String,
    pub alias: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<BitmapTransform>,
}

/// How one is to be at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapTransform {
    /// Whether it is stored in the image there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
}

/// Changes parameters, also while a migration runs. They outlive it.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct MigrateSetParameters(pub MigrationParameters);

/// Starts the migration on the source.
#[derive(Debug, Clone, Serialize)]
pub struct Migrate {
    pub uri: String,
    /// Take up a postcopy whose stream was lost.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub resume: bool,
    /// The disks go in band, whole. Only if
    /// [`Abilities::migrate_blk`](crate::qemu::Abilities::migrate_blk).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub blk: bool,
    /// The disks go in band, above a shared base. Only as `blk`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub inc: bool,
}

impl Migrate {
    /// Into a descriptor that was handed over under this name.
    pub fn to_fd(fdname: &str) -> Self {
        Self { uri: format!("fd:{fdname}"), resume: false, blk: false, inc: false }
    }
}

/// Starts the migration on a destination that was started with `-incoming defer`. A process
/// accepts this once in its life.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateIncoming {
    pub uri: String,
    /// False: the process stays when the migration fails, with its error. Only if
    /// [`Abilities::exit_on_error`](crate::qemu::Abilities::exit_on_error).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_on_error: Option<bool>,
}

impl MigrateIncoming {
    /// From a descriptor that was handed over under this name.
    pub fn from_fd(fdname: &str) -> Self {
        Self { uri: format!("fd:{fdname}"), exit_on_error: None }
    }

    /// The process stays when the migration fails, and tells why.
    pub fn and_stay(self) -> Self {
        Self { exit_on_error: Some(false), ..self }
    }
}

/// Goes on from the pause before switchover.
#[derive(Debug, Clone, Serialize)]
pub struct MigrateContinue {
    /// The state the migration must be in.
    pub state: MigrationStatus,
}

impl MigrateContinue {
    /// From `pre-switchover`, the only pause there is.
    pub fn from_pre_switchover() -> Self {
        Self { state: MigrationStatus::PreSwitchover }
    }
}
