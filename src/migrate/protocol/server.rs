//! The destination's side of a migration's control stream: requests with their numbers, answers, notices.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::sleep;

use super::message::{Asked, Reply, Request, Response, Summary};
use crate::error_chain::chain;
use crate::json::Strict;
use crate::migrate::transfer::frozen::{FrozenControl, StoppedControl};
use crate::net::message::{self, MessageError, MessageReceiver, MessageSender};
use crate::net::session::{Away, Session};
use crate::net::stream::Stream;
use crate::net::stream_owner::ThawedStreams;

/// How long a source may leave unread what is said to it, while its session has a connection. An answer waits only
/// where the stream's queue is full of those before it; who waits serves nothing else meanwhile.
const HEARD_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at whether it has a connection.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A control stream.
#[derive(Debug)]
pub(crate) struct Control {
    session: Session,
    sender: MessageSender,
    receiver: MessageReceiver,
    /// Of the request that is answered next.
    number: u64,
    summary: Option<Summary>,
    /// The source has left unread what was said to it: the stream was reset.
    is_unheard: bool,
}

impl Control {
    pub(crate) fn new(session: Session, stream: Stream) -> Self {
        let (sender, receiver) = message::split(stream, &session);
        Self { session, sender, receiver, number: 0, summary: None, is_unheard: false }
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
        let (sender, receiver) = message::take_up(stream, &session, &buffer);
        let number = frozen.number;
        Some(Self { session, sender, receiver, number, summary: None, is_unheard: false })
    }

    /// The next request; `None` when the source has finished, or is heard no more. Cancelling loses nothing.
    pub(crate) async fn request(&mut self) -> Result<Option<Request>, MessageError> {
        if self.is_unheard {
            return Ok(None);
        }
        let Some(json) = self.receiver.recv::<serde_json::Value>().await? else { return Ok(None) };
        // So that the refusal of what is not understood is the answer to it.
        self.number = json["number"].as_u64().unwrap_or_default();
        let asked = Asked::deserialize(Strict(json))?;
        self.summary = asked.summary;
        Ok(Some(asked.request))
    }

    /// What the source has said with its last request.
    pub(crate) fn take_summary(&mut self) -> Option<Summary> {
        self.summary.take()
    }

    /// SHA-256 of the certificate with which the source proves itself.
    pub(crate) fn certificate(&self) -> String {
        self.session.link().connection.fingerprint()
    }

    /// In which it is.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Set while its session has no connection.
    pub(crate) fn away(&self) -> Option<Away> {
        self.session.link().away
    }

    pub(crate) async fn answer(&mut self, response: Response) {
        self.say(Reply::Response { number: self.number, response }).await;
    }

    /// Says it to a source that reads. One that does not, though it has a connection, loses its stream.
    pub(crate) async fn say(&mut self, reply: Reply) {
        if self.is_unheard {
            return;
        }
        let unread = async {
            let mut left = HEARD_WITHIN;
            while !left.is_zero() {
                sleep(LOOK_EVERY).await;
                if self.session.link().away.is_none() {
                    left = left.saturating_sub(LOOK_EVERY);
                }
            }
        };
        let heard = tokio::select! {
            heard = self.sender.send(&reply) => Some(heard),
            () = unread => None,
        };
        match heard {
            Some(Ok(())) => {}
            Some(Err(e)) => tracing::debug!(error = chain(&e), "the source does not hear us"),
            None => {
                let peer = &self.session.info().peer;
                tracing::warn!(
                    %peer,
                    "what was said to the source was not read for {} s; its control stream is given up",
                    HEARD_WITHIN.as_secs()
                );
                self.sender.reset();
                self.is_unheard = true;
            }
        }
    }

    /// Answers, and says that nothing follows: a stream that is merely dropped is reset, and takes
    /// along what has not been sent yet.
    pub(crate) async fn answer_last(mut self, response: Response) {
        self.answer(response).await;
        self.finish();
    }

    /// Says that nothing follows.
    pub(crate) fn finish(&mut self) {
        self.sender.finish();
    }
}
