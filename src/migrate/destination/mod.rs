//! The destination's role: serves one migration's control stream, step by step, once it is admitted.
//!
//! It never starts a guest unasked, and once it has durably begun to start one it never goes
//! back. Before that, anything that fails, and any loss of the source, undoes what it prepared
//! and leaves the durable word that the guest never ran here.

pub(crate) mod admission;
mod end;
pub(crate) mod error;
mod explain;
mod exports;
pub(crate) mod handoff;
pub(crate) mod image_stamp;
mod ownership;
mod start;
mod view;

use end::never_ran;
pub(crate) use end::undo;
pub(crate) use ownership::Serving;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::checks::disks;
use super::guest::last_words::LastWords;
use super::guest::nbd_server::NbdServer;
use super::guest::process::{self, StartedQemu};
use super::guest::{nbd_server, settings};
use super::handover::{self, Ask, DestinationInput, DestinationState, Ended};
use super::host::Host;
use super::host::decisions::Orders;
use super::host::destinations::{Incoming, Registration};
use super::host::reservations::Reservation;
use super::journal::{Beginning, Journal, Record, Role, Undo};
use super::model::image::Image;
use super::model::label::Label;
use super::model::phase::Phase;
use super::model::plan::RAM_CHANNEL;
use super::model::problem::chain;
use super::model::progress::{Progress, ProgressSink};
use super::protocol::message::{Fate, Offer, Prepared, Request, Response, Started};
use super::protocol::server::Control;
use super::settle;
use super::transfer::streams::{Streams, socket_pair};
use crate::mux::{Code, purpose};
use crate::net::compress::{Coding, Undelivered};
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;
use crate::qemu::{
    Abilities, EventKind, Events, MigrateIncoming, MigrationStatus, Qmp, QueryMigrate, QueryStatus, Stop,
    names,
};
use admission::{permitted, target_problems, unreachable};
use error::Trouble;

/// Streams that may wait to be attached.
const STREAMS_WAITING_MAX: usize = 64;
/// How long the guest may take to run after `cont`.
const RUNNING_DEADLINE: Duration = Duration::from_secs(15);
/// How long a source may take to take note that its guest runs here.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at what has come.
const TICK: Duration = Duration::from_secs(1);

/// A destination at work.
pub(crate) struct Destination {
    pub(crate) host: Arc<Host>,
    pub(crate) vm: String,
    pub(crate) peer: Identity,
    pub(crate) journal: Journal,
    pub(crate) progress: ProgressSink,
    pub(crate) qmp: Qmp,
    pub(crate) events: Events,
    pub(crate) started: Option<StartedQemu>,
    pub(crate) last_words: LastWords,
    pub(crate) nbd: Option<NbdServer>,
    pub(crate) exports: Vec<super::protocol::message::Export>,
    pub(crate) images: Vec<Image>,
    pub(crate) streams: Streams,
    pub(crate) offered: mpsc::Receiver<IncomingStream>,
    pub(crate) controls: mpsc::Receiver<(Control, Request)>,
    pub(crate) ram: Option<std::os::fd::OwnedFd>,
    pub(crate) incoming: bool,
    /// Whose the guest is, while it is not run.
    pub(crate) handover: handover::Destination,
    pub(crate) serving: Serving,
    /// What was granted for which offer, and how the guest started: to be said again.
    pub(crate) granted: Option<(Offer, Prepared)>,
    pub(crate) said_started: Option<Started>,
    /// What an operator decides.
    pub(crate) orders: Orders,
    /// Nobody has listened to QEMU for a while: what happened is asked for.
    pub(crate) missed_events: bool,
    pub(crate) _registration: Registration,
    pub(crate) _reservation: Reservation,
}

/// Where a destination gets its streams.
pub(crate) struct Served {
    pub(crate) offered: mpsc::Receiver<IncomingStream>,
    pub(crate) controls: mpsc::Receiver<(Control, Request)>,
}

