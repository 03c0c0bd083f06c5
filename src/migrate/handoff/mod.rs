//! Succession: migrations stop between two steps, are left to another process of the agent as
//! plain data, and are taken up there where they were.
//!
//! A migration stops only while it waits: for the copy to get on, for an answer, for the other
//! side. Each phase can be begun again: it looks at what is there already. What happened in QEMU
//! while nobody listened is asked for. From the hand-over on nothing is left but the journal,
//! which has all that settling needs.

pub mod state;

use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::destination::{Destination, Served, Serving};
use super::guest::last_words::LastWords;
use super::guest::life;
use super::guest::nbd_server::NbdServer;
use super::guest::process::{self, StartedQemu};
use super::host::{Host, Reservation};
use super::journal::{Journal, Past, Role};
use super::model::options::Options;
use super::model::progress::ProgressSink;
use super::protocol::client::Link;
use super::protocol::server::{Control, Incoming};
use super::settle;
use super::source::request::SourceRequest;
use super::source::retry::{self, Try};
use super::source::{End, Source, TICK};
use super::transfer::bandwidth::{ShareHandle, Wish};
use super::transfer::disk::delta::Delta;
use super::transfer::streams::{Label, Streams};
use crate::config::VmConfig;
use crate::net::identity::Identity;
use crate::net::stream_owner::{Descriptors, ThawedStreams};
use crate::qemu::{Events, Qmp, QmpError};
use state::{FrozenDestination, FrozenMigrations, FrozenSource, StoppedControl, StoppedData, settle_data};

/// A migration that has stopped; its sessions have not.
#[derive(Debug)]
pub(crate) enum Stopped {
    Source(Box<StoppedSource>),
    Destination(Box<StoppedDestination>),
}

#[derive(Debug)]
pub(crate) struct StoppedSource {
    frozen: FrozenSource,
    control: StoppedControl,
    data: Vec<StoppedData>,
}

#[derive(Debug)]
pub(crate) struct StoppedDestination {
    frozen: FrozenDestination,
    control: Option<StoppedControl>,
    data: Vec<StoppedData>,
    nbd: Option<NbdServer>,
    ram: Option<OwnedFd>,
}

impl Stopped {
    fn settle(self, left: &mut FrozenMigrations, fds: &mut Descriptors) {
        match self {
            Self::Source(stopped) => {
                let StoppedSource { mut frozen, control, data } = *stopped;
                frozen.control = Some(control.settle());
                frozen.data = settle_data(data, fds);
                left.sources.push(frozen);
            }
            Self::Destination(stopped) => {
                let StoppedDestination { mut frozen, control, data, nbd, ram } = *stopped;
                frozen.control = control.map(StoppedControl::settle);
                frozen.data = settle_data(data, fds);
                frozen.nbd = nbd.and_then(NbdServer::into_socket).map(|socket| fds.add(socket));
                frozen.ram = ram.map(|ram| fds.add(ram));
                left.destinations.push(frozen);
            }
        }
    }
}

/// What has been left by migrations that have stopped, once their sessions have, too.
pub fn settle_stopped(host: &Host, fds: &mut Descriptors) -> FrozenMigrations {
    let mut left = FrozenMigrations::default();
    host.take_stopped().into_iter().for_each(|stopped| stopped.settle(&mut left, fds));
    left
}

/// A migration that goes on in this process.
pub struct TakenUp {
    /// Its progress.
    pub progress: ProgressSink,
    /// Cancels it, where this host is the source.
    pub cancel: CancellationToken,
    /// What it may send, where this host is the source.
    pub share: Option<ShareHandle>,
    /// Its journal is this one.
    pub journal: (Uuid, Role),
    host: Arc<Host>,
    part: Part,
}

