//! A source that stops for another process, and one that goes on where an earlier process has stopped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::awaited_try::AwaitedTry;
use super::clock::Clock;
use super::context::Context;
use super::copying::Copying;
use super::further_try::Held;
use super::guest::Guest;
use super::peer::Peer;
use super::request::SourceRequest;
use super::retry;
use super::state::Source;
use crate::migrate::guest::last_words::LastWords;
use crate::migrate::handoff::TakenUp;
use crate::migrate::handoff::state::{FrozenHeld, FrozenSource, FrozenWait, Stopped, StoppedSource};
use crate::migrate::handoff::taken_up::{journal, journal_as_left, reach};
use crate::migrate::host::Host;
use crate::migrate::host::reservations::Reservation;
use crate::migrate::journal::{RetryOf, Role};
use crate::migrate::model::options::Options;
use crate::migrate::model::plan::Plan;
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::protocol::client::Link;
use crate::migrate::transfer::bandwidth::{ShareHandle, Wish};
use crate::migrate::transfer::disk::frozen::thaw_changes;
use crate::migrate::transfer::streams::Streams;
use crate::net::stream_owner::{Descriptors, ThawedStreams};

impl Source {
    /// Stops: pumps between two bytes, everything else where it is.
    pub(crate) async fn stop(mut self) {
        let changes = self.copy.leave_changes().await;
        let (data, ended) = self.copy.streams.freeze().await;
        let phase = self.clock.phase;
        tracing::info!(
            phase = phase.name(),
            streams = data.len(),
            "the migration waits for the next process"
        );
        let paused_ms = self.clock.paused_ms();
        let Context { host, request, progress, .. } = self.context;
        let Wish { limit_bytes_per_s, weight } = request.share.wish();
        let frozen = FrozenSource {
            id: request.id,
            vm: request.vm,
            peer: request.peer,
            options: Options { limit_bytes_per_s, weight, ..request.options },
            progress: progress.now(),
            phase,
            control: None,
            data: Vec::new(),
            ended,
            disks: self.copy.plan.disks.into_iter().map(|plan| plan.disk).collect(),
            inventory: self.guest.inventory,
            retry: request.retry,
            tracking: self.copy.tracking,
            changes: BTreeMap::new(),
            completed: self.copy.completed,
            grant: self.peer.grant,
            loaded: self.peer.loaded,
            downtime: self.clock.downtime,
            paused_ms,
        };
        let control = self.peer.link.stop();
        host.freeze.add(Stopped::Source(Box::new(StoppedSource { frozen, control, data, changes })));
    }
}

/// Goes on with what an earlier process has left; why it cannot.
pub(crate) fn take_up(
    host: &Arc<Host>,
    left: FrozenSource,
    streams: &mut ThawedStreams,
    fds: &mut Descriptors,
) -> Result<TakenUp, String> {
    let reservation = host.reserve(&left.vm, left.id).map_err(|p| p.to_string())?;
    let link = left.control.as_ref().and_then(|control| Link::take_up(control, streams));
    let link = link.ok_or("its session has ended")?;
    let (progress, options) = (ProgressSink::new(left.progress), left.options);
    let share = ShareHandle::new(&options, progress.clone());
    // Before anything of it can be sent.
    let attached = share.attach(link.lanes(), left.id);
    let journal = journal_as_left(host, left.id, Role::Source)?;
    let config = host.vm(&left.vm, "source").map_err(|p| p.to_string())?;
    let pumps = Streams::thaw(left.data, streams, fds, |session| {
        link.lanes().add(session);
        attached.spread();
    });
    let pumps = pumps.map_err(|e| e.to_string())?;
    left.ended.into_iter().for_each(|label| pumps.has_ended(label));
    let id = left.id;
    let request = SourceRequest { id, vm: left.vm, peer: left.peer, options, retry: left.retry, share };
    let context = context_of(host, request, progress);
    let mut peer = Peer::with_share(link, attached);
    (peer.grant, peer.loaded) = (left.grant, left.loaded);
    if left.paused_ms.is_some() {
        peer.share.go_ahead();
    }
    let plan = Plan::of(left.disks, context.request.options.in_band);
    let mut copy = Copying::new(plan, pumps, left.tracking);
    if let Some(grant) = &peer.grant {
        copy.plan.is_granted(&grant.exports);
    }
    copy.completed = left.completed;
    copy.take_up(thaw_changes(left.changes, fds));
    let clock = Clock::new(left.phase, left.downtime, left.paused_ms.map(ago));
    let (inventory, its_context) = (left.inventory, context.clone());
    let this_try = Box::pin(async move {
        let monitor = reach(journal.past(), &config).await?;
        let last_words = LastWords::of(&config, monitor.0.process(), None);
        let guest = Guest::new(monitor, inventory, last_words, true);
        // Only what is the source's without a question is left to another process.
        Source::new(its_context, peer, guest, copy, clock, journal).run().await
    });
    Ok(goes_on(context, id, this_try, reservation))
}

/// Waits on where an earlier process has stopped; why it cannot.
pub(crate) fn take_up_wait(host: &Arc<Host>, left: FrozenWait) -> Result<TakenUp, String> {
    let reservation = host.reserve(&left.vm, left.id).map_err(|p| p.to_string())?;
    let (progress, options) = (ProgressSink::new(left.progress), left.options);
    let share = ShareHandle::new(&options, progress.clone());
    let its_journal = left.held.as_ref().map_or(left.id, |held| held.migration);
    let held = match left.held {
        Some(FrozenHeld { migration, outcome, tracking }) => {
            Some(Held { journal: journal(host, migration, Role::Source)?, outcome, tracking })
        }
        None => None,
    };
    let (first, number) = (left.id, left.number);
    let retry = Some(RetryOf { first, number, kept: Vec::new() });
    let request = SourceRequest { id: first, vm: left.vm, peer: left.peer, options, retry, share };
    let context = context_of(host, request, progress);
    let (its_context, waiting) =
        (context.clone(), AwaitedTry { first, number, failed: left.failed, held, wait: left.wait });
    let next_try = Box::pin(async move { retry::wait_for_next(&its_context, waiting).await?.await });
    Ok(goes_on(context, its_journal, next_try, reservation))
}

fn context_of(host: &Arc<Host>, request: SourceRequest, progress: ProgressSink) -> Context {
    let progress = progress.recorded(&host.audit);
    Context { host: Arc::clone(host), request, progress, cancel: CancellationToken::new() }
}

/// Its VM is this migration's up to its end.
fn goes_on(context: Context, journal: Uuid, this_try: retry::Try, reservation: Reservation) -> TakenUp {
    let (progress, cancel) = (context.progress.clone(), context.cancel.clone());
    let share = Some(context.request.share.clone());
    let running = Box::pin(async move {
        retry::go_on(context, this_try).await;
        drop(reservation);
    });
    TakenUp { progress, cancel, share, journal: (journal, Role::Source), running }
}

fn ago(ms: u64) -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}
