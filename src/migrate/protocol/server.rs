//! Where control streams arrive: what a peer asks first decides whether it gets an answer only
//! (check, settle) or a destination that serves it to the end of a migration.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use super::message::{Asked, Refusal, Reply, Request, Response, Summary};
use crate::migrate::destination::admission;
use crate::migrate::destination::error::Trouble;
use crate::migrate::destination::{Destination, Serving};
use crate::migrate::handoff::state::{FrozenControl, StoppedControl};
use crate::migrate::host::Host;
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::{recover, settle};
use crate::net::identity::Identity;
use crate::net::message::{self, MessageError, MessageReceiver, MessageSender};
use crate::net::session::{Away, IncomingStream, Session};
use crate::net::stream::Stream;
use crate::net::stream_owner::ThawedStreams;

/// How long a peer may keep a control stream without asking for anything.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long a first request is still waited for when everything is about to stop.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How a destination that is under way is reached.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    pub(crate) peer: Identity,
    pub(crate) streams: mpsc::Sender<IncomingStream>,
    pub(crate) control: mpsc::Sender<(Control, Request)>,
}

/// A control stream.
#[derive(Debug)]
pub(crate) struct Control {
    session: Session,
    sender: MessageSender,
    receiver: MessageReceiver,
    /// Of the request that is answered next.
    number: u64,
    /// What came with it.
    summary: Option<Summary>,
}

impl Control {
    pub(crate) fn new(session: Session, stream: Stream) -> Self {
        let (sender, receiver) = message::split(stream);
        Self { session, sender, receiver, number: 0, summary: None }
    }

    /// Lets go of the control stream without ending it.
    pub(crate) fn stop(self) -> StoppedControl {
        StoppedControl {
            session: self.session.id(),
            channel: message::stop(self.sender, self.receiver),
            number: self.number,
            notices: Vec::new(),
        }
    }

    /// Takes up the control stream that an earlier process has left.
    pub(crate) fn take_up(frozen: &FrozenControl, streams: &mut ThawedStreams) -> Option<Self> {
        let (session, stream, buffer) = frozen.thaw(streams)?;
        let (sender, receiver) = message::take_up(stream, &buffer);
        Some(Self { session, sender, receiver, number: frozen.number, summary: None })
    }

    /// The next request; `None` when the source has finished. Cancelling loses nothing.
    pub(crate) async fn request(&mut self) -> Result<Option<Request>, MessageError> {
        let asked: Option<Asked> = self.receiver.recv().await?;
        Ok(asked.map(|asked| {
            (self.number, self.summary) = (asked.number, asked.summary);
            asked.request
        }))
    }

    /// What the source has said with its last request.
    pub(crate) fn take_summary(&mut self) -> Option<Summary> {
        self.summary.take()
    }

    /// Set while its session has no connection.
    pub(crate) fn away(&self) -> Option<Away> {
        self.session.link().away
    }

    pub(crate) async fn answer(&mut self, response: Response) {
        self.say(Reply::Response { number: self.number, response }).await;
    }

    pub(crate) async fn say(&mut self, reply: Reply) {
        if let Err(e) = self.sender.send(&reply).await {
            tracing::debug!(error = chain(&e), "the source does not hear us");
        }
    }

    /// Answers, and says that nothing follows: a stream that is merely dropped is reset, and takes
    /// along what has not been sent yet.
    async fn answer_last(mut self, response: Response) {
        self.answer(response).await;
        self.finish();
    }

    /// Says that nothing follows.
    pub(crate) fn finish(&mut self) {
        self.sender.finish();
    }
}

/// Serves a control stream that a peer opened for `migration`. Returns the progress of a
/// migration that was prepared to `announce`.
pub(crate) async fn serve(
    host: Arc<Host>,
    peer: Identity,
    migration: Uuid,
    mut control: Control,
    announce: impl FnOnce(ProgressSink),
) {
    let frozen = host.frozen();
    let waited = async {
        frozen.await;
        // What was asked just now is still heard: it is begun, and then left with all the rest.
        tokio::time::sleep(LAST_REQUEST).await;
    };
    let request = tokio::select! {
        request = timeout(REQUEST_DEADLINE, control.request()) => request.ok(),
        () = waited => return,
    };
    let Some(request) = request else {
        return tracing::warn!(%peer, "a control stream without a request");
    };
    let request = match request {
        Ok(Some(request)) => request,
        Ok(None) => return,
        Err(e) => return tracing::warn!(%peer, error = chain(&e), "a control stream without a request"),
    };
    if matches!(request, Request::Tell) {
        let told = recover::tell(&host, &peer, migration);
        return control.answer_last(Response::Told(told)).await;
    }
    // A destination that is at work answers for itself, whatever it is asked and however often.
    let (mut control, request) = match host.destination(migration).filter(|d| d.peer == peer) {
        Some(destination) => match destination.control.send((control, request)).await {
            Ok(()) => return,
            Err(mpsc::error::SendError(back)) => back,
        },
        None => (control, request),
    };
    match request {
        Request::Check(offer) => {
            let answer = match admission::check(&host, &peer, &offer).await {
                Ok(problems) => Response::Checked(problems),
                Err(trouble) => Response::Checked(match trouble {
                    Trouble::Problems(problems) => problems,
                    other => vec![Problem::new(
                        ProblemKind::Other,
                        chain(&other),
                        "look at the destination agent's log",
                    )],
                }),
            };
            control.answer_last(answer).await;
        }
        Request::Prepare(offer) => match Destination::prepare(host, peer, migration, &offer).await {
            Ok((mut destination, prepared)) => {
                announce(destination.progress.clone());
                control.answer(Response::Prepared(prepared)).await;
                destination.serving = Serving::new(Some(control));
                destination.run().await;
            }
            Err(trouble) => {
                tracing::warn!(vm = offer.vm, cause = chain(&trouble), "not prepared");
                control.answer_last(Response::Refused(trouble.refusal())).await;
            }
        },
        Request::Settle | Request::Start | Request::Abort { .. } | Request::Confirmed => {
            recall(&host, &peer, migration, control, request).await;
        }
        other => {
            let trouble = Trouble::OutOfOrder(other.name());
            control.answer_last(Response::Refused(trouble.refusal())).await;
        }
    }
}

/// Answers from the journal, for a migration that nobody serves here any more.
async fn recall(host: &Host, peer: &Identity, migration: Uuid, mut control: Control, first: Request) {
    let mut request = first;
    loop {
        let answer = recalled(host, peer, migration, &request);
        control.answer(answer).await;
        let next = tokio::select! {
            next = timeout(REQUEST_DEADLINE, control.request()) => next,
            () = host.frozen() => return,
        };
        match next {
            Ok(Ok(Some(next))) => request = next,
            _ => return control.finish(),
        }
    }
}

fn recalled(host: &Host, peer: &Identity, migration: Uuid, request: &Request) -> Response {
    let recalled = settle::recall(host, peer, migration);
    match (request, recalled) {
        (Request::Confirmed, _) => {
            settle::confirmed(host, peer, migration);
            Response::Done
        }
        (Request::Settle | Request::Start | Request::Abort { .. }, Some(fate)) => Response::Fate(fate),
        // Nothing was ever prepared.
        (Request::Abort { .. }, None) => Response::Done,
        (Request::Settle | Request::Start, None) => Response::Refused(Refusal {
            problems: Vec::new(),
            text: format!("{} has no record of migration {migration} from {peer}", host.identity),
        }),
        (other, _) => Response::Refused(Trouble::OutOfOrder(other.name()).refusal()),
    }
}
