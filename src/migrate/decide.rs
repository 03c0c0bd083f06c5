//! What both roles do for the hand-over's interpreter: records, and for a source that has handed over and
//! heard no more, the question to its destination.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::handover::{Ask, Illegal, Mark, Side, Source, SourceInput, SourceState, Written};
use super::host::decisions::{Claimed, Decision, Order, Orders};
use super::host::{AskError, Host};
use super::journal::{Journal, JournalError, Record};
use super::model::phase::Phase;
use super::model::problem::chain;
use super::model::progress::{Outcome, ProgressSink};
use super::protocol::client::{Link, LinkError};
use super::protocol::message::{Fate, Prepared, Request, Response, Started};
use crate::config::HOOK_S_MAX;

/// Between two questions to a destination that cannot be reached, and two tries of a disk.
pub(crate) const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a destination may take to answer.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// How long the last answer is waited for when the agent stops.
const LAST_ANSWER: Duration = Duration::from_secs(3);
/// How long it is waited for when nothing depends on it.
const COURTESY_DEADLINE: Duration = Duration::from_secs(5);

/// Writes a record of the hand-over; `uid`: the operator's whose decision it is.
pub(crate) fn write(journal: &mut Journal, mark: Mark, uid: Option<u32>) -> (Written, Option<JournalError>) {
    let record = match mark {
        Mark::Forced(side) => {
            Record::Forced { side, uid, at: time::OffsetDateTime::now_utc().unix_timestamp() }
        }
        Mark::HandedOver => Record::HandedOver,
        Mark::Starting => Record::Starting,
        Mark::Runs => Record::Runs,
        Mark::NeverRan => Record::NeverRan,
        Mark::Confirmed => Record::Confirmed,
    };
    let (written, error) = journal.mark(record);
    if let Some(error) = &error {
        tracing::error!(?mark, ?written, error = chain(error), "the journal does not take a record");
    }
    (written, error)
}

/// A step that the machine does not have changes nothing, and is a mistake of ours.
pub(crate) fn report(error: &Illegal) {
    tracing::error!(error = chain(error), "please report this");
}

