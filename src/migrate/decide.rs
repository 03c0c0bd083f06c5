//! Does what the hand-over's machines say: writes their records, and for a source that has handed
//! over and heard no more, asks until it is decided.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::handover::{
    Ask, Destination, DestinationEffect, DestinationInput, Mark, Side, Source, SourceEffect, SourceInput,
    SourceState, Written,
};
use super::host::Host;
use super::host::decisions::{Decision, Order};
use super::journal::{Journal, JournalError, Record};
use super::model::phase::Phase;
use super::model::problem::chain;
use super::model::progress::{Outcome, ProgressSink};
use super::protocol::client::{Link, LinkError};
use super::protocol::message::{Fate, Prepared, Request, Response, Started};
use super::source::failure::Failure;
use crate::config::HOOK_S_MAX;

/// Between two questions to a destination that cannot be reached, and two tries of a disk.
pub(crate) const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a destination may take to answer.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// How long the last answer is waited for when the agent stops.
const LAST_ANSWER: Duration = Duration::from_secs(3);
/// How long it is waited for when nothing depends on it.
const COURTESY_DEADLINE: Duration = Duration::from_secs(5);

/// Writes what a source's machine asks to have written, until it asks for something else.
pub(crate) fn write_source(
    machine: &mut Source,
    journal: &mut Journal,
    mut effects: Vec<SourceEffect>,
    uid: Option<u32>,
) -> (Vec<SourceEffect>, Option<JournalError>) {
    let mut first_error = None;
    while let [SourceEffect::Write(mark)] = effects[..] {
        let (written, error) = write(journal, mark, uid);
        first_error = first_error.or(error);
        effects = source_step(machine, SourceInput::Written(written));
    }
    (effects, first_error)
}

/// The same for a destination's.
pub(crate) fn write_destination(
    machine: &mut Destination,
    journal: &mut Journal,
    mut effects: Vec<DestinationEffect>,
    uid: Option<u32>,
) -> (Vec<DestinationEffect>, Option<JournalError>) {
    let mut first_error = None;
    while let [DestinationEffect::Write(mark)] = effects[..] {
        let (written, error) = write(journal, mark, uid);
        first_error = first_error.or(error);
        effects = destination_step(machine, DestinationInput::Written(written));
    }
    (effects, first_error)
}

