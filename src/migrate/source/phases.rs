//! The source's four phases that move bytes: mirror, precopy, switchover, device.
//!
//! The exact commands and their order are QEMU's demands, the same for 7.2 and 10: only
//! `pause-before-switchover` leaves a moment in which the mirrors can be finished with the
//! guest at rest. What a way of copying demands is in its file.

use std::time::Duration;

use tokio::time::Instant;

use super::clock::millis;
use super::event::Event;
use super::failure::Failure;
use super::stall::{Stall, Waiting};
use super::state::Source;
use super::{any_phase, bases, copies, given_up, guest_watch, in_band, slow_writes, slowness, verify};
use crate::migrate::checks::disks::bitmaps;
use crate::migrate::guest::settings::{self, Settings};
use crate::migrate::model::forecast::Passes;
use crate::migrate::model::label::Label;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::progress::RamProgress;
use crate::migrate::protocol::message::Request;
use crate::migrate::transfer::disk::mirror;
use crate::migrate::transfer::ram::precopy;
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::purpose;
use crate::qemu::{EventKind, MigrateContinue, MigrationStatus, QueryMigrate, QueryStatus, RunState};

/// How long the destination may take to get ready for the RAM, and to close its exports.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// How long QEMU may take to say, in the pause, whether somebody has continued the guest.
const LOOK_DEADLINE: Duration = Duration::from_secs(1);
/// The RAM follows when this little is left to mirror: it would be copied in the pause.
const MIRROR_REMAINDER_BYTES: u64 = 4 * 1024 * 1024;
/// How long a ready mirror may take to get there before the RAM follows all the same.
const MIRROR_SETTLE: Duration = Duration::from_secs(20);

/// Copies the disks and keeps them in step.
pub(crate) async fn mirror(source: &mut Source) -> Result<(), Failure> {
    guest_watch::is_as_planned(source).await?;
    copies::choose(source).await?;
    bases::prove(source).await?;
    copies::start(source).await?;
    let mut stall = Stall::new(source.context.stall());
    let mut caught_up_at = None;
    let mut compared = source.context.request.options.verify.is_none();
    while !source.copy.plan.disks.is_empty() {
        copies::start_more(source).await?;
        match source.next().await? {
            Event::Tick => {
                let remaining = copies::look(source).await?.before_the_end(source);
                let Source { copy, peer, context, .. } = &mut *source;
                copy.foresee(&context.progress, None, peer.is_away());
                slowness::look(source).await;
                slow_writes::look(source).await?;
                let Source { copy, peer, .. } = &*source;
                stall.check(
                    "the copy of the disks",
                    copy.streams.total(),
                    copy.is_idle() || peer.is_away(),
                )?;
                if copy.has_caught_up() {
                    let since = *caught_up_at.get_or_insert_with(Instant::now);
                    let is_late = since.elapsed() > MIRROR_SETTLE && !slow_writes::may_help(source);
                    if remaining <= MIRROR_REMAINDER_BYTES || is_late {
                        if !std::mem::replace(&mut compared, true) {
                            verify::verify(source).await?;
                            caught_up_at = None;
                            continue;
                        }
                        note_remainder(source, remaining);
                        break;
                    }
                }
            }
            event => any_phase::on_event(source, event).await?,
        }
    }
    Ok(())
}

