//! The virtual machine as a whole: who it is, whether it runs, and descriptors by name.

use super::{Empty, commands, plain_commands};
use crate::qemu::states::RunState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

plain_commands! {
    /// QEMU's version. For people: what it can do is asked of [`Abilities`](crate::qemu::Abilities).
    QueryVersion = "query-version" -> VersionInfo;
    /// The name given by `-name`.
    QueryName = "query-name" -> NameInfo;
    /// The identity given by `-uuid`, or zeroes.
    QueryUuid = "query-uuid" -> UuidInfo;
    /// Whether the guest runs.
    QueryStatus = "query-status" -> StatusInfo;
    /// How much RAM the guest has.
    QueryMemorySizeSummary = "query-memory-size-summary" -> MemoryInfo;
    /// Whether KVM runs the guest.
    QueryKvm = "query-kvm" -> KvmInfo;
    /// The places for processors, and what is in them.
    QueryHotpluggableCpus = "query-hotpluggable-cpus" -> Vec<HotpluggableCpu>;
    /// The blocks of RAM that a migration moves, as a table (QEMU 6.2).
    XQueryRamblock = "x-query-ramblock" -> HumanReadableText;
    /// What TCG has translated, as a text, which says how its clock goes if that counts instructions (QEMU 6.2).
    XQueryJit = "x-query-jit" -> HumanReadableText;
    /// Memory that is plugged in as devices.
    QueryMemoryDevices = "query-memory-devices" -> Vec<MemoryDevice>;
    /// The back ends of the guest's RAM.
    QueryMemdev = "query-memdev" -> Vec<Memdev>;
    /// The guest's processors; only their number is looked at.
    QueryCpusFast = "query-cpus-fast" -> Vec<Value>;
    /// Pauses the guest. In `inmigrate` it only turns the start after the migration off.
    ///
    /// While a background mirror writes into a stream that stands still, QEMU's whole main loop
    /// hangs in here until that stream moves or is cut.
    Stop = "stop" -> Empty;
    /// Starts or resumes the guest. In `inmigrate` it only turns the start after the migration on.
    Cont = "cont" -> Empty;
    /// Ends the process. The reply usually comes before the connection closes.
    Quit = "quit" -> Empty;
}

commands! {
    QomGet = "qom-get" -> Value;
    QomList = "qom-list" -> Vec<ObjectPropertyInfo>;
    XQueryVirtioStatus = "x-query-virtio-status" -> Value;
    Closefd = "closefd" -> Empty;
}

/// A property of an object: `/machine` has `type`, such as `pc-q35-7.2-machine`.
#[derive(Debug, Clone, Serialize)]
pub struct QomGet {
    pub path: String,
    pub property: String,
}

/// The properties of an object, its children among them.
#[derive(Debug, Clone, Serialize)]
pub struct QomList {
    pub path: String,
}

/// What a device of virtio and the driver in the guest have agreed on (QEMU 7.2). QEMU calls it unstable.
#[derive(Debug, Clone, Serialize)]
pub struct XQueryVirtioStatus {
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ObjectPropertyInfo {
    pub name: String,
    /// Its type: `child<TYPE>` for a child.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Closes a descriptor that was handed over under this name and that no command has taken.
#[derive(Debug, Clone, Serialize)]
pub struct Closefd {
    /// Its name on this monitor.
    pub fdname: String,
}

/// The return of [`QueryVersion`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VersionInfo {
    pub qemu: VersionTriple,
    #[serde(default)]
    pub package: String,
}

/// A version in three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct VersionTriple {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl fmt::Display for VersionTriple {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The return of [`QueryName`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NameInfo {
    /// None when the machine was given no name.
    pub name: Option<String>,
}

/// The return of [`QueryUuid`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct UuidInfo {
    /// In the usual 36 characters.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// The return of [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StatusInfo {
    /// Whether the guest's processors run.
    pub running: bool,
    pub status: RunState,
}

/// The return of [`QueryMemorySizeSummary`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryInfo {
    /// RAM at start, in bytes.
    pub base_memory: u64,
    /// RAM added while running, in bytes.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// A back end of the guest's RAM.
#[derive(Debug, Clone, Deserialize)]
pub struct Memdev {
    #[serde(default)]
    pub id: String,
    /// Other processes may map it.
    #[serde(default)]
    pub share: bool,
}

/// Memory as a device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MemoryDevice {
    /// `dimm`, `virtio-mem` ...
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub data: MemoryDeviceInfo,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct MemoryDeviceInfo {
    /// What the guest has of it, in bytes.
    #[serde(default)]
    pub size: u64,
}

/// The return of [`QueryKvm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct KvmInfo {
    pub enabled: bool,
}

/// One entry of [`QueryHotpluggableCpus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HotpluggableCpu {
    /// The processor's type, such as `qemu64-x86_64-cpu`.
    #[serde(rename = "type")]
    pub kind: String,
    pub vcpus_count: u32,
    /// Where it is: `socket-id`, `core-id` ...
    #[serde(default)]
    pub props: BTreeMap<String, Value>,
    /// The first of them; none when the place is empty.
    #[serde(default)]
    pub qom_path: Option<String>,
}

/// A table for people.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HumanReadableText {
    pub human_readable_text: String,
}
