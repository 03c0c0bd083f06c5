//! The destination's role: serves one migration's control stream, step by step, once it is admitted.
//!
//! It never starts a guest unasked, and once it has durably begun to start one it never goes
//! back. Before that, anything that fails, and any loss of the source, undoes what it prepared
//! and leaves the durable word that the guest never ran here.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::admission::{permitted, target_problems, unreachable};
use super::exports::NbdServer;
use super::host::{Host, Registration, Reservation};
use super::journal::{Journal, Past, Record, Role, Undo};
use super::message::{Fate, Notice, Offer, Prepared, Reply, Request, Response, Started};
use super::perform::RAM_CHANNEL;
use super::phase::Phase;
use super::problem::chain;
use super::progress::{Outcome, Progress, ProgressSink};
use super::reception::{Control, Incoming};
use super::streams::{Label, Streams, socket_pair};
use super::trouble::Trouble;
use super::vm::{self, StartedQemu};
use super::{plan, settle, witness};
use crate::mux::{Code, purpose};
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;
use crate::qemu::{
    Abilities, Cont, DestinationLeftovers, EventKind, Events, MigrateIncoming, MigrateSetCapabilities,
    MigrationStatus, Qmp, QueryMigrate, QueryStatus, RunState, Stop, destination_cleanup, disks, names,
};

/// Streams that may wait to be attached.
const STREAMS_WAITING_MAX: usize = 64;
/// How long the guest may take to run after `cont`.
const RUNNING_DEADLINE: Duration = Duration::from_secs(15);
/// How long a source may take to take note that its guest runs here.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(60);

/// A destination at work.
pub(super) struct Destination {
    pub(super) host: Arc<Host>,
    pub(super) vm: String,
    pub(super) peer: Identity,
    pub(super) journal: Journal,
    pub(super) progress: ProgressSink,
    pub(super) qmp: Qmp,
    pub(super) events: Events,
    pub(super) started: Option<StartedQemu>,
    pub(super) nbd: Option<NbdServer>,
    pub(super) exports: Vec<super::message::Export>,
    pub(super) images: Vec<witness::Image>,
    pub(super) streams: Streams,
    pub(super) offered: mpsc::Receiver<IncomingStream>,
    pub(super) controls: mpsc::Receiver<Control>,
    pub(super) ram: Option<std::os::fd::OwnedFd>,
    pub(super) incoming: bool,
    pub(super) loaded: bool,
    /// QEMU may have been told to run the guest: from here on nothing leads back.
    pub(super) continued: bool,
    /// Nobody has listened to QEMU for a while: what happened is asked for.
    pub(super) missed_events: bool,
    pub(super) _registration: Registration,
    pub(super) _reservation: Reservation,
}

/// Where a destination gets its streams.
pub(super) struct Served {
    pub(super) offered: mpsc::Receiver<IncomingStream>,
    pub(super) controls: mpsc::Receiver<Control>,
}

impl Served {
    /// With the ends that fill it.
    pub(super) fn new() -> (Self, mpsc::Sender<IncomingStream>, mpsc::Sender<Control>) {
        let (stream_sender, offered) = mpsc::channel(STREAMS_WAITING_MAX);
        let (control_sender, controls) = mpsc::channel(1);
        (Self { offered, controls }, stream_sender, control_sender)
    }
}

/// What the loop does next.
enum Next {
    GoOn,
    /// The guest runs here and the source knows.
    Confirmed,
}

