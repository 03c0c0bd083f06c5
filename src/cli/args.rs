//! The arguments.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};

use super::audit::AuditArgs;
use super::certs::CertsArgs;
use super::client::{SOCKET, SOCKET_VARIABLE};
use super::complete;
use super::doctor::DoctorArgs;
use super::guest::GuestCommand;
use super::join::JoinArgs;
use super::libvirt::LibvirtCommand;
use super::ping::PingArgs;
use super::qemu_command::QemuCommandArgs;
use super::report::ReportArgs;
use crate::api::{
    AT_ONCE_MAX, Accepted, DiskChoice, DiskSample, DisksAtOnce, DowntimeLimit, InBand, Incremental,
    LocalSocket, Options, Retry, Side, TargetName, Weight,
};
use crate::config::DEFAULT_PATH;
use crate::rate::{Rate, RateError};

/// Moves running QEMU virtual machines with local disks between hosts, encrypted, through one
/// port.
///
/// Exit codes: 0 moved, or done; 1 failed, and the VM runs on the source; 2 usage or
/// configuration; 3 moved, but something is left to clean up; 4 undecided.
#[derive(Debug, Parser)]
#[command(name = "vmferry", version, max_term_width = 100)]
pub(super) struct Arguments {
    /// The local agent's socket.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = SOCKET_VARIABLE,
        default_value = SOCKET
    )]
    pub(super) socket: PathBuf,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run this host's agent (as the systemd service does).
    Agent {
        /// Its configuration.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// Take everything over from the running agent, migrations in flight included; it ends.
        #[arg(long)]
        take_over: bool,
        /// Only judge the configuration, the certificates that it names and their folder's secrets; exit
        /// code 2 if the agent would not start with them. Needs to read the private key.
        #[arg(long, conflicts_with_all = ["take_over", "handoff_formats"])]
        check_config: bool,
        /// Print what this version can take over, and what it would start as; do nothing else.
        #[arg(long = "succession-formats", hide = true)]
        handoff_formats: bool,
    },
    /// Move a running VM to another host. Closing the terminal does not stop it.
    Migrate(MigrateArgs),
    /// Bring a replica of a VM's disks at another host into step; the VM stays. The first time copies all, later
    /// ones what changed since, and so does a `migrate` there.
    Replicate(Box<ReplicateArgs>),
    /// List the replicas that peers have of this host's VMs, and those that this host keeps for peers.
    Replicas {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say everything that would make a migration fail; both hosts stay as they are. Where the
    /// destination's agent starts QEMUs, one is started for the questions and ended again.
    Check(CheckArgs),
    /// List migrations of this host, in both directions, and which VMs run here.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the agent and which VMs run here, or one VM or migration, libvirt's own included.
    Status {
        /// A VM, a migration's id, or the beginning of one.
        #[arg(value_name = "VM|ID", add = complete::vms_and_migrations())]
        what: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Follow a migration to its end, libvirt's own included, and its exit code is the migration's; or a
    /// forwarding, second by second.
    Watch {
        /// The migration: its id, the beginning of it, or its VM; or a forwarding: its id, the beginning of
        /// it, or its name.
        #[arg(value_name = "VM|ID|NAME", add = complete::migrations_and_forwards())]
        what: String,
        /// Print one line of JSON for each change.
        #[arg(long)]
        json: bool,
    },
    /// Tell what a migration has been through, as a page of HTML: phases, rate, what was left of each disk and
    /// RAM, waits, the downtime.
    Report(ReportArgs),
    /// Try the way to a peer: whether it is reached, who it proves to be, versions, round trip, segments, throughput.
    /// Exit code 0: all of that; 1: it is not reached, or answers no probe.
    Ping(PingArgs),
    /// Print how the QEMU of a VM that runs here is started on another host, to wait for the VM there: a script or a
    /// unit, from its own command line. Says what was changed and what could not be decided. Changes nothing.
    #[command(name = "qemu-command")]
    Qemu(QemuCommandArgs),
    /// Look at this host: configuration, certificates, permissions, port, kernel, limits, clock. Changes nothing, and
    /// says what it could not look at. Exit code 0: nothing has failed; 1: something has.
    Doctor(DoctorArgs),
    /// Roll a migration back; possible until the hand-over.
    Cancel {
        /// The migration: its id, the beginning of it, or its VM; `drain` for the drain of this host.
        #[arg(value_name = "VM|ID", add = complete::migrations())]
        migration: String,
    },
    /// Empty this host: move all of its VMs, or those selected, to other hosts. Closing the terminal does
    /// not stop it. Exit code 0: all moved; 1: some stay; 3: moved, but something is left to clean up; 4: undecided.
    Drain(Box<DrainArgs>),
    /// Show what may be sent in a second, or change it while it runs.
    Limit(LimitArgs),
    /// Carry sockets of this host to peers: a program that connects here is connected there.
    #[command(subcommand)]
    Forward(ForwardCommand),
    /// Show what is undecided or left over on this host, what both hosts know about it and what is
    /// done; clean up what was left. Exit code 0: nothing; 3: something is left; 4: undecided.
    Recover(RecoverArgs),
    /// Move domains of libvirt's, by libvirt, through the tunnel (docs/libvirt.md).
    #[command(subcommand)]
    Libvirt(LibvirtCommand),
    /// Show this host's audit record, or judge it.
    Audit(AuditArgs),
    /// Make, show and check the certificates that hosts trust each other by.
    Certs(CertsArgs),
    /// Make this host's key, and fetch its certificate with a ticket of `vmferry certs invite`.
    Join(JoinArgs),
    /// What the example units of guests ask of their QEMU.
    #[command(subcommand, hide = true)]
    Guest(GuestCommand),
    /// Write manual pages and completions into a folder, as packages install them: share/man/man1 and so on.
    #[command(hide = true)]
    Manual {
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// A VM and where it goes.
#[derive(Debug, Args)]
pub(super) struct PathArgs {
    /// The virtual machine, as [vm.NAME] in the configuration of both hosts.
    #[arg(add = complete::vms())]
    pub(super) vm: String,
    /// The destination, as [peer.NAME] in this host's configuration.
    #[arg(long, value_name = "PEER", add = complete::peers())]
    pub(super) to: String,
}

/// What is found beforehand, and what becomes of it.
#[derive(Debug, Args)]
pub(super) struct JudgeArgs {
    /// Refuse for warnings, too.
    #[arg(long)]
    pub(super) strict: bool,
    /// Go on in spite of problems of this kind (docs/check.md); may be given several times.
    #[arg(long, value_name = "KIND")]
    pub(super) accept: Vec<Accepted>,
}

/// Of whatever carries a VM's data to a peer.
#[derive(Debug, Args)]
pub(super) struct CarryArgs {
    /// Begin again to the same peer, up to N times, after a failure that may pass: a lost connection, a QEMU or a
    /// disk of the destination. Waits 1, 2, 4 ... 60 s in between. A disk whose copy was whole
    /// is not copied again, where that is safe; else it is said why not.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(Retry::MAX)))]
    retry: u32,
    /// Compress the disks on their way (zstd), for slow links. What does not get shorter is soon
    /// left as it is. RAM is not compressed.
    #[arg(long)]
    compress: bool,
    /// Send no more than this in a second for a VM, RAM and disks together: 100MiB/s, 1G.
    #[arg(long, value_name = "RATE")]
    limit: Option<Rate>,
    #[command(flatten)]
    judge: JudgeArgs,
}

impl CarryArgs {
    pub(super) fn options(self) -> anyhow::Result<Options> {
        Ok(Options {
            retry: self.retry.try_into()?,
            compress: self.compress,
            limit_bytes_per_s: self.limit,
            strict: self.judge.strict,
            accept: self.judge.accept.into_iter().collect(),
            ..Options::default()
        })
    }
}

/// Of whatever moves a guest that runs.
#[derive(Debug, Args)]
pub(super) struct MovingArgs {
    /// Slow a guest down when its RAM changes faster than it can be sent.
    #[arg(long)]
    auto_converge: bool,
    /// Let no write of a guest's wait, also when it writes faster than its disks can be copied: such a copy may
    /// never end, or lengthen the pause.
    #[arg(long)]
    never_slow_writes: bool,
    /// Longest pause to plan for the rest of the RAM, in milliseconds; at most 2000000.
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=DowntimeLimit::MAX_MS))]
    downtime_limit: u64,
    /// Refuse where a QEMU has no usable NBD, instead of having the disks carried inside QEMU's own stream.
    #[arg(long)]
    never_in_band: bool,
    #[command(flatten)]
    carry: CarryArgs,
}

