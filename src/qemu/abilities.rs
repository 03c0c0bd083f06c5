//! What one QEMU can do, found out by asking it and never by its version. One thing is not in any schema, and is told
//! by the version: whether its NBD client asks for extended headers (`src/migrate/source/disk_stream.rs`).

use super::client::Qmp;
use super::commands::{QueryMigrateCapabilities, QueryQmpSchema, QueryVersion, SchemaInfo, VersionTriple};
use super::error::QmpError;
use std::collections::{BTreeSet, HashMap};

/// What one QEMU can do. In a fixed QEMU it never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// For people only: major, minor, micro.
    pub version: (u32, u32, u32),
    /// The distribution's name of its build, for people only.
    pub package: String,
    /// The migration capabilities it knows, on or off.
    pub capabilities: BTreeSet<String>,
    /// It has an NBD server that takes a listening descriptor.
    pub nbd_server_fd: bool,
    /// `block-export-add` (QEMU 5.2).
    pub block_export_add: bool,
    /// `blockdev-mirror` with a job that stays for its error.
    pub blockdev_mirror: bool,
    /// The block driver `nbd`, which is what a mirror copies to.
    pub nbd_driver: bool,
    /// `migrate-incoming` can be deferred to a command.
    pub migrate_incoming: bool,
    /// `nbd-server-start` knows `handshake-max-seconds`.
    pub handshake_max_seconds: bool,
    /// `migrate-incoming` knows `exit-on-error`.
    pub exit_on_error: bool,
    /// `migrate` still has the old in-band block migration `blk`.
    pub migrate_blk: bool,
    /// The same for `inc`.
    pub migrate_inc: bool,
    /// `migrate` takes `channels`.
    pub migrate_channels: bool,
    /// A ready mirror can be changed to write-blocking.
    pub block_job_change: bool,
    /// `blockdev-mirror` can be told that the target is empty.
    pub mirror_target_is_zero: bool,
    /// A node can be exported before the disks are activated.
    pub export_allow_inactive: bool,
}

impl Abilities {
    /// Asks. The schema is long, so this is for the beginning, not for a loop.
    pub async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let version = qmp.execute(QueryVersion).await?;
        let capabilities = qmp.execute(QueryMigrateCapabilities).await?;
        let schema = Schema::new(qmp.execute(QueryQmpSchema).await?);
        let VersionTriple { major, minor, micro } = version.qemu;
        Ok(Self {
            version: (major, minor, micro),
            package: version.package,
            capabilities: capabilities.into_iter().map(|entry| entry.capability).collect(),
            nbd_server_fd: schema.takes_fd("nbd-server-start", "addr"),
            block_export_add: schema.has("block-export-add"),
            blockdev_mirror: schema.takes("blockdev-mirror", "auto-dismiss"),
            nbd_driver: schema.has_case("blockdev-add", "nbd"),
            migrate_incoming: schema.has("migrate-incoming"),
            handshake_max_seconds: schema.takes("nbd-server-start", "handshake-max-seconds"),
            exit_on_error: schema.takes("migrate-incoming", "exit-on-error"),
            migrate_blk: schema.takes("migrate", "blk"),
            migrate_inc: schema.takes("migrate", "inc"),
            migrate_channels: schema.takes("migrate", "channels"),
            block_job_change: schema.has("block-job-change"),
            mirror_target_is_zero: schema.takes("blockdev-mirror", "target-is-zero"),
            export_allow_inactive: schema.takes("block-export-add", "allow-inactive"),
        })
    }

    /// Whether disks can cross inside its migration stream. Distributions leave it out, too.
    pub fn in_band(&self) -> bool {
        self.migrate_blk && self.migrate_inc && self.capability("block")
    }

    /// Whether this migration capability is known.
    pub fn capability(&self, name: &str) -> bool {
        self.capabilities.contains(name)
    }
}

/// The schema by name. Commands and types can't be confused: types are named by numbers.
struct Schema(HashMap<String, SchemaInfo>);

impl Schema {
    fn new(entries: Vec<SchemaInfo>) -> Self {
        Self(entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect())
    }

    fn command(&self, name: &str) -> Option<&SchemaInfo> {
        self.0.get(name).filter(|entry| entry.meta_type == "command")
    }

    fn has(&self, command: &str) -> bool {
        self.command(command).is_some()
    }

    fn argument_type(&self, command: &str, argument: &str) -> Option<&str> {
        let arguments = self.0.get(self.command(command)?.arg_type.as_ref()?)?;
        let member = arguments.members.iter().find(|member| member.name == argument)?;
        member.type_name.as_deref()
    }

    fn takes(&self, command: &str, argument: &str) -> bool {
        self.argument_type(command, argument).is_some()
    }

    /// Whether the argument of a command may be of this kind.
    fn has_case(&self, command: &str, case: &str) -> bool {
        let argument = self.command(command).and_then(|entry| self.0.get(entry.arg_type.as_ref()?));
        argument.is_some_and(|argument| argument.variants.iter().any(|variant| variant.case == case))
    }

    /// Whether an argument that is an address may be a descriptor.
    fn takes_fd(&self, command: &str, argument: &str) -> bool {
        self.argument_type(command, argument)
            .and_then(|name| self.0.get(name))
            .is_some_and(|address| address.variants.iter().any(|variant| variant.case == "fd"))
    }
}
