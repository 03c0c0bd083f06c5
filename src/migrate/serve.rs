//! What a peer asks first on a control stream decides whether it gets an answer only (check, settle) or
//! a destination that serves it to the end of a migration.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use super::destination::error::Error;
use super::destination::{Destination, Serving, admission, replica};
use super::handover::Fate;
use super::host::Host;
use super::host::check_turns::Turn;
use super::model::problem::{Problem, ProblemKind, chain};
use super::model::progress::ProgressSink;
use super::protocol::message::{Offer, Refusal, Request, Response, Started};
use super::protocol::server::Control;
use super::{recover, settle};
use crate::audit::{Grant, head_of_peer};
use crate::net::identity::Identity;
use crate::net::message::MessageError;
use crate::peer_refusals::Reason;

/// How long a peer may keep a control stream without asking for anything.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long a request is still waited for when everything is about to stop for another process, which is asked again.
const LAST_REQUEST: Duration = Duration::from_secs(1);
/// The same when it stops for good, and a source at the end of a long road may be about to ask whose its guest is.
const LAST_REQUEST_EVER: Duration = Duration::from_secs(5);

/// Waits until everything stops, for another process or for good.
async fn ends(host: &Host) {
    tokio::select! {
        () = host.freeze.begun() => {}
        () = host.stopping.cancelled() => {}
    }
}

/// What is asked just before everything stops is still heard.
async fn last_request(host: &Host) {
    ends(host).await;
    let long = if host.freeze.is_on() { LAST_REQUEST } else { LAST_REQUEST_EVER };
    tokio::time::sleep(long).await;
}

/// What a peer asks first; `None` when it asks for nothing, or everything stops before.
async fn first_request(host: &Host, peer: &Identity, control: &mut Control) -> Option<Request> {
    let request = tokio::select! {
        request = timeout(REQUEST_DEADLINE, control.request()) => request,
        () = last_request(host) => return None,
    };
    match request {
        Ok(Ok(request)) => return request,
        Ok(Err(e @ (MessageError::Json(_) | MessageError::TooLong(_)))) => {
            host.refused(peer, Reason::NotUnderstood, || chain(&e));
            let text = format!("{} does not understand what is asked of it: {}", host.identity, chain(&e));
            control.answer(Response::Refused(Refusal { problems: Vec::new(), text })).await;
            control.finish();
        }
        Ok(Err(e)) => host.refused(peer, Reason::NothingAsked, || chain(&e)),
        Err(_) => host.refused(peer, Reason::NothingAsked, || "it said nothing in time".to_owned()),
    }
    None
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
    let Some(request) = first_request(&host, &peer, &mut control).await else { return };
    if matches!(request, Request::Tell) {
        let told = recover::tell(&host, &peer, migration);
        return control.answer_last(Response::Told(told)).await;
    }
    // A destination that is at work answers for itself, whatever it is asked and however often.
    let (mut control, request) = match host.destinations.of(migration, &peer) {
        Some(destination) => match destination.control.send((control, request)).await {
            Ok(()) => return,
            Err(mpsc::error::SendError(back)) => back,
        },
        None => (control, request),
    };
    match request {
        Request::Check(offer) => check(&host, &peer, &offer, control).await,
        Request::Prepare(offer) => {
            match Destination::prepare(Arc::clone(&host), peer.clone(), migration, &offer).await {
                Ok((mut destination, prepared)) => {
                    announce(destination.progress.clone());
                    granted(&destination, &offer, &control);
                    control.answer(Response::Prepared(prepared)).await;
                    destination.serving = Serving::new(Some(control), destination.data.streams.total());
                    destination.run().await;
                }
                Err(trouble) => {
                    not_prepared(&host, &peer, (migration, &offer.vm), &trouble);
                    control.answer_last(Response::Refused(trouble.refusal())).await;
                }
            }
        }
        Request::EndReplica(wanted) => {
            let answer = match replica::end(&host, &peer, &wanted.vm, wanted.images).await {
                Ok(ended) => Response::ReplicaEnded(ended),
                Err(trouble) => Response::Refused(trouble.refusal()),
            };
            control.answer_last(answer).await;
        }
        Request::Settle | Request::Start | Request::Abort { .. } | Request::Confirmed => {
            recall(&host, &peer, migration, control, request).await;
        }
        other => {
            let answer = out_of_order(&host, &peer, &other);
            control.answer_last(answer).await;
        }
    }
}

