//! Serves the source while its guest may still go either way: requests, events, streams, an operator.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::error::{Abort, Error};
use super::state::Destination;
use crate::migrate::handover::{self, Ask, DestinationInput, DestinationState, Ended, Fate};
use crate::migrate::host::decisions::{Order, Orders};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::{Offer, REPLICATED, Request, Response};
use crate::migrate::protocol::server::Control;
use crate::net::message::MessageError;
use crate::net::trust;
use crate::peer_refusals::Reason;
use crate::qemu::{EventKind, MigrationStatus, QueryMigrate, QueryStatus, RunState, Stop};

/// How long a source may take to take note that its guest runs here.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(60);

impl Destination {
    /// Serves the source until something happens that its machine is to know; `None`: until the guest runs
    /// here and the source knows, or stays away.
    pub(crate) async fn work(
        &mut self,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Error> {
        if self.serving.confirmed {
            self.answer_confirmed().await;
            return Ok(None);
        }
        let runs = machine.ended() == Some(Ended::Moved);
        if let Some(happened) = self.begin(machine).await? {
            return Ok(Some(happened));
        }
        if runs && self.serving.control.is_none() {
            // It was taken with its source away: whoever comes back later hears it from the journal.
            self.serving.alone_until.get_or_insert_with(Instant::now);
        }
        loop {
            let frozen = self.host.freeze.begun();
            let alone_until = self.serving.alone_until;
            let is_open = machine.state() == (DestinationState::Waiting { loaded: false });
            let at_witness = Self::is_at_witness(machine);
            let request = next_request(&mut self.serving.control);
            let happened = tokio::select! {
                biased;
                event = self.guest.events.recv() => self.heard(event.map(|e| e.kind), machine).await?,
                request = request => match request {
                    Ok(Some(request)) => self.on_request(request, machine).await?,
                    ended => {
                        self.on_control_ended(ended.err(), machine)?;
                        None
                    }
                },
                Some((again, request)) = self.served.controls.recv() => {
                    (self.serving.control, self.serving.alone_until) = (Some(again), None);
                    self.host.decisions.answered(self.journal.past().header.migration);
                    self.on_request(request, machine).await?
                }
                Some(order) = next_order(&mut self.serving.waiting, &mut self.served.orders) => self.claim(order),
                Some(stream) = self.served.offered.recv() => {
                    self.attach(stream).await;
                    None
                }
                (label, end) = self.data.streams.ended() => {
                    tracing::debug!(stream = %label, end = chain(&end), "a stream ended");
                    None
                }
                () = frozen => return Err(Error::Frozen),
                () = sleep_until(self.serving.ask_witness_at), if at_witness => Some(DestinationInput::Again),
                _ = self.serving.tick.tick() => {
                    self.look_at_streams();
                    if is_open {
                        self.tell_busy().await;
                        self.is_within_quota()?;
                    }
                    None
                }
                // One that is loaded has a deadline of its own.
                () = sleep_until(self.served.until), if is_open => {
                    return Err(Error::GrantOver(self.host.config.deadlines.grant_s));
                }
                // A guest that is here whole may be handed over at any moment: that is waited for, unless
                // its source is away.
                () = self.host.stopping.cancelled(), if alone_until.is_some() || !(machine.is_loaded() || runs) => {
                    return if runs { Ok(None) } else { Err(Error::Stopping) };
                }
                () = sleep_until(alone_until.unwrap_or_else(Instant::now)), if alone_until.is_some() && !at_witness => {
                    return self.source_stays_away(machine);
                }
            };
            if happened.is_some() {
                return Ok(happened);
            }
        }
    }

    /// Whether no more has come than its peer may send in one migration.
    fn is_within_quota(&self) -> Result<(), Error> {
        let permits = self.host.config.peer_by_identity(&self.peer).map(|(_, permits)| permits);
        let Some(most) = permits.and_then(|permits| permits.receive_bytes) else { return Ok(()) };
        let come = self.data.streams.total();
        if come <= most.bytes() {
            return Ok(());
        }
        self.host.refused(&self.peer, Reason::Quota, || format!("{come} bytes of VM {}", self.vm));
        Err(Error::TooManyBytes(come, most))
    }

    async fn heard(
        &mut self,
        event: Option<EventKind>,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Error> {
        match event {
            Some(EventKind::Missed) => self.catch_up(machine).await,
            Some(EventKind::Resume) if Self::must_stand_still(machine) => Err(self.was_continued().await),
            event => self.on_event(event).await,
        }
    }

    /// Asks QEMU what has happened while nobody listened.
    pub(crate) async fn catch_up(
        &mut self,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Error> {
        if self.guest.incoming
            && Self::must_stand_still(machine)
            && self.guest.qmp.execute(QueryStatus).await?.status == RunState::Running
        {
            return Err(self.was_continued().await);
        }
        if !self.guest.incoming || machine.state() != (DestinationState::Waiting { loaded: false }) {
            return Ok(None);
        }
        let status = self.guest.qmp.execute(QueryMigrate).await?.status;
        self.on_event(Some(EventKind::Migration { status })).await
    }

    /// Whether the guest may not run here: nobody has decided that it is this host's.
    fn must_stand_still(machine: handover::Destination) -> bool {
        Self::may_be_given_up(machine)
    }

    /// Somebody has let it run all the same.
    async fn was_continued(&self) -> Error {
        if let Err(e) = self.guest.qmp.execute_until_answered(Stop).await {
            tracing::error!(
                vm = self.vm,
                error = chain(&e),
                "a guest that somebody has continued is not stopped"
            );
        }
        Error::Continued
    }

    fn on_control_ended(
        &mut self,
        cause: Option<MessageError>,
        machine: handover::Destination,
    ) -> Result<(), Error> {
        if let Some(e @ (MessageError::Json(_) | MessageError::TooLong(_))) = cause {
            self.host.refused(&self.peer, Reason::NotUnderstood, || chain(&e));
        }
        self.serving.control = None;
        self.on_source_lost(machine)
    }

    /// How long to wait for a source that was lost; an error when there is nothing to wait for.
    pub(crate) fn on_source_lost(&mut self, machine: handover::Destination) -> Result<(), Error> {
        let wait = if machine.ended() == Some(Ended::Moved) {
            CONFIRM_DEADLINE
        } else if machine.is_loaded() {
            tracing::warn!(vm = self.vm, "the source was lost with the guest loaded; waiting for it");
            let words = format!(
                "the whole guest is here, paused, and {} was lost before it said whether it hands it over. It is \
                 waited for, {} s in all; then {}",
                self.peer,
                self.host.config.deadlines.handover_s,
                self.what_then()
            );
            self.host.decisions.open_question(self.journal.past().header.migration, words);
            self.host.config.deadlines.handover()
        } else if Self::is_at_witness(machine) {
            // What the witness says does not hang on who listens.
            return Ok(());
        } else {
            return Err(Error::SourceLost);
        };
        self.serving.alone_until = Some(Instant::now() + wait);
        Ok(())
    }

    async fn on_event(&mut self, event: Option<EventKind>) -> Result<Option<DestinationInput>, Error> {
        let Some(event) = event else {
            return Err(Error::of_monitor(&self.vm, &self.guest.qmp));
        };
        let EventKind::Migration { status } = event else { return Ok(None) };
        match status {
            MigrationStatus::Completed => {
                self.flush_in_band().await?;
                Ok(Some(DestinationInput::Loaded))
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                let error = self.guest.qmp.execute(QueryMigrate).await?.error_desc.unwrap_or_default();
                Err(Error::Ram { status, error })
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
    ) -> Result<Option<DestinationInput>, Error> {
        self.serving.asked = true;
        let open = matches!(machine.state(), DestinationState::Waiting { .. });
        let done = match request {
            Request::Prepare(offer) => {
                let answer = self.grant_again(&offer);
                self.answer(answer).await;
                return Ok(None);
            }
            Request::Hash(wanted) if open && !self.guest.incoming => {
                let answer = self.hash(&wanted).await;
                self.answer(answer).await;
                return Ok(None);
            }
            Request::Zeroes(wanted) if open && !self.guest.incoming => {
                let answer = self.zeroes(&wanted).await;
                self.answer(answer).await;
                return Ok(None);
            }
            // Its QEMU never has a guest, so none can be continued in it.
            Request::Incoming | Request::Switchover | Request::Start | Request::ToRun { .. }
                if self.is_replica() =>
            {
                Err(Error::OutOfOrder(request.name()))
            }
            Request::Incoming if self.guest.incoming => Ok(()),
            Request::Incoming if open => self.accept_ram().await,
            Request::ToRun { running } if open => self.note_to_run(running),
            Request::Switchover if self.guest.incoming => self.switchover(open, machine).await,
            Request::Start if machine.is_loaded() => match self.guest.qmp.execute(QueryStatus).await {
                Ok(_) => return Ok(Some(DestinationInput::Asked(Ask::Start))),
                Err(e) => Err(e.into()),
            },
            Request::Confirmed if machine.ended() == Some(Ended::Moved) => {
                self.serving.confirmed = true;
                return Ok(Some(DestinationInput::Asked(Ask::Confirmed)));
            }
            Request::Abort { reason } if Self::may_be_given_up(machine) => {
                return Err(Error::Aborted(match Abort::from(reason) {
                    Abort::Replicated if !self.is_replica() => Abort::Failed(REPLICATED.into()),
                    abort => abort,
                }));
            }
            Request::Abort { .. } => return Ok(Some(DestinationInput::Asked(Ask::Abort))),
            Request::Start => return Ok(Some(DestinationInput::Asked(Ask::Start))),
            Request::Settle => return Ok(Some(DestinationInput::Asked(Ask::Settle))),
            other => Err(Error::OutOfOrder(other.name())),
        };
        if done.is_ok() {
            self.answer(Response::Done).await;
        }
        done.map(|()| None)
    }

    /// The last request of a source that can still go on by itself: it is looked at once more before. Later it is
    /// not. A guest that is handed over and refused would be nobody's until its source, which no new connection is
    /// made to, has heard of it.
    async fn switchover(&mut self, open: bool, machine: handover::Destination) -> Result<(), Error> {
        if open {
            self.is_source_trusted()?;
        }
        self.enter(Phase::Switchover);
        self.close_exports(machine).await?;
        self.enter(Phase::Device);
        Ok(())
    }

    /// What comes of it for its session comes at the next judgement, so that it hears the refusal.
    fn is_source_trusted(&self) -> Result<(), Error> {
        let Some(control) = &self.serving.control else { return Ok(()) };
        trust::look(self.host.pool.endpoint(), control.session()).map_err(|cause| {
            self.host.refused(&self.peer, Reason::NotTrusted, || format!("the switchover of VM {}", self.vm));
            Error::Untrusted { peer: self.peer.clone(), cause }
        })
    }

    /// Answers the source's last request, if it has not been.
    pub(crate) async fn answer(&mut self, response: Response) {
        if let (true, Some(control)) = (std::mem::take(&mut self.serving.asked), &mut self.serving.control) {
            control.answer(response).await;
        }
    }

    /// The source knows that the guest runs here, and how it went.
    async fn answer_confirmed(&mut self) {
        self.serving.rate = (std::time::Instant::now(), self.data.streams.total());
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
            _ => Response::Refused(Error::OutOfOrder("prepare").refusal()),
        }
    }

    /// What the source is told of the guest.
    pub(crate) fn word(&self, fate: Fate) -> Response {
        match &self.said_started {
            Some(started) => Response::Started(started.clone()),
            None => Response::Fate(fate),
        }
    }
}

/// An operator's decision.
async fn next_order(waiting: &mut Option<Order>, orders: &mut Orders) -> Option<Order> {
    match waiting.take() {
        Some(order) => Some(order),
        None => orders.recv().await,
    }
}

/// What the source asks next; a source that was lost asks nothing.
async fn next_request(control: &mut Option<Control>) -> Result<Option<Request>, MessageError> {
    match control {
        Some(control) => control.request().await,
        None => std::future::pending().await,
    }
}