impl MovingArgs {
    pub(super) fn options(self) -> anyhow::Result<Options> {
        Ok(Options {
            auto_converge: self.auto_converge,
            never_slow_writes: self.never_slow_writes,
            downtime_limit_ms: self.downtime_limit.try_into()?,
            never_in_band: self.never_in_band,
            ..self.carry.options()?
        })
    }
}

/// What is said of a drain that is to begin.
const DRAIN_BEGINS: [&str; 9] =
    ["vms", "except", "at_once", "within", "dry_run", "detach", "MovingArgs", "CarryArgs", "JudgeArgs"];

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    pub(super) path: PathArgs,
    #[command(flatten)]
    pub(super) moving: MovingArgs,
    /// Leave the source's QEMU, paused for ever, instead of ending it.
    #[arg(long)]
    pub(super) keep_source: bool,
    /// Its part among migrations to the same host: twice the weight is twice the bytes.
    #[arg(long, value_name = "WEIGHT", default_value_t = Weight::default().into(), value_parser = weight())]
    pub(super) weight: u16,
    #[command(flatten)]
    pub(super) disks: DiskArgs,
    /// Copy no more than N disks at the same time, in the order of `--disk`, or QEMU's; all by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(DisksAtOnce::MAX)))]
    pub(super) disks_at_once: Option<u32>,
    #[command(flatten)]
    pub(super) incremental: IncrementalArgs,
    /// Compare disks that the guest cannot write to, which are not copied, with those that the destination has, before
    /// anything is copied.
    #[arg(long)]
    pub(super) compare_read_only: bool,
    /// Compare the disks on both hosts before the switchover, all of them or as much as is said; the guest does
    /// not wait for it.
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100%")]
    pub(super) verify: Option<DiskSample>,
    /// Have QEMU carry the disks inside its own stream, as QEMUs up to 9.0 can: the destination needs no NBD server
    /// then. `inc` for only what lies above backing files that both hosts have.
    #[arg(long, value_name = "blk|inc", num_args = 0..=1, require_equals = true, default_missing_value = "blk", conflicts_with_all = ["compare_read_only", "compress", "DiskArgs", "IncrementalArgs", "disks_at_once", "never_in_band", "verify"])]
    pub(super) in_band: Option<InBand>,
    /// Only say what would be done, how much would be copied, and how long that and the pause would take, if the
    /// guest and the way went on as they are now: `check`, 8 MiB sent to the destination, and a second of looking at
    /// the guest's RAM.
    #[arg(long, conflicts_with = "detach")]
    pub(super) dry_run: bool,
    /// Begin, print the migration's id and return.
    #[arg(long)]
    pub(super) detach: bool,
    /// Print JSON: one line for each change.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["to", "status", "cancel"])))]
