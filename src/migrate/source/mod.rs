//! The source's role: runs one migration through its phases, and back when one fails.

mod carried;
mod changes;
pub(crate) mod connect;
pub(crate) mod examine;
mod explain;
pub(crate) mod failure;
mod given_up;
mod guest_watch;
pub(crate) mod handoff;
mod look_again;
mod ownership;
pub(crate) mod phases;
mod pivoted;
pub(crate) mod reconnect_policy;
pub(crate) mod request;
pub(crate) mod retry;
mod trial;

pub(crate) use ownership::End;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::checks::machine;
use super::guest::inventory::Inventory;
use super::guest::last_words::LastWords;
use super::host::Host;
use super::journal::{Beginning, Journal, Record, Role};
use super::model::label::Label;
use super::model::phase::{Phase, Step};
use super::model::plan::{self, CopiedDisk};
use super::model::problem::{self, chain};
use super::model::progress::{DiskProgress, Downtime, Outcome, ProgressSink};
use super::protocol::client::{Link, LinkError};
use super::protocol::message::{Notice, Prepared, Request, Response};
use super::transfer::bandwidth::Attached;
use super::transfer::disk::delta::{Delta, DeltaError, Tracking};
use super::transfer::streams::Streams;
use crate::net::lanes::Lanes;
use crate::net::pump::PumpEnd;
use crate::qemu::{EventKind, Events, Qmp};
use connect::reach;
use examine::Examined;
use failure::Failure;
use reconnect_policy::Patience;
use request::SourceRequest;
use retry::{Ended, Held};

/// Between two looks at how far QEMU is.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// Something that happened while a phase waits.
pub(crate) enum Happening {
    Event(EventKind),
    Loaded,
    StreamEnded(Label, PumpEnd),
    /// What changed of a disk is copied, down to the last of it.
    Copied(String, Result<(), DeltaError>),
    Tick,
}

/// A migration at its source.
pub(crate) struct Source {
    pub(crate) host: Arc<Host>,
    pub(crate) request: SourceRequest,
    pub(crate) progress: ProgressSink,
    pub(crate) cancel: CancellationToken,
    pub(crate) qmp: Qmp,
    pub(crate) events: Events,
    pub(crate) lanes: Lanes,
    pub(crate) link: Link,
    pub(crate) journal: Journal,
    /// What becomes of it from its hand-over, or its failure, on.
    pub(crate) end: End,
    pub(crate) streams: Streams,
    pub(crate) disks: Vec<CopiedDisk>,
    /// The machine that the disks were planned for.
    pub(crate) inventory: Option<Inventory>,
    pub(crate) tracking: Tracking,
    pub(crate) delta: Delta,
    pub(crate) grant: Option<Prepared>,
    pub(crate) phase: Phase,
    pub(crate) tick: Interval,
    pub(crate) loaded: bool,
    pub(crate) downtime: Downtime,
    pub(crate) paused_at: Option<Instant>,
    pub(crate) share: Attached,
    pub(crate) rate: (Instant, u64),
    /// Nobody has listened to QEMU for a while: the next phase asks what happened.
    pub(crate) missed_events: bool,
    /// How often a phase was begun again for that.
    pub(crate) looks: u32,
    pub(crate) last_words: LastWords,
}

/// Runs one try of a migration from Begin to its end, which it leaves to the caller to make
/// known. The caller has reserved the VM.
pub(crate) async fn attempt(
    host: Arc<Host>,
    request: SourceRequest,
    progress: ProgressSink,
    cancel: CancellationToken,
    mut held: Option<Held>,
) -> Option<Ended> {
    match Source::begin(host, request, progress, cancel, &mut held).await {
        Ok(source) => source.run().await,
        Err(failure) => Some(Ended { held, ..not_begun(&failure) }),
    }
}

/// The end of a try before it changed anything.
pub(crate) fn not_begun(failure: &Failure) -> Ended {
    tracing::warn!(cause = chain(failure), "migration not begun; nothing was changed");
    Ended {
        phase: Phase::Failed,
        outcome: failed(Phase::Begin, failure, chain(failure), Vec::new()),
        may_pass: failure.may_pass(),
        handed_over: false,
        held: None,
    }
}

