//! The hand-over at a live destination: what its machine decides over. The journal, the source behind the
//! control stream, an operator, and the guest in its QEMU.

use tokio::time::sleep;

use super::end::{Moment, never_ran, undo};
use super::error::{Abort, Error};
use super::state::Destination;
use super::{created_images, image_stamp};
use crate::migrate::decide::{self, Afterwards};
use crate::migrate::handover::{
    self, Answer, Ask, DestinationInput, DestinationState, Ended, Fate, Illegal, Mark, Move, Ran, Side,
    Written,
};
use crate::migrate::handover_run::{DestinationRun, DestinationWorld};
use crate::migrate::host::decisions::{Decision, Order};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::migrate::protocol::message::{Notice, Reply, Response};

/// Why the run of the hand-over ends before its time.
pub(crate) enum Leave {
    /// Everything is left to another process as it is.
    Frozen,
    /// The agent stops before its disk has taken a record, or the witness has said whose the guest is. The journal says
    /// how it goes on.
    ToTheJournal,
}

type Happened = Result<Option<DestinationInput>, Leave>;

impl DestinationWorld for Destination {
    type Stop = Leave;

    async fn wait(&mut self, machine: handover::Destination) -> Happened {
        match machine.state() {
            DestinationState::NeverRan => return Ok(None),
            DestinationState::Runs if self.serving.trouble.is_some() => return Ok(None),
            DestinationState::GivingUp { .. } => return self.try_again().await,
            _ => {}
        }
        let worked = match self.seal_is_over(machine) {
            true => Err(Error::NotSealed(self.why_not_sealed())),
            false => self.work(machine).await,
        };
        let trouble = match worked {
            Ok(happened) => return Ok(happened),
            Err(Error::Frozen) => return Err(Leave::Frozen),
            Err(Error::Stopping) if self.is_left_alone(machine) => return Err(Leave::ToTheJournal),
            Err(trouble) => trouble,
        };
        let asked = matches!(trouble, Error::Aborted(_));
        self.serving.trouble = Some(trouble);
        if machine.ended().is_some() {
            self.refuse().await;
            return Ok(None);
        }
        self.tell_trouble().await;
        Ok(Some(if asked { DestinationInput::Asked(Ask::Abort) } else { DestinationInput::Trouble }))
    }

    async fn write(&mut self, mark: Mark) -> Result<Written, Leave> {
        let uid = self.serving.order.as_ref().and_then(|order| order.uid);
        let (written, error) = decide::write(&mut self.journal, mark, uid);
        match (error, &self.serving.trouble) {
            (Some(error), None) if mark == Mark::Starting && self.serving.order.is_none() => {
                self.serving.trouble = Some(error.into());
            }
            (None, _) => self.serving.unwritten = None,
            (_, Some(Error::Journal(_))) => {}
            (error, _) => self.serving.unwritten = self.serving.unwritten.take().or(error),
        }
        Ok(written)
    }

    async fn say(&mut self, fate: Fate) -> Result<(), Leave> {
        // It is said once the journal has ended: what comes after is answered by that.
        if fate == Fate::NeverRan && self.serving.told {
            return Ok(());
        }
        match (self.serving.asked, fate, &mut self.serving.control) {
            // The source asks again, and then hears what is in the journal.
            (true, ..) if self.serving.trouble.is_some() && !self.serving.told => self.refuse().await,
            (true, ..) => self.answer(self.word(fate)).await,
            (false, Fate::Loaded, Some(control)) => control.say(Reply::Notice(Notice::Loaded)).await,
            (false, ..) => {}
        }
        Ok(())
    }

    async fn start(&mut self) -> Result<Ran, Leave> {
        let (ran, trouble) = self.start_guest().await;
        self.serving.trouble = trouble;
        Ok(ran)
    }

    async fn undo(&mut self) -> Result<(), Leave> {
        self.tell_trouble().await;
        let moment = match self.serving.trouble {
            Some(Error::Continued) => Moment::Continued,
            _ => Moment::AtOnce,
        };
        let started = self.guest.started.take();
        let left = undo(&self.vm, &self.guest.qmp, self.journal.past(), started, moment).await;
        let left: Vec<_> = self.serving.unwritten.take().iter().map(|e| chain(e)).chain(left).collect();
        let left = self.undo_images(left).await;
        image_stamp::record(&self.host, &mut self.journal, &self.data.images, &left);
        self.serving.leftovers = left.into_iter().map(Leftover::from).collect();
        Ok(())
    }

    async fn seal(&mut self, by: Move) -> Result<Answer, Leave> {
        Ok(self.at_witness(by).await)
    }

    async fn give_up_at_witness(&mut self) -> Result<(), Leave> {
        decide::afterwards(&self.host, self.journal.past(), Afterwards::Yield);
        Ok(())
    }

