//! The source's four phases that move bytes: mirror, precopy, switchover, device.
//!
//! The exact commands and their order are QEMU's demands, the same for 7.2 and 10: only
//! `pause-before-switchover` leaves a moment in which the mirrors can be finished with the
//! guest at rest. What a way of copying demands is in its file.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::changes::{choose_ways, follow, start_delta, start_disk_stream};
use super::clock::millis;
use super::event::Event;
use super::failure::Failure;
use super::reconnect::ReconnectPolicy;
use super::stall::{Stall, Waiting};
use super::state::Source;
use super::{given_up, guest_watch};
use crate::migrate::guest::settings;
use crate::migrate::model::label::Label;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::plan::{CopiedDisk, Way};
use crate::migrate::model::progress::RamProgress;
use crate::migrate::protocol::message::{Export, Request};
use crate::migrate::transfer::disk::mirror::{self, Mirror};
use crate::migrate::transfer::ram::precopy;
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::purpose;
use crate::qemu::{
    COMMAND_DEADLINE, Command, EventKind, MigrateContinue, MigrationStatus, QmpError, QueryBlockJobs,
    QueryJobs, QueryMigrate, names,
};

/// `blockdev-add` shakes hands with the destination's NBD server in QEMU's main loop: the guest
/// stands still for as long.
const BLOCKDEV_ADD_DEADLINE: Duration = Duration::from_secs(10);
/// How long the destination may take to get ready for the RAM, and to close its exports.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// The RAM follows when this little is left to mirror: it would be copied in the pause.
const MIRROR_REMAINDER_BYTES: u64 = 4 * 1024 * 1024;
/// How long a ready mirror may take to get there before the RAM follows all the same.
const MIRROR_SETTLE: Duration = Duration::from_secs(20);

/// Copies the disks and keeps them in step.
pub(crate) async fn mirror(source: &mut Source) -> Result<(), Failure> {
    guest_watch::is_as_planned(source).await?;
    let mut unready = start_copies(source).await?;
    let mut stall = Stall::new(source.context.stall());
    let mut all_ready_at = None;
    while !source.copy.disks.is_empty() {
        match source.next().await? {
            Event::Qemu(EventKind::BlockJobReady { device }) => {
                source.copy.tracking.in_step(&device);
                unready.retain(|j| *j != device);
            }
            Event::Tick => {
                let remaining = look_at_mirrors(source).await?;
                let Source { copy, peer, .. } = &*source;
                let idle = (unready.is_empty() && copy.delta.is_idle()) || peer.is_away();
                stall.check("the copy of the disks", copy.streams.total(), idle)?;
                if unready.is_empty() && copy.delta.copied_once() {
                    let since = *all_ready_at.get_or_insert_with(Instant::now);
                    if remaining <= MIRROR_REMAINDER_BYTES || since.elapsed() > MIRROR_SETTLE {
                        note_remainder(source, remaining);
                        break;
                    }
                }
            }
            event => common(source, event).await?,
        }
    }
    Ok(())
}

/// Starts what is not under way, each disk by the way of its plan. The jobs that are not ready yet.
async fn start_copies(source: &mut Source) -> Result<Vec<String>, Failure> {
    // Otherwise the ways are chosen.
    if !source.guest.take_missed_events() {
        choose_ways(source).await?;
    }
    let mut unready = Vec::new();
    for plan in source.copy.disks.clone() {
        let disk = &plan.disk;
        let export = source.peer.granted(&disk.name)?;
        let under_way = source.copy.streams.has(&Label::Disk(disk.name.clone()));
        match plan.way {
            // This agent copies it, and has lost nothing of its own.
            Way::Changes if under_way => {}
            Way::Changes => start_delta(source, disk, &export).await?,
            // Begun by an earlier process of this agent.
            Way::Whole if under_way => unready.extend(is_unready(source, disk).await?),
            Way::Whole => {
                follow(source, disk).await?;
                start_mirror(source, disk, &export).await?;
                unready.push(names::job_id(&disk.name));
            }
        }
    }
    Ok(unready)
}

