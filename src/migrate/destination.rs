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
use super::decide;
use super::exports::NbdServer;
use super::handover::{self, Ask, DestinationEffect, DestinationInput, DestinationState, Ended, Ran};
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
use super::{plan, settle};
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
    host: Arc<Host>,
    vm: String,
    peer: Identity,
    journal: Journal,
    pub(super) progress: ProgressSink,
    qmp: Qmp,
    events: Events,
    started: Option<StartedQemu>,
    nbd: Option<NbdServer>,
    exports: Vec<super::message::Export>,
    streams: Streams,
    offered: mpsc::Receiver<IncomingStream>,
    controls: mpsc::Receiver<(Control, Request)>,
    ram: Option<std::os::fd::OwnedFd>,
    incoming: bool,
    /// Whose the guest is.
    handover: handover::Destination,
    /// What was granted for which offer, and how the guest started: to be said again.
    granted: Option<(Offer, Prepared)>,
    said_started: Option<Started>,
    _registration: Registration,
    _reservation: Reservation,
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
            host.journal(migration, Role::Destination, &offer.vm, &peer, offer.running, false)?;
        let (started, qmp, events) = match find_or_start(&host, &offer.vm, &config, &mut journal).await {
            Ok(found) => found,
            Err(trouble) => {
                let word = journal.record(Record::NeverRan);
                host.end(journal, never_ran(&trouble, word.err().map(|e| chain(&e)).into_iter().collect()));
                return Err(trouble);
            }
        };
        let (stream_sender, offered) = mpsc::channel(STREAMS_WAITING_MAX);
        let (control_sender, controls) = mpsc::channel(1);
        let incoming = Incoming { peer: peer.clone(), streams: stream_sender, control: control_sender };
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
            streams: Streams::new(),
            offered,
            controls,
            ram: None,
            incoming: false,
            handover: handover::Destination::new(),
            granted: None,
            said_started: None,
            _registration: registration,
            _reservation: reservation,
        };
        match destination.make_ready(offer).await {
            Ok(prepared) => {
                destination.granted = Some((offer.clone(), prepared.clone()));
                Ok((destination, prepared))
            }
            Err(trouble) => {
                destination.give_up(&trouble, None).await;
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
        })
    }

    fn enter(&self, phase: Phase) {
        self.progress.update(|p| p.phase = phase);
    }

    /// Serves the source until the guest runs here, or never will.
    pub(super) async fn run(mut self, control: Control) {
        let mut control = Some(control);
        match self.work(&mut control).await {
            Ok(()) => self.end_moved(Vec::new()),
            Err(trouble) if self.handover.ended() == Some(Ended::Moved) => self.go_on(&trouble),
            Err(trouble) => {
                tracing::warn!(vm = self.vm, cause = chain(&trouble), "the destination gives up");
                if let Some(control) = &mut control {
                    let text = chain(&trouble);
                    control.say(Reply::Notice(Notice::Failed { text })).await;
                }
                self.give_up(&trouble, control).await;
            }
        }
    }

    async fn work(&mut self, control: &mut Option<Control>) -> Result<(), Trouble> {
        let mut alone_until = None;
        loop {
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
                Some((again, request)) = self.controls.recv() => {
                    let again = control.insert(again);
                    alone_until = None;
                    if matches!(self.on_request(request, again).await?, Next::Confirmed) {
                        return Ok(());
                    }
                }
                Some(stream) = self.offered.recv() => self.attach(stream).await,
                (label, end) = self.streams.ended() => {
                    tracing::debug!(stream = %label, end = chain(&end), "a stream ended");
                }
                // A guest that is here whole may be handed over at any moment: that is waited for.
                () = self.host.stopping.cancelled(), if !self.handover.is_loaded() && !self.runs() => return Err(Trouble::Stopping),
                () = sleep_until(alone_until.unwrap_or_else(Instant::now)), if alone_until.is_some() => {
                    if self.runs() {
                        return Ok(());
                    }
                    return Err(Trouble::SourceStayedAway(self.host.config.deadlines.handover_s));
                }
            }
        }
    }

    fn runs(&self) -> bool {
        self.handover.ended() == Some(Ended::Moved)
    }

    /// How long to wait for a source that was lost; an error when there is nothing to wait for.
    fn on_source_lost(&self) -> Result<Instant, Trouble> {
        if self.runs() {
            return Ok(Instant::now() + CONFIRM_DEADLINE);
        }
        if !self.handover.is_loaded() {
            return Err(Trouble::SourceLost);
        }
        tracing::warn!(vm = self.vm, "the source was lost with the guest loaded; waiting for it");
        Ok(Instant::now() + self.host.config.deadlines.handover())
    }

    /// Whether the guest has just been loaded.
    async fn on_event(&mut self, event: Option<EventKind>) -> Result<bool, Trouble> {
        let Some(event) = event else {
            return Err(Trouble::QemuGone { vm: self.vm.clone() });
        };
        let EventKind::Migration { status } = event else { return Ok(false) };
        match status {
            MigrationStatus::Completed => {
                self.enter(Phase::Device);
                let says = self.handover.step(DestinationInput::Loaded)?;
                Ok(says.contains(&DestinationEffect::Say(Fate::Loaded)))
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

    /// Whatever is asked may be asked again, and gets the same answer again.
    async fn on_request(&mut self, request: Request, control: &mut Control) -> Result<Next, Trouble> {
        let open = matches!(self.handover.state(), DestinationState::Waiting { .. });
        let done = match request {
            Request::Prepare(offer) => {
                control.answer(self.grant_again(&offer)).await;
                return Ok(Next::GoOn);
            }
            Request::Incoming if self.incoming => Ok(()),
            Request::Incoming if open => self.accept_ram().await,
            Request::Switchover if self.incoming => self.close_exports().await,
            Request::Start if self.handover.is_loaded() => match self.start_guest(control).await {
                Ok(()) => return Ok(Next::GoOn),
                Err(trouble) => Err(trouble),
            },
            Request::Confirmed if self.runs() => {
                if let Err(e) = self.journal.record(Record::Confirmed) {
                    tracing::info!(error = chain(&e), "the journal is kept for longer");
                }
                control.answer(Response::Done).await;
                control.finish();
                return Ok(Next::Confirmed);
            }
            Request::Abort { reason } if open => return Err(Trouble::Aborted(reason)),
            Request::Start | Request::Settle | Request::Abort { .. } => {
                control.answer(self.word()).await;
                return Ok(Next::GoOn);
            }
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

    fn grant_again(&self, offer: &Offer) -> Response {
        match &self.granted {
            Some((before, prepared)) if before == offer => Response::Prepared(prepared.clone()),
            _ => Response::Refused(Trouble::OutOfOrder("prepare").refusal()),
        }
    }

    /// What the source is told of the guest.
    fn word(&self) -> Response {
        match &self.said_started {
            Some(started) => Response::Started(started.clone()),
            None => Response::Fate(self.handover.fate()),
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
        let runtime = stream.session().runtime().clone();
        match stream.accept().await {
            Ok(stream) => self.streams.start(label, &runtime, local, stream),
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
    async fn start_guest(&mut self, control: &mut Control) -> Result<(), Trouble> {
        self.qmp.execute(QueryStatus).await?;
        let effects = self.handover.step(DestinationInput::Asked(Ask::Start))?;
        if let Some(error) = self.write(effects) {
            return Err(error.into());
        }
        self.enter(Phase::HandOver);
        let mut warnings = Vec::new();
        let hook_ms = self.run_hook(&mut warnings).await;
        let (ran, trouble) = self.let_run(&mut warnings).await;
        let effects = self.handover.step(DestinationInput::Ran(ran))?;
        if let Some(trouble) = trouble {
            self.write(effects);
            return Err(trouble);
        }
        self.enter(Phase::Confirm);
        tracing::info!(vm = self.vm, "the guest runs here");
        // Said before it is written: `starting` is on the disk, and says the same after a crash.
        self.said_started = Some(Started { hook_ms, warnings });
        control.answer(self.word()).await;
        self.write(effects);
        Ok(())
    }

    /// Writes the records of these effects, and of those that follow from them. The rest is done
    /// where the guest's start or end is.
    fn write(&mut self, effects: Vec<DestinationEffect>) -> Option<super::journal::JournalError> {
        let effects = effects.into_iter().filter(|e| matches!(e, DestinationEffect::Write(_))).collect();
        decide::write_destination(&mut self.handover, &mut self.journal, effects, None).1
    }

    async fn let_run(&mut self, warnings: &mut Vec<String>) -> (Ran, Option<Trouble>) {
        if !self.journal.past().header.running {
            return (Ran::Yes, None);
        }
        if let Err(e) = self.qmp.execute(QueryStatus).await {
            return (Ran::No, Some(e.into()));
        }
        match self.qmp.execute(Cont).await {
            Err(source) if source.desc().is_some() => {
                return (Ran::No, Some(Trouble::NotStarted { vm: self.vm.clone(), source }));
            }
            Err(e) => return (Ran::Perhaps, Some(e.into())),
            Ok(_) => {}
        }
        match self.wait_running().await {
            Ok(warning) => {
                warnings.extend(warning);
                (Ran::Yes, None)
            }
            Err(e) => (Ran::Perhaps, Some(e)),
        }
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

    /// A warning when QEMU does not say that the guest runs.
    async fn wait_running(&self) -> Result<Option<String>, Trouble> {
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
    fn go_on(mut self, trouble: &Trouble) {
        tracing::error!(vm = self.vm, cause = chain(trouble), "trouble after the hand-over");
        let mut leftovers = vec![chain(trouble)];
        if !self.journal.past().runs
            && let Err(e) = self.journal.record(Record::Runs)
        {
            leftovers.push(chain(&e));
        }
        self.end_moved(leftovers);
    }

    fn end_moved(self, leftovers: Vec<String>) {
        let outcome = Outcome::Moved { leftovers };
        self.host.end(self.journal, outcome.clone());
        super::source::finish(&self.progress, Phase::Done, outcome);
    }

    /// Undoes what was prepared, once it is proved that the guest never ran here and never will.
    async fn give_up(mut self, trouble: &Trouble, mut control: Option<Control>) {
        let asked = matches!(trouble, Trouble::Aborted(_));
        let input = match asked {
            true => DestinationInput::Asked(Ask::Abort),
            false => DestinationInput::Trouble,
        };
        let effects = decide::destination_step(&mut self.handover, input);
        let error = self.write(effects);
        // Streams first: an NBD client in its handshake would hang QEMU 7.2's server stop.
        self.streams.cut_all();
        self.ram = None;
        self.nbd = None;
        if !self.prove(&mut control).await {
            tracing::warn!(vm = self.vm, "the agent stops before its disk has taken a record");
            return;
        }
        let mut leftovers: Vec<String> = error.map(|e| chain(&e)).into_iter().collect();
        leftovers.extend(undo(&self.vm, &self.qmp, self.journal.past(), self.started.take()).await);
        let outcome = never_ran(trouble, leftovers);
        self.host.end(self.journal, outcome.clone());
        tracing::info!(vm = self.vm, peer = %self.peer, "the destination is as it was");
        super::source::finish(&self.progress, Phase::Failed, outcome);
        if let Some(mut control) = control {
            if asked {
                control.answer(Response::Fate(Fate::NeverRan)).await;
            }
            control.finish();
        }
    }

    /// Tries until the journal proves that the guest never will run; not when the agent stops before.
    async fn prove(&mut self, control: &mut Option<Control>) -> bool {
        while self.handover.ended().is_none() {
            tokio::select! {
                () = tokio::time::sleep(decide::ASK_AGAIN) => {
                    let effects = decide::destination_step(&mut self.handover, DestinationInput::Again);
                    self.write(effects);
                }
                Some((again, _)) = self.controls.recv() => {
                    control.insert(again).answer(self.word()).await;
                }
                () = self.host.stopping.cancelled() => return false,
            }
        }
        true
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
