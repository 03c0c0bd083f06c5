//! A stream's local side, as the driver sees it: what waits to enter the session, and where what
//! was received goes. Knows no socket.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::stream::{ChunkPermit, Crowd, Inbound, Shared, StreamEnded};
use crate::mux::{Code, StreamId};

/// The answer to the opening of a stream.
pub(super) type Answer = Result<(), StreamEnded>;

/// The edges that a session begins with, and what their owners are told of their number.
pub(super) type Edges = (Vec<(StreamId, Edge)>, Crowd);

/// One stream's edge.
pub(super) struct Edge {
    pub(super) inbox: mpsc::UnboundedSender<Inbound>,
    pub(super) shared: Arc<Shared>,
    /// Chunks that the session has no room for yet; each holds its permit. One that was handed
    /// over by an earlier process has none.
    pub(super) backlog: VecDeque<(Bytes, Option<ChunkPermit>)>,
    pub(super) finish_after_backlog: bool,
    accepted: Option<oneshot::Sender<Answer>>,
}

impl Edge {
    pub(super) fn new(
        inbox: mpsc::UnboundedSender<Inbound>,
        shared: Arc<Shared>,
        accepted: Option<oneshot::Sender<Answer>>,
    ) -> Self {
        Self { inbox, shared, backlog: VecDeque::new(), finish_after_backlog: false, accepted }
    }

    /// The peer has answered the opening.
    pub(super) fn answer(&mut self, answer: Answer) {
        if let Some(accepted) = self.accepted.take() {
            let _ = accepted.send(answer);
        }
    }

    /// The stream ends in both directions.
    pub(super) fn end(&mut self, code: Code) {
        self.backlog.clear();
        self.shared.end(code);
        let _ = self.inbox.send(Inbound::Reset(code));
        self.answer(Err(StreamEnded(code)));
    }
}