impl Served {
    /// With the ends that fill it.
    pub(crate) fn new() -> (Self, mpsc::Sender<IncomingStream>, mpsc::Sender<(Control, Request)>) {
        let (stream_sender, offered) = mpsc::channel(STREAMS_WAITING_MAX);
        let (control_sender, controls) = mpsc::channel(1);
        (Self { offered, controls }, stream_sender, control_sender)
    }
}

impl Destination {
    /// Finds or starts the QEMU and makes it ready for `offer`; undone again if that fails.
    pub(crate) async fn prepare(
        host: Arc<Host>,
        peer: Identity,
        migration: Uuid,
        offer: &Offer,
    ) -> Result<(Self, Prepared), Trouble> {
        permitted(&host, &peer, &offer.vm)?;
        let problem = |p| Trouble::Problems(vec![p]);
        let config = host.vm(&offer.vm, "destination").map_err(problem)?.clone();
        let reservation = host.reserve(&offer.vm, migration).map_err(problem)?;
        let mut journal = host.journals.begin(migration, Role::Destination, &peer, beginning(offer))?;
        let (started, qmp, events) = match find_or_start(&host, &offer.vm, &config, &mut journal).await {
            Ok(found) => found,
            Err(trouble) => {
                let mut left = settle::never_begun(&host, &mut journal).await;
                left.extend(if let Trouble::Vm(error) = &trouble { error.leftover() } else { None });
                host.journals.end(journal, never_ran(&trouble, left));
                return Err(trouble);
            }
        };
        let (served, offers, controls) = Served::new();
        let incoming = Incoming { peer: peer.clone(), streams: offers, control: controls };
        let registration = host.destinations.register(migration, incoming);
        let noted = journal.note_qemu(qmp.process());
        let start_log = started.as_ref().map(|_| process::start_log(&host.config, &offer.vm));
        let last_words = LastWords::of(&config, qmp.process(), start_log.as_deref());
        let mut progress = Progress::new(migration, &offer.vm, Role::Destination, peer.as_str());
        progress.paused = !offer.running;
        let orders = host.decisions.take_orders(migration);
        let mut destination = Self {
            host,
            vm: offer.vm.clone(),
            peer,
            journal,
            progress: ProgressSink::new(progress),
            qmp,
            events,
            started,
            last_words,
            nbd: None,
            exports: exports::exports(&offer.disks),
            images: Vec::new(),
            streams: Streams::new(),
            offered: served.offered,
            controls: served.controls,
            ram: None,
            incoming: false,
            handover: handover::Destination::new(),
            serving: Serving::new(None),
            granted: None,
            said_started: None,
            orders,
            missed_events: false,
            _registration: registration,
            _reservation: reservation,
        };
        let ready = match noted {
            Ok(()) => destination.make_ready(offer).await,
            Err(e) => Err(e.into()),
        };
        match ready {
            Ok(prepared) => {
                destination.granted = Some((offer.clone(), prepared.clone()));
                Ok((destination, prepared))
            }
            Err(trouble) => Err(destination.give_up(trouble).await),
        }
    }

    async fn make_ready(&mut self, offer: &Offer) -> Result<Prepared, Trouble> {
        let found = target_problems(&self.qmp, offer).await?;
        let findings = offer.policy.judge(found).map_err(Trouble::Problems)?;
        // A QEMU that was started without -S would run its guest unasked.
        self.qmp.execute(Stop).await?;
        let present = crate::qemu::disks(&self.qmp).await?;
        let pairs = disks::pair(&offer.disks, &present);
        self.images = image_stamp::images(pairs.pairs.iter().map(|(want, have)| (want.name.as_str(), *have)));
        let since = offer.after.map_or_else(Vec::new, |after| {
            image_stamp::since(&self.host.journals, &self.peer, &self.vm, after, &self.images)
        });
        let nodes: Vec<_> =
            self.exports.iter().filter_map(|e| pairs.of(&e.disk).map(|d| (e, d.node_name.clone()))).collect();
        if !nodes.is_empty() {
            let folder = self.host.config.runtime_dir.join("nbd");
            self.nbd = Some(NbdServer::start(&self.qmp, &mut self.journal, &folder, &nodes).await?);
        }
        let (major, minor, micro) = Abilities::ask(&self.qmp).await?.version;
        self.enter(Phase::Prepare);
        self.show_disks(offer);
        Ok(Prepared {
            exports: self.exports.clone(),
            qemu: format!("QEMU {major}.{minor}.{micro}"),
            restartable: self.started.is_some(),
            since,
            compress: offer.compress,
            findings,
            hook_s: Some(self.hook_s()),
        })
    }