    fn answer_operator(&mut self, machine: handover::Destination) {
        let Some(order) = self.serving.order.take() else { return };
        let (state, side, error) = (machine.state(), order.side, self.serving.unwritten.take());
        let gives_up = matches!(state, DestinationState::GivingUp { .. });
        let decided = match side {
            Side::Here => matches!(state, DestinationState::Starting { .. }),
            Side::There => state == DestinationState::NeverRan,
        };
        let here_in_vain = side == Side::Here && state == DestinationState::NeverRan;
        // The witness has said since that it is the source's.
        let overruled = matches!(self.serving.trouble, Some(Error::NotSealed(_))) && !decided;
        order.answer(match (&self.serving.trouble, gives_up) {
            (Some(why), true) if overruled && side == Side::Here => Decision::Unknown(format!(
                "{}. It is being given up here, and the disk has not taken the record of it yet, which is tried every \
                 second. Do not restart this agent before: by your decision it would start the guest",
                chain(why)
            )),
            (_, true) => decide::is_being_given_up(),
            (Some(why), false) if overruled && here_in_vain => Decision::Refused(chain(why)),
            _ if here_in_vain => {
                let cause = error.as_ref().map_or_else(String::new, |e| format!(": {}", chain(e)));
                Decision::Refused(format!(
                    "the disk does not take the record of the guest's start, so it is given up here{cause}"
                ))
            }
            _ => decide::decision(decided, &self.journal, error.as_ref()),
        });
        if decided && side == Side::Here {
            // So that the source does not take it back, nor, of a decision that was wrong, lets it run.
            decide::afterwards(&self.host, self.journal.past(), Afterwards::Take);
        }
        if (gives_up || state == DestinationState::NeverRan) && !(overruled && side == Side::Here) {
            let error = error.filter(|_| side == Side::Here);
            self.serving.trouble = Some(error.map_or(Error::Forced, Error::from));
        }
    }

    fn illegal(&mut self, error: Illegal) {
        match self.serving.order.take() {
            Some(order) => order.answer(Decision::Refused(chain(&error))),
            None => decide::report(&error),
        }
    }
}

impl Destination {
    /// Removes the images that were made, unless they may be needed; what is left then.
    async fn undo_images(&self, mut left: Vec<String>) -> Vec<String> {
        // What was granted for a replica is the replica's.
        if self.is_replica() {
            return left;
        }
        let past = self.journal.past();
        // Its source takes the guest back: the disks there are the guest's.
        let is_given_back = matches!(self.serving.trouble, Some(Error::Aborted(_)));
        match self.granted.is_none() || is_given_back {
            // A QEMU that did not end has them open.
            true if left.is_empty() => left.extend(created_images::remove(&self.host.config, past).await),
            _ => left.extend(created_images::kept(&self.host.config, past)),
        }
        left
    }

    /// Serves the source until the guest runs here, or never will.
    pub(crate) async fn run(mut self) {
        let mut handover = DestinationRun::new(self.handover);
        let ran = handover.run(&mut self).await;
        self.handover = handover.machine();
        match ran {
            Ok(()) if self.handover.ended() == Some(Ended::Moved) => {
                if decide::is_confirmed(self.journal.past()) {
                    decide::afterwards(&self.host, self.journal.past(), Afterwards::Forget);
                }
                self.end_moved().await;
            }
            Ok(()) => drop(self.end_given_up().await),
            Err(Leave::Frozen) => self.stop().await,
            Err(Leave::ToTheJournal) => {
                tracing::warn!(vm = self.vm, "the agent stops before it is known whose the guest is");
            }
        }
    }

    /// Undoes what was prepared, for a source that has not been granted anything.
    pub(super) async fn give_up(mut self, trouble: Error) -> Error {
        self.serving.trouble = Some(trouble);
        self.tell_trouble().await;
        let mut handover = DestinationRun::new(self.handover);
        if let Err(e) = handover.give(DestinationInput::Trouble) {
            self.illegal(e);
        }
        let ran = handover.run(&mut self).await;
        if ran.is_err() || handover.machine().ended() != Some(Ended::Stayed) {
            // Its journal stays open, and is settled by what it says.
            return self.serving.trouble.take().unwrap_or(Error::Stopping);
        }
        self.end_given_up().await
    }

    /// An operator decides while the source is away.
    pub(super) fn claim(&mut self, order: Order) -> Option<DestinationInput> {
        let order = order.claim()?;
        let side = order.side;
        tracing::warn!(vm = self.vm, uid = order.uid, ?side, "an operator decides whose the guest is");
        (self.serving.order, self.serving.unwritten) = (Some(order), None);
        Some(DestinationInput::Forced(side))
    }