impl Destination {
    /// Finds or starts the QEMU and makes it ready for `offer`; undone again if that fails.
    pub(super) async fn prepare(
        host: Arc<Host>,
        peer: Identity,
        migration: Uuid,
        offer: &Offer,
    ) -> Result<(Self, Prepared), Trouble> {
        permitted(&host, &peer, &offer.vm)?;
        let problem = |p| Trouble::Problems(vec![p]);
        let config = host.vm(&offer.vm, "destination").map_err(problem)?.clone();
        let reservation = host.reserve(&offer.vm, migration).map_err(problem)?;
        let mut journal =
            host.journal(migration, Role::Destination, &offer.vm, &peer, offer.running, None)?;
        let (started, qmp, events) = match find_or_start(&host, &offer.vm, &config, &mut journal).await {
            Ok(found) => found,
            Err(trouble) => {
                let word = journal.record(Record::NeverRan);
                host.end(journal, never_ran(&trouble, word.err().map(|e| chain(&e)).into_iter().collect()));
                return Err(trouble);
            }
        };
        let (served, offers, controls) = Served::new();
        let incoming = Incoming { peer: peer.clone(), streams: offers, control: controls };
        let registration = host.register(migration, incoming);
        let progress = Progress::new(migration, &offer.vm, Role::Destination, peer.as_str());
        let mut destination = Self {
            host,
            vm: offer.vm.clone(),
            peer,
            journal,
            progress: ProgressSink::new(progress),
            qmp,
            events,
            started,
            nbd: None,
            exports: plan::exports(&offer.disks),
            images: Vec::new(),
            streams: Streams::new(),
            offered: served.offered,
            controls: served.controls,
            ram: None,
            incoming: false,
            loaded: false,
            continued: false,
            missed_events: false,
            _registration: registration,
            _reservation: reservation,
        };
        match destination.make_ready(offer).await {
            Ok(prepared) => Ok((destination, prepared)),
            Err(trouble) => {
                destination.give_up(&trouble).await;
                Err(trouble)
            }
        }
    }

    async fn make_ready(&mut self, offer: &Offer) -> Result<Prepared, Trouble> {
        let problems = target_problems(&self.qmp, offer).await?;
        if !problems.is_empty() {
            return Err(Trouble::Problems(problems));
        }
        // A QEMU that was started without -S would run its guest unasked.
        self.qmp.execute(Stop).await?;
        let disks = disks(&self.qmp).await?;
        self.images = witness::images(&disks);
        let since = offer.after.map_or_else(Vec::new, |after| {
            witness::since(&self.host, &self.peer, &self.vm, after, &self.images)
        });
        let nodes: Vec<_> = self
            .exports
            .iter()
            .filter_map(|e| disks.iter().find(|d| d.name == e.disk).map(|d| (e, d.node_name.clone())))
            .collect();
        if !nodes.is_empty() {
            let folder = self.host.config.runtime_dir.join("nbd");
            self.nbd = Some(NbdServer::start(&self.qmp, &mut self.journal, &folder, &nodes).await?);
        }
        let (major, minor, micro) = Abilities::ask(&self.qmp).await?.version;
        self.enter(Phase::Prepare);
        Ok(Prepared {
            exports: self.exports.clone(),
            qemu: format!("QEMU {major}.{minor}.{micro}"),
            restartable: self.started.is_some(),
            since,
        })
    }

    fn enter(&self, phase: Phase) {
        self.progress.update(|p| p.phase = phase);
    }

    /// Serves the source until the guest runs here, or never will.
    pub(super) async fn run(mut self, mut control: Option<Control>) {
        match self.work(&mut control).await {
            Ok(()) => self.end_moved(Vec::new()),
            Err(Trouble::Frozen) => self.stop(control).await,
            // A QEMU that is gone, or refuses, before it runs its guest: the way back is open.
            Err(trouble) if self.continued => self.go_on(&trouble).await,
            Err(trouble) => {
                tracing::warn!(vm = self.vm, cause = chain(&trouble), "the destination gives up");
                if let Some(control) = &mut control {
                    let text = chain(&trouble);
                    control.say(Reply::Notice(Notice::Failed { text })).await;
                }
                let aborted = matches!(trouble, Trouble::Aborted(_));
                self.give_up(&trouble).await;
                if let (true, Some(control)) = (aborted, &mut control) {
                    control.answer(Response::Done).await;
                }
                if let Some(control) = &mut control {
                    control.finish();
                }
            }
        }
    }

