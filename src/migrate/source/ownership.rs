//! The hand-over at a live source: what its machine decides over. The journal, the destination behind the
//! control stream, and the guest in its QEMU.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::clock::millis;
use super::context::Context;
use super::copies;
use super::end::{Back, kept_by_force, stands_there};
use super::explain::{explain, explained_late};
use super::failure::Failure;
use super::further_try::{Ended, Held};
use super::guest_watch::overruled;
use super::perform::perform;
use super::reconnect::ReconnectPolicy;
use super::replica;
use super::state::Source;
use crate::migrate::decide::{self, Afterwards, Decided, Leaving, Question};
use crate::migrate::guest::process;
use crate::migrate::guest::undo::{self, Bitmaps};
use crate::migrate::handover::{self, Answer, Ask, Illegal, Mark, Move, SourceInput, SourceState, Written};
use crate::migrate::handover_run::{SourceRun, SourceWorld};
use crate::migrate::journal::Record;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::migrate::protocol::client::LinkError;
use crate::migrate::protocol::message::{Fate, Request, Response, Summary};
use crate::migrate::transfer::disk::pivoted;
use crate::qemu::QueryStatus;

/// How long the destination may take to undo what it prepared.
const ABORT_DEADLINE: Duration = Duration::from_secs(45);
/// How long the destination may take to note that its word is known here.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);
/// How long the old QEMU may take to say that it is there.
const ASK_QEMU_DEADLINE: Duration = Duration::from_secs(5);
/// How long its guest's start may take, its `before_start` aside.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Why the run of the hand-over ends before its time.
pub(crate) enum Leave {
    /// Nothing is handed over: everything is left to another process as it is.
    Frozen,
    /// The journal says all that there is to know.
    ToTheJournal,
}

impl From<Leaving> for Leave {
    fn from(_: Leaving) -> Self {
        Self::ToTheJournal
    }
}

type Happened = Result<Option<SourceInput>, Leave>;

impl SourceWorld for Source {
    type Stop = Leave;

    async fn wait(&mut self, machine: handover::Source) -> Happened {
        match machine.state() {
            SourceState::Ours => self.until_handed_over().await.map(Some),
            _ if machine.ended().is_some() => Ok(None),
            _ => {
                let frozen = self.context.host.freeze.begun();
                self.open_question();
                let Some(question) = &mut self.end.question else { return Ok(None) };
                tokio::select! {
                    happened = question.wait(&mut self.journal, machine) => Ok(happened?),
                    () = frozen => Err(Leave::ToTheJournal),
                }
            }
        }
    }

    async fn write(&mut self, mark: Mark) -> Result<Written, Leave> {
        // Also of a record in doubt.
        self.end.may_be_handed_over |= mark == Mark::HandedOver;
        // The guest runs at the destination.
        if mark == Mark::Runs
            && let Err(e) = self.enter_next()
        {
            self.end.leftovers.push(chain(&e).into());
        }
        if let Some(question) = &mut self.end.question {
            return Ok(question.write(&mut self.journal, mark));
        }
        let (written, error) = decide::write(&mut self.journal, mark, None);
        match error {
            Some(error) if self.end.back.is_some() || mark == Mark::Runs => {
                self.end.leftovers.push(chain(&error).into());
            }
            Some(error) => self.end.failure = self.end.failure.take().or(Some(error.into())),
            None => {}
        }
        Ok(written)
    }

    async fn ask(&mut self, ask: Ask, machine: handover::Source) -> Happened {
        match ask {
            Ask::Confirmed => {
                self.confirm().await;
                Ok(None)
            }
            Ask::Start if self.end.question.is_none() => self.ask_to_start().await,
            Ask::Start | Ask::Abort | Ask::Settle => {
                let frozen = self.context.host.freeze.begun();
                self.open_question();
                let Some(question) = &mut self.end.question else { return Ok(None) };
                tokio::select! {
                    happened = question.ask(ask, machine) => Ok(happened?),
                    () = frozen => Err(Leave::ToTheJournal),
                }
            }
        }
    }

    async fn resume(&mut self, abort: bool) -> Happened {
        self.close_question();
        let Some(Back { phase, cause, .. }) = &self.end.back else { return Ok(self.roll_back(abort).await) };
        // Its QEMU is gone, and somebody has said by now that the guest is this host's.
        if abort {
            self.abort_remote(*phase, cause).await;
        }
        Ok(None)
    }