/// The job of a mirror that goes on and is not ready, after nobody listened for a while.
async fn is_unready(source: &mut Source, disk: &CopiedDisk) -> Result<Option<String>, Failure> {
    let id = names::job_id(&disk.name);
    if is_finished(source, &id).await? {
        return Err(mirror_failed(source, &id, "it ended before its time".into()));
    }
    let jobs = source.query(QueryBlockJobs).await?;
    let ready = jobs.iter().any(|job| job.device == id && job.ready);
    if ready {
        source.copy.tracking.in_step(&id);
    }
    Ok((!ready).then_some(id))
}

/// Whether a mirror is at its end, or gone; its error, if it has one.
async fn is_finished(source: &Source, id: &str) -> Result<bool, Failure> {
    let jobs = source.query(QueryJobs).await?;
    match jobs.into_iter().find(|job| job.id == id) {
        Some(job) if job.status.is_over() => match job.error {
            Some(error) => Err(mirror_failed(source, id, error)),
            None => Ok(true),
        },
        found => Ok(found.is_none()),
    }
}

async fn start_mirror(source: &mut Source, disk: &CopiedDisk, export: &Export) -> Result<(), Failure> {
    let theirs = start_disk_stream(source, disk, export).await?;
    let mirror = Mirror::of(disk);
    for undo in mirror.undo() {
        source.journal.will_make(undo)?;
    }
    source.guest.qmp.getfd(&mirror.fd, theirs).await?;
    at_a_standstill(source, mirror.add(&export.export), BLOCKDEV_ADD_DEADLINE).await?;
    at_a_standstill(source, mirror.begin(), COMMAND_DEADLINE).await
}

/// Executes what QEMU's main loop, and with it the guest, stands still for: a new node until the
/// other end has answered, a new mirror until what the others are writing has been written.
async fn at_a_standstill<C: Command>(source: &Source, command: C, deadline: Duration) -> Result<(), Failure> {
    let (host, lanes) = (&source.context.host, &source.peer.lanes);
    let limit = host.config.deadlines.resume_paused();
    let policy = ReconnectPolicy::new(host, lanes, &source.context.progress, Some(limit));
    let late = QmpError::Deadline { name: C::NAME, after: deadline, sent: true };
    let done = lanes.within(deadline, source.guest.qmp.execute_within(command, deadline + limit));
    policy.until_done(async { done.await.unwrap_or(Err(late)) }).await.map(drop)
}

/// Bytes that the disks' copies still have to copy.
async fn look_at_mirrors(source: &mut Source) -> Result<u64, Failure> {
    let jobs = source.query(QueryBlockJobs).await?;
    let progress = &source.context.progress;
    let mut remaining = 0;
    progress.update(|p| {
        for disk in &mut p.disks {
            let id = names::job_id(&disk.name);
            if let Some(job) = jobs.iter().find(|j| j.device == id) {
                (disk.total_bytes, disk.done_bytes, disk.ready) = (job.len, job.offset, job.ready);
                remaining += job.len.saturating_sub(job.offset);
            }
        }
    });
    remaining += source.copy.count_changes(progress);
    source.copy.count_bytes(progress);
    Ok(remaining)
}

fn note_remainder(source: &Source, remaining: u64) {
    if remaining > MIRROR_REMAINDER_BYTES {
        let text = format!(
            "the guest writes faster than its disks can be mirrored: {} MiB are behind and will lengthen the pause",
            remaining >> 20
        );
        tracing::warn!("{text}");
        source.context.progress.update(|p| p.notes.push(text));
    }
}