enum Part {
    Source(Box<SourceRequest>, Try, Reservation),
    Destination(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl TakenUp {
    /// Runs it to its end. One whose QEMU cannot be reached any more is settled by its journal.
    pub async fn run(self) {
        let Self { progress, cancel, journal, host, part, .. } = self;
        match part {
            Part::Source(request, running, _reservation) => {
                retry::go_on(Arc::clone(&host), *request, progress.clone(), cancel, running).await;
            }
            Part::Destination(running) => running.await,
        }
        if progress.now().outcome.is_none()
            && !host.is_freezing()
            && let Some(open) = settle::reopen(&host, journal, progress)
        {
            settle::settle(host, open).await;
        }
    }
}

/// Takes up what an earlier process has left. What cannot be taken up is logged; its journal is
/// open, and is settled as after a crash. QEMU is not asked yet: its main loop may hang on a stream
/// that moves only when peers can reach us again.
pub fn take_up(
    host: &Arc<Host>,
    left: FrozenMigrations,
    streams: &mut ThawedStreams,
    fds: &mut Descriptors,
) -> Vec<TakenUp> {
    let mut taken = Vec::new();
    for frozen in left.sources {
        let (vm, id) = (frozen.vm.clone(), frozen.id);
        match Source::take_up(host, frozen, streams, fds) {
            Ok(one) => taken.push(one),
            Err(why) => tracing::error!(vm, migration = %id, why, "not taken up; its journal is settled"),
        }
    }
    for frozen in left.destinations {
        let (vm, id) = (frozen.vm.clone(), frozen.id);
        match Destination::take_up(host, frozen, streams, fds) {
            Ok(one) => taken.push(one),
            Err(why) => tracing::error!(vm, migration = %id, why, "not taken up; its journal is settled"),
        }
    }
    taken
}

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
            paused_ms: self.paused_at.map(super::source::millis),
        };
        let control = self.link.stop();
        host.stopped(Stopped::Source(Box::new(StoppedSource { frozen, control, data })));
    }

    fn take_up(
        host: &Arc<Host>,
        left: FrozenSource,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
    ) -> Result<TakenUp, String> {
        let reservation = host.reserve(&left.vm, left.id).map_err(|p| p.to_string())?;
        let link = left.control.as_ref().and_then(|control| Link::take_up(control, streams));
        let link = link.ok_or("its session has ended")?;
        let lanes = link.lanes().clone();
        let journal = journal(host, left.id, Role::Source)?;
        let config = host.vm(&left.vm, "source").map_err(|p| p.to_string())?.clone();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut pumps = Streams::new();
        for data in left.data {
            let label = data.label.clone();
            let thawed = data.thaw(streams, fds).ok_or_else(|| lost(&label))?;
            lanes.add(&thawed.session);
            pumps.resume(thawed);
        }
        left.ended.into_iter().for_each(|label| pumps.has_ended(label));
        let (id, vm, peer, options) = (left.id, left.vm, left.peer, left.options);
        let (progress, cancel) = (ProgressSink::new(left.progress), CancellationToken::new());
        let share = ShareHandle::new(&options, progress.clone());
        let attached = share.attach(&lanes, id);
        if left.paused_ms.is_some() {
            attached.go_ahead();
        }
        let request = SourceRequest { id, vm, peer, options, retry: left.retry, share };
        let revived = Revived { host: Arc::clone(host), request, progress, cancel };
        let Revived { host, request, progress, cancel } = revived.clone();
        let past = journal.past().clone();
        let vm_config = config.clone();
        let source = move |qmp: Qmp, events| Self {
            last_words: LastWords::of(&vm_config, qmp.process(), None),
            host,
            request,
            progress,
            cancel,
            qmp,
            events,
            lanes,
            link,
            journal,
            // Only what is the source's without a question is left to another process.
            end: End::default(),
            streams: pumps,
            disks: left.disks,
            inventory: left.inventory,
            tracking: left.tracking,
            delta: Delta::new(),
            grant: left.grant,
            phase: left.phase,
            tick,
            loaded: left.loaded,
            downtime: left.downtime,
            paused_at: left.paused_ms.map(ago),
            share: attached,
            rate: (Instant::now(), 0),
            missed_events: true,
            looks: 0,
        };
        let running = async move {
            match reach(&past, &config).await {
                Ok((qmp, events)) => source(qmp, events).run().await,
                Err(_) => None,
            }
        };
        let Revived { host, request, progress, cancel } = revived;
        let share = Some(request.share.clone());
        let part = Part::Source(Box::new(request), Box::pin(running), reservation);
        Ok(TakenUp { progress, cancel, share, journal: (id, Role::Source), host, part })
    }
}

/// What a migration that goes on, and whoever watches it, both have.
#[derive(Clone)]
struct Revived {
    host: Arc<Host>,
    request: SourceRequest,
    progress: ProgressSink,
    cancel: CancellationToken,
}

/// Reaches a monitor whose QEMU may stand still until its streams move again.
async fn reach(past: &Past, config: &VmConfig) -> Result<(Qmp, Events), QmpError> {
    life::reach(past, config).await.map_err(|(known, error)| {
        let (qemu, error_text) = (known.in_words(), super::model::problem::chain(&error));
        tracing::error!(
            qemu,
            error = error_text,
            "QEMU cannot be reached; the migration is settled by its journal"
        );
        error
    })
}