    /// How long `before_start` may take here.
    fn hook_s(&self) -> u64 {
        let hook = self.host.config.vms.get(&self.vm).map(|vm| vm.before_start.is_empty());
        if hook.unwrap_or(true) { 0 } else { self.host.config.deadlines.hook_s }
    }

    /// Serves the source until something happens that its machine is to know; `None`: until the guest runs
    /// here and the source knows, or stays away.
    async fn work(&mut self, machine: handover::Destination) -> Result<Option<DestinationInput>, Trouble> {
        if self.serving.confirmed {
            self.answer_confirmed().await;
            return Ok(None);
        }
        let runs = machine.ended() == Some(Ended::Moved);
        if let Some(happened) = self.begin(machine).await? {
            return Ok(Some(happened));
        }
        loop {
            let frozen = self.host.freeze.begun();
            let alone_until = self.serving.alone_until;
            let request = async {
                match self.serving.control.as_mut() {
                    Some(control) => control.request().await,
                    None => std::future::pending().await,
                }
            };
            let happened = tokio::select! {
                biased;
                event = self.events.recv() => match event.map(|e| e.kind) {
                    Some(EventKind::Missed) => self.catch_up(machine).await?,
                    event => self.on_event(event).await?,
                },
                request = request => match request {
                    Ok(Some(request)) => self.on_request(request, machine).await?,
                    Ok(None) | Err(_) => {
                        self.serving.control = None;
                        self.on_source_lost(machine)?;
                        None
                    }
                },
                Some((again, request)) = self.controls.recv() => {
                    (self.serving.control, self.serving.alone_until) = (Some(again), None);
                    self.host.decisions.answered(self.journal.past().header.migration);
                    self.on_request(request, machine).await?
                }
                Some(order) = self.orders.recv() => self.claim(order),
                Some(stream) = self.offered.recv() => {
                    self.attach(stream).await;
                    None
                }
                (label, end) = self.streams.ended() => {
                    tracing::debug!(stream = %label, end = chain(&end), "a stream ended");
                    None
                }
                () = frozen => return Err(Trouble::Frozen),
                _ = self.serving.tick.tick() => {
                    self.look_at_streams();
                    None
                }
                // A guest that is here whole may be handed over at any moment: that is waited for, unless
                // its source is away.
                () = self.host.stopping.cancelled(), if alone_until.is_some() || !(machine.is_loaded() || runs) => {
                    return if runs { Ok(None) } else { Err(Trouble::Stopping) };
                }
                () = sleep_until(alone_until.unwrap_or_else(Instant::now)), if alone_until.is_some() => {
                    if runs {
                        return Ok(None);
                    }
                    return Err(Trouble::SourceStayedAway(self.host.config.deadlines.handover_s));
                }
            };
            if happened.is_some() {
                return Ok(happened);
            }
        }
    }

