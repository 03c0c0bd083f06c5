//! The question of a source that has handed over and heard no more. It goes to the destination again and again,
//! and may be decided by an operator.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::records::{decision, write};
use super::remote::{ANSWER_DEADLINE, tell};
use super::witness::{Afterwards, afterwards, at_witness, witness_trouble};
use crate::config::WitnessConfig;
use crate::migrate::handover::{Answer, Ask, Mark, Move, Side, Source, SourceInput, SourceState, Written};
use crate::migrate::host::decisions::{Claimed, Decision, Order, Orders};
use crate::migrate::host::{AskError, Host};
use crate::migrate::journal::{Journal, JournalError, Past};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::{Outcome, ProgressSink};
use crate::migrate::protocol::client::{Link, LinkError};
use crate::migrate::protocol::message::{Fate, Request, Response, Started};

/// Between two questions to a destination that cannot be reached, and two tries of a disk.
pub(crate) const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Between two tries to take the guest back at the witness.
const TAKE_BACK_AGAIN: Duration = Duration::from_secs(5);
/// How long the last answer is waited for when the agent stops.
const LAST_ANSWER: Duration = Duration::from_secs(3);

/// Where the destination's agent has lost what it knew, nobody but an operator who looks there can know. Whatever
/// would let the guest run twice is not among it.
const WHAT_AN_OPERATOR_CAN_DO: &str = ". Look on that host for the VM's QEMU. If its state folder was only not mounted, mount it and restart its agent; an \
     older copy of the folder would say what is no longer true. If the guest runs there or has run there since, decide \
     `there`. Decide `here` only if it surely has not, and after its QEMU there has ended and nothing starts one: what \
     is not surely known stays undecided";

const WON: &str = "the witness has given the guest back to this host, for good; but the disk does not take the record of \
     it, without which a restart would not know. That is tried every second, and then the guest goes on here";

/// A source whose guest may be either side's.
pub(crate) struct Question {
    host: Arc<Host>,
    peer: String,
    migration: Uuid,
    progress: ProgressSink,
    orders: Orders,
    found: Decided,
    /// Came while the witness was asked.
    waiting: Option<Order>,
    /// The operator whose decision is being written, and why it was not.
    order: Option<Claimed>,
    unwritten: Option<JournalError>,
    /// How long the destination's `before_start` may take.
    hook: Duration,
    /// When the migration is shown as undecided.
    show_at: Instant,
    shown: bool,
    /// What went wrong last, in words.
    last: String,
    /// It was that the destination has no record of the migration.
    unknown_there: bool,
    /// When the agent stops: until then the last answer is waited for.
    leave_at: Option<Instant>,
    /// When the guest is taken back at the witness; none without one.
    unheard_at: Option<Instant>,
    /// What that has said of it.
    witness: Option<String>,
    /// It has answered the offer.
    offered: bool,
}

/// The agent stops with a question open: the next one asks on.
pub(crate) struct Leaving;

/// What is known once it is decided whose the guest is.
#[derive(Default)]
pub(crate) struct Decided {
    /// The destination's word on the guest's start, if it came with its answer.
    pub(crate) started: Option<Started>,
    /// A control stream on which the destination has answered.
    pub(crate) link: Option<Link>,
    pub(crate) forced: Option<Side>,
}

impl Question {
    /// A question to the peer of that name in the configuration, open because of `cause`.
    pub(crate) fn new(
        host: &Arc<Host>,
        peer: &str,
        migration: Uuid,
        progress: ProgressSink,
        cause: String,
    ) -> Self {
        Self {
            host: Arc::clone(host),
            peer: peer.to_owned(),
            migration,
            progress,
            orders: host.decisions.take_orders(migration),
            found: Decided::default(),
            waiting: None,
            order: None,
            unwritten: None,
            hook: host.config.deadlines.hook(),
            show_at: Instant::now() + host.config.deadlines.undecided(),
            shown: false,
            last: cause,
            unknown_there: false,
            leave_at: None,
            unheard_at: None,
            witness: None,
            offered: false,
        }
    }