/// Copies the RAM while the guest runs, up to QEMU's pause.
pub(crate) async fn precopy(source: &mut Source) -> Result<(), Failure> {
    if !source.copy.streams.has(&Label::Ram) {
        start_migration(source).await?;
    }
    if source.guest.take_missed_events() && missed_migration(source).await? == MigrationStatus::PreSwitchover
    {
        source.guest_stands_still();
        return Ok(());
    }
    let mut stall = Stall::new(source.context.stall());
    loop {
        match source.next().await? {
            Event::Qemu(EventKind::Migration { status: MigrationStatus::PreSwitchover }) => {
                source.guest_stands_still();
                return Ok(());
            }
            Event::Tick => {
                look_at_ram(source).await?;
                let Source { copy, peer, .. } = &*source;
                stall.check("the copy of the RAM", copy.streams.total(), peer.is_away())?;
            }
            event => common(source, event).await?,
        }
    }
}

async fn start_migration(source: &mut Source) -> Result<(), Failure> {
    guest_watch::is_as_planned(source).await?;
    set_up_migration(source).await?;
    source.demand(Request::Incoming, REQUEST_DEADLINE).await?;
    for channel in precopy::CHANNELS {
        let (lane, stream) = source.open(&channel.label, purpose::RAM, channel.channel).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        source.copy.streams.start(channel.label.clone(), &lane, ours, stream);
        source.context.progress.update(|p| p.ram = Some(RamProgress::default()));
        channel.give::<Failure>(&source.guest.qmp, &mut source.journal, theirs).await?;
    }
    source.guest.qmp.execute(precopy::send()).await?;
    Ok(())
}

async fn set_up_migration(source: &mut Source) -> Result<(), Failure> {
    let (qmp, options) = (&source.guest.qmp, &source.context.request.options);
    let before = settings::remember::<Failure>(qmp, &mut source.journal).await?;
    let mut wanted = vec!["events", "return-path", "pause-before-switchover"];
    if options.auto_converge {
        wanted.push("auto-converge");
    }
    before.state(qmp, &wanted, Some(options.downtime_limit_ms.into())).await?;
    Ok(())
}

/// What QEMU's migration has come to while nobody listened; a bad end is an error.
async fn missed_migration(source: &Source) -> Result<MigrationStatus, Failure> {
    let info = source.query(QueryMigrate).await?;
    if let Some(meanwhile) = Meanwhile::told_by(&EventKind::Migration { status: info.status.clone() }) {
        return Err(meanwhile.into());
    }
    if info.status == MigrationStatus::Failed {
        return Err(given_up::ram_failed(source).await);
    }
    Ok(info.status)
}

async fn look_at_ram(source: &mut Source) -> Result<(), Failure> {
    // While the guest stands still, QEMU has better things to do than to answer.
    if source.peer.is_away() || source.clock.paused_at.is_some() {
        return Ok(());
    }
    // QEMU's main loop may be busy stopping the guest behind a slow mirror.
    let info = source.query(QueryMigrate).await?;
    let stream_bytes = source.copy.streams.bytes(&Label::Ram);
    if let Some(stats) = info.ram {
        let ram = RamProgress {
            total_bytes: stats.total,
            remaining_bytes: stats.remaining,
            stream_bytes,
            passes: stats.dirty_sync_count,
        };
        source.context.progress.update(|p| p.ram = Some(ram));
    }
    look_at_mirrors(source).await?;
    Ok(())
}

/// The guest is at rest: finishes the copies of the disks, so that both sides' disks are identical, and
/// has the exports closed.
pub(crate) async fn switchover(source: &mut Source) -> Result<(), Failure> {
    let since = Instant::now();
    source.copy.delta.finish();
    let mut open: Vec<String> = source.copy.mirrors().collect();
    if source.guest.take_missed_events() {
        open = unfinished(source, open).await?;
    }
    let finish = open.iter().map(|job| mirror::finish(&source.guest.qmp, job));
    let asked = async { Ok::<_, Failure>(join_all(finish).await) };
    for asked in source.reconnect_policy().until_done(asked).await? {
        asked?;
    }
    let mut waiting = Waiting::new(source.context.stall());
    while !(open.is_empty() && source.copy.delta.is_over()) {
        match source.next().await? {
            Event::Qemu(EventKind::BlockJobCompleted { device, error: None, .. }) => {
                open.retain(|j| *j != device);
            }
            Event::Tick => waiting.check("finishing the mirrors", source.peer.is_away())?,
            event => common(source, event).await?,
        }
    }
    source.copy.note_changes(&source.context);
    guest_watch::tell_whether_it_runs(source).await?;
    close_exports(source).await?;
    source.clock.downtime.disks_ms = millis(since);
    Ok(())
}

