//! The copies of a plan's disks, whichever their ways: begun, looked at, finished. Each can be asked for again,
//! and looks at what is there. What a way demands of QEMU is in its file of `transfer/disk`.

use std::io::ErrorKind;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::any_phase;
use super::changes::{choose_ways, follow, start_delta};
use super::disk_stream::{self, Agreed};
use super::event::Event;
use super::failure::Failure;
use super::reconnect::ReconnectPolicy;
use super::stall::{Stall, Waiting};
use super::state::Source;
use crate::migrate::model::plan::{CopiedDisk, DiskPlan, Export, Way};
use crate::migrate::transfer::disk::mirror::{self, Mirror};
use crate::migrate::transfer::streams::socket_pair;
use crate::qemu::{
    Abilities, COMMAND_DEADLINE, Command, EventKind, JobStatus, NbdError, QueryBlockJobs, QueryJobs,
    QueryNamedBlockNodes, names,
};

/// The guest stands still while QEMU's main loop does: for so long at most without a byte on any stream.
const STANDSTILL_MAX: Duration = Duration::from_secs(10);
/// How long a mirror is given to write everything that was written before.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
/// Between two looks at what begins or comes to rest.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Between two words on how far it is meanwhile.
const SHOW_EVERY: Duration = Duration::from_millis(100);
/// Of a mirror that ended without an error, and not by this migration, while nobody listened.
const ENDED_EARLY: &str = "it ended before its time";
const GONE: &str = "its job is gone, and whether it had completed is not known";

/// Chooses each disk's way, unless an earlier process has done it and begun.
pub(crate) async fn choose(source: &mut Source) -> Result<(), Failure> {
    let is_chosen = source.guest.take_missed_events() && source.copy.has_begun();
    if is_chosen { Ok(()) } else { choose_ways(source).await }
}

/// Begins what is not under way, each disk by the way of its plan.
pub(crate) async fn start(source: &mut Source) -> Result<(), Failure> {
    source.copy.unready.clear();
    // Begun by an earlier process of this agent. What this agent copies itself has lost nothing of its own.
    let whole = |plan: &&DiskPlan| plan.way.is_mirror() && source.copy.is_under_way(plan);
    let begun: Vec<_> = source.copy.plan.disks.iter().filter(whole).map(|plan| plan.disk.clone()).collect();
    for disk in begun {
        let unready = is_unready(source, &disk).await?;
        source.copy.unready.extend(unready);
    }
    // It may have left them at rest.
    resume(source).await?;
    start_more(source).await
}

/// Begins what is not under way, in the plan's order, as far as so many whole copies may be made at once.
/// Whole copies that are under way rest meanwhile, or the guest would wait for what they are writing.
pub(crate) async fn start_more(source: &mut Source) -> Result<(), Failure> {
    let at_once = source.context.request.options.disks_at_once;
    let at_once = at_once.map_or(usize::MAX, |disks| u32::from(disks) as usize);
    if source.copy.next_to_begin(at_once).is_none() {
        return Ok(());
    }
    for job in whole_copies(source) {
        rest(source, &job).await?;
    }
    let can = SourceCan {
        skip_zeroes: can_skip_zeroes(source).await?,
        extended_headers: disk_stream::asks_for_extended_headers(source).await?,
    };
    while let Some(DiskPlan { disk, target, way }) = source.copy.next_to_begin(at_once).cloned() {
        let Some(export) = target else {
            return Err(Failure::Destination(format!("disk {} is not part of its grant", disk.name)));
        };
        match way {
            Way::Changes => start_delta(source, &disk, &export).await?,
            Way::Whole | Way::Top => {
                follow(source, &disk).await?;
                start_mirror(source, &disk, &export, can).await?;
                source.copy.unready.push(names::job_id(&disk.name));
            }
            Way::InBand(_) => {}
        }
    }
    resume(source).await
}