    /// Both sides have agreed on a witness, by the journal.
    pub(crate) fn with_witness(mut self, past: &Past) -> Self {
        let after = self.host.config.witness.as_ref().map(WitnessConfig::after);
        self.unheard_at = past.witness.as_ref().and(after).map(|after| Instant::now() + after);
        self.witness = witness_trouble(&self.host, past);
        self
    }

    /// Offers the guest at the witness, and asks the destination meanwhile. What that has to say does not wait for a
    /// witness that does not answer.
    pub(crate) async fn offer(
        &mut self,
        past: &Past,
        ask: Option<Ask>,
        machine: Source,
    ) -> Result<Option<SourceInput>, Leaving> {
        let (host, offered) = (Arc::clone(&self.host), self.offered);
        // An offer is never taken back, and what was refused stays refused: one that was heard need not be repeated.
        let offers = async { offered || at_witness(&host, past, Move::Offer).await != Answer::Unknown };
        let mut offers = pin!(offers);
        let (heard, offered) = {
            let asks = async {
                match ask {
                    Some(ask) => self.ask(ask, machine).await,
                    None => Ok(None),
                }
            };
            let mut asks = pin!(asks);
            tokio::select! {
                biased;
                heard = &mut asks => (heard?, None),
                offered = &mut offers => (asks.await?, Some(offered)),
            }
        };
        let offered = match offered {
            Some(offered) => Ok(offered),
            None if heard.is_some_and(leads_on) => return Ok(heard),
            None => self.unless_ordered(machine, offers).await?,
        };
        match offered {
            Ok(offered) => self.offered = offered,
            Err(order) => return Ok(self.claim(order).or(heard)),
        }
        Ok(heard)
    }

    /// Takes the guest back at the witness, where there is a QEMU whose guest could run; `not_there`: why there is not.
    /// An operator or a stop cuts it short: then it may be done all the same.
    pub(crate) async fn take_back(&mut self, past: &Past, not_there: Option<String>) -> Answer {
        let is_there = not_there.is_none();
        let taken = at_witness(&self.host, past, Move::TakeBack);
        let answer = tokio::select! {
            biased;
            answer = taken, if is_there => answer,
            Some(order) = self.orders.recv(), if is_there => {
                self.waiting = Some(order);
                Answer::Unknown
            }
            () = self.host.stopping.cancelled(), if is_there => Answer::Unknown,
            else => Answer::Unknown,
        };
        // The destination is asked in between, however long the witness takes.
        self.unheard_at = self.unheard_at.map(|_| Instant::now() + TAKE_BACK_AGAIN);
        let peer = &self.peer;
        self.witness = match answer {
            Answer::Done => None,
            Answer::TheOthers => Some(format!("{peer} has taken the guest, and has not given it up")),
            Answer::Forgotten => Some("it knows nothing of this migration".into()),
            _ => Some(match not_there {
                Some(why) => {
                    format!("it is not asked to give the guest back, for its QEMU here cannot take it: {why}")
                }
                None => witness_trouble(&self.host, past).unwrap_or_else(|| "it does not answer".into()),
            }),
        };
        let words = self.witness.as_deref().unwrap_or("the guest is this host's");
        tracing::warn!(peer, witness = words, "the destination has not said what became of the guest");
        answer
    }

    /// The destination's `before_start` may take this long.
    pub(crate) fn with_hook(mut self, hook: Duration) -> Self {
        self.hook = hook;
        self
    }

    /// Asks the destination. Its answer, an operator's decision, or nothing.
    pub(crate) async fn ask(&mut self, ask: Ask, machine: Source) -> Result<Option<SourceInput>, Leaving> {
        let asking = Asking {
            host: Arc::clone(&self.host),
            peer: self.peer.clone(),
            migration: self.migration,
            hook: self.hook,
            link: self.found.link.take(),
        };
        let cause = self.last.clone();
        match self.unless_ordered(machine, async move { asking.ask(ask, &cause).await }).await? {
            Ok(answer) => Ok(self.answered(answer)),
            Err(order) => Ok(self.claim(order)),
        }
    }

