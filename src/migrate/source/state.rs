//! A migration at its source: its parts, and what waiting has in common in all of its phases.
//!
//! ```text
//! Source ── context   what is asked, by whom; host, progress, cancellation
//!        ├─ peer      the destination: control stream, lanes, grant
//!        ├─ guest     the guest's QEMU: monitor, events, the machine of the plan
//!        ├─ copy      disks and RAM: their ways, their streams
//!        ├─ clock     the phase, and the guest's pause
//!        └─ journal   what is durable
//! ```

use std::time::Duration;

use tokio::time::Instant;

use super::clock::Clock;
use super::context::Context;
use super::copying::Copying;
use super::end::End;
use super::event::Event;
use super::failure::Failure;
use super::guest::Guest;
use super::peer::Peer;
use super::reconnect::ReconnectPolicy;
use crate::migrate::journal::{Journal, Record};
use crate::migrate::model::label::Label;
use crate::migrate::model::phase::Phase;
use crate::migrate::protocol::message::Request;
use crate::migrate::transfer::verify::transcript::Transcripts;
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::qemu::Command;

/// A migration at its source.
pub(crate) struct Source {
    pub(crate) context: Context,
    pub(crate) peer: Peer,
    pub(crate) guest: Guest,
    pub(crate) copy: Copying,
    pub(crate) clock: Clock,
    pub(crate) journal: Journal,
    /// What was hashed of its disks.
    pub(crate) hashed: Transcripts,
    /// What becomes of it from its hand-over, or its failure, on.
    pub(crate) end: End,
}

impl Source {
    /// One that is the source's without a question.
    pub(crate) fn new(
        context: Context,
        peer: Peer,
        guest: Guest,
        copy: Copying,
        clock: Clock,
        journal: Journal,
    ) -> Self {
        let hashed = Transcripts::new(context.progress.clone());
        Self { context, peer, guest, copy, clock, journal, hashed, end: End::default() }
    }

    /// Goes to the next phase of the plan, on disk before in fact.
    pub(crate) fn enter_next(&mut self) -> Result<(), Failure> {
        let next = self.copy.plan.after(self.clock.phase)?;
        // In the pause each sync is downtime, and the hand-over has a record of its own.
        if next < Phase::Switchover || next > Phase::HandOver {
            self.journal.record(Record::Phase(next))?;
        }
        self.clock.phase = next;
        let Context { request, progress, .. } = &self.context;
        tracing::info!(migration = %request.id, vm = request.vm, peer = request.peer, phase = next.name(), "phase");
        progress.update(|p| p.phase = next);
        Ok(())
    }

    /// How long a connection is missed: for long while the guest runs, for less while it, or what it writes,
    /// stands still.
    pub(crate) fn reconnect_policy(&self) -> ReconnectPolicy {
        let Context { host, progress, .. } = &self.context;
        let paused = self.clock.paused_at.is_some();
        let limit = Some(host.config.deadlines.resume_paused());
        let monitor = limit.filter(|_| paused).unwrap_or_else(|| self.context.stall());
        let waits = paused || progress.now().waits_for_destination();
        ReconnectPolicy::new(host, &self.peer.lanes, progress, limit.filter(|_| waits))
            .for_monitor(&self.guest.qmp, monitor)
    }

    /// From now on every millisecond counts.
    pub(crate) fn guest_stands_still(&mut self) {
        self.clock.paused_at.get_or_insert_with(Instant::now);
        self.peer.share.go_ahead();
    }

    /// Asks the destination for something whose answer is only that it is done.
    pub(crate) async fn demand(&mut self, request: Request, deadline: Duration) -> Result<(), Failure> {
        self.reconnect_policy().with(self.peer.link.demand(request, deadline)).await
    }

    /// A question to QEMU, whose main loop may hang on a stream that does not move.
    pub(crate) async fn query<C: Command + Clone>(&self, command: C) -> Result<C::Return, Failure> {
        let ask = || self.guest.qmp.execute_within(command.clone(), self.context.stall());
        tokio::select! {
            biased;
            answer = self.reconnect_policy().ask(ask) => answer,
            () = self.context.cancel.cancelled(), if self.clock.phase.may_cancel() => {
                Err(self.context.cancelled())
            }
        }
    }

    /// Opens a data stream.
    pub(crate) async fn open(
        &self,
        label: &Label,
        purpose: u16,
        channel: u16,
    ) -> Result<(Session, Stream), Failure> {
        self.peer.open(&self.context, label, purpose, channel).await
    }

    /// Waits for the next thing to happen; what ends the migration is an error.
    pub(crate) async fn next(&mut self) -> Result<Event, Failure> {
        let policy = self.reconnect_policy();
        tokio::select! {
            biased;
            failure = policy.over() => Err(failure),
            () = self.context.cancel.cancelled(), if self.clock.phase.may_cancel() => {
                Err(self.context.cancelled())
            }
            event = self.guest.event() => Ok(Event::Qemu(event?)),
            loaded = self.peer.loaded() => loaded.map(|()| Event::Loaded),
            // Before the streams: it is what explains the end of one.
            (disk, result) = self.copy.delta.next() => Ok(Event::Copied(disk, result)),
            (label, end) = self.copy.streams.ended() => Ok(Event::StreamEnded(label, end)),
            () = self.clock.tick() => Ok(Event::Tick),
        }
    }
}