impl Source {
    async fn begin(
        host: Arc<Host>,
        request: SourceRequest,
        progress: ProgressSink,
        cancel: CancellationToken,
        held: &mut Option<Held>,
    ) -> Result<Self, Failure> {
        let problem = |p| Failure::Problems(vec![p]);
        let peer = host.peers.find(&request.peer).map_err(problem)?.identity.clone();
        let examined = examine::source(&host, &request.vm).await?;
        let Examined { qmp, events, disks, inventory, problems, running, .. } = examined;
        let findings = request.options.policy().judge(problems).map_err(Failure::Problems)?;
        progress.update(|p| problem::note(findings, &mut p.notes));
        let link = reach(&host, &request, &cancel).await?;
        let lanes = link.lanes().clone();
        let share = request.share.attach(&lanes, request.id);
        let mut retry = request.retry.clone();
        if let (Some(retry), Some(held)) = (&mut retry, &*held) {
            retry.kept = held.tracking.undo();
        }
        let beginning = Beginning {
            vm: &request.vm,
            running,
            keep_source: request.options.keep_source,
            retry,
            accepted: request.options.accept.clone(),
        };
        let journal = host.journals.begin(request.id, Role::Source, &peer, beginning)?;
        let mut journal = journal;
        if let Err(e) = journal.note_qemu(qmp.process()) {
            tracing::error!(
                error = chain(&e),
                "which QEMU it is was not written; the next record will fail, too"
            );
        }
        let config = host.vm(&request.vm, "source").map_err(problem)?;
        let last_words = LastWords::of(config, qmp.process(), None);
        // Now that this one tells of the bitmaps.
        let tracking = held.take().map(|held| held.pass_on(&host)).unwrap_or_default();
        let disks = plan::copied(&disks);
        progress.update(|p| {
            p.disks = disks.iter().map(disk_progress).collect();
            p.paused = !running;
        });
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let now = Instant::now();
        Ok(Self {
            host,
            request,
            progress,
            cancel,
            qmp,
            events,
            lanes,
            link,
            journal,
            end: End::default(),
            streams: Streams::new(),
            disks,
            inventory: Some(inventory),
            tracking,
            delta: Delta::new(),
            grant: None,
            phase: Phase::Begin,
            tick,
            loaded: false,
            downtime: Downtime::default(),
            paused_at: None,
            share,
            rate: (now, 0),
            missed_events: false,
            looks: 0,
            last_words,
        })
    }

    /// Everything from where it is up to the hand-over.
    async fn perform(&mut self) -> Result<(), Failure> {
        loop {
            let looked = self.look_if_missed().await;
            let done = match self.phase {
                _ if looked.is_err() => looked,
                Phase::Prepare => self.prepare().await,
                Phase::Mirror => self.mirror().await,
                Phase::Precopy => self.precopy().await,
                Phase::Switchover => self.switchover().await,
                Phase::Device => self.device().await,
                Phase::HandOver => return Ok(()),
                _ => Ok(()),
            };
            match done {
                Ok(()) => self.enter(Step::Done)?,
                Err(failure) => self.look_again(failure)?,
            }
        }
    }

    /// Goes to the next phase of the table, on disk before in fact.
    pub(crate) fn enter(&mut self, step: Step) -> Result<(), Failure> {
        let next = self.phase.after(step)?;
        // In the pause each sync is downtime, and the hand-over has a record of its own.
        if next < Phase::Switchover || next > Phase::HandOver {
            self.journal.record(Record::Phase(next))?;
        }
        self.phase = next;
        tracing::info!(migration = %self.request.id, vm = self.request.vm, phase = next.name(), "phase");
        self.progress.update(|p| p.phase = next);
        Ok(())
    }

    async fn prepare(&mut self) -> Result<(), Failure> {
        self.rehearse().await?;
        let examined_offer = self.offer().await?;
        let deadline = self.host.config.deadlines.qemu_start() + Duration::from_secs(30);
        let asked = self.patience().with(self.link.ask(Request::Prepare(examined_offer), deadline));
        let answer = tokio::select! {
            answer = asked => answer?,
            () = self.cancel.cancelled() => return Err(cancelled(&self.host)),
        };
        let Response::Prepared(grant) = answer else {
            return Err(LinkError::Unexpected { request: "prepare" }.into());
        };
        let granted = self.disks.iter().all(|d| grant.exports.iter().any(|e| e.disk == d.name));
        if !granted {
            return Err(LinkError::Unexpected { request: "prepare" }.into());
        }
        tracing::info!(destination = grant.qemu, "the destination is prepared");
        if self.request.options.compress && !grant.compress {
            let text = "the destination's agent does not know compression: disks are sent as they are";
            self.progress.update(|p| p.notes.push(text.into()));
        }
        let findings = grant.findings.clone();
        self.progress.update(|p| problem::note(findings, &mut p.notes));
        self.tracking.after = Some(self.request.id);
        self.grant = Some(grant);
        Ok(())
    }