pub(super) struct DrainArgs {
    /// Where VMs may go, as [peer.NAME] in this host's configuration: each goes to the first of these with the
    /// fewest on their way and a free place.
    #[arg(long, value_name = "PEER", value_delimiter = ',', add = complete::peers())]
    pub(super) to: Vec<String>,
    /// Only VMs of this name, `*` for any run of characters; may be given several times.
    #[arg(long = "vm", value_name = "PATTERN", add = complete::vms())]
    pub(super) vms: Vec<String>,
    /// All but VMs of this name; may be given several times.
    #[arg(long, value_name = "PATTERN", add = complete::vms())]
    pub(super) except: Vec<String>,
    /// Move no more than N at once; the configuration's number by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=AT_ONCE_MAX as u64))]
    pub(super) at_once: Option<u64>,
    /// Cancel it after so many seconds: nothing further is begun then, what can be is rolled back, and its end is
    /// waited for.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["detach", "dry_run"], value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub(super) within: Option<u64>,
    /// Only say what would be done: the order, where each VM would go, what `check` says. Where the destination's
    /// agent starts QEMUs, one is started for the questions and ended again.
    #[arg(long, conflicts_with = "detach")]
    pub(super) dry_run: bool,
    /// Show the drain that is under way, or the last one.
    #[arg(long, conflicts_with_all = DRAIN_BEGINS)]
    pub(super) status: bool,
    /// Begin nothing further, and roll back what can be.
    #[arg(long, conflicts_with_all = DRAIN_BEGINS)]
    pub(super) cancel: bool,
    #[command(flatten)]
    pub(super) moving: MovingArgs,
    /// Begin, print the drain's id and return.
    #[arg(long)]
    pub(super) detach: bool,
    /// Print JSON: one line for each change.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReplicateArgs {
    #[command(flatten)]
    pub(super) path: PathArgs,
    #[command(flatten)]
    pub(super) carry: CarryArgs,
    /// Its part among migrations to the same host: twice the weight is twice the bytes.
    #[arg(long, value_name = "WEIGHT", default_value_t = Weight::default().into(), value_parser = weight())]
    pub(super) weight: u16,
    #[command(flatten)]
    pub(super) disks: DiskArgs,
    /// End it: the record on both hosts, and the dirty bitmaps in the VM's QEMU.
    #[arg(long, conflicts_with_all = ["CarryArgs", "JudgeArgs", "weight", "DiskArgs", "detach"])]
    pub(super) end: bool,
    /// With `--end`: remove the images at the peer, too, that were made for it and that nobody has used since. Exit
    /// code 3 if some stay.
    #[arg(long, requires = "end")]
    pub(super) remove_images: bool,
    /// Begin, print the run's id and return.
    #[arg(long)]
    pub(super) detach: bool,
    /// Print one line of JSON for each change.
    #[arg(long)]
    pub(super) json: bool,
}