fn write(journal: &mut Journal, mark: Mark, uid: Option<u32>) -> (Written, Option<JournalError>) {
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
pub(crate) fn source_step(machine: &mut Source, input: SourceInput) -> Vec<SourceEffect> {
    machine.step(input).unwrap_or_else(|e| {
        tracing::error!(error = chain(&e), "please report this");
        Vec::new()
    })
}

/// The same for a destination's.
pub(crate) fn destination_step(machine: &mut Destination, input: DestinationInput) -> Vec<DestinationEffect> {
    machine.step(input).unwrap_or_else(|e| {
        tracing::error!(error = chain(&e), "please report this");
        Vec::new()
    })
}

/// How an open question ended: the machine says whose the guest is.
pub(crate) struct Decided {
    /// What is to be done about it.
    pub(crate) effects: Vec<SourceEffect>,
    /// The destination's word on the guest's start, if it came with it.
    pub(crate) started: Started,
    /// A control stream on which the destination has answered.
    pub(crate) link: Option<Link>,
    /// What an operator decided.
    pub(crate) forced: Option<Side>,
}

/// A source whose guest may be either side's.
pub(crate) struct Question {
    host: Arc<Host>,
    peer: String,
    migration: Uuid,
    progress: ProgressSink,
    orders: mpsc::Receiver<Order>,
    link: Option<Link>,
    started: Option<Started>,
    /// How long the destination's `before_start` may take.
    hook: Duration,
    /// When the migration is shown as undecided.
    show_at: Instant,
    shown: bool,
    /// What went wrong last, in words.
    last: String,
    /// Resolves when the agent stops and the last answer was waited for.
    leaving: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// What ends a turn of the loop that asks.
enum Turn {
    /// The destination has answered.
    Heard(Fate),
    /// It has not.
    Missed,
    /// It is time to ask again.
    Again,
    /// An operator decides.
    Order(Order),
    /// The agent stops.
    Leave,
}

impl Question {
    /// A question to the peer of that name in the configuration.
    pub(crate) fn new(host: &Arc<Host>, peer: &str, migration: Uuid, progress: ProgressSink) -> Self {
        let stopping = host.stopping.clone();
        Self {
            host: Arc::clone(host),
            peer: peer.to_owned(),
            migration,
            progress,
            orders: host.take_orders(migration),
            link: None,
            started: None,
            hook: host.config.deadlines.hook(),
            show_at: Instant::now() + host.config.deadlines.undecided(),
            shown: false,
            last: String::new(),
            leaving: Box::pin(async move {
                stopping.cancelled().await;
                sleep(LAST_ANSWER).await;
            }),
        }
    }

    /// The destination's `before_start` may take this long.
    pub(crate) fn with_hook(mut self, hook: Duration) -> Self {
        self.hook = hook;
        self
    }

    /// Asks until it is decided. There is no deadline: neither side may guess. `None` when the agent
    /// stops before; the next one goes on with the journal.
    pub(crate) async fn decide(
        mut self,
        machine: &mut Source,
        journal: &mut Journal,
        effects: Vec<SourceEffect>,
        cause: String,
    ) -> Option<Decided> {
        let (mut effects, mut forced) = (effects, None);
        self.last = cause;
        loop {
            let (next, error) = write_source(machine, journal, effects, None);
            effects = next;
            if let Some(error) = error {
                self.last = chain(&error);
            }
            if machine.ended().is_some() {
                break;
            }
            if self.shown || machine.state() == SourceState::Doubt || Instant::now() >= self.show_at {
                self.show(machine.state());
            }
            let ask = effects.iter().find_map(|effect| match effect {
                SourceEffect::Ask(ask) => Some(*ask),
                _ => None,
            });
            effects = match self.turn(ask, machine.state()).await {
                Turn::Heard(fate) => source_step(machine, SourceInput::Heard(fate)),
                Turn::Missed => Vec::new(),
                Turn::Again => {
                    // A decision that was refused in doubt must not wait on the disk for a restart.
                    let _ = journal.settle_doubt();
                    source_step(machine, SourceInput::Again)
                }
                Turn::Order(order) => obey(machine, journal, order, &mut forced),
                Turn::Leave => {
                    tracing::warn!(
                        peer = self.peer,
                        "the agent stops with the hand-over undecided; the next one asks on"
                    );
                    return None;
                }
            };
        }
        self.progress.update(|p| p.outcome = None);
        let started = self.started.take().unwrap_or(Started { hook_ms: None, warnings: Vec::new() });
        Some(Decided { effects, started, link: self.link.take(), forced })
    }

    /// Asks, or waits a little; an operator's decision interrupts either.
    async fn turn(&mut self, ask: Option<Ask>, state: SourceState) -> Turn {
        let asking = Asking {
            host: Arc::clone(&self.host),
            peer: self.peer.clone(),
            migration: self.migration,
            hook: self.hook,
            link: ask.and_then(|_| self.link.take()),
        };
        let cause = self.last.clone();
        let asked = async move {
            match ask {
                Some(ask) => Some(asking.ask(ask, &cause).await),
                None => {
                    sleep(ASK_AGAIN).await;
                    None
                }
            }
        };
        tokio::pin!(asked);
        loop {
            tokio::select! {
                biased;
                answer = &mut asked => return answer.map_or(Turn::Again, |answer| self.answered(answer)),
                Some(order) = self.orders.recv() => return Turn::Order(order),
                () = &mut self.leaving => return Turn::Leave,
                // Also while a peer is dialed that does not answer.
                () = sleep_until(self.show_at), if !self.shown => self.show(state),
            }
        }
    }

    fn answered(&mut self, answer: Result<Answer, Failure>) -> Turn {
        match answer {
            Ok(Answer { link, fate, started }) => {
                self.link = Some(link);
                self.started = started.or(self.started.take());
                Turn::Heard(fate)
            }
            Err(e) => {
                let now = chain(&e);
                if now != self.last {
                    tracing::warn!(cause = now, "the destination has not said what became of the guest");
                    self.last = now;
                }
                Turn::Missed
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
        self.host.open_question(self.migration, cause.clone());
        super::source::finish(&self.progress, Phase::Undecided, Outcome::Undecided { cause });
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.host.leave_orders(self.migration);
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
    async fn ask(self, ask: Ask, cause: &str) -> Result<Answer, Failure> {
        let mut link = match self.link {
            Some(link) => link,
            None => Link::open(&self.host.session(&self.peer).await?, self.migration).await?,
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

/// An operator's decision goes through the machine, and is on the disk before it counts.
fn obey(
    machine: &mut Source,
    journal: &mut Journal,
    order: Order,
    forced: &mut Option<Side>,
) -> Vec<SourceEffect> {
    let Some(order) = order.claim() else { return Vec::new() };
    tracing::warn!(uid = order.uid, side = ?order.side, "an operator decides whose the guest is");
    let effects = source_step(machine, SourceInput::Forced(order.side));
    let (effects, error) = write_source(machine, journal, effects, order.uid);
    let decided = machine.ended().is_some();
    if decided {
        *forced = Some(order.side);
    }
    order.answer(decision(decided, journal, error));
    effects
}

/// What the operator is told.
pub(crate) fn decision(decided: bool, journal: &Journal, error: Option<JournalError>) -> Decision {
    let cause = error.map_or_else(|| "nothing is open any more".to_owned(), |e| chain(&e));
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
///
/// # Errors
/// It cannot be told; it finds out by itself when it has waited for long enough.
pub(crate) async fn call_off(
    host: &Host,
    peer: &str,
    migration: Uuid,
    reason: &str,
) -> Result<Option<Fate>, Failure> {
    let session = host.session(peer).await?;
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
        let session = host.session(peer).await?;
        let mut link = Link::open(&session, migration).await?;
        link.demand(Request::Confirmed, COURTESY_DEADLINE).await?;
        link.finish();
        Ok::<_, Failure>(())
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
