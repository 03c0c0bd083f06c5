//! Does what the hand-over's machines say: writes their records, and for a source that has handed
//! over and heard no more, asks until it is decided.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::failure::Failure;
use super::handover::{
    Ask, Destination, DestinationEffect, DestinationInput, Mark, Side, Source, SourceEffect, SourceInput,
    SourceState, Written,
};
use super::host::Host;
use super::journal::{Journal, JournalError, Record};
use super::link::{Link, LinkError};
use super::message::{Fate, Request, Response, Started};
use super::phase::Phase;
use super::problem::chain;
use super::progress::{Outcome, ProgressSink};

/// Between two questions to a destination that cannot be reached, and two tries of a disk.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After this long without an answer the migration is shown as undecided; asking goes on.
const UNDECIDED_AFTER: Duration = Duration::from_secs(30);
/// How long a destination may take to answer.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// How long it is waited for when nothing depends on it.
const COURTESY_DEADLINE: Duration = Duration::from_secs(5);

/// An operator's decision.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) side: Side,
    /// The caller's user, by the kernel's word.
    pub(crate) uid: Option<u32>,
    pub(crate) answer: oneshot::Sender<Result<(), String>>,
}

/// Writes what a source's machine asks to have written, until it asks for something else.
pub(super) fn write_source(
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
pub(super) fn write_destination(
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
pub(super) fn source_step(machine: &mut Source, input: SourceInput) -> Vec<SourceEffect> {
    machine.step(input).unwrap_or_else(|e| {
        tracing::error!(error = chain(&e), "please report this");
        Vec::new()
    })
}

/// The same for a destination's.
pub(super) fn destination_step(machine: &mut Destination, input: DestinationInput) -> Vec<DestinationEffect> {
    machine.step(input).unwrap_or_else(|e| {
        tracing::error!(error = chain(&e), "please report this");
        Vec::new()
    })
}

/// How an open question ended: the machine says whose the guest is.
pub(super) struct Decided {
    /// What is to be done about it.
    pub(super) effects: Vec<SourceEffect>,
    /// The destination's word on the guest's start, if it came with it.
    pub(super) started: Started,
    /// A control stream on which the destination has answered.
    pub(super) link: Option<Link>,
    /// What an operator decided.
    pub(super) forced: Option<Side>,
}

/// A source whose guest may be either side's.
pub(super) struct Question {
    host: Arc<Host>,
    peer: String,
    migration: Uuid,
    progress: ProgressSink,
    orders: mpsc::Receiver<Order>,
    link: Option<Link>,
    started: Option<Started>,
}

impl Question {
    /// A question to the peer of that name in the configuration.
    pub(super) fn new(host: &Arc<Host>, peer: &str, migration: Uuid, progress: ProgressSink) -> Self {
        let orders = host.take_orders(migration);
        let (host, peer) = (Arc::clone(host), peer.to_owned());
        Self { host, peer, migration, progress, orders, link: None, started: None }
    }

    /// Asks until it is decided. There is no deadline: neither side may guess.
    pub(super) async fn decide(
        mut self,
        machine: &mut Source,
        journal: &mut Journal,
        effects: Vec<SourceEffect>,
        cause: String,
    ) -> Decided {
        let since = Instant::now();
        let (mut effects, mut last, mut forced) = (effects, cause, None);
        loop {
            let (next, error) = write_source(machine, journal, effects, None);
            effects = next;
            last = error.as_ref().map_or(last, |e| chain(e));
            if machine.ended().is_some() {
                break;
            }
            effects = self.ask_all(machine, effects, &mut last).await;
            if !effects.is_empty() {
                continue;
            }
            if since.elapsed() > UNDECIDED_AFTER || machine.state() == SourceState::Doubt {
                self.show(machine.state(), &last);
            }
            tokio::select! {
                () = sleep(ASK_AGAIN) => effects = source_step(machine, SourceInput::Again),
                Some(order) = self.orders.recv() => {
                    effects = obey(machine, journal, order, &mut forced);
                    if machine.ended().is_some() {
                        break;
                    }
                }
            }
        }
        self.progress.update(|p| p.outcome = None);
        let started = self.started.take().unwrap_or(Started { hook_ms: None, warnings: Vec::new() });
        Decided { effects, started, link: self.link.take(), forced }
    }

    async fn ask_all(
        &mut self,
        machine: &mut Source,
        effects: Vec<SourceEffect>,
        last: &mut String,
    ) -> Vec<SourceEffect> {
        let mut next = Vec::new();
        for effect in effects {
            let SourceEffect::Ask(ask) = effect else { continue };
            match self.ask(ask, last).await {
                Ok(fate) => next.extend(source_step(machine, SourceInput::Heard(fate))),
                Err(e) => {
                    self.link = None;
                    let now = chain(&e);
                    if now != *last {
                        tracing::warn!(cause = now, "the destination has not said what became of the guest");
                        *last = now;
                    }
                }
            }
        }
        next
    }

    async fn ask(&mut self, ask: Ask, cause: &str) -> Result<Fate, Failure> {
        let link = match &mut self.link {
            Some(link) => link,
            None => {
                let session = self.host.session(&self.peer).await?;
                self.link.insert(Link::open(&session, self.migration).await?)
            }
        };
        let deadline = match ask {
            Ask::Start => self.host.config.deadlines.hook() + ANSWER_DEADLINE,
            _ => ANSWER_DEADLINE,
        };
        match link.ask(request(ask, cause), deadline).await? {
            Response::Started(started) => {
                self.started = Some(started);
                Ok(Fate::Runs)
            }
            Response::Fate(fate) => Ok(fate),
            _ => Err(LinkError::Unexpected { request: "settle" }.into()),
        }
    }

    fn show(&self, state: SourceState, last: &str) {
        let cause = match state {
            SourceState::Doubt => format!(
                "whether the hand-over to {} is on this host's disk is not known: {last}. The guest stays \
                 paused here until the disk, or {}, says so; both are tried every second",
                self.peer, self.peer
            ),
            _ => format!(
                "the guest was handed over to {}, which has not said since whether it runs: {last}. \
                 It is asked again every second; the guest stays paused here until then",
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

/// An operator's decision goes through the machine, and is on the disk before it counts.
fn obey(
    machine: &mut Source,
    journal: &mut Journal,
    order: Order,
    forced: &mut Option<Side>,
) -> Vec<SourceEffect> {
    tracing::warn!(uid = order.uid, side = ?order.side, "an operator decides whose the guest is");
    let effects = source_step(machine, SourceInput::Forced(order.side));
    let (effects, error) = write_source(machine, journal, effects, order.uid);
    let decided = machine.ended().is_some();
    if decided {
        *forced = Some(order.side);
    }
    let cause = error.map_or_else(|| "nothing is open any more".to_owned(), |e| chain(&e));
    let _ = order.answer.send(if decided { Ok(()) } else { Err(cause) });
    effects
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
pub(super) async fn call_off(
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
pub(super) async fn thank(host: &Host, peer: &str, migration: Uuid) {
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
