//! Disks: what there is, the destination's NBD server, the source's NBD nodes and mirrors.

use super::{BlockDirtyInfo, Empty, commands, plain_commands};
use crate::qemu::states::{IoStatus, JobStatus};
use serde::{Deserialize, Serialize};

plain_commands! {
    /// The guest's disks and drives.
    QueryBlock = "query-block" -> Vec<BlockInfo>;
    /// Block jobs as block jobs. A job that has failed shows here until it is dismissed.
    QueryBlockJobs = "query-block-jobs" -> Vec<BlockJobInfo>;
    /// The same jobs and others, with their error.
    QueryJobs = "query-jobs" -> Vec<JobInfo>;
    /// Which node is whose child, the guest's devices included. QEMU calls it unstable; it has been
    /// the same since 4.0.
    XDebugQueryBlockGraph = "x-debug-query-block-graph" -> BlockGraph;
    /// The exports of all kinds.
    QueryBlockExports = "query-block-exports" -> Vec<BlockExportInfo>;
    /// Stops the NBD server and deletes its exports, connected or not.
    ///
    /// On QEMU 7.2 it hangs for ever if a client has not finished its handshake: close those
    /// connections before.
    NbdServerStop = "nbd-server-stop" -> Empty;
}

commands! {
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<BlockDeviceInfo>;
    NbdServerStart = "nbd-server-start" -> Empty;
    BlockExportAdd = "block-export-add" -> Empty;
    BlockExportDel = "block-export-del" -> Empty;
    BlockdevAdd = "blockdev-add" -> Empty;
    BlockdevDel = "blockdev-del" -> Empty;
    BlockdevMirror = "blockdev-mirror" -> Empty;
    BlockJobCancel = "block-job-cancel" -> Empty;
    JobPause = "job-pause" -> Empty;
    JobResume = "job-resume" -> Empty;
    BlockJobComplete = "block-job-complete" -> Empty;
    BlockJobChange = "block-job-change" -> Empty;
    BlockJobSetSpeed = "block-job-set-speed" -> Empty;
    JobDismiss = "job-dismiss" -> Empty;
}

/// A disk or drive of the guest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockInfo {
    /// The `-drive` name; empty with `-blockdev`.
    #[serde(default)]
    pub device: String,
    /// The id or the path of the guest's device.
    #[serde(default)]
    pub qdev: String,
    /// A drive for media, such as a CD-ROM's.
    #[serde(default)]
    pub removable: bool,
    /// The medium; none in an empty drive.
    pub inserted: Option<BlockDeviceInfo>,
    /// Whether the guest's I/O has been stopped by an error.
    #[serde(rename = "io-status")]
    pub io_status: Option<IoStatus>,
}

/// A node's cache modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct CacheInfo {
    /// Of a guest's device, as it is at the moment: what the guest writes is kept once it has flushed, not before. Of a
    /// node that is asked without its device it is always true.
    pub writeback: bool,
    /// What is written goes past the host's memory (`cache=none`).
    pub direct: bool,
    /// The guest's flushes are not passed on (`cache=unsafe`).
    pub no_flush: bool,
}

impl Default for CacheInfo {
    fn default() -> Self {
        Self { writeback: true, direct: false, no_flush: false }
    }
}

/// A block node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockDeviceInfo {
    /// Its name; `#block...` when QEMU chose it.
    #[serde(rename = "node-name", default)]
    pub node_name: String,
    /// Its driver, such as `qcow2`.
    #[serde(default)]
    pub drv: String,
    #[serde(default)]
    pub ro: bool,
    #[serde(default)]
    pub cache: CacheInfo,
    /// The file as QEMU names it.
    #[serde(default)]
    pub file: String,
    /// The file it stands on.
    pub backing_file: Option<String>,
    /// How many files it stands on.
    #[serde(default)]
    pub backing_file_depth: u64,
    pub image: Option<ImageInfo>,
    #[serde(rename = "dirty-bitmaps", default)]
    pub dirty_bitmaps: Vec<BlockDirtyInfo>,
    /// The nodes right below it (QEMU 10.1; none says nothing).
    pub children: Option<Vec<BlockdevChild>>,
}

/// One node below another.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevChild {
    /// What it is to its parent: `file`, `backing`, `data-file`, ...
    pub child: String,
    pub node_name: String,
}

/// The return of [`XDebugQueryBlockGraph`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockGraph {
    /// Nodes, guest devices and jobs.
    pub nodes: Vec<BlockGraphNode>,
    pub edges: Vec<BlockGraphEdge>,
}