    async fn work(&mut self, control: &mut Option<Control>) -> Result<(), Trouble> {
        let mut alone_until = if control.is_none() { Some(self.on_source_lost()?) } else { None };
        if std::mem::take(&mut self.missed_events) {
            self.catch_up(control).await?;
        }
        loop {
            let frozen = self.host.frozen();
            let request = async {
                match control.as_mut() {
                    Some(control) => control.request().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                event = self.events.recv() => {
                    let loaded = self.on_event(event.map(|e| e.kind)).await?;
                    if let (true, Some(control)) = (loaded, control.as_mut()) {
                        control.say(Reply::Notice(Notice::Loaded)).await;
                    }
                }
                request = request => match request {
                    Ok(Some(request)) => {
                        let Some(control) = control.as_mut() else { continue };
                        if matches!(self.on_request(request, control).await?, Next::Confirmed) {
                            return Ok(());
                        }
                    }
                    Ok(None) | Err(_) => {
                        *control = None;
                        alone_until = Some(self.on_source_lost()?);
                    }
                },
                Some(again) = self.controls.recv() => {
                    let again = control.insert(again);
                    alone_until = None;
                    again.answer(Response::Fate(self.fate())).await;
                }
                Some(stream) = self.offered.recv() => self.attach(stream).await,
                (label, end) = self.streams.ended() => {
                    tracing::debug!(stream = %label, end = chain(&end), "a stream ended");
                }
                () = frozen => return Err(Trouble::Frozen),
                // A guest that is here whole may be handed over at any moment: that is waited for.
                () = self.host.stopping.cancelled(), if !self.loaded => return Err(Trouble::Stopping),
                () = sleep_until(alone_until.unwrap_or_else(Instant::now)), if alone_until.is_some() => {
                    if self.journal.past().runs {
                        return Ok(());
                    }
                    return Err(Trouble::SourceStayedAway(self.host.config.deadlines.handover_s));
                }
            }
        }
    }

    /// Asks QEMU what has happened while nobody listened.
    async fn catch_up(&mut self, control: &mut Option<Control>) -> Result<(), Trouble> {
        if !self.incoming || self.loaded {
            return Ok(());
        }
        let status = self.qmp.execute(QueryMigrate).await?.status;
        let loaded = self.on_event(Some(EventKind::Migration { status })).await?;
        if let (true, Some(control)) = (loaded, control.as_mut()) {
            control.say(Reply::Notice(Notice::Loaded)).await;
        }
        Ok(())
    }

    /// How long to wait for a source that was lost; an error when there is nothing to wait for.
    fn on_source_lost(&self) -> Result<Instant, Trouble> {
        if self.journal.past().runs {
            return Ok(Instant::now() + CONFIRM_DEADLINE);
        }
        if !self.loaded {
            return Err(Trouble::SourceLost);
        }
        tracing::warn!(vm = self.vm, "the source was lost with the guest loaded; waiting for it");
        Ok(Instant::now() + self.host.config.deadlines.handover())
    }

    fn fate(&self) -> Fate {
        match (self.journal.past().runs, self.loaded) {
            (true, _) => Fate::Runs,
            (false, true) => Fate::Loaded,
            (false, false) => Fate::NeverRan,
        }
    }

    /// Whether the guest has just been loaded.
    async fn on_event(&mut self, event: Option<EventKind>) -> Result<bool, Trouble> {
        let Some(event) = event else {
            return Err(Trouble::QemuGone { vm: self.vm.clone() });
        };
        let EventKind::Migration { status } = event else { return Ok(false) };
        match status {
            MigrationStatus::Completed => {
                self.loaded = true;
                self.enter(Phase::Device);
                Ok(true)
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                let error = self.qmp.execute(QueryMigrate).await?.error_desc.unwrap_or_default();
                Err(Trouble::Ram { status, error })
            }
            MigrationStatus::Active => {
                self.enter(Phase::Precopy);
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    async fn on_request(&mut self, request: Request, control: &mut Control) -> Result<Next, Trouble> {
        let started = self.journal.past().starting;
        let done = match request {
            Request::Incoming if !self.incoming => self.accept_ram().await,
            Request::Switchover if self.incoming && !started => self.close_exports().await,
            Request::Start if self.loaded && !started => match self.start_guest().await {
                Ok(started) => {
                    control.answer(Response::Started(started)).await;
                    return Ok(Next::GoOn);
                }
                Err(trouble) => Err(trouble),
            },
            Request::Confirmed if self.journal.past().runs => {
                control.answer(Response::Done).await;
                control.finish();
                return Ok(Next::Confirmed);
            }
            Request::Abort { reason } if !started => return Err(Trouble::Aborted(reason)),
            other => Err(Trouble::OutOfOrder(other.name())),
        };
        match done {
            Ok(()) => {
                control.answer(Response::Done).await;
                Ok(Next::GoOn)
            }
            Err(trouble) => {
                control.answer(Response::Refused(trouble.refusal())).await;
                Err(trouble)
            }
        }
    }

    /// Attaches a data stream that the source opened under this grant.
    async fn attach(&mut self, stream: IncomingStream) {
        let (kind, channel) = (stream.open.purpose, stream.open.channel);
        let label = match kind {
            purpose::RAM if channel == RAM_CHANNEL => Some(Label::Ram),
            purpose::NBD => {
                self.exports.iter().find(|e| e.channel == channel).map(|e| Label::Disk(e.disk.clone()))
            }
            _ => None,
        };
        let Some(label) = label.filter(|l| !self.streams.has(l)) else {
            tracing::warn!(purpose = kind, channel, "a stream outside the grant was refused");
            return stream.refuse(Code::Denied);
        };
        let local = match label {
            Label::Ram => self.ram.take().ok_or(std::io::ErrorKind::NotConnected.into()),
            Label::Disk(_) => match &self.nbd {
                Some(nbd) => nbd.connect(),
                None => Err(std::io::ErrorKind::NotConnected.into()),
            },
        };
        let local = match local {
            Ok(local) => local,
            Err(e) => {
                tracing::warn!(stream = %label, error = %e, "the local end cannot be connected");
                return stream.refuse(Code::ConnectFailed);
            }
        };
        let session = stream.session().clone();
        match stream.accept().await {
            Ok(stream) => self.streams.start(label, &session, local, stream),
            Err(e) => tracing::warn!(stream = %label, error = %e, "the stream ended before it began"),
        }
    }

    async fn accept_ram(&mut self) -> Result<(), Trouble> {
        self.incoming = true;
        let capabilities = MigrateSetCapabilities::on(&["events", "return-path"]);
        self.qmp.execute(capabilities).await?;
        let (ours, theirs) = socket_pair()?;
        self.journal.will_make(Undo::Fd(names::RAM_FDNAME.into()))?;
        self.qmp.getfd(names::RAM_FDNAME, theirs).await?;
        self.ram = Some(ours);
        self.qmp.execute(MigrateIncoming::from_fd(names::RAM_FDNAME)).await?;
        Ok(())
    }

    /// The disks become the guest's alone.
    async fn close_exports(&mut self) -> Result<(), Trouble> {
        if let Some(nbd) = self.nbd.take() {
            nbd.stop(&self.qmp).await?;
        }
        Ok(())
    }

    /// The guest is ours from the record on, unless its QEMU turns out to be gone before it was
    /// told to run it: then it surely never ran here.
    async fn start_guest(&mut self) -> Result<Started, Trouble> {
        self.qmp.execute(QueryStatus).await?;
        self.journal.record(Record::Starting)?;
        self.enter(Phase::HandOver);
        let mut warnings = Vec::new();
        let hook_ms = self.run_hook(&mut warnings).await;
        if self.journal.past().header.running {
            self.qmp.execute(QueryStatus).await?;
            warnings.extend(self.continue_guest().await?);
        }
        self.continued = true;
        self.journal.record(Record::Runs)?;
        self.enter(Phase::Confirm);
        tracing::info!(vm = self.vm, "the guest runs here");
        Ok(Started { hook_ms, warnings })
    }

    async fn run_hook(&self, warnings: &mut Vec<String>) -> Option<u64> {
        let hook = &self.host.config.vms.get(&self.vm)?.before_start;
        if hook.is_empty() {
            return None;
        }
        let since = Instant::now();
        let ran = vm::run_hook(hook, &self.vm, self.host.config.deadlines.hook()).await;
        warnings.extend(ran.err());
        Some(since.elapsed().as_millis() as u64)
    }

    /// Lets the guest run; a warning when QEMU does not say that it does.
    async fn continue_guest(&mut self) -> Result<Option<String>, Trouble> {
        self.continued = true;
        match self.qmp.execute(Cont).await {
            Err(source) if source.desc().is_some() => {
                self.continued = false;
                return Err(Trouble::NotStarted { vm: self.vm.clone(), source });
            }
            answer => answer?,
        };
        let until = Instant::now() + RUNNING_DEADLINE;
        loop {
            let info = self.qmp.execute(QueryStatus).await?;
            if info.running {
                return Ok(None);
            }
            if Instant::now() > until {
                return Ok(Some(format!("VM {} was started and is in state {}", self.vm, info.status)));
            }
            super::source::pause().await;
        }
    }

    /// After the word to start nothing leads back: the guest is here, as well as it can be.
    async fn go_on(mut self, trouble: &Trouble) {
        tracing::error!(vm = self.vm, cause = chain(trouble), "trouble after the hand-over");
        let mut leftovers = vec![chain(trouble)];
        if let Err(e) = self.journal.record(Record::Runs) {
            leftovers.push(chain(&e));
        }
        self.end_moved(leftovers);
    }

    fn end_moved(self, leftovers: Vec<String>) {
        let outcome = Outcome::Moved { leftovers };
        self.host.end(self.journal, outcome.clone());
        super::source::finish(&self.progress, Phase::Done, outcome);
    }

    /// Undoes what was prepared. The durable word that the guest never ran here comes first; on a
    /// disk that does not take it, a journal without the word to start says the same.
    async fn give_up(mut self, trouble: &Trouble) {
        let word = self.journal.record(Record::NeverRan);
        let mut leftovers: Vec<String> = word.err().map(|e| chain(&e)).into_iter().collect();
        // Streams first: an NBD client in its handshake would hang QEMU 7.2's server stop.
        self.streams.cut_all();
        self.ram = None;
        self.nbd = None;
        leftovers.extend(undo(&self.vm, &self.qmp, self.journal.past(), self.started.take()).await);
        witness::bear(&mut self.journal, &self.images, &leftovers);
        let outcome = never_ran(trouble, leftovers);
        self.host.end(self.journal, outcome.clone());
        tracing::info!(vm = self.vm, peer = %self.peer, "the destination is as it was");
        super::source::finish(&self.progress, Phase::Failed, outcome);
    }
}

fn never_ran(trouble: &Trouble, leftovers: Vec<String>) -> Outcome {
    let problems = trouble.refusal().problems;
    let cancelled = matches!(trouble, Trouble::Aborted(reason) if reason == "cancelled");
    let cause = chain(trouble);
    Outcome::Failed { phase: Phase::Prepare, cause, problems, cancelled, leftovers }
}

async fn find_or_start(
    host: &Host,
    name: &str,
    config: &crate::config::VmConfig,
    journal: &mut Journal,
) -> Result<(Option<StartedQemu>, Qmp, Events), Trouble> {
    match (vm::connect(config).await, &config.start) {
        (Ok((qmp, events)), _) => Ok((None, qmp, events)),
        (Err(e), Some(start)) if e.is_not_listening() => {
            journal.will_make(Undo::Qemu)?;
            let deadline = host.config.deadlines.qemu_start();
            let (started, qmp, events) =
                vm::start(name, config, start, &host.config.state_dir, deadline).await?;
            Ok((Some(started), qmp, events))
        }
        (Err(e), _) => Err(Trouble::Problems(vec![unreachable(name, &chain(&e))])),
    }
}

/// Whether the QEMU behind the monitor is still the one that waited for this migration.
async fn is_that_qemu(qmp: &Qmp, past: &Past) -> bool {
    let took_ram = past.undo.contains(&Undo::Fd(names::RAM_FDNAME.into()));
    match qmp.execute(QueryStatus).await.map(|info| info.status) {
        Ok(RunState::InMigrate) => true,
        Ok(RunState::Paused) => took_ram,
        _ => false,
    }
}

/// Undoes what `past` records: ends the QEMU that we started, or cleans the one that we found.
pub(super) async fn undo(name: &str, qmp: &Qmp, past: &Past, started: Option<StartedQemu>) -> Vec<String> {
    if settle::started_qemu(past) {
        let ended = match started {
            Some(started) => started.stop(qmp).await,
            None if is_that_qemu(qmp, past).await => vm::quit(name, qmp).await,
            // Somebody has started the VM since; what we had started is gone with its process.
            None => Ok(()),
        };
        return ended.err().map(|e| chain(&e)).into_iter().collect();
    }
    let mut left = DestinationLeftovers::default();
    for undo in &past.undo {
        match undo {
            Undo::Fd(name) => left.fdnames.push(name.clone()),
            Undo::NbdServer => left.nbd_server = true,
            Undo::Export(id) => left.exports.push(id.clone()),
            _ => {}
        }
    }
    let report = destination_cleanup(qmp, &left).await;
    let not_ours = report.left.iter().filter(|l| !l.source.is_disconnected());
    not_ours.map(|l| format!("{} in the destination's QEMU: {}", l.what, chain(&l.source))).collect()
}
