//! Perform, the source's four phases that move bytes: mirror, precopy, switchover, device.
//!
//! The exact commands and their order are QEMU's demands, the same for 7.2 and 10: a stream
//! must be up end to end before `blockdev-add`, whose handshake blocks QEMU's main loop; only
//! `pause-before-switchover` leaves a moment in which the mirrors can be finished with the
//! guest at rest; and only a non-forced `block-job-cancel` finishes a mirror in step.

use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;
use super::journal::Undo;
use super::link::WEIGHT;
use super::message::Request;
use super::patience::Patience;
use super::plan::CopiedDisk;
use super::progress::RamProgress;
use super::source::{Happening, Source, cancelled, millis, pause};
use super::streams::{Label, socket_pair};
use crate::mux::{Class, Open, purpose};
use crate::net::stream::Stream;
use crate::qemu::{
    BlockJobCancel, BlockdevAdd, BlockdevMirror, EventKind, JobDismiss, Migrate, MigrateContinue,
    MigrateSetCapabilities, MigrateSetParameters, MigrationParameters, MigrationStatus, MirrorSyncMode,
    QmpError, QueryBlockJobs, QueryJobs, QueryMigrate, QueryMigrateCapabilities, QueryMigrateParameters,
    names,
};

/// `blockdev-add` shakes hands with the destination's NBD server in QEMU's main loop: the guest
/// stands still for as long.
const BLOCKDEV_ADD_DEADLINE: Duration = Duration::from_secs(10);
/// The RAM follows when this little is left to mirror: it would be copied in the pause.
const MIRROR_REMAINDER_BYTES: u64 = 4 * 1024 * 1024;
/// How long a ready mirror may take to get there before the RAM follows all the same.
const MIRROR_SETTLE: Duration = Duration::from_secs(20);
/// How long a finished job may take to conclude.
const CONCLUDE_DEADLINE: Duration = Duration::from_secs(10);
/// QEMU's own limit for the RAM stream; the session limits, not QEMU.
const MAX_BANDWIDTH_BYTES_PER_S: u64 = 1 << 40;
/// The channel of the RAM stream.
pub(super) const RAM_CHANNEL: u16 = 0;

impl Source {
    /// Copies the disks and keeps them in step.
    pub(super) async fn mirror(&mut self) -> Result<(), Failure> {
        let disks = self.disks.clone();
        for disk in &disks {
            self.start_mirror(disk).await?;
        }
        let mut waiting: Vec<String> = disks.iter().map(|d| names::job_id(&d.name)).collect();
        let mut stall = Stall::new(self.host.config.deadlines.stall());
        let mut all_ready_at = None;
        while !disks.is_empty() {
            match self.next().await? {
                Happening::Event(EventKind::BlockJobReady { device }) => waiting.retain(|j| *j != device),
                Happening::Tick => {
                    let remaining = self.look_at_mirrors().await?;
                    let idle = waiting.is_empty() || self.is_away();
                    stall.check(self.streams.total(), || "the copy of the disks".into(), idle)?;
                    if waiting.is_empty() {
                        let since = *all_ready_at.get_or_insert_with(Instant::now);
                        if remaining <= MIRROR_REMAINDER_BYTES || since.elapsed() > MIRROR_SETTLE {
                            self.note_remainder(remaining);
                            break;
                        }
                    }
                }
                happening => self.common(happening)?,
            }
        }
        Ok(())
    }