/// Counts, records and tells it, unless it was refused, for which that is done.
fn not_prepared(host: &Host, peer: &Identity, (migration, vm): (Uuid, &str), trouble: &Error) {
    if matches!(trouble, Error::Refused(_)) {
        return;
    }
    let cause = chain(trouble);
    let text = || format!("migration {migration} of VM {vm}: {cause}");
    host.audit.refused(peer.as_str(), &trouble.reason(), text);
    if let Some(unsaid_before) = host.refusals.to_be_told(peer, Reason::NotPossible) {
        tracing::warn!(%peer, %migration, vm, cause, unsaid_before, "not prepared");
    }
}

fn granted(destination: &Destination, offer: &Offer, control: &Control) {
    destination.progress.record_granted(Grant {
        subject: destination.progress.now().subject(),
        certificate: control.certificate(),
        disks: offer.disks.iter().filter(|disk| disk.is_copied()).map(|disk| disk.name.clone()).collect(),
        peers_head: head_of_peer(offer.audit_head.as_deref()),
    });
}

/// A turn for a check; none when that takes too long, or everything stops before.
async fn turn_of(host: &Host, peer: &Identity, vm: &str) -> Option<Turn> {
    tokio::select! {
        turn = host.check_turns.turn(peer, vm) => turn,
        () = ends(host) => None,
    }
}

/// Checks for a peer, in its turn.
async fn check(host: &Arc<Host>, peer: &Identity, offer: &Offer, control: Control) {
    let not_checked = |text, remedy| vec![Problem::new(ProblemKind::Other, text, remedy)];
    // Only what the configuration knows has turns.
    let (turn, found) = match host.vm_from(peer, &offer.vm) {
        Err(problem) => {
            if problem.kind != ProblemKind::NotPermitted {
                let text = || format!("a check of VM {}", offer.vm);
                host.audit.refused(peer.as_str(), &problem.kind.name(), text);
            }
            (None, vec![problem])
        }
        Ok(_) => match turn_of(host, peer, &offer.vm).await {
            None if host.freeze.is_on() || host.stopping.is_cancelled() => {
                let text = format!("the agent of {} is being stopped or restarted", host.identity);
                (None, not_checked(text, "check again in a moment"))
            }
            None => {
                let text = format!("VM {} is checked again and again on {}", offer.vm, host.identity);
                host.refused(peer, Reason::Quota, || text.clone());
                (None, not_checked(text, "wait for the other checks"))
            }
            turn => match admission::check(host, peer, offer).await {
                Ok(problems) | Err(Error::Problems(problems)) => (turn, problems),
                Err(other) => (turn, not_checked(chain(&other), "look at the destination agent's log")),
            },
        },
    };
    control.answer_last(Response::Checked(found)).await;
    if let Some(turn) = turn {
        tokio::select! {
            () = turn.pause() => {}
            () = ends(host) => {}
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
            () = host.freeze.begun() => return,
            () = last_request(host) => return control.finish(),
        };
        match next {
            Ok(Ok(Some(next))) => request = next,
            Ok(Err(e @ (MessageError::Json(_) | MessageError::TooLong(_)))) => {
                host.refused(peer, Reason::NotUnderstood, || chain(&e));
                return control.finish();
            }
            _ => return control.finish(),
        }
    }
}

/// What cannot be asked now, or of a migration that nobody serves.
fn out_of_order(host: &Host, peer: &Identity, request: &Request) -> Response {
    let trouble = Error::OutOfOrder(request.name());
    host.refused(peer, Reason::NotPossible, || trouble.to_string());
    Response::Refused(trouble.refusal())
}

fn recalled(host: &Host, peer: &Identity, migration: Uuid, request: &Request) -> Response {
    let recalled = settle::recall(host, peer, migration);
    match (request, recalled) {
        (Request::Confirmed, _) => {
            settle::confirmed(host, peer, migration);
            Response::Done
        }
        (Request::Settle | Request::Start | Request::Abort { .. }, Some(fate)) => {
            let says_how = fate == Fate::Runs && !matches!(request, Request::Abort { .. });
            match settle::why_it_stands(host, peer, migration).filter(|_| says_how) {
                None => Response::Fate(fate),
                stands => Response::Started(Started { hook_ms: None, warnings: Vec::new(), stands }),
            }
        }
        // Nothing was ever prepared.
        (Request::Abort { .. }, None) => Response::Done,
        (Request::Settle | Request::Start, None) => Response::Refused(Refusal {
            problems: Vec::new(),
            text: format!("{} has no record of migration {migration} from {peer}", host.identity),
        }),
        (other, _) => out_of_order(host, peer, other),
    }
}