/// A node of the graph, a guest's device or a job.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockGraphNode {
    /// Its number, valid within one answer.
    pub id: u64,
    /// `block-driver` for a node.
    #[serde(rename = "type")]
    pub kind: String,
    /// A node's name; the name or path of a guest's device; empty for an export and its like.
    #[serde(default)]
    pub name: String,
}

/// That one is below another.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockGraphEdge {
    pub parent: u64,
    pub child: u64,
    /// What it is to the upper one: `file`, `backing`, `data-file`, ...
    #[serde(default)]
    pub name: String,
    /// What the upper one may do to the lower one: `write`, ...
    #[serde(default)]
    pub perm: Vec<String>,
}

/// An image file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    #[serde(default)]
    pub filename: String,
    #[serde(default)]
    pub format: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// What it occupies, in bytes.
    pub actual_size: Option<u64>,
    /// The file it stands on.
    pub backing_filename: Option<String>,
    /// It is encrypted itself; what is below it is not asked.
    #[serde(default)]
    pub encrypted: bool,
    /// What only this format has.
    pub format_specific: Option<ImageInfoSpecific>,
    #[serde(default)]
    pub snapshots: Vec<SnapshotInfo>,
    /// What the node stands on: its backing image, or what is below a filter.
    pub backing_image: Option<Box<ImageInfo>>,
}

/// What only images of one format have.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ImageInfoSpecific {
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Looked at for the kind of encryption only.
    #[serde(default)]
    pub data: serde_json::Value,
}

/// A snapshot inside an image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct SnapshotInfo {
    #[serde(default)]
    pub name: String,
}

/// All nodes, also those no guest device uses.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leave the chains of backing files out.
    pub flat: bool,
}

/// A block job as `query-block-jobs` shows it. `len - offset` is what remains, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    pub device: String,
    /// `mirror`, `commit`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// What there is to copy, in bytes; it grows with the guest's writes.
    pub len: u64,
    /// What is copied, in bytes.
    pub offset: u64,
    /// Everything was copied once. It may be behind again.
    #[serde(default)]
    pub ready: bool,
    /// Where it is in its life.
    pub status: JobStatus,
    /// Whether an I/O error has stopped it.
    pub io_status: IoStatus,
    pub error: Option<String>,
}

/// A job of any kind as `query-jobs` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    pub id: String,
    /// `mirror`, `create`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it is in its life.
    pub status: JobStatus,
    pub error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    pub id: String,
    /// `nbd`, `fuse`, ...
    #[serde(rename = "type")]
    pub kind: String,
    pub node_name: String,
}

/// Starts the process's one NBD server.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NbdServerStart {
    pub addr: SocketAddressLegacy,
    /// Further clients wait; QEMU's default is 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// A client that takes longer for its handshake is dropped; 0 is never, QEMU's default 10.
    /// Only if [`Abilities::handshake_max_seconds`](crate::qemu::Abilities::handshake_max_seconds).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_max_seconds: Option<u32>,
}

impl NbdServerStart {
    /// A server on a listening socket that was handed over under this name.
    pub fn on_fd(fdname: &str) -> Self {
        let addr = SocketAddressLegacy::Fd { str: fdname.to_owned() };
        Self { addr, max_connections: None, handshake_max_seconds: None }
    }
}

/// An address in the older of QEMU's two forms.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum SocketAddressLegacy {
    /// A descriptor by its name.
    Fd { str: String },
}

/// Makes a node available to NBD clients.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename = "nbd", rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// The export's id, for `block-export-del`.
    pub id: String,
    /// The node; a `-drive` name is refused.
    pub node_name: String,
    /// What the client asks for.
    pub name: String,
    /// Whether the client may write.
    pub writable: bool,
    /// Dirty bitmaps that it may ask for; one that records cannot be shown read-only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<String>,
    /// It may ask which image of the chain has what.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allocation_depth: bool,
}

/// Deletes an export.
#[derive(Debug, Clone, Serialize)]
pub struct BlockExportDel {
    pub id: String,
    /// Whether clients are cut off.
    pub mode: BlockExportRemoveMode,
}

/// How an export with clients is deleted.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockExportRemoveMode {
    Hard,
}

/// Adds a node. There is one kind: an NBD client over a descriptor.
///
/// QEMU shakes hands within the command and stands still meanwhile, guest and monitors, so the caller shakes
/// hands with the far end before, answers QEMU itself, and must be ready to cut it. No reconnection is
/// ever asked of QEMU: it would use the number of a descriptor that is someone else's by then.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "driver", rename = "nbd", rename_all = "kebab-case")]
pub struct BlockdevAdd {
    pub node_name: String,
    pub server: SocketAddress,
    /// The export's name on the server.
    pub export: String,
    /// `unmap`, or holes would be filled at the destination (QEMU 10.0).
    pub discard: &'static str,
    /// `unmap`, so that written zeroes are neither sent nor stored.
    pub detect_zeroes: &'static str,
}