/// Whether the source's QEMU can be told that a target reads as zeroes; not asked where none does.
async fn can_skip_zeroes(source: &Source) -> Result<bool, Failure> {
    let targets = source.copy.plan.disks.iter().filter_map(|plan| plan.target.as_ref());
    if !targets.into_iter().any(|target| target.is_fresh) {
        return Ok(false);
    }
    let qmp = &source.guest.qmp;
    Ok(source.reconnect_policy().ask(|| Abilities::ask(qmp)).await?.mirror_target_is_zero)
}

/// The jobs of the whole copies that are under way.
fn whole_copies(source: &Source) -> Vec<String> {
    let copy = &source.copy;
    let whole = copy.plan.disks.iter().filter(|plan| plan.way.is_mirror() && copy.is_under_way(plan));
    whole.map(|plan| names::job_id(&plan.disk.name)).collect()
}

/// Has a mirror wait until [`resume`], with nothing of it under way.
async fn rest(source: &mut Source, job: &str) -> Result<(), Failure> {
    let qmp = &source.guest.qmp;
    // One that is over refuses it, and one whose first answer was lost with the monitor.
    if !source.reconnect_policy().ask(|| mirror::pause(qmp, job)).await? {
        return Ok(());
    }
    let mut stall = Stall::new(source.context.stall());
    let mut shown = Instant::now();
    loop {
        let jobs = source.query(QueryJobs).await?;
        match jobs.iter().find(|known| known.id == job) {
            Some(known) if !known.status.is_at_rest() => {}
            _ => return Ok(()),
        }
        let (bytes, away) = (source.copy.streams.total(), source.peer.is_away());
        stall.check("what a disk's copy was writing", bytes, away)?;
        // It takes seconds on a slow link.
        if shown.elapsed() >= SHOW_EVERY {
            shown = Instant::now();
            source.copy.count_bytes(&source.context.progress);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Has all mirrors copy. One that does not wait refuses it.
async fn resume(source: &Source) -> Result<(), Failure> {
    let qmp = &source.guest.qmp;
    for job in whole_copies(source) {
        source.reconnect_policy().ask(|| mirror::resume(qmp, &job)).await?;
    }
    Ok(())
}

/// Waits until the destination has everything that was written to a disk before this call. False when the guest
/// writes too much for that to be seen, or the copy is over.
///
/// Of a mirror: it is at rest, which is a point of its loop, and once it is ready again it has counted anew
/// what it has to write. When none of that is left, all of it has been written. Of changes: a pass that
/// began after the call is over.
pub(crate) async fn has_all_until_now(source: &mut Source, plan: &DiskPlan) -> Result<bool, Failure> {
    let until = Instant::now() + CATCH_UP_MAX;
    let job = names::job_id(&plan.disk.name);
    let copied = source.copy.delta.disks.get(&plan.disk.name).cloned();
    let passes = copied.as_ref().map_or(0, |copied| copied.passes.load(Relaxed));
    if plan.way.is_mirror() {
        rest(source, &job).await?;
        let qmp = &source.guest.qmp;
        source.reconnect_policy().ask(|| mirror::resume(qmp, &job)).await?;
    }
    let mut has_counted = false;
    while Instant::now() < until {
        let done = match &copied {
            // The one that is under way may have begun before.
            Some(copied) => copied.passes.load(Relaxed) >= passes + 2,
            None => {
                let jobs = source.query(QueryBlockJobs).await?;
                let Some(job) = jobs.iter().find(|known| known.device == job) else { return Ok(false) };
                let has_all = has_counted && job.len == job.offset;
                has_counted |= job.status == JobStatus::Ready;
                has_all
            }
        };
        if done {
            return Ok(true);
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(false)
}

/// Brings the copies to their ends and waits for them: until the deadline of a stall with the guest at rest, else
/// for as long as something moves.
pub(crate) async fn finish(source: &mut Source) -> Result<(), Failure> {
    const WHAT: &str = "the end of the disks' copies";
    // An earlier process, or before the monitor was lost.
    if source.copy.completed {
        return Ok(());
    }
    ask_to_finish(source).await?;
    let deadline = source.context.stall();
    let (mut waiting, mut stall) = (Waiting::new(deadline), Stall::new(deadline));
    while !source.copy.is_finished() {
        match source.next().await? {
            Event::Qemu(EventKind::BlockJobCompleted { device, error: None, .. }) => {
                source.copy.mirror_finished(&device);
            }
            Event::Tick if source.clock.paused_at.is_some() => waiting.check(WHAT, source.peer.is_away())?,
            Event::Tick => {
                look(source).await?;
                stall.check(WHAT, source.copy.streams.total(), source.peer.is_away())?;
            }
            event => any_phase::on_event(source, event).await?,
        }
    }
    source.copy.note_changes(&source.context);
    source.copy.completed = true;
    Ok(())
}

/// That all mirrors still follow the guest, after nobody listened for a while.
/// Errors: one has ended.
pub(crate) async fn still_follow(source: &Source) -> Result<(), Failure> {
    for job in whole_copies(source) {
        if is_finished(source, &job).await? {
            return Err(mirror_failed(source, &job, ENDED_EARLY.into()));
        }
    }
    Ok(())
}

/// Those that had ended already are not waited for.
async fn ask_to_finish(source: &mut Source) -> Result<(), Failure> {
    source.copy.delta.finish();
    let mut open: Vec<String> = source.copy.mirrors().collect();
    if source.guest.take_missed_events() {
        let jobs = std::mem::take(&mut open);
        for job in jobs {
            if !is_finished(source, &job).await? {
                open.push(job);
            }
        }
    }
    let finish = open.iter().map(|job| mirror::finish(&source.guest.qmp, job));
    let asked = async { Ok::<_, Failure>(join_all(finish).await) };
    for asked in source.reconnect_policy().until_done(asked).await? {
        asked?;
    }
    source.copy.unfinished = open;
    Ok(())
}

/// The job of a mirror that goes on and is not ready, after nobody listened for a while.
async fn is_unready(source: &mut Source, disk: &CopiedDisk) -> Result<Option<String>, Failure> {
    let id = names::job_id(&disk.name);
    if is_finished(source, &id).await? {
        return Err(mirror_failed(source, &id, ENDED_EARLY.into()));
    }
    let jobs = source.query(QueryBlockJobs).await?;
    let ready = jobs.iter().any(|job| job.device == id && job.ready);
    if ready {
        source.copy.tracking.in_step(&id);
    }
    Ok((!ready).then_some(id))
}

/// Whether a mirror is at its end; its error, if it has one. A job that has concluded stays on QEMU's list until it is
/// dismissed, which we do only once all have completed: one that is gone was somebody else's doing.
async fn is_finished(source: &Source, id: &str) -> Result<bool, Failure> {
    let jobs = source.query(QueryJobs).await?;
    match jobs.into_iter().find(|job| job.id == id) {
        Some(job) if job.status.is_over() => match job.error {
            Some(error) => Err(mirror_failed(source, id, error)),
            None => Ok(true),
        },
        Some(_) => Ok(false),
        None => Err(mirror_failed(source, id, GONE.into())),
    }
}

/// What the source's QEMU can do for a mirror.
#[derive(Clone, Copy)]
struct SourceCan {
    skip_zeroes: bool,
    extended_headers: bool,
}

/// Begins a mirror. The destination is waited for before QEMU gets its connection; the handshake of QEMU's own is
/// with this agent, and takes no time of the guest's.
async fn start_mirror(
    source: &mut Source,
    disk: &CopiedDisk,
    export: &Export,
    can: SourceCan,
) -> Result<(), Failure> {
    let agreed = disk_stream::agree(source, disk, export, can.extended_headers).await?;
    let Agreed { label, lane, stream, state, terms } = agreed;
    let mirror = Mirror::of(disk);
    for undo in mirror.undo() {
        source.journal.will_make(undo)?;
    }
    let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
    source.guest.qmp.getfd(&mirror.fd, theirs).await?;
    let offered = async {
        match terms.offer(&export.export, ours).await {
            Ok(ours) => Ok(ours),
            // QEMU says why. An error of this end's own is none of its.
            Err(NbdError::Io(error)) if is_parting(error.kind()) => {
                tracing::info!(disk = disk.name, %error, "QEMU's NBD client has gone");
                std::future::pending().await
            }
            Err(error) => Err(Failure::Handshake { disk: disk.name.clone(), source: error }),
        }
    };
    // With this agent alone, whatever the streams do.
    let added = async { Ok(source.guest.qmp.execute(mirror.add(&export.export)).await?) };
    let (_added, ours) = tokio::try_join!(added, offered)?;
    source.copy.streams.start_as(label, &lane, ours, stream, state);
    at_a_standstill(source, mirror.begin(export, can.skip_zeroes)).await?;
    rest(source, &mirror.job).await
}

/// Whether an error says that the other end of a socket has gone.
fn is_parting(error: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error, UnexpectedEof | BrokenPipe | ConnectionReset | ConnectionAborted)
}

/// Executes what QEMU's main loop, and with it the guest, stands still for: a new mirror, until what the others are
/// writing has been written.
async fn at_a_standstill<C: Command>(source: &Source, command: C) -> Result<(), Failure> {
    let (host, lanes) = (&source.context.host, &source.peer.lanes);
    let limit = host.config.deadlines.resume_paused();
    let policy = ReconnectPolicy::new(host, lanes, &source.context.progress, Some(limit));
    let command = source.guest.qmp.execute_within(command, COMMAND_DEADLINE + limit);
    tokio::select! {
        biased;
        done = policy.until_done(command) => done.map(drop),
        failure = nothing_flows(source, C::NAME) => Err(failure),
    }
}

/// Waits until the streams have carried nothing for too long.
async fn nothing_flows(source: &Source, name: &'static str) -> Failure {
    let mut stall = Stall::new(STANDSTILL_MAX);
    let what = format!("{name} in the source's QEMU, with all streams,");
    loop {
        sleep(LOOK_EVERY).await;
        if let Err(failure) = stall.check(&what, source.copy.streams.total(), source.peer.is_away()) {
            return failure;
        }
    }
}

/// What is still to be copied, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Remaining {
    /// By mirrors.
    pub(crate) mirrors: u64,
    /// Of what changed since an earlier copy.
    pub(crate) changes: u64,
}

impl Remaining {
    /// What the end of the copies waits for. What a replica's guest writes to a disk of which only changes are
    /// copied is the next run's.
    pub(crate) fn before_the_end(self, source: &Source) -> u64 {
        let changes = if source.context.request.options.replicate { 0 } else { self.changes };
        self.mirrors.saturating_add(changes)
    }
}

/// Brings the copies into the progress.
pub(crate) async fn look(source: &mut Source) -> Result<Remaining, Failure> {
    let jobs = source.query(QueryBlockJobs).await?;
    if !source.copy.delta.disks.is_empty() {
        let nodes = source.query(QueryNamedBlockNodes { flat: true }).await?;
        source.copy.delta.learn(&nodes);
    }
    let progress = &source.context.progress;
    let mut remaining = 0;
    progress.update(|p| {
        for disk in &mut p.disks {
            let id = names::job_id(&disk.name);
            if let Some(job) = jobs.iter().find(|j| j.device == id) {
                disk.learn(job.len, job.offset, job.ready);
                remaining += job.len.saturating_sub(job.offset);
            }
        }
    });
    let changes = source.copy.count_changes(progress);
    source.copy.count_bytes(progress);
    Ok(Remaining { mirrors: remaining, changes })
}

/// Whether a mirror failed because it had ended while nobody listened: somebody may have completed it.
pub(crate) fn ended_unheard(failure: &Failure) -> bool {
    matches!(failure, Failure::Mirror { error, .. } if error == ENDED_EARLY || error == GONE)
}

fn mirror_failed(source: &Source, job: &str, error: String) -> Failure {
    Failure::Mirror { disk: source.copy.disk_of(job).unwrap_or_else(|| job.to_owned()), error }
}