    async fn start_mirror(&mut self, disk: &CopiedDisk) -> Result<(), Failure> {
        let (label, name) = (Label::Disk(disk.name.clone()), &disk.name);
        let export = self.grant.as_ref().and_then(|g| g.exports.iter().find(|e| e.disk == *name)).cloned();
        let Some(export) = export else {
            return Err(Failure::Destination(format!("disk {name} is not part of its grant")));
        };
        let stream = self.open(&label, purpose::NBD, export.channel).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        self.streams.start(label, &self.session, ours, stream);
        let (fd, node, job) = (names::nbd_fdname(name), names::node_name(name), names::job_id(name));
        self.journal.will_make(Undo::Fd(fd.clone()))?;
        self.journal.will_make(Undo::Node(node.clone()))?;
        self.journal.will_make(Undo::Job(job.clone()))?;
        self.qmp.getfd(&fd, theirs).await?;
        let add = BlockdevAdd::nbd_on_fd(&node, &fd, &export.export);
        self.add_node(add).await?;
        self.qmp.execute(BlockdevMirror::new(&job, &disk.node_name, &node, MirrorSyncMode::Full)).await?;
        Ok(())
    }

    /// QEMU's main loop, and with it the guest, stands still until the other end has answered.
    async fn add_node(&self, add: BlockdevAdd) -> Result<(), Failure> {
        let limit = self.host.config.deadlines.resume_paused();
        let patience = Patience::new(&self.host, &self.session, &self.progress, Some(limit));
        let name = <BlockdevAdd as crate::qemu::Command>::NAME;
        let late = QmpError::Deadline { name, after: BLOCKDEV_ADD_DEADLINE, sent: true };
        let longest = BLOCKDEV_ADD_DEADLINE + limit;
        let added = self.session.within(BLOCKDEV_ADD_DEADLINE, self.qmp.execute_within(add, longest));
        patience.to_the_end(async { added.await.unwrap_or(Err(late)) }).await.map(drop)
    }

    /// Whether nothing can move for want of a connection.
    fn is_away(&self) -> bool {
        self.session.away_since().is_some()
    }

    /// A question to QEMU, whose main loop may hang on a stream that does not move.
    async fn query<C: crate::qemu::Command>(&self, command: C) -> Result<C::Return, Failure> {
        let deadline = self.host.config.deadlines.stall();
        self.patience().with(self.qmp.execute_within(command, deadline)).await
    }

    async fn open(&self, label: &Label, purpose: u16, channel: u16) -> Result<Stream, Failure> {
        let migration = *self.request.id.as_bytes();
        let open = Open { purpose, class: Class::Bulk, weight: WEIGHT, migration, channel };
        tokio::select! {
            stream = self.session.open(open) => {
                stream.map_err(|source| Failure::Open { stream: label.to_string(), source })
            }
            () = self.cancel.cancelled() => Err(cancelled(&self.host)),
        }
    }

    /// Bytes that the mirrors still have to copy.
    async fn look_at_mirrors(&mut self) -> Result<u64, Failure> {
        let jobs = self.query(QueryBlockJobs).await?;
        let mut remaining = 0;
        self.progress.update(|p| {
            for disk in &mut p.disks {
                let id = names::job_id(&disk.name);
                if let Some(job) = jobs.iter().find(|j| j.device == id) {
                    (disk.total_bytes, disk.done_bytes, disk.ready) = (job.len, job.offset, job.ready);
                    remaining += job.len.saturating_sub(job.offset);
                }
            }
        });
        self.count_bytes();
        Ok(remaining)
    }

    fn note_remainder(&self, remaining: u64) {
        if remaining > MIRROR_REMAINDER_BYTES {
            let text = format!(
                "the guest writes faster than its disks can be mirrored: {} MiB are behind and will lengthen the pause",
                remaining >> 20
            );
            tracing::warn!("{text}");
            self.progress.update(|p| p.notes.push(text));
        }
    }