    async fn offer(&mut self, ask: Option<Ask>, machine: handover::Source) -> Happened {
        let (host, past) = (Arc::clone(&self.context.host), self.journal.past().clone());
        let frozen = self.context.host.freeze.begun();
        if ask != Some(Ask::Start) || self.end.question.is_some() {
            self.open_question();
            let Some(question) = &mut self.end.question else { return Ok(None) };
            return tokio::select! {
                happened = question.offer(&past, ask, machine) => Ok(happened?),
                () = frozen => Err(Leave::ToTheJournal),
            };
        }
        // The guest's start waits for nothing: the destination takes it by itself.
        let offers = async {
            decide::at_witness(&host, &past, Move::Offer).await;
            std::future::pending().await
        };
        tokio::select! {
            happened = self.ask_to_start() => happened,
            never = offers => never,
        }
    }

    async fn take_back_at_witness(&mut self) -> Result<Answer, Leave> {
        let frozen = self.context.host.freeze.begun();
        let past = self.journal.past().clone();
        let looked = self.guest.qmp.execute_within(QueryStatus, ASK_QEMU_DEADLINE).await;
        let not_there = looked.err().map(|e| chain(&e));
        self.open_question();
        let Some(question) = &mut self.end.question else { return Ok(Answer::Unknown) };
        tokio::select! {
            answer = question.take_back(&past, not_there) => Ok(answer),
            () = frozen => Err(Leave::ToTheJournal),
        }
    }

    async fn release(&mut self) -> Result<(), Leave> {
        self.close_question();
        let left = if self.end.back.take().is_some() {
            // What was said of it then was said of a guest that is not here.
            self.end.leftovers.clear();
            Vec::new()
        } else if self.end.forced {
            vec![kept_by_force(&self.context.request.vm)]
        } else if self.context.request.options.keep_source {
            undo::clean_kept(&self.guest.qmp, self.journal.past()).await
        } else {
            process::end_the_old(&self.context.request.vm, &self.guest.qmp).await.into_iter().collect()
        };
        self.end.leftovers.extend(left.into_iter().map(Leftover::from));
        let left = replica::became_the_guests(self).await;
        self.end.leftovers.extend(left.into_iter().map(Leftover::from));
        Ok(())
    }

    fn answer_operator(&mut self, machine: handover::Source) {
        if let Some(question) = &mut self.end.question {
            question.answer_operator(&self.journal, machine);
        }
    }

    fn illegal(&mut self, error: Illegal) {
        decide::report(&error);
    }
}

impl Source {
    /// Runs it to its end; `None`: it is left to another process.
    pub(crate) async fn run(mut self) -> Option<Ended> {
        tracing::info!(
            migration = %self.context.request.id,
            vm = self.context.request.vm,
            peer = self.context.request.peer,
            phase = self.clock.phase.name(),
            "migration begins"
        );
        let mut handover = SourceRun::new(handover::Source::new());
        match handover.run(&mut self).await {
            Ok(()) => {
                if decide::is_never_offered(self.journal.past()) && !self.end.may_be_handed_over {
                    decide::afterwards(&self.context.host, self.journal.past(), Afterwards::Forget);
                }
                Some(self.end())
            }
            Err(Leave::Frozen) => {
                self.stop().await;
                None
            }
            Err(Leave::ToTheJournal) => None,
        }
    }

    /// All phases before the hand-over.
    async fn until_handed_over(&mut self) -> Result<SourceInput, Leave> {
        match perform(self).await {
            Ok(()) => {
                self.end.since = Some(Instant::now());
                return Ok(SourceInput::Complete { witness: self.journal.past().witness.is_some() });
            }
            Err(Failure::Frozen) => return Err(Leave::Frozen),
            Err(failure) => self.end.failure = Some(failure),
        }
        Ok(SourceInput::Fail)
    }

    /// The source's last word. An answer that comes later is not a failure: the destination is asked what
    /// became of it.
    async fn ask_to_start(&mut self) -> Happened {
        let deadline = decide::hook(&self.context.host, self.peer.grant.as_ref()) + START_DEADLINE;
        let answer = tokio::select! {
            answer = self.peer.link.ask(Request::Start, deadline) => answer,
            () = self.context.host.freeze.begun() => return Err(Leave::ToTheJournal),
        };
        let (fate, started) = match answer {
            Ok(Response::Started(started)) => (Fate::Runs, Some(started)),
            Ok(Response::Fate(fate)) => (fate, None),
            Ok(_) => return Ok(self.ask_again(LinkError::Unexpected { request: "start" })),
            Err(e) => {
                if let LinkError::Refused(refusal) = &e {
                    self.end.refused = Some(refusal.text.clone());
                }
                return Ok(self.ask_again(e));
            }
        };
        if fate == Fate::Open {
            return Ok(self.ask_again(LinkError::Unexpected { request: "start" }));
        }
        if fate == Fate::Runs {
            self.clock.downtime.start_ms = self.end.since.map_or(0, millis);
            self.clock.downtime.lasted(self.clock.paused_at.map_or(0, millis));
            self.clock.downtime.hook_ms = started.as_ref().and_then(|started| started.hook_ms);
            self.end.started = started;
        } else {
            self.ask_again(LinkError::Unexpected { request: "start" });
        }
        Ok(Some(SourceInput::Heard(fate)))
    }