    /// What is only waited for once.
    pub(super) async fn begin(
        &mut self,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Error> {
        if std::mem::replace(&mut self.serving.begun, true) {
            return Ok(None);
        }
        if self.serving.control.is_none() {
            self.on_source_lost(machine)?;
        }
        match std::mem::take(&mut self.guest.missed_events) {
            true => self.catch_up(machine).await,
            false => Ok(None),
        }
    }

    /// Tells the source why the destination does not go on, once, and cuts all streams.
    async fn tell_trouble(&mut self) {
        if std::mem::replace(&mut self.serving.told, true) {
            return;
        }
        self.refuse().await;
        if let Some(trouble) = &self.serving.trouble {
            match trouble {
                Error::Aborted(Abort::Replicated) => tracing::info!(vm = self.vm, "the replica is in step"),
                trouble => tracing::warn!(vm = self.vm, cause = chain(trouble), "the destination gives up"),
            }
            // A source that gave up knows why.
            if let Some(control) = &mut self.serving.control
                && !matches!(trouble, Error::Aborted(_))
            {
                let text = chain(trouble);
                control.say(Reply::Notice(Notice::Failed { text })).await;
            }
        }
        // Streams first: an NBD client in its handshake would hang QEMU 7.2's server stop.
        self.data.streams.cut_all();
        self.data.ram = None;
        self.data.nbd = None;
    }

    /// Answers what the source has asked by why that is not done.
    async fn refuse(&mut self) {
        let Some(mut trouble) = self.serving.trouble.take() else { return };
        if !std::mem::replace(&mut self.serving.explained, true) {
            trouble = self.explained(trouble).await;
        }
        if !matches!(trouble, Error::Aborted(_)) {
            self.answer(Response::Refused(trouble.refusal())).await;
        }
        self.serving.trouble = Some(trouble);
    }

    /// Until the journal proves that the guest never will run; not when the agent stops before.
    async fn try_again(&mut self) -> Happened {
        self.tell_trouble().await;
        let words = "the guest never ran here, and never shall; but the disk does not take the record that \
                     proves it, which is tried every second";
        self.host.decisions.open_question(self.journal.past().header.migration, words.to_owned());
        loop {
            tokio::select! {
                () = sleep(decide::ASK_AGAIN) => return Ok(Some(DestinationInput::Again)),
                Some(order) = self.served.orders.recv() => {
                    let cause = "the guest is being given up here, which needs the disk and nobody's word";
                    if let Some(order) = order.claim() {
                        order.answer(Decision::Refused(cause.into()));
                    }
                }
                Some((again, _)) = self.served.controls.recv() => {
                    (self.serving.control, self.serving.asked) = (Some(again), true);
                    return Ok(Some(DestinationInput::Asked(Ask::Settle)));
                }
                () = self.host.stopping.cancelled() => return Err(Leave::ToTheJournal),
                () = self.host.freeze.begun() => return Err(Leave::ToTheJournal),
            }
        }
    }

    /// After the word to start nothing leads back: the guest is here, as well as it can be.
    async fn end_moved(mut self) {
        let mut leftovers = Vec::new();
        match self.serving.trouble.take() {
            None => self.restore_settings().await,
            Some(trouble) => {
                tracing::error!(vm = self.vm, cause = chain(&trouble), "trouble after the hand-over");
                leftovers.push(Leftover::Guest(chain(&trouble)));
                leftovers.extend(self.serving.unwritten.take().map(|e| chain(&e).into()));
            }
        }
        let outcome = Outcome::Moved { leftovers };
        self.log_end(&outcome);
        self.host.journals.end(self.journal, outcome.clone());
        self.progress.end(Phase::Done, outcome);
    }

    /// Whether a replica's record says all that anybody may ask of this run.
    fn is_remembered(&self, outcome: &Outcome) -> bool {
        let run = self.journal.past().header.migration;
        let kept = || self.host.replicas.kept(&self.vm, self.peer.as_str());
        matches!(outcome, Outcome::Replicated { .. })
            && kept().and_then(|kept| kept.left).is_some_and(|left| left.after == run)
    }

    /// The guest never ran here, and everything is undone.
    async fn end_given_up(mut self) -> Error {
        let trouble = self.serving.trouble.take().unwrap_or(Error::Stopping);
        let outcome = never_ran(&trouble, std::mem::take(&mut self.serving.leftovers));
        self.log_end(&outcome);
        let is_clean = matches!(&outcome, Outcome::Failed { leftovers, .. } | Outcome::Replicated { leftovers } if leftovers.is_empty());
        match is_clean && (self.granted.is_none() || self.is_remembered(&outcome)) {
            true => self.host.journals.forget(self.journal, outcome.clone()),
            false => self.host.journals.end(self.journal, outcome.clone()),
        }
        // Whoever was granted a disk may have written to it, if it is still there.
        let granted = self.granted.iter().flat_map(|(_, grant)| &grant.exports);
        let written: Vec<&str> = granted.map(|export| export.disk.as_str()).collect();
        if written.is_empty() {
            tracing::info!(vm = self.vm, peer = %self.peer, "the destination is as it was");
        } else {
            let note =
                format!("the images of disks {} hold what was copied to them by then", written.join(", "));
            tracing::info!(vm = self.vm, peer = %self.peer, note, "the destination has given the VM up");
            self.progress.update(|p| p.notes.push(note.clone()));
        }
        let phase = match outcome {
            Outcome::Replicated { .. } => Phase::Done,
            _ => Phase::Failed,
        };
        self.progress.end(phase, outcome);
        // Whatever the source says next is answered by the journal.
        if let Some(mut control) = self.serving.control {
            if matches!(trouble, Error::Aborted(_)) {
                control.answer(Response::Fate(Fate::NeverRan)).await;
            }
            control.finish();
        }
        trouble
    }
}
