//! Perform, the source's four phases that move bytes: mirror, precopy, switchover, device.
//!
//! The exact commands and their order are QEMU's demands, the same for 7.2 and 10: a stream
//! must be up end to end before `blockdev-add`, whose handshake blocks QEMU's main loop; only
//! `pause-before-switchover` leaves a moment in which the mirrors can be finished with the
//! guest at rest; and only a non-forced `block-job-cancel` finishes a mirror in step.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::failure::Failure;
use super::given_up;
use super::reconnect_policy::Patience;
use super::{Happening, Source, cancelled, millis, pause};
use crate::migrate::guest::settings;
use crate::migrate::journal::Undo;
use crate::migrate::model::label::Label;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::plan::{CopiedDisk, RAM_CHANNEL};
use crate::migrate::model::progress::RamProgress;
use crate::migrate::protocol::client::WEIGHT;
use crate::migrate::protocol::message::{Export, Request};
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::{Class, Open, purpose};
use crate::net::compress::Coding;
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::qemu::{
    BlockJobCancel, BlockdevAdd, BlockdevMirror, COMMAND_DEADLINE, EventKind, JobDismiss, Migrate,
    MigrateContinue, MigrationStatus, MirrorSyncMode, Qmp, QmpError, QueryBlockJobs, QueryJobs, QueryMigrate,
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

impl Source {
    /// Copies the disks and keeps them in step.
    pub(crate) async fn mirror(&mut self) -> Result<(), Failure> {
        self.is_as_planned().await?;
        let disks = self.disks.clone();
        let missed = std::mem::take(&mut self.missed_events);
        let changed_only = if missed { BTreeSet::new() } else { self.choose().await? };
        let mut waiting = Vec::new();
        for disk in &disks {
            let export = self.granted(disk)?;
            if self.delta.disks.contains_key(&disk.name) {
                // This agent copies it, and has lost nothing of its own.
            } else if self.streams.has(&Label::Disk(disk.name.clone())) {
                // Begun by an earlier process of this agent.
                waiting.extend(self.is_unready(disk).await?);
            } else if changed_only.contains(&disk.name) {
                self.start_delta(disk, &export).await?;
            } else {
                self.follow(disk).await?;
                self.start_mirror(disk, &export).await?;
                waiting.push(names::job_id(&disk.name));
            }
        }
        let mut stall = Stall::new(self.host.config.deadlines.stall());
        let mut all_ready_at = None;
        while !disks.is_empty() {
            match self.next().await? {
                Happening::Event(EventKind::BlockJobReady { device }) => {
                    self.in_step(&device);
                    waiting.retain(|j| *j != device);
                }
                Happening::Tick => {
                    let remaining = self.look_at_mirrors().await?;
                    let idle = (waiting.is_empty() && self.delta.is_idle()) || self.is_away();
                    stall.check(self.streams.total(), || "the copy of the disks".into(), idle)?;
                    if waiting.is_empty() && self.delta.copied_once() {
                        let since = *all_ready_at.get_or_insert_with(Instant::now);
                        if remaining <= MIRROR_REMAINDER_BYTES || since.elapsed() > MIRROR_SETTLE {
                            self.note_remainder(remaining);
                            break;
                        }
                    }
                }
                happening => self.common(happening).await?,
            }
        }
        Ok(())
    }

    /// The job of a mirror that goes on and is not ready, after nobody listened for a while.
    async fn is_unready(&mut self, disk: &CopiedDisk) -> Result<Option<String>, Failure> {
        let id = names::job_id(&disk.name);
        if self.finished_mirror(&id).await? {
            return Err(self.mirror_failed(&id, "it ended before its time".into()));
        }
        let jobs = self.query(QueryBlockJobs).await?;
        let ready = jobs.iter().any(|job| job.device == id && job.ready);
        if ready {
            self.in_step(&id);
        }
        Ok((!ready).then_some(id))
    }

    /// Whether a mirror is at its end, or gone; its error, if it has one.
    async fn finished_mirror(&self, id: &str) -> Result<bool, Failure> {
        let jobs = self.query(QueryJobs).await?;
        match jobs.iter().find(|job| job.id == id) {
            Some(job) if job.status.is_over() => match &job.error {
                Some(error) => Err(self.mirror_failed(id, error.clone())),
                None => Ok(true),
            },
            found => Ok(found.is_none()),
        }
    }

    fn granted(&self, disk: &CopiedDisk) -> Result<Export, Failure> {
        let exports = self.grant.iter().flat_map(|g| &g.exports);
        exports
            .clone()
            .find(|e| e.disk == disk.name)
            .cloned()
            .ok_or_else(|| Failure::Destination(format!("disk {} is not part of its grant", disk.name)))
    }

    /// How what is sent of disks is coded.
    pub(crate) fn disk_coding(&self) -> Coding {
        match &self.grant {
            Some(grant) if grant.compress => Coding::Compress,
            _ => Coding::Plain,
        }
    }

    async fn start_mirror(&mut self, disk: &CopiedDisk, export: &Export) -> Result<(), Failure> {
        let (label, name) = (Label::Disk(disk.name.clone()), &disk.name);
        let (lane, stream) = self.open(&label, purpose::NBD, export.channel).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        self.streams.start_coded(label, &lane, ours, stream, self.disk_coding());
        let (fd, node, job) = (names::nbd_fdname(name), names::node_name(name), names::job_id(name));
        self.journal.will_make(Undo::Fd(fd.clone()))?;
        self.journal.will_make(Undo::Node(node.clone()))?;
        self.journal.will_make(Undo::Job(job.clone()))?;
        self.qmp.getfd(&fd, theirs).await?;
        let add = BlockdevAdd::nbd_on_fd(&node, &fd, &export.export);
        self.at_a_standstill(add, BLOCKDEV_ADD_DEADLINE).await?;
        let mirror = BlockdevMirror::new(&job, &disk.node_name, &node, MirrorSyncMode::Full);
        self.at_a_standstill(mirror, COMMAND_DEADLINE).await
    }

    /// Executes what QEMU's main loop, and with it the guest, stands still for: a new node until the
    /// other end has answered, a new mirror until what the others are writing has been written.
    async fn at_a_standstill<C>(&self, command: C, deadline: Duration) -> Result<(), Failure>
    where
        C: crate::qemu::Command,
    {
        let limit = self.host.config.deadlines.resume_paused();
        let patience = Patience::new(&self.host, &self.lanes, &self.progress, Some(limit));
        let late = QmpError::Deadline { name: C::NAME, after: deadline, sent: true };
        let longest = deadline + limit;
        let done = self.lanes.within(deadline, self.qmp.execute_within(command, longest));
        patience.until_done(async { done.await.unwrap_or(Err(late)) }).await.map(drop)
    }

    /// Whether nothing can move for want of a connection.
    fn is_away(&self) -> bool {
        self.lanes.is_away()
    }

    /// A question to QEMU, whose main loop may hang on a stream that does not move.
    pub(crate) async fn query<C: crate::qemu::Command>(&self, command: C) -> Result<C::Return, Failure> {
        let deadline = self.host.config.deadlines.stall();
        tokio::select! {
            biased;
            answer = self.patience().with(self.qmp.execute_within(command, deadline)) => answer,
            () = self.cancel.cancelled(), if self.phase.may_cancel() => Err(cancelled(&self.host)),
        }
    }

    /// Opens a data stream in the next of the peer's lanes, which is this migration's from then on.
    pub(crate) async fn open(
        &self,
        label: &Label,
        purpose: u16,
        channel: u16,
    ) -> Result<(Session, Stream), Failure> {
        let migration = *self.request.id.as_bytes();
        let open = Open { purpose, class: Class::Bulk, weight: WEIGHT, migration, channel };
        let opened = async {
            let lane = self.host.peers.lane(self.lanes.first(), &self.request.peer).await;
            self.lanes.add(&lane);
            self.share.spread();
            let stream = lane.open(open).await;
            let stream = stream.map_err(|source| Failure::Open { stream: label.to_string(), source })?;
            Ok((lane, stream))
        };
        tokio::select! {
            opened = opened => opened,
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
        remaining += self.look_at_delta();
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
    pub(crate) async fn precopy(&mut self) -> Result<(), Failure> {
        if !self.streams.has(&Label::Ram) {
            self.start_migration().await?;
        }
        if std::mem::take(&mut self.missed_events) && self.missed_the_pause().await? {
            return Ok(());
        }
        let mut stall = Stall::new(self.host.config.deadlines.stall());
        loop {
            match self.next().await? {
                Happening::Event(EventKind::Migration { status: MigrationStatus::PreSwitchover }) => {
                    self.guest_stands_still();
                    return Ok(());
                }
                Happening::Tick => {
                    self.look_at_ram().await?;
                    let idle = self.is_away();
                    stall.check(self.streams.total(), || "the copy of the RAM".into(), idle)?;
                }
                happening => self.common(happening).await?,
            }
        }
    }

    async fn start_migration(&mut self) -> Result<(), Failure> {
        self.is_as_planned().await?;
        self.set_up_migration().await?;
        self.demand(Request::Incoming, Duration::from_secs(30)).await?;
        let (lane, stream) = self.open(&Label::Ram, purpose::RAM, RAM_CHANNEL).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        self.streams.start(Label::Ram, &lane, ours, stream);
        self.progress.update(|p| p.ram = Some(RamProgress::default()));
        self.journal.will_make(Undo::Fd(names::RAM_FDNAME.into()))?;
        self.qmp.getfd(names::RAM_FDNAME, theirs).await?;
        self.qmp.execute(Migrate::to_fd(names::RAM_FDNAME)).await?;
        Ok(())
    }

    /// What QEMU's migration has come to while nobody listened; a bad end is an error.
    async fn missed_migration(&mut self) -> Result<MigrationStatus, Failure> {
        let info = self.query(QueryMigrate).await?;
        if let Some(meanwhile) = Meanwhile::told_by(&EventKind::Migration { status: info.status.clone() }) {
            return Err(meanwhile.into());
        }
        if info.status == MigrationStatus::Failed {
            return Err(self.ram_failed().await);
        }
        Ok(info.status)
    }

    /// Whether the guest is paused by now.
    async fn missed_the_pause(&mut self) -> Result<bool, Failure> {
        let is_paused = self.missed_migration().await? == MigrationStatus::PreSwitchover;
        if is_paused {
            self.guest_stands_still();
        }
        Ok(is_paused)
    }

    /// From now on every millisecond counts.
    pub(crate) fn guest_stands_still(&mut self) {
        self.paused_at.get_or_insert_with(Instant::now);
        self.share.go_ahead();
    }

    async fn set_up_migration(&mut self) -> Result<(), Failure> {
        let before = settings::remember::<Failure>(&self.qmp, &mut self.journal).await?;
        let mut wanted = vec!["events", "return-path", "pause-before-switchover"];
        if self.request.options.auto_converge {
            wanted.push("auto-converge");
        }
        let downtime_limit_ms = self.request.options.downtime_limit_ms.into();
        before.state(&self.qmp, &wanted, Some(downtime_limit_ms)).await?;
        Ok(())
    }

    async fn look_at_ram(&mut self) -> Result<(), Failure> {
        // While the guest stands still, QEMU has better things to do than to answer.
        if self.is_away() || self.paused_at.is_some() {
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
    pub(crate) async fn switchover(&mut self) -> Result<(), Failure> {
        let since = Instant::now();
        self.delta.finish();
        let mirrored = self.disks.iter().filter(|d| !self.delta.disks.contains_key(&d.name));
        let mut open: Vec<String> = mirrored.map(|d| names::job_id(&d.name)).collect();
        if std::mem::take(&mut self.missed_events) {
            open = self.unfinished(open).await?;
        }
        let finish = |job: &String| self.qmp.execute(BlockJobCancel { device: job.clone(), force: false });
        let asked = async { Ok::<_, Failure>(join_all(open.iter().map(finish)).await) };
        for asked in self.patience().until_done(asked).await? {
            match asked {
                // Asked for already, by an earlier process.
                Err(e) if e.is_job_past_that() => {}
                done => drop(done?),
            }
        }
        let mut waiting = Waiting::new(self.host.config.deadlines.stall());
        while !(open.is_empty() && self.delta.is_over()) {
            match self.next().await? {
                Happening::Event(EventKind::BlockJobCompleted { device, error: None, .. }) => {
                    open.retain(|j| *j != device);
                }
                Happening::Tick => waiting.check("finishing the mirrors", self.is_away())?,
                happening => self.common(happening).await?,
            }
        }
        self.note_delta();
        self.tell_whether_it_runs().await?;
        // Their ends were heard of; what is left of them is not waited for on the way.
        let closed = self.patience().with(self.link.demand(Request::Switchover, Duration::from_secs(30)));
        let (closed, dismissed, given_up) = tokio::join!(
            closed,
            dismiss_jobs(&self.qmp, &self.disks),
            given_up::is_possible(&self.qmp, self.inventory.as_ref())
        );
        closed.and(dismissed).and(given_up)?;
        self.downtime.disks_ms = millis(since);
        Ok(())
    }

    /// Of these mirrors, those that are not at their end.
    async fn unfinished(&self, jobs: Vec<String>) -> Result<Vec<String>, Failure> {
        let mut open = Vec::new();
        for job in jobs {
            if !self.finished_mirror(&job).await? {
                open.push(job);
            }
        }
        Ok(open)
    }

    /// The rest of the RAM and the devices' state, until both QEMUs say that all has arrived.
    pub(crate) async fn device(&mut self) -> Result<(), Failure> {
        let since = Instant::now();
        let mut waiting = Waiting::new(self.host.config.deadlines.stall());
        let mut status = MigrationStatus::PreSwitchover;
        if std::mem::take(&mut self.missed_events) {
            status = self.missed_migration().await?;
        }
        if status == MigrationStatus::PreSwitchover {
            let go_on = self.qmp.execute(MigrateContinue::from_pre_switchover());
            self.patience().until_done(go_on).await?;
        }
        let mut completed = status == MigrationStatus::Completed;
        while !(completed && self.loaded) {
            match self.next().await? {
                Happening::Event(EventKind::Migration { status: MigrationStatus::Completed }) => {
                    completed = true
                }
                // Closed by now: the exports in order, the RAM stream when its last byte is there.
                Happening::StreamEnded(..) | Happening::Loaded => {}
                Happening::Tick => waiting.check("the transfer of the devices' state", self.is_away())?,
                happening => self.common(happening).await?,
            }
        }
        self.downtime.device_ms = millis(since);
        Ok(())
    }

    /// What means the same in every phase.
    async fn common(&mut self, happening: Happening) -> Result<(), Failure> {
        match happening {
            Happening::Event(EventKind::BlockJobCompleted { device, error, .. }) => {
                let Some(disk) = self.disk_of(&device) else { return Ok(()) };
                Err(match error {
                    Some(error) => Failure::Mirror { disk, error },
                    // We end none before the guest is paused.
                    None => Meanwhile::MirrorEnded { disk, what: "ended" }.into(),
                })
            }
            Happening::Event(EventKind::BlockJobCancelled { device, .. }) => match self.disk_of(&device) {
                Some(disk) => Err(Meanwhile::MirrorEnded { disk, what: "cancelled" }.into()),
                None => Ok(()),
            },
            Happening::Copied(disk, Err(source)) => Err(Failure::Delta { disk, source }),
            Happening::StreamEnded(label, source) => {
                Err(Failure::Stream { stream: label.to_string(), source })
            }
            Happening::Event(event) => self.on_guest_event(&event).await,
            Happening::Tick | Happening::Loaded | Happening::Copied(_, Ok(())) => Ok(()),
        }
    }

    fn mirror_failed(&self, job: &str, error: String) -> Failure {
        Failure::Mirror { disk: self.disk_of(job).unwrap_or_else(|| job.to_owned()), error }
    }

    /// The disk of one of our mirrors; others have jobs of their own.
    fn disk_of(&self, job: &str) -> Option<String> {
        self.disks.iter().find(|d| names::job_id(&d.name) == job).map(|d| d.name.clone())
    }
}

/// Takes finished mirrors off QEMU's list. One that failed after all is an error.
async fn dismiss_jobs(qmp: &Qmp, disks: &[CopiedDisk]) -> Result<(), Failure> {
    let until = Instant::now() + CONCLUDE_DEADLINE;
    for disk in disks {
        let id = names::job_id(&disk.name);
        loop {
            let jobs = qmp.execute(QueryJobs).await?;
            match jobs.iter().find(|j| j.id == id) {
                None => break,
                Some(job) if job.status.is_over() => {
                    if let Some(error) = job.error.clone() {
                        return Err(Failure::Mirror { disk: disk.name.clone(), error });
                    }
                    qmp.execute(JobDismiss { id: id.clone() }).await?;
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