/// A source whose guest may be either side's.
pub(crate) struct Question {
    host: Arc<Host>,
    peer: String,
    migration: Uuid,
    progress: ProgressSink,
    orders: Orders,
    found: Decided,
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
    /// When the agent stops: until then the last answer is waited for.
    leave_at: Option<Instant>,
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
            order: None,
            unwritten: None,
            hook: host.config.deadlines.hook(),
            show_at: Instant::now() + host.config.deadlines.undecided(),
            shown: false,
            last: cause,
            leave_at: None,
        }
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
            match self.unless_ordered(machine, sleep(ASK_AGAIN)).await? {
                Ok(()) => break,
                Err(order) => match self.claim(order) {
                    None => {}
                    forced => return Ok(forced),
                },
            }
        }
        // A decision that was refused in doubt must not wait on the disk for a restart.
        let _ = journal.settle_doubt();
        Ok(Some(SourceInput::Again))
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
        order.answer(decision(decided, journal, error.as_ref()));
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
        if self.shown || state == SourceState::Doubt || Instant::now() >= self.show_at {
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

    fn answered(&mut self, answer: Result<Answer, AskError>) -> Option<SourceInput> {
        match answer {
            Ok(Answer { link, fate, started }) => {
                self.found.link = Some(link);
                self.found.started = started.or(self.found.started.take());
                Some(SourceInput::Heard(fate))
            }
            Err(e) => {
                let now = chain(&e);
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
            SourceState::Doubt => format!(
                "whether the hand-over to {} is on this host's disk is not known: {last}. The guest stays \
                 paused here until the disk, or {}, says so; both are tried every second",
                self.peer, self.peer
            ),
            _ => format!(
                "the guest was handed over to {}, which has not said since whether it runs: {last}. \
                 It is asked again and again; the guest stays paused here until then",
                self.peer
            ),
        };
        self.host.decisions.open_question(self.migration, cause.clone());
        self.progress.end(Phase::Undecided, Outcome::Undecided { cause });
    }
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
struct Answer {
    link: Link,
    fate: Fate,
    started: Option<Started>,
}

impl Asking {
    async fn ask(self, ask: Ask, cause: &str) -> Result<Answer, AskError> {
        let mut link = match self.link {
            Some(link) => link,
            None => Link::open(&self.host.peers.session(&self.peer).await?, self.migration).await?,
        };
        let deadline = match ask {
            Ask::Start => self.hook + ANSWER_DEADLINE,
            _ => ANSWER_DEADLINE,
        };
        let (fate, started) = match link.ask(request(ask, cause), deadline).await? {
            Response::Started(started) => (Fate::Runs, Some(started)),
            Response::Fate(fate) => (fate, None),
            _ => return Err(LinkError::Unexpected { request: "settle" }.into()),
        };
        Ok(Answer { link, fate, started })
    }
}

/// What the operator is told.
pub(crate) fn decision(decided: bool, journal: &Journal, error: Option<&JournalError>) -> Decision {
    let cause = error.map_or_else(|| "nothing is open any more".to_owned(), |e| chain(e));
    match (decided, journal.is_sure()) {
        (true, _) => Decision::Taken,
        (false, true) => Decision::Refused(cause),
        (false, false) => Decision::Unknown(format!("whether it is on the disk is not known: {cause}")),
    }
}

/// How long the destination's `before_start` may take.
pub(crate) fn hook(host: &Host, grant: Option<&Prepared>) -> Duration {
    hook_of(grant, host.config.deadlines.hook())
}

/// By the destination's own word, if it gave one, and at most [`HOOK_S_MAX`].
fn hook_of(grant: Option<&Prepared>, ours: Duration) -> Duration {
    let granted = grant.and_then(|grant| grant.hook_s);
    granted.map_or(ours, |s| Duration::from_secs(s.min(HOOK_S_MAX)))
}

fn request(ask: Ask, reason: &str) -> Request {
    match ask {
        Ask::Start => Request::Start,
        Ask::Abort => Request::Abort { reason: reason.to_owned() },
        Ask::Settle => Request::Settle,
        Ask::Confirmed => Request::Confirmed,
    }
}

/// Tells a destination, over a control stream of its own, that the guest stays where it is.
/// Errors: it cannot be told; it finds out by itself when it has waited for long enough.
pub(crate) async fn call_off(
    host: &Host,
    peer: &str,
    migration: Uuid,
    reason: &str,
) -> Result<Option<Fate>, AskError> {
    let session = host.peers.session(peer).await?;
    let mut link = Link::open(&session, migration).await?;
    let answer = link.ask(Request::Abort { reason: reason.into() }, ANSWER_DEADLINE).await?;
    link.finish();
    Ok(match answer {
        Response::Fate(fate) => Some(fate),
        _ => None,
    })
}

/// Tells a destination that its word is known here for good, so that it need not be kept there.
pub(crate) async fn thank(host: &Host, peer: &str, migration: Uuid) {
    let said = async {
        let session = host.peers.session(peer).await?;
        let mut link = Link::open(&session, migration).await?;
        link.demand(Request::Confirmed, COURTESY_DEADLINE).await?;
        link.finish();
        Ok::<_, AskError>(())
    };
    if !matches!(tokio::time::timeout(COURTESY_DEADLINE, said).await, Ok(Ok(()))) {
        tracing::debug!("the destination keeps its journal for longer: it was not told that it need not");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_says_how_long_its_command_may_take() {
        // As an agent says it that does not know of it.
        let grant: Prepared =
            serde_json::from_str(r#"{"exports":[],"qemu":"QEMU 10.0.2","restartable":true}"#).unwrap();
        let ours = Duration::from_secs(30);
        let says = |hook_s| hook_of(Some(&Prepared { hook_s, ..grant.clone() }), ours).as_secs();
        assert_eq!((hook_of(None, ours), says(None)), (ours, 30));
        assert_eq!((says(Some(0)), says(Some(400)), says(Some(u64::MAX))), (0, 400, HOOK_S_MAX));
    }
}