/// Has the exports closed. Dismissing the jobs that have completed does not delay that.
async fn close_exports(source: &mut Source) -> Result<(), Failure> {
    let policy = source.reconnect_policy();
    let Source { peer, guest, copy, .. } = source;
    let closed = policy.with(peer.link.demand(Request::Switchover, REQUEST_DEADLINE));
    let disks = copy.disks.iter().map(|plan| plan.disk.name.clone());
    let (closed, dismissed, given_up) = tokio::join!(
        closed,
        mirror::dismiss(&guest.qmp, disks),
        given_up::is_possible(&guest.qmp, guest.inventory.as_ref())
    );
    closed.and(dismissed.map_err(Failure::from)).and(given_up)
}

/// Of these mirrors, those that are not at their end.
async fn unfinished(source: &Source, jobs: Vec<String>) -> Result<Vec<String>, Failure> {
    let mut open = Vec::new();
    for job in jobs {
        if !is_finished(source, &job).await? {
            open.push(job);
        }
    }
    Ok(open)
}

/// The rest of the RAM and the devices' state, until both QEMUs say that all has arrived.
pub(crate) async fn device(source: &mut Source) -> Result<(), Failure> {
    let since = Instant::now();
    let mut waiting = Waiting::new(source.context.stall());
    let mut status = MigrationStatus::PreSwitchover;
    if source.guest.take_missed_events() {
        status = missed_migration(source).await?;
    }
    if status == MigrationStatus::PreSwitchover {
        let go_on = source.guest.qmp.execute(MigrateContinue::from_pre_switchover());
        source.reconnect_policy().until_done(go_on).await?;
    }
    let mut completed = status == MigrationStatus::Completed;
    while !(completed && source.peer.loaded) {
        match source.next().await? {
            Event::Qemu(EventKind::Migration { status: MigrationStatus::Completed }) => completed = true,
            // Closed by now: the exports in order, the RAM stream when its last byte is there.
            Event::StreamEnded(..) | Event::Loaded => {}
            Event::Tick => waiting.check("the transfer of the devices' state", source.peer.is_away())?,
            event => common(source, event).await?,
        }
    }
    source.clock.downtime.device_ms = millis(since);
    Ok(())
}

/// What means the same in every phase.
async fn common(source: &mut Source, event: Event) -> Result<(), Failure> {
    match event {
        Event::Qemu(EventKind::BlockJobCompleted { device, error, .. }) => {
            let Some(disk) = source.copy.disk_of(&device) else { return Ok(()) };
            match error {
                Some(error) => Err(Failure::Mirror { disk, error }),
                // We end none before the guest is paused.
                None if source.clock.phase < Phase::Switchover => {
                    Err(Meanwhile::MirrorEnded { disk, what: "ended" }.into())
                }
                // Ours, and known by a question already: asked and told at the same time, after a restart.
                None => Ok(()),
            }
        }
        Event::Qemu(EventKind::BlockJobCancelled { device, .. }) => match source.copy.disk_of(&device) {
            Some(disk) => Err(Meanwhile::MirrorEnded { disk, what: "cancelled" }.into()),
            None => Ok(()),
        },
        Event::Copied(disk, Err(source)) => Err(Failure::Delta { disk, source }),
        Event::StreamEnded(label, source) => Err(Failure::Stream { stream: label.to_string(), source }),
        Event::Qemu(event) => guest_watch::on_guest_event(source, &event).await,
        Event::Tick | Event::Loaded | Event::Copied(_, Ok(())) => Ok(()),
    }
}

fn mirror_failed(source: &Source, job: &str, error: String) -> Failure {
    Failure::Mirror { disk: source.copy.disk_of(job).unwrap_or_else(|| job.to_owned()), error }
}