/// Which disks are copied: all that the guest can write to, unless it says otherwise.
#[derive(Debug, Args)]
pub(super) struct DiskArgs {
    /// Copy only this disk; may be given several times, and the disks are begun in that order. The others
    /// have to be on storage that both hosts share.
    #[arg(long = "disk", value_name = "NAME", conflicts_with = "except")]
    only: Vec<String>,
    /// Copy all disks but this one, which has to be on storage that both hosts share; may be given
    /// several times.
    #[arg(long = "except-disk", value_name = "NAME")]
    except: Vec<String>,
}

/// Disks of which only the topmost image is copied.
#[derive(Debug, Args)]
pub(super) struct IncrementalArgs {
    /// Copy only the topmost image of disks that stand on a backing file, of all or of this one (may be given several
    /// times). The destination's image has to be qcow2 on something that shows the same: that is compared before
    /// anything is copied.
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = ALL_DISKS)]
    incremental: Vec<String>,
}

/// No disk has this name.
const ALL_DISKS: &str = "*";

impl IncrementalArgs {
    pub(super) fn disks(self) -> Option<Incremental> {
        let names = self.incremental;
        if names.iter().any(|name| name == ALL_DISKS) {
            return Some(Incremental::All);
        }
        (!names.is_empty()).then(|| Incremental::Only(names.into_iter().collect()))
    }
}

