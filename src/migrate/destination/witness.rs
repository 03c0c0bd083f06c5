//! The witness as the destination has it: agreed on before anything is made, and asked before the guest runs.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::error::Error;
use super::state::Destination;
use crate::migrate::decide;
use crate::migrate::handover::{self, Answer, DestinationInput, DestinationState, Ended, Move};
use crate::migrate::host::Host;
use crate::migrate::host::witness::{WHOLE_DEADLINE, has_none, unusable};
use crate::migrate::journal::{Journal, JournalError, Record};
use crate::migrate::model::problem::Problem;
use crate::migrate::model::witness::AgreedWitness;
use crate::migrate::protocol::message::Offer;
use crate::net::identity::Identity;

/// How long the witness is asked for a guest that has not been started before it is given up here.
const SEAL_DEADLINE: Duration = Duration::from_secs(10);

/// Takes part in the source's witness, if that wants one.
/// Errors: this host has none, or its own is of no use.
pub(super) async fn agree(
    host: &Host,
    peer: &Identity,
    migration: Uuid,
    offer: &Offer,
) -> Result<Option<AgreedWitness>, Error> {
    let Some(theirs) = &offer.witness else { return Ok(None) };
    let own = host.identity.as_str();
    let Some(witness) = &host.witness else {
        return Err(Error::Problems(vec![has_none(own, peer.as_str())]));
    };
    let agreed = witness.agree(migration, theirs).await;
    agreed.map(Some).map_err(|e| Error::Problems(vec![unusable(own, &e)]))
}

/// Durable before anything is granted.
pub(super) fn note(journal: &mut Journal, agreed: Option<AgreedWitness>) -> Result<(), JournalError> {
    agreed.map_or(Ok(()), |agreed| journal.record(Record::WitnessAgreed(agreed)))
}

/// What a check finds. Changes nothing.
pub(super) async fn finding(host: &Host, peer: &Identity, offer: &Offer) -> Option<Problem> {
    let own = host.identity.as_str();
    match (&host.witness, &offer.witness) {
        (_, None) => None,
        (None, Some(_)) => Some(has_none(own, peer.as_str())),
        (Some(witness), Some(theirs)) => witness.is_that(theirs).await.err().map(|e| unusable(own, &e)),
    }
}

impl Destination {
    /// Whether the witness is asked, and has not said.
    pub(super) fn is_at_witness(machine: handover::Destination) -> bool {
        matches!(machine.state(), DestinationState::Sealing { .. } | DestinationState::Alone)
    }

    /// Whether the guest has not been started, and no record says more than that it may be.
    pub(super) fn may_be_given_up(machine: handover::Destination) -> bool {
        let asked = matches!(
            machine.state(),
            DestinationState::Alone | DestinationState::Sealing { again: false, .. }
        );
        asked || matches!(machine.state(), DestinationState::Waiting { .. })
    }

    /// It has not said for as long as can be waited for a guest that stands still; only of one that may be given up, and
    /// for a source that is there to take it back.
    pub(super) fn seal_is_over(&self, machine: handover::Destination) -> bool {
        let is_first = matches!(machine.state(), DestinationState::Sealing { again: false, .. });
        is_first
            && self.has_source()
            && self.serving.sealing_since.is_some_and(|since| since.elapsed() >= SEAL_DEADLINE)
    }

    fn has_source(&self) -> bool {
        self.serving.control.as_ref().is_some_and(|control| control.away().is_none())
    }

    /// The guest is handed over to this host, and its source is not there: perhaps for good. The next process asks the
    /// witness on, by the journal.
    pub(super) fn is_left_alone(&self, machine: handover::Destination) -> bool {
        matches!(machine.state(), DestinationState::Sealing { .. }) && !self.has_source()
    }

    /// Why not.
    pub(super) fn why_not_sealed(&self) -> String {
        let trouble = decide::witness_trouble(&self.host, self.journal.past());
        trouble.unwrap_or_else(|| format!("no answer within {} s", SEAL_DEADLINE.as_secs()))
    }