    /// Waits until it is time to ask again, or an operator decides. There is no deadline: neither side
    /// may guess.
    pub(crate) async fn wait(
        &mut self,
        journal: &mut Journal,
        machine: Source,
    ) -> Result<Option<SourceInput>, Leaving> {
        loop {
            let order = match self.waiting.take() {
                Some(order) => order,
                None => match self.unless_ordered(machine, sleep(ASK_AGAIN)).await? {
                    Ok(()) => break,
                    Err(order) => order,
                },
            };
            let forced = self.claim(order);
            if forced.is_some() {
                return Ok(forced);
            }
        }
        // A decision that was refused in doubt must not wait on the disk for a restart.
        let _ = journal.settle_doubt();
        let now = Instant::now();
        let is_open = matches!(machine.state(), SourceState::Asking { .. });
        let is_unheard = self.unheard_at.is_some_and(|at| is_open && now >= at);
        Ok(Some(if is_unheard { SourceInput::Unheard } else { SourceInput::Again }))
    }

    /// Writes a record.
    pub(crate) fn write(&mut self, journal: &mut Journal, mark: Mark) -> Written {
        let uid = self.order.as_ref().and_then(|order| order.uid);
        let (written, error) = write(journal, mark, uid);
        match error {
            Some(error) if self.order.is_some() => self.unwritten = self.unwritten.take().or(Some(error)),
            Some(error) => self.last = chain(&error),
            None => {}
        }
        written
    }

    /// An operator's decision is on the disk before it counts.
    pub(crate) fn answer_operator(&mut self, journal: &Journal, machine: Source) {
        let (order, error) = (self.order.take(), self.unwritten.take());
        let Some(order) = order else { return };
        let decided = machine.ended().is_some();
        self.found.forced = decided.then_some(order.side);
        if decided && order.side == Side::Here {
            // So that a destination that lives, against what was decided, does not take it there.
            afterwards(&self.host, journal.past(), Afterwards::Take);
        }
        order.answer(match machine.state() {
            SourceState::Won => Decision::Refused(WON.into()),
            _ => decision(decided, journal, error.as_ref()),
        });
    }

    /// It is decided.
    pub(crate) fn close(mut self) -> Decided {
        self.progress.update(|p| p.outcome = None);
        std::mem::take(&mut self.found)
    }

    /// `work`, unless an operator's decision interrupts it.
    async fn unless_ordered<T>(
        &mut self,
        machine: Source,
        work: impl Future<Output = T>,
    ) -> Result<Result<T, Order>, Leaving> {
        let state = machine.state();
        if self.shown || matches!(state, SourceState::Doubt { .. }) || Instant::now() >= self.show_at {
            self.show(state);
        }
        tokio::pin!(work);
        let stopping = self.host.stopping.clone();
        loop {
            let leave_at = self.leave_at;
            tokio::select! {
                biased;
                done = &mut work => return Ok(Ok(done)),
                Some(order) = self.orders.recv() => return Ok(Err(order)),
                () = stopping.cancelled(), if leave_at.is_none() => {
                    self.leave_at = Some(Instant::now() + LAST_ANSWER);
                }
                () = sleep_until(leave_at.unwrap_or(self.show_at)), if leave_at.is_some() => {
                    tracing::warn!(
                        peer = self.peer,
                        "the agent stops with the hand-over undecided; the next one asks on"
                    );
                    return Err(Leaving);
                }
                // Also while a peer is dialed that does not answer.
                () = sleep_until(self.show_at), if !self.shown => self.show(state),
            }
        }
    }

    /// Takes a decision, if whoever made it still waits.
    fn claim(&mut self, order: Order) -> Option<SourceInput> {
        let order = order.claim()?;
        let side = order.side;
        tracing::warn!(uid = order.uid, ?side, "an operator decides whose the guest is");
        self.order = Some(order);
        Some(SourceInput::Forced(side))
    }

    fn answered(&mut self, answer: Result<TheirWord, AskError>) -> Option<SourceInput> {
        match answer {
            Ok(TheirWord { link, fate, started }) => {
                self.found.link = Some(link);
                self.found.started = started.or(self.found.started.take());
                Some(SourceInput::Heard(fate))
            }
            Err(e) => {
                let now = chain(&e);
                self.unknown_there = matches!(e, AskError::Link(LinkError::NoRecord));
                if now != self.last {
                    tracing::warn!(cause = now, "the destination has not said what became of the guest");
                    self.last = now;
                }
                None
            }
        }
    }

