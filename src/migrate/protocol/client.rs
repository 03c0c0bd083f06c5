//! The source's side of a migration's control stream: ask, wait for the answer, take notices.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::task::yield_now;
use uuid::Uuid;

use super::message::{Asked, Busy, Notice, Refusal, Reply, Request, Response, Summary};
use crate::migrate::transfer::frozen::{FrozenControl, StoppedControl};
use crate::mux::{Class, Code, Name, Open, purpose};
use crate::net::lanes::Lanes;
use crate::net::message::{self, MessageError, MessageReceiver, MessageSender};
use crate::net::session::{OpenStreamError, Session};
use crate::net::stream::StreamEnded;
use crate::net::stream_owner::ThawedStreams;

/// Notices kept while an answer is awaited; a peer that sends more is not one of ours.
const NOTICES_MAX: usize = 16;
/// The scheduler weight of ordinary streams.
pub(crate) const WEIGHT: u16 = 16;

/// Why the destination did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("no control stream")]
    Open(#[from] OpenStreamError),
    #[error("the control stream was lost")]
    Lost(#[source] MessageError),
    #[error("the destination's agent ended the migration's control stream")]
    Closed,
    #[error("the destination's agent did not answer `{request}` within {} s", after.as_secs())]
    Deadline { request: &'static str, after: Duration },
    #[error("the destination refused: {}", .0.text)]
    Refused(Refusal),
    #[error(
        "its agent has no record of this migration. It keeps one until this host has confirmed the end, so that its \
         state folder was lost or is an older one, or another agent answers by its name; its QEMU may run the guest all \
         the same"
    )]
    NoRecord,
    #[error("the destination's agent gave an answer that does not fit `{request}`")]
    Unexpected { request: &'static str },
}

impl LinkError {
    /// The control stream ended with its session.
    pub fn is_session_lost(&self) -> bool {
        matches!(self, Self::Lost(MessageError::Ended(StreamEnded(Code::SessionLost))))
    }
}

/// A migration's control stream.
#[derive(Debug)]
pub(crate) struct Link {
    lanes: Lanes,
    sender: MessageSender,
    receiver: MessageReceiver,
    notices: VecDeque<Notice>,
    /// Said since it was asked for last; the last word of several.
    busy: Option<Busy>,
    number: u64,
    /// Goes with the next request.
    summary: Option<Summary>,
}

impl Link {
    /// Opens the control stream of `migration`.
    pub(crate) async fn open(session: &Session, migration: Uuid) -> Result<Self, LinkError> {
        let open = Open {
            purpose: purpose::CONTROL,
            class: Class::Urgent,
            weight: WEIGHT,
            migration: *migration.as_bytes(),
            channel: 0,
            name: Name::NONE,
        };
        let (sender, receiver) = message::split(session.open(open).await?, session);
        let lanes = session.clone().into();
        Ok(Self { lanes, sender, receiver, notices: VecDeque::new(), busy: None, number: 0, summary: None })
    }

    /// Asks and waits for the answer. The time without a connection does not count.
    pub(crate) async fn ask(&mut self, request: Request, deadline: Duration) -> Result<Response, LinkError> {
        let name = request.name();
        self.number += 1;
        let asked = Asked { number: self.number, request, summary: self.summary.take() };
        let lanes = self.lanes.clone();
        let answered = async {
            self.sender.send(&asked).await.map_err(LinkError::Lost)?;
            loop {
                match self.next().await? {
                    Reply::Response { number, response } if number == asked.number => break Ok(response),
                    // To a request that was given up; its answer came too late.
                    Reply::Response { .. } => yield_now().await,
                    Reply::Notice(_) if self.notices.len() >= NOTICES_MAX => {
                        break Err(LinkError::Unexpected { request: name });
                    }
                    Reply::Notice(notice) => self.notices.push_back(notice),
                    Reply::Busy(busy) => self.take_note(busy).await,
                }
            }
        };
        let answer = match lanes.within(deadline, answered).await {
            Some(answer) => answer?,
            None => return Err(LinkError::Deadline { request: name, after: deadline }),
        };
        match answer {
            Response::Refused(refusal) => Err(LinkError::Refused(refusal)),
            response => Ok(response),
        }
    }

    /// Asks for something whose answer is only that it is done.
    pub(crate) async fn demand(&mut self, request: Request, deadline: Duration) -> Result<(), LinkError> {
        let name = request.name();
        match self.ask(request, deadline).await? {
            Response::Done => Ok(()),
            _ => Err(LinkError::Unexpected { request: name }),
        }
    }

    /// Says with the next request how it went.
    pub(crate) fn sum_up(&mut self, summary: Summary) {
        self.summary = Some(summary);
    }

    /// The next notice. Cancelling loses nothing.
    pub(crate) async fn notice(&mut self) -> Result<Notice, LinkError> {
        if let Some(notice) = self.notices.pop_front() {
            return Ok(notice);
        }
        loop {
            match self.next().await? {
                Reply::Notice(notice) => return Ok(notice),
                Reply::Busy(busy) => self.take_note(busy).await,
                Reply::Response { .. } => yield_now().await,
            }
        }
    }

    /// A peer that says this, or answers what nobody asks, without end keeps no deadline from its turn.
    async fn take_note(&mut self, busy: Busy) {
        self.busy = Some(busy);
        yield_now().await;
    }

    /// How busy the destination is, where it has said so since the last call.
    pub(crate) fn take_busy(&mut self) -> Option<Busy> {
        self.busy.take()
    }

    /// Of the notices that have come with an answer, the one of a failure.
    pub(crate) fn take_failure(&mut self) -> Option<String> {
        std::mem::take(&mut self.notices).into_iter().find_map(|notice| match notice {
            Notice::Failed { text } => Some(text),
            Notice::Loaded => None,
        })
    }

    /// Lets go of the control stream without ending it.
    pub(crate) fn stop(self) -> StoppedControl {
        StoppedControl {
            session: self.lanes.first().id(),
            channel: message::stop(self.sender, self.receiver),
            number: self.number,
            notices: self.notices.into(),
        }
    }

    /// Takes up the control stream that an earlier process has left.
    pub(crate) fn take_up(frozen: &FrozenControl, streams: &mut ThawedStreams) -> Option<Self> {
        let (session, stream, buffer) = frozen.thaw(streams)?;
        let (sender, receiver) = message::take_up(stream, &session, &buffer);
        let notices = frozen.notices.clone().into();
        let (lanes, number) = (session.into(), frozen.number);
        Some(Self { lanes, sender, receiver, notices, busy: None, number, summary: None })
    }

    /// The sessions of its migration, that of this stream first. What it asks for may depend on all.
    pub(crate) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Ends the control stream in order.
    pub(crate) fn finish(&mut self) {
        self.sender.finish();
    }

    async fn next(&mut self) -> Result<Reply, LinkError> {
        self.receiver.recv().await.map_err(LinkError::Lost)?.ok_or(LinkError::Closed)
    }
}