fn note_remainder(source: &Source, remaining: u64) {
    if remaining > MIRROR_REMAINDER_BYTES {
        let means = match source.context.request.options.replicate {
            true => "have to be copied before the replica is in step",
            false => "will lengthen the pause",
        };
        let text = format!(
            "the guest writes faster than its disks can be copied: {} MiB are behind and {means}",
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
    if source.guest.take_missed_events() {
        copies::still_follow(source).await?;
        if missed_migration(source).await? == MigrationStatus::PreSwitchover {
            source.guest_stands_still();
            return Ok(());
        }
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
            event => any_phase::on_event(source, event).await?,
        }
    }
}

async fn start_migration(source: &mut Source) -> Result<(), Failure> {
    guest_watch::is_as_planned(source).await?;
    if let Some(how) = source.copy.plan.in_band() {
        let text = "the disks cross inside QEMU's own stream";
        source
            .context
            .note(format!("{text} ({}): both sides' are equal only when all of it has arrived", how.name()));
    }
    set_up_migration(source).await?;
    source.demand(Request::Incoming, REQUEST_DEADLINE).await?;
    for channel in precopy::CHANNELS {
        let (lane, stream) = source.open(&channel.label, purpose::RAM, channel.channel).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        source.copy.streams.start(channel.label.clone(), &lane, ours, stream);
        source.context.progress.update(|p| {
            p.ram = Some(RamProgress {
                left_bytes: p.whole.as_ref().and_then(|w| w.ram_expected_bytes),
                ..RamProgress::default()
            })
        });
        channel.give::<Failure>(&source.guest.qmp, &mut source.journal, theirs).await?;
    }
    source.guest.qmp.execute(precopy::send(source.copy.plan.in_band())).await?;
    Ok(())
}

async fn set_up_migration(source: &mut Source) -> Result<(), Failure> {
    let (qmp, options) = (&source.guest.qmp, &source.context.request.options);
    let before = settings::remember::<Failure>(qmp, &mut source.journal).await?;
    let mut wanted = vec!["events", "return-path", "pause-before-switchover"];
    if options.auto_converge {
        wanted.push("auto-converge");
    }
    if source.copy.plan.in_band().is_some() {
        // A hole crosses as a few bytes.
        wanted.push("zero-blocks");
    }
    let (sent, dropped) = match source.peer.grant.as_ref().and_then(|grant| grant.bitmaps.as_ref()) {
        Some(accepted) if !accepted.is_empty() => bitmaps::to_send(&crate::qemu::disks(qmp).await?, accepted),
        _ => Default::default(),
    };
    dropped.iter().for_each(|problem| tracing::warn!("{problem}"));
    source.context.note_findings(dropped);
    if !sent.is_empty() {
        wanted.push(bitmaps::CAPABILITY);
    }
    before.state(qmp, &wanted, Some(options.downtime_limit_ms.into())).await?;
    if !sent.is_empty() {
        Settings::map_bitmaps(qmp, sent).await?;
    }
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
        source.copy.foresee(&source.context.progress, None, true);
        if source.peer.is_away() {
            slowness::look(source).await;
        }
        return Ok(());
    }
    // QEMU's main loop may be busy stopping the guest behind a slow mirror.
    let info = source.query(QueryMigrate).await?;
    in_band::look(source, &info).await?;
    let stream_bytes = source.copy.ram_stream_bytes(&source.context.progress);
    let mut passes = None;
    if let Some(stats) = info.ram {
        let figures = (stats.total, stats.remaining, stats.dirty_sync_count);
        let all_once = source.copy.plan.in_band().is_none() || source.context.progress.now().all_passed();
        passes = (stats.dirty_sync_count > 1 && all_once).then(|| Passes {
            remaining_bytes: stats.remaining,
            dirty_bytes_per_s: stats.dirty_pages_rate.saturating_mul(stats.page_size),
            expected_downtime_ms: info.expected_downtime,
            downtime_limit_ms: source.context.request.options.downtime_limit_ms.into(),
        });
        source.context.progress.update(|p| {
            let expected = p.whole.as_ref().and_then(|whole| whole.ram_expected_bytes);
            p.ram = Some(RamProgress::of(figures, stream_bytes, expected));
        });
    }
    copies::look(source).await?;
    source.copy.foresee(&source.context.progress, passes, false);
    slowness::look(source).await;
    slow_writes::look(source).await
}

/// The guest is at rest: finishes the copies of the disks, so that both sides' disks are identical, and
/// has the exports closed.
pub(crate) async fn switchover(source: &mut Source) -> Result<(), Failure> {
    let since = Instant::now();
    copies::finish(source).await?;
    guest_watch::tell_whether_it_runs(source).await?;
    close_exports(source).await?;
    source.clock.downtime.disks_ms = millis(since);
    Ok(())
}

/// Has the exports closed. Dismissing the jobs that have completed does not delay that.
async fn close_exports(source: &mut Source) -> Result<(), Failure> {
    let policy = source.reconnect_policy();
    let Source { context, peer, guest, copy, .. } = &mut *source;
    let closed = policy.with(peer.link.demand(Request::Switchover, REQUEST_DEADLINE));
    let disks = copy.plan.disks.iter().map(|plan| plan.disk.name.clone());
    let compares = context.request.options.verify.is_some();
    let (closed, dismissed, given_up, written) = tokio::join!(
        closed,
        mirror::dismiss(&guest.qmp, disks),
        given_up::is_possible(&guest.qmp, guest.inventory.as_ref()),
        verify::written_since(&guest.qmp, compares)
    );
    verify::conclude(source, written);
    closed.and(dismissed.map_err(Failure::from)).and(given_up)
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
            event => any_phase::on_event(source, event).await?,
        }
    }
    // QEMU takes a `cont` after its migration, too. One that does not answer at once is not waited for: the guest is
    // whole at the destination.
    let looked = source.guest.qmp.execute_within(QueryStatus, LOOK_DEADLINE).await;
    if looked.is_ok_and(|info| info.status == RunState::Running) {
        return Err(Meanwhile::Continued.into());
    }
    source.clock.downtime.device_ms = millis(since);
    Ok(())
}