    /// Asks QEMU what has happened while nobody listened.
    async fn catch_up(
        &mut self,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Trouble> {
        if !self.incoming || machine.state() != (DestinationState::Waiting { loaded: false }) {
            return Ok(None);
        }
        let status = self.qmp.execute(QueryMigrate).await?.status;
        self.on_event(Some(EventKind::Migration { status })).await
    }

    /// How long to wait for a source that was lost; an error when there is nothing to wait for.
    fn on_source_lost(&mut self, machine: handover::Destination) -> Result<(), Trouble> {
        let wait = if machine.ended() == Some(Ended::Moved) {
            CONFIRM_DEADLINE
        } else if machine.is_loaded() {
            tracing::warn!(vm = self.vm, "the source was lost with the guest loaded; waiting for it");
            let words = format!(
                "the whole guest is here, paused, and {} was lost before it said whether it hands it over. It is \
                 waited for, {} s in all; then the guest is given up here, for good",
                self.peer, self.host.config.deadlines.handover_s
            );
            self.host.decisions.open_question(self.journal.past().header.migration, words);
            self.host.config.deadlines.handover()
        } else {
            return Err(Trouble::SourceLost);
        };
        self.serving.alone_until = Some(Instant::now() + wait);
        Ok(())
    }

    async fn on_event(&mut self, event: Option<EventKind>) -> Result<Option<DestinationInput>, Trouble> {
        let Some(event) = event else {
            return Err(Trouble::of_monitor(&self.vm, &self.qmp));
        };
        let EventKind::Migration { status } = event else { return Ok(None) };
        match status {
            MigrationStatus::Completed => Ok(Some(DestinationInput::Loaded)),
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                let error = self.qmp.execute(QueryMigrate).await?.error_desc.unwrap_or_default();
                Err(Trouble::Ram { status, error })
            }
            MigrationStatus::Active => {
                self.enter(Phase::Precopy);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Whatever is asked may be asked again, and gets the same answer again. What is the machine's to
    /// answer is told to it.
    async fn on_request(
        &mut self,
        request: Request,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Trouble> {
        self.serving.asked = true;
        let open = matches!(machine.state(), DestinationState::Waiting { .. });
        let done = match request {
            Request::Prepare(offer) => {
                let answer = self.grant_again(&offer);
                self.answer(answer).await;
                return Ok(None);
            }
            Request::Incoming if self.incoming => Ok(()),
            Request::Incoming if open => self.accept_ram().await,
            Request::ToRun { running } if open => self.note_to_run(running),
            Request::Switchover if self.incoming => {
                self.enter(Phase::Switchover);
                let closed = self.close_exports(machine).await;
                if closed.is_ok() {
                    self.enter(Phase::Device);
                }
                closed
            }
            Request::Start if machine.is_loaded() => match self.qmp.execute(QueryStatus).await {
                Ok(_) => return Ok(Some(DestinationInput::Asked(Ask::Start))),
                Err(e) => Err(e.into()),
            },
            Request::Confirmed if machine.ended() == Some(Ended::Moved) => {
                self.serving.confirmed = true;
                return Ok(Some(DestinationInput::Asked(Ask::Confirmed)));
            }
            Request::Abort { reason } if open => return Err(Trouble::Aborted(reason)),
            Request::Abort { .. } => return Ok(Some(DestinationInput::Asked(Ask::Abort))),
            Request::Start => return Ok(Some(DestinationInput::Asked(Ask::Start))),
            Request::Settle => return Ok(Some(DestinationInput::Asked(Ask::Settle))),
            other => Err(Trouble::OutOfOrder(other.name())),
        };
        if done.is_ok() {
            self.answer(Response::Done).await;
        }
        done.map(|()| None)
    }

    /// Answers the source's last request, if it has not been.
    async fn answer(&mut self, response: Response) {
        if let (true, Some(control)) = (std::mem::take(&mut self.serving.asked), &mut self.serving.control) {
            control.answer(response).await;
        }
    }

    /// The source knows that the guest runs here, and how it went.
    async fn answer_confirmed(&mut self) {
        self.serving.rate = (std::time::Instant::now(), self.streams.total());
        let control = self.serving.control.take();
        self.look_at_streams();
        let Some(mut control) = control else { return };
        self.learn(control.take_summary());
        control.answer(Response::Done).await;
        control.finish();
    }

    fn grant_again(&self, offer: &Offer) -> Response {
        match &self.granted {
            Some((before, prepared)) if offer.is_again(before) => Response::Prepared(prepared.clone()),
            _ => Response::Refused(Trouble::OutOfOrder("prepare").refusal()),
        }
    }

    /// What the source is told of the guest.
    fn word(&self, fate: Fate) -> Response {
        match &self.said_started {
            Some(started) => Response::Started(started.clone()),
            None => Response::Fate(fate),
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
            Ok(stream) => {
                let is_disk = matches!(label, Label::Disk(_));
                if is_disk {
                    self.enter(Phase::Mirror);
                }
                let coding = match &self.granted {
                    Some((_, grant)) if grant.compress && is_disk => {
                        Coding::Decompress(Undelivered::default())
                    }
                    _ => Coding::Plain,
                };
                self.streams.start_coded(label, &session, local, stream, coding);
            }
            Err(e) => tracing::warn!(stream = %label, error = %e, "the stream ended before it began"),
        }
    }

    async fn accept_ram(&mut self) -> Result<(), Trouble> {
        self.incoming = true;
        let before = settings::remember::<Trouble>(&self.qmp, &mut self.journal).await?;
        before.state(&self.qmp, &["events", "return-path"], None).await?;
        let (ours, theirs) = socket_pair()?;
        self.journal.will_make(Undo::Fd(names::RAM_FDNAME.into()))?;
        self.qmp.getfd(names::RAM_FDNAME, theirs).await?;
        self.ram = Some(ours);
        let incoming = MigrateIncoming::from_fd(names::RAM_FDNAME);
        // A QEMU that stays tells why it failed; it is ended in `undo`.
        let stays = Abilities::ask(&self.qmp).await?.exit_on_error;
        self.qmp.execute(if stays { incoming.and_stay() } else { incoming }).await?;
        Ok(())
    }

    /// On the disk before it is answered, and so before the guest can be handed over.
    fn note_to_run(&mut self, running: bool) -> Result<(), Trouble> {
        if self.journal.past().running() != running {
            self.journal.record(Record::ToRun { running })?;
            self.progress.update(|p| p.paused = !running);
        }
        Ok(())
    }

    /// The disks become the guest's alone.
    async fn close_exports(&mut self, machine: handover::Destination) -> Result<(), Trouble> {
        // Somebody's `cont` meanwhile would have QEMU start the guest when it is loaded, unasked.
        if machine.state() == (DestinationState::Waiting { loaded: false }) {
            self.qmp.execute(Stop).await?;
        }
        self.nbd = None;
        // The journal knows of a server that an earlier process has started.
        if self.journal.past().undo.contains(&Undo::NbdServer) {
            nbd_server::close(&self.qmp, &self.exports).await?;
        }
        Ok(())
    }
}

async fn find_or_start(
    host: &Host,
    name: &str,
    config: &crate::config::VmConfig,
    journal: &mut Journal,
) -> Result<(Option<StartedQemu>, Qmp, Events), Trouble> {
    match (process::connect(config).await, &config.start) {
        (Ok((qmp, events)), _) => Ok((None, qmp, events)),
        (Err(e), Some(start)) if e.is_not_listening() => {
            journal.will_make(Undo::Qemu)?;
            let purpose = journal.past().header.migration;
            let (started, qmp, events) = process::start(&host.config, name, config, start, purpose).await?;
            Ok((Some(started), qmp, events))
        }
        (Err(e), _) => Err(Trouble::Problems(vec![unreachable(name, &chain(&e))])),
    }
}

fn beginning(offer: &Offer) -> Beginning<'_> {
    let accepted = offer.policy.accept.clone();
    Beginning { vm: &offer.vm, running: offer.running, keep_source: false, retry: None, accepted }
}