    /// The offer again: between Begin and Prepare the guest may have been paused.
    async fn offer(&mut self) -> Result<super::protocol::message::Offer, Failure> {
        let disks = crate::qemu::disks(&self.qmp).await?;
        let running = self.journal.past().running();
        let unknown = |why| self.progress.update(|p| problem::note(vec![why], &mut p.notes));
        Ok(super::protocol::message::Offer {
            vm: self.request.vm.clone(),
            disks: super::checks::disks::offered(&disks),
            running,
            qemu: String::new(),
            compress: self.request.options.compress,
            policy: self.request.options.policy(),
            machine: machine::ask(&self.qmp, "source").await.map_err(unknown).ok(),
            after: self.tracking.after.filter(|_| self.tracking.is_worth_keeping()),
        })
    }

    /// How long a connection is missed: for long while the guest runs, for less while it stands
    /// still.
    pub(crate) fn patience(&self) -> Patience {
        let limit = self.paused_at.is_some().then(|| self.host.config.deadlines.resume_paused());
        let monitor = limit.unwrap_or_else(|| self.host.config.deadlines.stall());
        Patience::new(&self.host, &self.lanes, &self.progress, limit).for_monitor(&self.qmp, monitor)
    }

    /// Asks the destination for something whose answer is only that it is done.
    pub(crate) async fn demand(&mut self, request: Request, deadline: Duration) -> Result<(), Failure> {
        self.patience().with(self.link.demand(request, deadline)).await
    }

    /// Waits for the next thing to happen; what ends the migration is an error.
    pub(crate) async fn next(&mut self) -> Result<Happening, Failure> {
        let patience = self.patience();
        tokio::select! {
            biased;
            failure = patience.over() => Err(failure),
            () = self.cancel.cancelled(), if self.phase.may_cancel() => Err(cancelled(&self.host)),
            event = self.events.recv() => match event {
                Some(event) if event.kind == EventKind::Missed => Err(Failure::Missed),
                Some(event) => Ok(Happening::Event(event.kind)),
                None => Err(Failure::of_monitor(&self.qmp)),
            },
            notice = self.link.notice() => match notice? {
                Notice::Loaded => {
                    self.loaded = true;
                    Ok(Happening::Loaded)
                }
                Notice::Failed { text } => Err(Failure::Destination(text)),
            },
            // Before the streams: it is what explains the end of one.
            (disk, result) = self.delta.next() => Ok(Happening::Copied(disk, result)),
            (label, end) = self.streams.ended() => Ok(Happening::StreamEnded(label, end)),
            _ = self.tick.tick() => Ok(Happening::Tick),
        }
    }

    fn close(self, phase: Phase, outcome: Outcome, may_pass: bool) -> Ended {
        let handed_over = self.journal.past().handed_over;
        let Self { request: SourceRequest { id, vm, .. }, .. } = self;
        self.host.journals.end(self.journal, outcome.clone());
        tracing::info!(migration = %id, vm, phase = phase.name(), result = outcome.label(), "migration ends");
        Ended { phase, outcome, may_pass, handed_over, held: None }
    }

    /// The journal stays open: it tells of the bitmaps that stay.
    fn hold(self, outcome: Outcome) -> Ended {
        let held = Held { journal: self.journal, outcome: outcome.clone(), tracking: self.tracking };
        Ended { phase: Phase::Failed, outcome, may_pass: true, handed_over: false, held: Some(held) }
    }
}

/// Who cancelled: an operator, or the agent on its way out.
pub(crate) fn cancelled(host: &Host) -> Failure {
    if host.stopping.is_cancelled() { Failure::Stopping } else { Failure::Cancelled }
}

/// An operator's word alone does not end a QEMU that has the only copy of a guest's RAM.
pub(crate) fn kept_by_force(vm: &str) -> String {
    format!(
        "the QEMU of VM {vm}, paused: an operator gave the VM to the destination. Never continue it; end it \
         once the VM runs there"
    )
}

fn disk_progress(disk: &CopiedDisk) -> DiskProgress {
    DiskProgress { name: disk.name.clone(), total_bytes: disk.virtual_size, ..DiskProgress::default() }
}

pub(crate) fn failed(phase: Phase, failure: &Failure, cause: String, leftovers: Vec<String>) -> Outcome {
    let cancelled = matches!(failure, Failure::Cancelled);
    Outcome::Failed { phase, cause, problems: failure.problems(), cancelled, leftovers }
}

pub(crate) fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// Waits a little between two questions to QEMU.
pub(crate) async fn pause() {
    sleep(Duration::from_millis(10)).await;
}