impl BlockdevAdd {
    /// An NBD client on a connected socket that was handed over under this name.
    pub fn nbd_on_fd(node_name: &str, fdname: &str, export: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
            server: SocketAddress::Fd { str: fdname.to_owned() },
            export: export.to_owned(),
            discard: "unmap",
            detect_zeroes: "unmap",
        }
    }
}

/// An address in the newer of QEMU's two forms.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// A descriptor by its name.
    Fd { str: String },
}

/// Removes a node that nothing uses. Closes the NBD stream.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    pub node_name: String,
}

/// Copies a disk and keeps the copy equal. A target of another size is no error of the command:
/// the job ends at once with one.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevMirror {
    pub job_id: String,
    /// The disk: its node or `-drive` name.
    pub device: String,
    pub target: String,
    pub sync: MirrorSyncMode,
    /// Whether the guest's writes wait for the target.
    pub copy_mode: MirrorCopyMode,
    /// False: a failed job stays, with its error, until `job-dismiss`.
    pub auto_dismiss: bool,
    /// What an error of the disk does.
    pub on_source_error: BlockdevOnError,
    /// What an error of the target does.
    pub on_target_error: BlockdevOnError,
    /// Bytes per second; none is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
    /// The least that is copied, in bytes: a power of two; QEMU's choice is 64 KiB at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u32>,
    /// The target reads as zeroes: none are written.
    /// Only if [`Abilities::mirror_target_is_zero`](crate::qemu::Abilities::mirror_target_is_zero).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub target_is_zero: bool,
}

impl BlockdevMirror {
    /// A background mirror that stays for its error to be read, and ends at the first one.
    pub fn new(job_id: &str, device: &str, target: &str, sync: MirrorSyncMode) -> Self {
        Self {
            job_id: job_id.to_owned(),
            device: device.to_owned(),
            target: target.to_owned(),
            sync,
            copy_mode: MirrorCopyMode::Background,
            auto_dismiss: false,
            on_source_error: BlockdevOnError::Report,
            on_target_error: BlockdevOnError::Report,
            speed: None,
            granularity: None,
            target_is_zero: false,
        }
    }
}

/// Pauses a job: it is `paused` once nothing that it reads or writes is under way.
#[derive(Debug, Clone, Serialize)]
pub struct JobPause {
    pub id: String,
}

/// Resumes a job after [`JobPause`]. Any other is refused.
#[derive(Debug, Clone, Serialize)]
pub struct JobResume {
    pub id: String,
}

/// What a mirror copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSyncMode {
    Full,
    /// What the topmost image has.
    Top,
    /// Only what is written from now on.
    None,
}

/// Whether the guest's writes wait for the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorCopyMode {
    /// No: the copy follows as fast as it can.
    Background,
    /// Yes: a stalled target stalls the guest.
    WriteBlocking,
}

/// What an I/O error does to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockdevOnError {
    /// The job ends with it.
    Report,
    /// The job pauses. With a dead target it then never ends.
    Stop,
}

/// Ends a mirror. Without force, once ready: after the last difference is copied, and well
/// (`BLOCK_JOB_COMPLETED`). With force: at once, the target being no copy.
///
/// The general `job-cancel` is not this: it always forces.
#[derive(Debug, Clone, Serialize)]
pub struct BlockJobCancel {
    pub device: String,
    /// Drop what is in flight.
    pub force: bool,
}

/// Ends a ready mirror by putting the guest's disk onto its target.
#[derive(Debug, Clone, Serialize)]
pub struct BlockJobComplete {
    pub device: String,
}

/// Changes a mirror to write-blocking. There is no way back.
/// Only if [`Abilities::block_job_change`](crate::qemu::Abilities::block_job_change).
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename = "mirror", rename_all = "kebab-case")]
pub struct BlockJobChange {
    pub id: String,
    pub copy_mode: MirrorCopyMode,
}

/// Limits what a job copies by itself in a second, not what it does with the guest's writes; 0 is no limit.
#[derive(Debug, Clone, Serialize)]
pub struct BlockJobSetSpeed {
    pub device: String,
    pub speed: u64,
}

/// Forgets a concluded job.
#[derive(Debug, Clone, Serialize)]
pub struct JobDismiss {
    pub id: String,
}
