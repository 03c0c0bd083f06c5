//! A destination that stops for another process, and one that goes on where an earlier process has
//! stopped.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::state::{Data, Destination, Guest, Served, Serving};
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::guest::process::StartedQemu;
use crate::migrate::handoff::TakenUp;
use crate::migrate::handoff::state::{FrozenDestination, Stopped, StoppedDestination};
use crate::migrate::handoff::taken_up::{journal_as_left, reach};
use crate::migrate::host::Host;
use crate::migrate::journal::Role;
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::protocol::server::Control;
use crate::migrate::transfer::streams::Streams;
use crate::migrate::transfer::verify::transcript::Transcripts;
use crate::net::identity::Identity;
use crate::net::stream_owner::{Descriptors, ThawedStreams};
use crate::qemu::{Events, Qmp};

impl Destination {
    /// Stops, as the source does.
    pub(crate) async fn stop(mut self) {
        // Whoever takes the sessions up hears of these streams again.
        self.served.offered.close();
        while let Some(offered) = self.served.offered.recv().await {
            offered.leave();
        }
        let (data, _) = self.data.streams.freeze().await;
        tracing::info!(vm = self.vm, streams = data.len(), "the migration waits for the next process");
        self.progress.record_all();
        let host = Arc::clone(&self.host);
        let frozen = FrozenDestination {
            id: self.journal.past().header.migration,
            vm: self.vm,
            peer: self.peer.to_string(),
            progress: self.progress.now(),
            control: None,
            data: Vec::new(),
            exports: self.data.exports,
            images: self.data.images,
            nbd: None,
            ram: None,
            incoming: self.guest.incoming,
            handover: self.handover,
            granted: self.granted,
            said_started: self.said_started,
            started: self.guest.started.map(StartedQemu::into_unit),
            grant_left: Some(self.served.until.saturating_duration_since(Instant::now())),
        };
        let (nbd, ram, control) = (self.data.nbd, self.data.ram, self.serving.control.map(Control::stop));
        let stopped = StoppedDestination { frozen, control, data, nbd, ram };
        host.freeze.add(Stopped::Destination(Box::new(stopped)));
    }
}

/// Goes on with what an earlier process has left; why it cannot.
pub(crate) fn take_up(
    host: &Arc<Host>,
    left: FrozenDestination,
    streams: &mut ThawedStreams,
    fds: &mut Descriptors,
) -> Result<TakenUp, String> {
    let reservation = host.reserve(&left.vm, left.id).map_err(|p| p.to_string())?;
    let peer: Identity = left.peer.parse().map_err(|e| format!("{e}"))?;
    let journal = journal_as_left(host, left.id, Role::Destination)?;
    let config = host.vm(&left.vm, "destination").map_err(|p| p.to_string())?;
    let control = left.control.as_ref().and_then(|control| Control::take_up(control, streams));
    let pumps = Streams::thaw(left.data, streams, fds, |_| {}).map_err(|e| e.to_string())?;
    let carried = pumps.total();
    let within = left.grant_left.unwrap_or(host.config.deadlines.grant());
    let place = host.arrival(&peer).ok();
    let (id, served) = (left.id, Served::new(host, left.id, &peer, (within, place)));
    let nbd = left.nbd.map(|n| NbdServer::from_socket(&left.vm, fds.take(n)));
    let ram = left.ram.and_then(|n| fds.take(n));
    let data = Data { nbd, exports: left.exports, images: left.images, streams: pumps, ram };
    let progress = ProgressSink::new(left.progress).recorded(&host.audit);
    let (its_progress, its_host) = (progress.clone(), Arc::clone(host));
    let past = journal.past().clone();
    let its_config = config.clone();
    let destination = move |monitor: (Qmp, Events)| {
        let started = left.started.map(|unit| StartedQemu::of_earlier(&left.vm, unit, left.id));
        let guest = Guest::new(monitor, started, &its_host, (&left.vm, &its_config));
        Destination {
            guest: Guest { incoming: left.incoming, missed_events: true, ..guest },
            host: its_host,
            vm: left.vm,
            peer,
            journal,
            hashed: Transcripts::new(its_progress.clone()),
            progress: its_progress,
            data,
            served,
            handover: left.handover,
            serving: Serving::new(control, carried),
            granted: left.granted,
            said_started: left.said_started,
            _reservation: reservation,
        }
    };
    let running = async move {
        if let Some(monitor) = reach(&past, &config).await {
            destination(monitor).run().await;
        }
    };
    Ok(TakenUp {
        progress,
        cancel: CancellationToken::new(),
        share: None,
        journal: (id, Role::Destination),
        running: Box::pin(running),
    })
}
