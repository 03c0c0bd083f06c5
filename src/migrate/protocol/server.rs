//! The destination's side of a migration's control stream: requests with their numbers, answers, notices.

use serde::Deserialize;

use super::message::{Asked, Reply, Request, Response, Summary};
use crate::error_chain::chain;
use crate::json::Strict;
use crate::migrate::transfer::frozen::{FrozenControl, StoppedControl};
use crate::net::message::{self, MessageError, MessageReceiver, MessageSender};
use crate::net::session::{Away, Session};
use crate::net::stream::Stream;
use crate::net::stream_owner::ThawedStreams;

/// A control stream.
#[derive(Debug)]
pub(crate) struct Control {
    session: Session,
    sender: MessageSender,
    receiver: MessageReceiver,
    /// Of the request that is answered next.
    number: u64,
    summary: Option<Summary>,
}

impl Control {
    pub(crate) fn new(session: Session, stream: Stream) -> Self {
        let (sender, receiver) = message::split(stream, &session);
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
        let (sender, receiver) = message::take_up(stream, &session, &buffer);
        Some(Self { session, sender, receiver, number: frozen.number, summary: None })
    }

    /// The next request; `None` when the source has finished. Cancelling loses nothing.
    pub(crate) async fn request(&mut self) -> Result<Option<Request>, MessageError> {
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

    pub(crate) async fn say(&mut self, reply: Reply) {
        if let Err(e) = self.sender.send(&reply).await {
            tracing::debug!(error = chain(&e), "the source does not hear us");
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