    fn ask_again(&mut self, error: LinkError) -> Option<SourceInput> {
        self.end.failure = Some(error.into());
        self.open_question();
        Some(SourceInput::Again)
    }

    /// The guest may be either side's: that is asked until it is decided, or the agent stops.
    fn open_question(&mut self) {
        if self.end.question.is_some() {
            return;
        }
        let cause = self.end.failure.as_ref().map_or_else(String::new, |failure| chain(failure));
        tracing::error!(cause, "the hand-over is open: the destination is asked");
        self.copy.streams.cut_all();
        let (id, progress) = (self.context.request.id, self.context.progress.clone());
        let question = Question::new(&self.context.host, &self.context.request.peer, id, progress, cause);
        let question = question.with_witness(self.journal.past());
        self.end.question =
            Some(question.with_hook(decide::hook(&self.context.host, self.peer.grant.as_ref())));
        self.clock.phase = Phase::Undecided;
    }

    fn close_question(&mut self) {
        let Some(question) = self.end.question.take() else { return };
        let Decided { started, link, forced } = question.close();
        self.end.started = started;
        self.end.forced = forced.is_some();
        if let Some(link) = link {
            self.peer.link = link;
        }
        self.clock.downtime.lasted(self.clock.paused_at.map_or(0, millis));
    }

    /// Says that the destination's word is known here for good.
    async fn confirm(&mut self) {
        self.close_question();
        if self.end.back.is_some() {
            return decide::confirm_remote(
                &self.context.host,
                &self.context.request.peer,
                self.context.request.id,
            )
            .await;
        }
        self.copy.count_bytes(&self.context.progress);
        self.peer.link.sum_up(Summary::of(&self.context.progress.now(), &self.clock.downtime));
        if let Err(e) = self.peer.link.demand(Request::Confirmed, CONFIRM_DEADLINE).await {
            tracing::info!(error = chain(&e), "the destination ends its part without our thanks");
        }
    }

    /// The guest is this host's: it runs again here. What the destination says, if it was told.
    async fn roll_back(&mut self, abort: bool) -> Option<SourceInput> {
        let failure = self.end.failure.take().unwrap_or_else(|| self.context.cancelled());
        if self.clock.phase == Phase::Undecided {
            self.clock.phase = Phase::HandOver;
        }
        let phase = self.clock.phase;
        let cause = explain(self, &failure).await;
        let (failure, cause) = overruled(self, failure, cause).await;
        match &failure {
            Failure::Replicated => tracing::info!("the replica is in step; the guest stays"),
            _ => tracing::warn!(phase = phase.name(), cause, "migration fails; rolling back"),
        }
        self.copy.count_bytes(&self.context.progress);
        self.clock.phase = Phase::RollBack;
        self.context.progress.update(|p| p.phase = Phase::RollBack);
        if let Err(e) = self.journal.record(Record::Phase(Phase::RollBack)) {
            tracing::error!(error = chain(&e), "the roll-back goes on without the journal");
        }
        let not_back = match &failure {
            // Nobody else's failure leaves QEMU free to answer before the streams are cut.
            failure if matches!(failure, Failure::Meanwhile(_)) || copies::ended_unheard(failure) => {
                let (qmp, disks) = (&self.guest.qmp, &self.copy.plan.disks);
                pivoted::take_back(qmp, disks, self.context.stall(), &self.context.progress).await
            }
            _ => Vec::new(),
        };
        // Before anything else, so that neither QEMU hangs on a stream that no longer moves.
        self.copy.abort().await;
        if !matches!(failure, Failure::Replicated) {
            replica::remember_late(self);
        }
        let keeps = self.context.has_successor()
            && failure.may_pass()
            && !self.journal.past().handed_over
            && self.copy.tracking.is_worth_keeping();
        let bitmaps = if keeps { Bitmaps::StayForTheNextTry } else { Bitmaps::Go };
        let is_off = matches!(&failure, Failure::Meanwhile(meanwhile) if meanwhile.is_off());
        let (fate, is_gone) = self.take_back(abort, phase, &cause, bitmaps, is_off).await;
        self.end.leftovers.extend(not_back.into_iter().map(Leftover::from));
        let request = &self.context.request;
        self.end.leftovers.extend(decide::runs_twice(&request.vm, &request.peer, is_gone, fate));
        self.end.failure = Some(failure);
        self.end.back = Some(Back { phase, cause, keeps });
        decide::after_resume(is_gone && abort, phase, fate)
    }

