//! A source that stops for another process, and one that goes on where an earlier process has stopped.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::request::SourceRequest;
use super::{End, Source, TICK, millis, retry};
use crate::config::VmConfig;
use crate::migrate::guest::last_words::LastWords;
use crate::migrate::handoff::TakenUp;
use crate::migrate::handoff::state::{FrozenSource, Stopped, StoppedSource};
use crate::migrate::handoff::taken_up::{journal, reach};
use crate::migrate::host::Host;
use crate::migrate::journal::{Journal, Role};
use crate::migrate::model::options::Options;
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::protocol::client::Link;
use crate::migrate::transfer::bandwidth::{Attached, ShareHandle, Wish};
use crate::migrate::transfer::disk::delta::Delta;
use crate::migrate::transfer::streams::Streams;
use crate::net::stream_owner::{Descriptors, ThawedStreams};
use crate::qemu::{Events, Qmp};

impl Source {
    /// Stops: pumps between two bytes, everything else where it is.
    pub(crate) async fn stop(mut self) {
        let (data, ended) = self.streams.freeze().await;
        tracing::info!(
            phase = self.phase.name(),
            streams = data.len(),
            "the migration waits for the next process"
        );
        let host = Arc::clone(&self.host);
        let Wish { limit_bytes_per_s, weight } = self.request.share.wish();
        let frozen = FrozenSource {
            id: self.request.id,
            vm: self.request.vm,
            peer: self.request.peer,
            options: Options { limit_bytes_per_s, weight, ..self.request.options },
            progress: self.progress.now(),
            phase: self.phase,
            control: None,
            data: Vec::new(),
            ended,
            disks: self.disks,
            inventory: self.inventory,
            retry: self.request.retry,
            tracking: self.tracking,
            grant: self.grant,
            loaded: self.loaded,
            downtime: self.downtime,
            paused_ms: self.paused_at.map(millis),
        };
        let control = self.link.stop();
        host.freeze.add(Stopped::Source(Box::new(StoppedSource { frozen, control, data })));
    }
}

/// What a source that goes on has before its QEMU is asked.
struct Left {
    host: Arc<Host>,
    request: SourceRequest,
    progress: ProgressSink,
    cancel: CancellationToken,
    link: Link,
    journal: Journal,
    streams: Streams,
    share: Attached,
    frozen: FrozenSource,
}

/// Goes on with what an earlier process has left; why it cannot.
pub(crate) fn take_up(
    host: &Arc<Host>,
    mut frozen: FrozenSource,
    streams: &mut ThawedStreams,
    fds: &mut Descriptors,
) -> Result<TakenUp, String> {
    let (id, vm, peer) = (frozen.id, frozen.vm.clone(), frozen.peer.clone());
    let reservation = host.reserve(&vm, id).map_err(|p| p.to_string())?;
    let link = frozen.control.as_ref().and_then(|control| Link::take_up(control, streams));
    let link = link.ok_or("its session has ended")?;
    let lanes = link.lanes().clone();
    let journal = journal(host, id, Role::Source)?;
    let config = host.vm(&vm, "source").map_err(|p| p.to_string())?.clone();
    let data = std::mem::take(&mut frozen.data);
    let pumps = Streams::thaw(data, streams, fds, |session| lanes.add(session)).map_err(|e| e.to_string())?;
    std::mem::take(&mut frozen.ended).into_iter().for_each(|label| pumps.has_ended(label));
    let (progress, cancel) = (ProgressSink::new(frozen.progress.clone()), CancellationToken::new());
    let share = ShareHandle::new(&frozen.options, progress.clone());
    let attached = share.attach(&lanes, id);
    if frozen.paused_ms.is_some() {
        attached.go_ahead();
    }
    let (options, retry) = (frozen.options.clone(), frozen.retry.clone());
    let request = SourceRequest { id, vm, peer, options, retry, share: share.clone() };
    let past = journal.past().clone();
    let left = Left {
        host: Arc::clone(host),
        request: request.clone(),
        progress: progress.clone(),
        cancel: cancel.clone(),
        link,
        journal,
        streams: pumps,
        share: attached,
        frozen,
    };
    let this_try = Box::pin(async move {
        let (qmp, events) = reach(&past, &config).await?;
        left.source(&config, qmp, events).run().await
    });
    let tries = retry::go_on(Arc::clone(host), request, progress.clone(), cancel.clone(), this_try);
    let running = Box::pin(async move {
        tries.await;
        drop(reservation);
    });
    Ok(TakenUp { progress, cancel, share: Some(share), journal: (id, Role::Source), running })
}

impl Left {
    fn source(self, config: &VmConfig, qmp: Qmp, events: Events) -> Source {
        let Self { host, request, progress, cancel, link, journal, streams, share, frozen } = self;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Source {
            last_words: LastWords::of(config, qmp.process(), None),
            host,
            request,
            progress,
            cancel,
            qmp,
            events,
            lanes: link.lanes().clone(),
            link,
            journal,
            // Only what is the source's without a question is left to another process.
            end: End::default(),
            streams,
            disks: frozen.disks,
            inventory: frozen.inventory,
            tracking: frozen.tracking,
            delta: Delta::new(),
            grant: frozen.grant,
            phase: frozen.phase,
            tick,
            loaded: frozen.loaded,
            downtime: frozen.downtime,
            paused_at: frozen.paused_ms.map(ago),
            share,
            rate: (Instant::now(), 0),
            missed_events: true,
            looks: 0,
        }
    }
}

fn ago(ms: u64) -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}