impl DiskArgs {
    pub(super) fn choice(self) -> DiskChoice {
        if !self.only.is_empty() {
            DiskChoice::Only(self.only)
        } else if !self.except.is_empty() {
            DiskChoice::Except(self.except.into_iter().collect())
        } else {
            DiskChoice::All
        }
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum ForwardCommand {
    /// Listen on a socket until `end` or the agent's end, and print the forwarding's id. Those that
    /// are always wanted belong into the configuration.
    Add(AddForwardArgs),
    /// List forwardings and targets with what they carry.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Change what a forwarding may send in a second, and its part of what is sent, while it runs; until it
    /// ends or the agent stops.
    Limit {
        /// The forwarding: its id, the beginning of it, or its name in the configuration.
        #[arg(value_name = "ID|NAME", add = complete::forwards())]
        forward: String,
        /// Bytes per second over all its connections, as in 100MiB/s or 1G, or `none`.
        #[arg(long, value_name = "RATE", required_unless_present = "weight")]
        rate: Option<Limit>,
        /// Its part of what is sent to the peer.
        #[arg(long, value_name = "WEIGHT", value_parser = weight())]
        weight: Option<u16>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Close a forwarding's socket and all its connections. One of the configuration begins again with
    /// the agent.
    End {
        /// The forwarding: its id, the beginning of it, or its name in the configuration.
        #[arg(value_name = "ID|NAME", add = complete::forwards())]
        forward: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct AddForwardArgs {
    /// Where programs connect: a unix socket's absolute path, or TCP on loopback, as in 127.0.0.1:5900.
    pub(super) listen: LocalSocket,
    /// The peer, as [peer.NAME] in this host's configuration.
    #[arg(long, value_name = "PEER", add = complete::peers())]
    pub(super) to: String,
    /// The target's name at the peer, as [target.NAME] in its configuration.
    #[arg(long, value_name = "NAME")]
    pub(super) target: TargetName,
    /// Its part of what is sent to the peer: twice the weight is twice the bytes.
    #[arg(long, value_name = "WEIGHT", default_value_t = Weight::default().into(), value_parser = weight())]
    pub(super) weight: u16,
    /// Send no more than this in a second, over all its connections: 100MiB/s, 1G.
    #[arg(long, value_name = "RATE")]
    pub(super) limit: Option<Rate>,
    /// Go before everything that is not urgent, within a bounded share.
    #[arg(long)]
    pub(super) urgent: bool,
    /// Owner of the unix socket, by name or number.
    #[arg(long, value_name = "USER")]
    pub(super) owner: Option<String>,
    /// Its group.
    #[arg(long, value_name = "GROUP")]
    pub(super) group: Option<String>,
    /// Its mode.
    #[arg(long, value_name = "MODE", default_value = "0600")]
    pub(super) mode: String,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

fn weight() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=i64::from(Weight::MAX))
}

/// `none`, or a rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<Rate>);

impl FromStr for Limit {
    type Err = RateError;

    fn from_str(word: &str) -> Result<Self, RateError> {
        match word {
            "none" => Ok(Self(None)),
            rate => rate.parse().map(|rate| Self(Some(rate))),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// A migration's id, the beginning of it, or a VM that is being moved away; all are shown if it is left out.
    #[arg(conflicts_with = "peer", add = complete::migrations())]
    pub(super) migration: Option<String>,
    /// Bytes per second, as in 100MiB/s or 1G, or `none`.
    #[arg(long, value_name = "RATE")]
    pub(super) rate: Option<Limit>,
    /// The migration's part among those to the same host.
    #[arg(long, value_name = "WEIGHT", value_parser = weight(), requires = "migration")]
    pub(super) weight: Option<u16>,
    /// All that is sent to this peer, instead of a migration.
    #[arg(long, value_name = "PEER", add = complete::peers())]
    pub(super) peer: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RecoverArgs {
    /// Only this migration: its id, the beginning of it, or its VM.
    #[arg(value_name = "VM|ID", add = complete::migration_ids())]
    pub(super) id: Option<String>,
    /// Decide whose its virtual machine is, seen from this host. Only for when the other host is
    /// lost for good: if this is wrong, the VM runs twice.
    #[arg(long, value_name = "here|there", requires = "id", value_parser = side)]
    pub(super) force: Option<Side>,
    /// Do not ask for the VM's name before a forced decision.
    #[arg(long, requires = "force")]
    pub(super) yes: bool,
    /// Only look: clean up nothing.
    #[arg(long, conflicts_with = "force")]
    pub(super) look: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

fn side(word: &str) -> Result<Side, String> {
    match word {
        "here" => Ok(Side::Here),
        "there" => Ok(Side::There),
        _ => Err("`here` or `there`".into()),
    }
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    pub(super) path: PathArgs,
    #[command(flatten)]
    pub(super) judge: JudgeArgs,
    #[command(flatten)]
    pub(super) disks: DiskArgs,
    #[command(flatten)]
    pub(super) incremental: IncrementalArgs,
    /// Whether disks that the guest cannot write to could be compared, too.
    #[arg(long)]
    pub(super) compare_read_only: bool,
    /// Whether the disks could be compared on the way, too.
    #[arg(long)]
    pub(super) verify: bool,
    /// Whether QEMU could carry the disks inside its own stream.
    #[arg(long, value_name = "blk|inc", num_args = 0..=1, require_equals = true, default_missing_value = "blk", conflicts_with_all = ["compare_read_only", "DiskArgs", "IncrementalArgs", "verify"])]
    pub(super) in_band: Option<InBand>,
    /// Refuse where a QEMU has no usable NBD, instead of having the disks carried inside QEMU's own stream.
    #[arg(long, conflicts_with = "in_band")]
    pub(super) never_in_band: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}
