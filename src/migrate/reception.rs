//! Where control streams arrive: what a peer asks first decides whether it gets an answer only
//! (check, settle) or a destination that serves it to the end of a migration.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use super::destination::Destination;
use super::frozen::{FrozenControl, StoppedControl, ThawedStreams};
use super::host::Host;
use super::message::{Asked, Refusal, Reply, Request, Response};
use super::problem::{Problem, ProblemKind, chain};
use super::progress::ProgressSink;
use super::trouble::Trouble;
use super::{admission, settle};
use crate::net::identity::Identity;
use crate::net::message::{self, MessageError, MessageReceiver, MessageSender};
use crate::net::session::{IncomingStream, Session};
use crate::net::stream::Stream;

/// How long a peer may keep a control stream without asking for anything.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long a first request is still waited for when everything is about to stop.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How a destination that is under way is reached.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    pub(crate) peer: Identity,
    pub(crate) streams: mpsc::Sender<IncomingStream>,
    pub(crate) control: mpsc::Sender<Control>,
}

/// A control stream.
#[derive(Debug)]
pub(crate) struct Control {
    session: Session,
    sender: MessageSender,
    receiver: MessageReceiver,
    /// Of the request that is answered next.
    number: u64,
}

impl Control {
    pub(crate) fn new(session: Session, stream: Stream) -> Self {
        let (sender, receiver) = message::split(stream);
        Self { session, sender, receiver, number: 0 }
    }

    /// Lets go of the control stream without ending it.
    pub(super) fn stop(self) -> StoppedControl {
        StoppedControl {
            session: self.session.id(),
            channel: message::stop(self.sender, self.receiver),
            number: self.number,
            notices: Vec::new(),
        }
    }

    /// Takes up the control stream that an earlier process has left.
    pub(super) fn take_up(frozen: &FrozenControl, streams: &mut ThawedStreams) -> Option<Self> {
        let (session, stream, buffer) = frozen.thaw(streams)?;
        let (sender, receiver) = message::take_up(stream, &buffer);
        Some(Self { session, sender, receiver, number: frozen.number })
    }

    /// The next request; `None` when the source has finished. Cancelling loses nothing.
    pub(super) async fn request(&mut self) -> Result<Option<Request>, MessageError> {
        let asked: Option<Asked> = self.receiver.recv().await?;
        Ok(asked.map(|asked| {
            self.number = asked.number;
            asked.request
        }))
    }

    pub(super) async fn answer(&mut self, response: Response) {
        self.say(Reply::Response { number: self.number, response }).await;
    }

    pub(super) async fn say(&mut self, reply: Reply) {
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
    pub(super) fn finish(&mut self) {
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
            Ok((destination, prepared)) => {
                announce(destination.progress.clone());
                control.answer(Response::Prepared(prepared)).await;
                destination.run(Some(control)).await;
            }
            Err(trouble) => {
                tracing::warn!(vm = offer.vm, cause = chain(&trouble), "not prepared");
                control.answer_last(Response::Refused(trouble.refusal())).await;
            }
        },
        Request::Settle => settle_request(&host, &peer, migration, control).await,
        Request::Abort { .. } => control.answer_last(Response::Done).await,
        other => {
            let trouble = Trouble::OutOfOrder(other.name());
            control.answer_last(Response::Refused(trouble.refusal())).await;
        }
    }
}

/// What has become of a migration whose source was lost.
async fn settle_request(host: &Host, peer: &Identity, migration: Uuid, mut control: Control) {
    if let Some(incoming) = host.destination(migration)
        && incoming.peer == *peer
    {
        // It still waits; it answers for itself.
        let _ = incoming.control.send(control).await;
        return;
    }
    let answer = match settle::fate(host, peer, migration) {
        Some(fate) => Response::Fate(fate),
        None => Response::Refused(Refusal {
            problems: Vec::new(),
            text: format!("{} has no decided record of migration {migration} from {peer}", host.identity),
        }),
    };
    control.answer(answer).await;
    // The source takes note of its fate, or calls off what is over already.
    loop {
        let request = tokio::select! {
            request = timeout(REQUEST_DEADLINE, control.request()) => request,
            () = host.frozen() => return,
        };
        let Ok(Ok(Some(request))) = request else { break };
        let answer = match request {
            Request::Confirmed | Request::Abort { .. } => Response::Done,
            other => Response::Refused(Trouble::OutOfOrder(other.name()).refusal()),
        };
        control.answer(answer).await;
    }
    control.finish();
}