impl Destination {
    /// Stops, as [`Source::stop`].
    pub(crate) async fn stop(mut self) {
        // Whoever takes the sessions up hears of these streams again.
        self.offered.close();
        while let Some(offered) = self.offered.recv().await {
            offered.leave();
        }
        let (data, _) = self.streams.freeze().await;
        tracing::info!(vm = self.vm, streams = data.len(), "the migration waits for the next process");
        let host = Arc::clone(&self.host);
        let frozen = FrozenDestination {
            id: self.journal.past().header.migration,
            vm: self.vm,
            peer: self.peer.to_string(),
            progress: self.progress.now(),
            control: None,
            data: Vec::new(),
            exports: self.exports,
            images: self.images,
            nbd: None,
            ram: None,
            incoming: self.incoming,
            handover: self.handover,
            granted: self.granted,
            said_started: self.said_started,
            started: self.started.map(StartedQemu::into_unit),
        };
        let (nbd, ram, control) = (self.nbd, self.ram, self.serving.control.map(Control::stop));
        let stopped = StoppedDestination { frozen, control, data, nbd, ram };
        host.stopped(Stopped::Destination(Box::new(stopped)));
    }

    fn take_up(
        host: &Arc<Host>,
        left: FrozenDestination,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
    ) -> Result<TakenUp, String> {
        let reservation = host.reserve(&left.vm, left.id).map_err(|p| p.to_string())?;
        let peer: Identity = left.peer.parse().map_err(|e| format!("{e}"))?;
        let journal = journal(host, left.id, Role::Destination)?;
        let config = host.vm(&left.vm, "destination").map_err(|p| p.to_string())?.clone();
        let control = left.control.as_ref().and_then(|control| Control::take_up(control, streams));
        let mut pumps = Streams::new();
        for data in left.data {
            let label = data.label.clone();
            let thawed = data.thaw(streams, fds).ok_or_else(|| lost(&label))?;
            pumps.resume(thawed);
        }
        let (served, offers, controls) = Served::new();
        let incoming = Incoming { peer: peer.clone(), streams: offers, control: controls };
        let (id, registration) = (left.id, host.register(left.id, incoming));
        let (nbd, ram) = (
            left.nbd.map(|n| NbdServer::from_socket(&left.vm, fds.take(n))),
            left.ram.and_then(|n| fds.take(n)),
        );
        let progress = ProgressSink::new(left.progress);
        let (its_progress, its_host) = (progress.clone(), Arc::clone(host));
        let orders = host.take_orders(id);
        let past = journal.past().clone();
        let vm_config = config.clone();
        let start_log = left.started.as_ref().map(|_| process::start_log(host, &left.vm));
        let destination = move |qmp: Qmp, events| Self {
            last_words: LastWords::of(&vm_config, qmp.process(), start_log.as_deref()),
            orders,
            vm: left.vm.clone(),
            peer,
            journal,
            progress: its_progress,
            qmp,
            events,
            started: left.started.map(|unit| StartedQemu::of_earlier(&left.vm, unit, left.id)),
            nbd,
            exports: left.exports,
            images: left.images,
            streams: pumps,
            offered: served.offered,
            controls: served.controls,
            ram,
            incoming: left.incoming,
            handover: left.handover,
            serving: Serving::new(control),
            granted: left.granted,
            said_started: left.said_started,
            missed_events: true,
            _registration: registration,
            _reservation: reservation,
            host: its_host,
        };
        let running = async move {
            if let Ok((qmp, events)) = reach(&past, &config).await {
                destination(qmp, events).run().await;
            }
        };
        Ok(TakenUp {
            progress,
            cancel: CancellationToken::new(),
            share: None,
            journal: (id, Role::Destination),
            host: Arc::clone(host),
            part: Part::Destination(Box::pin(running)),
        })
    }
}

fn journal(host: &Host, id: Uuid, role: Role) -> Result<Journal, String> {
    let path = Journal::path(&host.journals(), id, role);
    let journal =
        Journal::open(&path, host.identity.as_str()).map_err(|e| super::model::problem::chain(&e))?;
    match journal.past().ended {
        None => Ok(journal),
        Some(_) => Err("its journal has ended".into()),
    }
}

fn lost(label: &Label) -> String {
    format!("the stream of {label} did not come along")
}

fn ago(ms: u64) -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}