    /// What becomes of the guest when its source stays away, in words.
    pub(super) fn what_then(&self) -> &'static str {
        match self.journal.past().witness {
            None => "the guest is given up here, for good",
            Some(_) => "the witness is asked whether it has handed the guest over",
        }
    }

    /// Makes a move there. What it refuses is why the guest is given up.
    pub(super) async fn at_witness(&mut self, by: Move) -> Answer {
        // Only for a source that is there the guest is given up when it takes too long.
        match by == Move::TakeAsTold && self.has_source() {
            true => drop(self.serving.sealing_since.get_or_insert_with(Instant::now)),
            false => self.serving.sealing_since = None,
        }
        let answer = self.asked(by).await;
        self.serving.ask_witness_at = Instant::now() + decide::ASK_AGAIN;
        let id = self.journal.past().header.migration;
        let why = match answer {
            Answer::Unknown if by == Move::TakeIfOffered => {
                let words = format!(
                    "the whole guest is here, paused, and {} stays away; whether it has handed the guest over the \
                     witness has not said: {}. It is asked every second; start the VM nowhere until then. The guest is \
                     given up here if this agent is stopped for good meanwhile; a restart or reload goes on",
                    self.peer,
                    self.why_not_sealed()
                );
                self.host.decisions.open_question(id, words);
                return answer;
            }
            // An operator's word is enough: it is started.
            Answer::Unknown if self.serving.order.is_some() => {
                self.host.decisions.answered(id);
                return answer;
            }
            Answer::Unknown => {
                if !self.has_source() {
                    let words = format!(
                        "the whole guest is here, paused, and {} has handed it over and is away; whether it has taken \
                         it back the witness has not said: {}. It is asked every second; start the VM nowhere until \
                         then",
                        self.peer,
                        self.why_not_sealed()
                    );
                    self.host.decisions.open_question(id, words);
                }
                return answer;
            }
            Answer::Done => {
                self.host.decisions.answered(id);
                None
            }
            Answer::TheOthers => Some(format!("{} has taken the guest back", self.peer)),
            Answer::NotOffered => Some(format!("{} has not handed it over", self.peer)),
            Answer::Forgotten => Some("the witness knows nothing of this migration".to_owned()),
        };
        self.serving.sealing_since = None;
        if self.serving.trouble.is_none() {
            self.serving.trouble = why.map(Error::NotSealed);
        }
        answer
    }

    /// Whatever cuts it short, it may be done all the same.
    async fn asked(&mut self, by: Move) -> Answer {
        let until = match (&self.serving.order, self.serving.sealing_since) {
            (Some(_), _) => Instant::now() + decide::ORDERED_WITHIN,
            (None, Some(since)) => since + SEAL_DEADLINE,
            (None, None) => Instant::now() + WHOLE_DEADLINE,
        };
        let hears_orders = self.serving.order.is_none() && self.serving.waiting.is_none();
        tokio::select! {
            biased;
            answer = decide::at_witness(&self.host, self.journal.past(), by) => answer,
            Some(order) = self.served.orders.recv(), if hears_orders => {
                self.serving.waiting = Some(order);
                Answer::Unknown
            }
            () = self.host.freeze.begun() => Answer::Unknown,
            () = self.host.stopping.cancelled() => Answer::Unknown,
            () = sleep_until(until) => Answer::Unknown,
        }
    }

    /// The source stays away: of a guest that runs here it need not know.
    pub(super) fn source_stays_away(
        &self,
        machine: handover::Destination,
    ) -> Result<Option<DestinationInput>, Error> {
        if machine.ended() == Some(Ended::Moved) {
            return Ok(None);
        }
        let after_s = self.host.config.deadlines.handover_s;
        if self.journal.past().witness.is_none() || !machine.is_loaded() {
            return Err(Error::SourceStayedAway(after_s));
        }
        tracing::warn!(
            vm = self.vm,
            after_s,
            "the source stays away: the witness is asked whose the guest is"
        );
        Ok(Some(DestinationInput::Alone))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What the version before this one leaves, and reads.
    #[test]
    fn without_a_witness_not_a_byte_of_what_is_left_has_changed() {
        let text = serde_json::to_string(&handover::Destination::new()).unwrap();
        assert_eq!(text, r#"{"state":{"Waiting":{"loaded":false}}}"#);
        let read: handover::Destination = serde_json::from_str(&text).unwrap();
        assert!(!read.has_witness());
        let with = serde_json::to_string(&read.with_witness()).unwrap();
        assert_eq!(with, r#"{"state":{"Waiting":{"loaded":false}},"witness":true}"#);
    }
}