    /// Undoes what was made, and tells the destination meanwhile. What that says, and whether the guest's QEMU is gone.
    /// `is_off`: the guest was shut down, which is nothing to mend.
    async fn take_back(
        &mut self,
        abort: bool,
        phase: Phase,
        cause: &str,
        bitmaps: Bitmaps,
        is_off: bool,
    ) -> (Option<Fate>, bool) {
        // What cannot be reached is not waited for while another process does: the end of our stream tells it, too.
        let is_left = phase < Phase::Switchover && self.context.host.freeze.is_on() && self.peer.is_away();
        let (reason, link) = (cause.to_owned(), &mut self.peer.link);
        let told = async {
            match abort && !is_left {
                true => Some(link.ask(Request::Abort { reason }, ABORT_DEADLINE).await),
                false => None,
            }
        };
        let undoing = undo::roll_back(&self.guest.qmp, self.journal.past(), bitmaps);
        let telling =
            ReconnectPolicy::new(&self.context.host, &self.peer.lanes, &self.context.progress, None);
        let telling = telling.for_monitor(&self.guest.qmp, Duration::MAX);
        let (told, mut undone) = telling.tell_while(async { tokio::join!(told, undoing) }).await;
        self.context.progress.update(|p| p.notes.extend(undone.standing.take()));
        if !(undone.gone && is_off) {
            self.end.leftovers.extend(undone.leftovers);
        }
        let heard = match told {
            Some(Ok(Response::Fate(heard))) => Some(heard),
            Some(Err(e)) => {
                tracing::info!(error = chain(&e), "the destination could not be told");
                self.abort_remote(phase, cause).await
            }
            _ => None,
        };
        (heard, undone.gone)
    }

    /// A destination that lost us undoes its part by itself, at once; but one that has the whole
    /// guest waits for our word for long, and nothing could be tried again meanwhile.
    async fn abort_remote(&self, phase: Phase, cause: &str) -> Option<Fate> {
        if phase < Phase::Switchover {
            return None;
        }
        let told = decide::abort_remote(
            &self.context.host,
            &self.context.request.peer,
            self.context.request.id,
            cause,
        )
        .await;
        told.unwrap_or_else(|e| {
            tracing::info!(
                error = chain(&e),
                "the destination undoes its part when it misses us for too long"
            );
            None
        })
    }

    /// It is decided, and everything is done about it.
    fn end(mut self) -> Ended {
        self.close_question();
        let leftovers = std::mem::take(&mut self.end.leftovers);
        let Some(Back { phase, cause, keeps }) = self.end.back.take() else {
            return self.end_moved(leftovers);
        };
        let failure = self.end.failure.take().unwrap_or_else(|| self.context.cancelled());
        let cause = explained_late(&mut self.peer, &failure, cause);
        let outcome = failure.outcome(phase, cause, leftovers);
        let phase = if matches!(failure, Failure::Replicated) { Phase::Done } else { Phase::Failed };
        if keeps { self.hold(outcome) } else { self.close(phase, outcome, failure.may_pass()) }
    }

    fn end_moved(mut self, mut leftovers: Vec<Leftover>) -> Ended {
        self.peer.link.finish();
        let (started, refused) = (self.end.started.as_ref(), self.end.refused.take());
        leftovers.extend(stands_there(&self.context.request.peer, started, refused));
        let downtime = self.clock.downtime.clone();
        let warnings = self.end.started.take().map_or_else(Vec::new, |started| started.warnings);
        self.context.progress.update(|p| {
            p.downtime = Some(downtime);
            p.notes.extend(warnings);
        });
        self.copy.count_bytes(&self.context.progress);
        self.close(Phase::Done, Outcome::Moved { leftovers }, false)
    }

    fn close(self, phase: Phase, outcome: Outcome, may_pass: bool) -> Ended {
        let handed_over = self.journal.past().handed_over;
        let Context { host, request, .. } = &self.context;
        match &outcome {
            // Nobody will ask: nothing was handed over, and the replica has a record of its own.
            Outcome::Replicated { leftovers } if leftovers.is_empty() => {
                host.journals.forget(self.journal, outcome.clone());
            }
            _ => host.journals.end(self.journal, outcome.clone()),
        }
        tracing::info!(
            migration = %request.id,
            vm = request.vm,
            peer = request.peer,
            phase = phase.name(),
            result = outcome.label(),
            "migration ends"
        );
        Ended { phase, outcome, may_pass, handed_over, held: None }
    }

    /// The journal stays open: it tells of the bitmaps that stay.
    fn hold(self, outcome: Outcome) -> Ended {
        let held = Held { journal: self.journal, outcome: outcome.clone(), tracking: self.copy.tracking };
        Ended { phase: Phase::Failed, outcome, may_pass: true, handed_over: false, held: Some(held) }
    }
}