    /// Copies the RAM while the guest runs, up to QEMU's pause.
    pub(super) async fn precopy(&mut self) -> Result<(), Failure> {
        self.set_up_migration().await?;
        self.demand(Request::Incoming, Duration::from_secs(30)).await?;
        let stream = self.open(&Label::Ram, purpose::RAM, RAM_CHANNEL).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        self.streams.start(Label::Ram, &self.session, ours, stream);
        self.progress.update(|p| p.ram = Some(RamProgress::default()));
        self.journal.will_make(Undo::Fd(names::RAM_FDNAME.into()))?;
        self.qmp.getfd(names::RAM_FDNAME, theirs).await?;
        self.qmp.execute(Migrate::to_fd(names::RAM_FDNAME)).await?;
        let mut stall = Stall::new(self.host.config.deadlines.stall());
        loop {
            match self.next().await? {
                Happening::Event(EventKind::Stop) => self.paused_at = Some(Instant::now()),
                Happening::Event(EventKind::Migration { status: MigrationStatus::PreSwitchover }) => {
                    self.paused_at.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Happening::Tick => {
                    self.look_at_ram().await?;
                    let idle = self.is_away();
                    stall.check(self.streams.total(), || "the copy of the RAM".into(), idle)?;
                }
                happening => self.common(happening)?,
            }
        }
    }

    async fn set_up_migration(&mut self) -> Result<(), Failure> {
        let capabilities = self.qmp.execute(QueryMigrateCapabilities).await?;
        let parameters = self.qmp.execute(QueryMigrateParameters).await?;
        self.journal.will_make(Undo::MigrationSettings { capabilities, parameters })?;
        let mut wanted = vec!["events", "return-path", "pause-before-switchover"];
        if self.request.options.auto_converge {
            wanted.push("auto-converge");
        }
        self.qmp.execute(MigrateSetCapabilities::on(&wanted)).await?;
        let parameters = MigrationParameters {
            max_bandwidth: Some(MAX_BANDWIDTH_BYTES_PER_S),
            downtime_limit: Some(self.request.options.downtime_limit_ms),
            ..MigrationParameters::default()
        };
        self.qmp.execute(MigrateSetParameters(parameters)).await?;
        Ok(())
    }

    async fn look_at_ram(&mut self) -> Result<(), Failure> {
        if self.is_away() {
            return Ok(());
        }
        // QEMU's main loop may be busy stopping the guest behind a slow mirror.
        let info = self.query(QueryMigrate).await?;
        let stream_bytes = self.streams.bytes(&Label::Ram);
        if let Some(stats) = info.ram {
            let ram = RamProgress {
                total_bytes: stats.total,
                remaining_bytes: stats.remaining,
                stream_bytes,
                passes: stats.dirty_sync_count,
            };
            self.progress.update(|p| p.ram = Some(ram));
        }
        self.look_at_mirrors().await?;
        Ok(())
    }

    /// The guest is at rest: finishes the mirrors, so that both sides' disks are identical, and
    /// has the exports closed.
    pub(super) async fn switchover(&mut self) -> Result<(), Failure> {
        let since = Instant::now();
        let mut open: Vec<String> = self.disks.iter().map(|d| names::job_id(&d.name)).collect();
        for job in &open {
            self.qmp.execute(BlockJobCancel { device: job.clone(), force: false }).await?;
        }
        let mut waiting = Waiting::new(self.host.config.deadlines.stall());
        while !open.is_empty() {
            match self.next().await? {
                Happening::Event(EventKind::BlockJobCompleted { device, error: None, .. }) => {
                    open.retain(|j| *j != device);
                }
                Happening::Tick => waiting.check("finishing the mirrors", self.is_away())?,
                happening => self.common(happening)?,
            }
        }
        self.dismiss_jobs().await?;
        self.demand(Request::Switchover, Duration::from_secs(30)).await?;
        self.downtime.disks_ms = millis(since);
        Ok(())
    }

    async fn dismiss_jobs(&mut self) -> Result<(), Failure> {
        let until = Instant::now() + CONCLUDE_DEADLINE;
        for disk in self.disks.clone() {
            let id = names::job_id(&disk.name);
            loop {
                let jobs = self.qmp.execute(QueryJobs).await?;
                match jobs.iter().find(|j| j.id == id) {
                    None => break,
                    Some(job) if job.status.is_over() => {
                        if let Some(error) = job.error.clone() {
                            return Err(Failure::Mirror { disk: disk.name, error });
                        }
                        self.qmp.execute(JobDismiss { id: id.clone() }).await?;
                        break;
                    }
                    Some(_) if Instant::now() > until => {
                        return Err(stalled(
                            &format!("the end of the mirror of disk {}", disk.name),
                            CONCLUDE_DEADLINE,
                        ));
                    }
                    Some(_) => pause().await,
                }
            }
        }
        Ok(())
    }

    /// The rest of the RAM and the devices' state, until both QEMUs say that all has arrived.
    pub(super) async fn device(&mut self) -> Result<(), Failure> {
        let since = Instant::now();
        let mut waiting = Waiting::new(self.host.config.deadlines.stall());
        self.qmp.execute(MigrateContinue::from_pre_switchover()).await?;
        let mut completed = false;
        while !(completed && self.loaded) {
            match self.next().await? {
                Happening::Event(EventKind::Migration { status: MigrationStatus::Completed }) => {
                    completed = true
                }
                // Closed by now: the exports in order, the RAM stream when its last byte is there.
                Happening::StreamEnded(..) | Happening::Loaded => {}
                Happening::Tick => waiting.check("the transfer of the devices' state", self.is_away())?,
                happening => self.common(happening)?,
            }
        }
        self.downtime.device_ms = millis(since);
        Ok(())
    }

    /// What means the same in every phase.
    fn common(&mut self, happening: Happening) -> Result<(), Failure> {
        match happening {
            Happening::Event(EventKind::BlockJobCompleted { device, error, .. }) => {
                Err(self.mirror_failed(&device, error.unwrap_or_else(|| "it ended before its time".into())))
            }
            Happening::Event(EventKind::BlockJobCancelled { device, .. }) => {
                Err(self.mirror_failed(&device, "somebody else cancelled it".into()))
            }
            Happening::Event(EventKind::Migration { status }) if is_bad_end(&status) => {
                Err(Failure::Ram { status, error: String::new() })
            }
            Happening::StreamEnded(label, source) => {
                Err(Failure::Stream { stream: label.to_string(), source })
            }
            Happening::Event(EventKind::GuestPanicked) => {
                self.progress.update(|p| p.notes.push("the guest has panicked at the source".into()));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn mirror_failed(&self, job: &str, error: String) -> Failure {
        let disk = self.disks.iter().find(|d| names::job_id(&d.name) == job);
        Failure::Mirror { disk: disk.map_or_else(|| job.to_owned(), |d| d.name.clone()), error }
    }
}

fn is_bad_end(status: &MigrationStatus) -> bool {
    matches!(status, MigrationStatus::Failed | MigrationStatus::Cancelled | MigrationStatus::Cancelling)
}

fn stalled(what: &str, after: Duration) -> Failure {
    Failure::Stalled { what: what.into(), seconds: after.as_secs() }
}

/// A wait with a deadline; the time without a connection does not count.
struct Waiting {
    deadline: Duration,
    left: Duration,
    at: Instant,
}

impl Waiting {
    fn new(deadline: Duration) -> Self {
        Self { deadline, left: deadline, at: Instant::now() }
    }

    fn check(&mut self, what: &str, is_away: bool) -> Result<(), Failure> {
        let since = std::mem::replace(&mut self.at, Instant::now()).elapsed();
        if !is_away {
            self.left = self.left.saturating_sub(since);
        }
        if self.left.is_zero() { Err(stalled(what, self.deadline)) } else { Ok(()) }
    }
}

/// Notices when nothing moves.
struct Stall {
    deadline: Duration,
    bytes: u64,
    since: Instant,
}

impl Stall {
    fn new(deadline: Duration) -> Self {
        Self { deadline, bytes: 0, since: Instant::now() }
    }

    fn check(&mut self, bytes: u64, what: impl FnOnce() -> String, idle: bool) -> Result<(), Failure> {
        if bytes != self.bytes || idle {
            (self.bytes, self.since) = (bytes, Instant::now());
        }
        if self.since.elapsed() < self.deadline {
            return Ok(());
        }
        Err(stalled(&what(), self.deadline))
    }
}