    fn show(&mut self, state: SourceState) {
        self.shown = true;
        let last = &self.last;
        let cause = match state {
            SourceState::Doubt { .. } => format!(
                "whether the hand-over to {} is on this host's disk is not known: {last}. The guest stays \
                 paused here until the disk, or {}, says so; both are tried every second",
                self.peer, self.peer
            ),
            SourceState::Missing => format!(
                "the guest's QEMU here is gone, and {}, which may have the whole guest, has not said since whether it \
                 runs there: {last}. It is asked again and again; start the VM nowhere until then{}",
                self.peer,
                if self.unknown_there { WHAT_AN_OPERATOR_CAN_DO } else { "" }
            ),
            SourceState::Won => WON.into(),
            _ => format!(
                "the guest was handed over to {}, which has not said since whether it runs: {last}. \
                 It is asked again and again; the guest stays paused here until then{}{}",
                self.peer,
                self.witness.as_ref().map_or_else(String::new, |said| format!(". The witness: {said}")),
                if self.unknown_there { WHAT_AN_OPERATOR_CAN_DO } else { "" }
            ),
        };
        self.host.decisions.open_question(self.migration, cause.clone());
        self.progress.end(Phase::Undecided, Outcome::Undecided { cause });
    }
}

/// Whether there is something to be done about what was heard.
fn leads_on(heard: SourceInput) -> bool {
    !matches!(heard, SourceInput::Heard(Fate::Open))
}

/// One question on its way. Dropped, it is not answered, and its control stream ends.
struct Asking {
    host: Arc<Host>,
    peer: String,
    migration: Uuid,
    hook: Duration,
    link: Option<Link>,
}

/// The destination's word.
struct TheirWord {
    link: Link,
    fate: Fate,
    started: Option<Started>,
}

impl Asking {
    async fn ask(self, ask: Ask, cause: &str) -> Result<TheirWord, AskError> {
        let mut link = match self.link {
            Some(link) => link,
            None => Link::open(&self.host.peers.session(&self.peer).await?, self.migration).await?,
        };
        let deadline = match ask {
            Ask::Start => self.hook + ANSWER_DEADLINE,
            _ => ANSWER_DEADLINE,
        };
        let answer = match link.ask(request(ask, cause), deadline).await {
            Err(refused @ LinkError::Refused(_)) => {
                // Nothing there decides it, unless it knows the migration and refuses for another reason.
                match tell(&self.host, &self.peer, self.migration, ANSWER_DEADLINE).await {
                    Ok(None) => return Err(LinkError::NoRecord.into()),
                    _ => return Err(refused.into()),
                }
            }
            answer => answer?,
        };
        let (fate, started) = said(answer, ask)?;
        Ok(TheirWord { link, fate, started })
    }
}

/// What the destination says of the guest with its answer.
fn said(answer: Response, ask: Ask) -> Result<(Fate, Option<Started>), LinkError> {
    match answer {
        Response::Started(started) => Ok((Fate::Runs, Some(started))),
        Response::Fate(fate) => Ok((fate, None)),
        // It has no record of it, which proves nothing: an operator may have decided there before it was lost.
        Response::Done if ask == Ask::Abort => Err(LinkError::NoRecord),
        _ => Err(LinkError::Unexpected { request: "settle" }),
    }
}

fn request(ask: Ask, reason: &str) -> Request {
    match ask {
        Ask::Start => Request::Start,
        Ask::Abort => Request::Abort { reason: reason.to_owned() },
        Ask::Settle => Request::Settle,
        Ask::Confirmed => Request::Confirmed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A destination that may have had the whole guest keeps its record until this host has confirmed the end.
    #[test]
    fn a_destination_without_a_record_says_nothing_of_the_guest() {
        assert!(matches!(said(Response::Done, Ask::Abort), Err(LinkError::NoRecord)));
        for fate in [Fate::Runs, Fate::NeverRan, Fate::Loaded, Fate::Open] {
            assert!(matches!(said(Response::Fate(fate), Ask::Abort), Ok((same, None)) if same == fate));
        }
    }
}
