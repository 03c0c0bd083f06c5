//! The two sides of a stream within this process: its port, which the session's driver keeps, and what
//! the port shares with the stream's handle.
//!
//! ```text
//!             handle                       port
//! chunks out  command channel ───────────► backlog ──► session, while it has room
//!             ◄── permits, one per chunk of the backlog
//! chunks in   inbox ◄───────────────────── session
//! ```
//! Knows no socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::stream_inbox::{Inbound, InboxReceiver, InboxSender, inbox};
use crate::mux::{Code, StreamId};

/// Chunks that may be on their way from one stream's handle to the driver: together a batch on a
/// fast connection.
const CHUNKS_IN_FLIGHT: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was ended: {}", .0.name())]
pub struct StreamEnded(pub Code);

/// Whether a session has many streams: then one chunk of each may be on its way. The driver sets it, the
/// streams' owners read it.
#[derive(Debug, Clone, Default)]
struct ManyStreams(Arc<AtomicBool>);

impl ManyStreams {
    const STREAMS_FEW: usize = 32;

    fn set_for(&self, streams: usize) {
        self.0.store(streams > Self::STREAMS_FEW, Relaxed);
    }

    fn permits_per_chunk(&self) -> u32 {
        if self.0.load(Relaxed) { CHUNKS_IN_FLIGHT as u32 } else { 1 }
    }
}

/// State that the driver and both halves of a stream share.
#[derive(Debug)]
pub(super) struct Shared {
    permits: Arc<Semaphore>,
    ended: OnceLock<Code>,
    many_streams: ManyStreams,
}

impl Shared {
    fn new(many_streams: ManyStreams) -> Arc<Self> {
        let permits = Arc::new(Semaphore::new(CHUNKS_IN_FLIGHT));
        Arc::new(Self { permits, ended: OnceLock::new(), many_streams })
    }

    /// Waits until a chunk may be queued.
    pub(super) async fn reserve(&self) -> Result<ChunkPermit, StreamEnded> {
        let permits = Arc::clone(&self.permits);
        let wanted = self.many_streams.permits_per_chunk();
        permits.acquire_many_owned(wanted).await.map_err(|_| self.ended())
    }

    /// Ends sending: waiting and later sends fail with `code`.
    pub(super) fn end(&self, code: Code) {
        let _ = self.ended.set(code);
        self.permits.close();
    }

    /// With which code it was ended.
    pub(super) fn ended(&self) -> StreamEnded {
        StreamEnded(self.ended.get().copied().unwrap_or(Code::SessionLost))
    }
}

/// The permit for one chunk, held until the session has taken the chunk.
pub(super) type ChunkPermit = OwnedSemaphorePermit;

/// The answer to the opening of a stream.
pub(super) type Answer = Result<(), StreamEnded>;

/// One stream's port: what waits to enter the session, and where what was received goes.
pub(super) struct Port {
    pub(super) inbox: InboxSender,
    shared: Arc<Shared>,
    /// Chunks that the session has no room for yet; each holds its permit. One that was handed
    /// over by an earlier process has none.
    pub(super) backlog: VecDeque<(Bytes, Option<ChunkPermit>)>,
    pub(super) finish_after_backlog: bool,
    accepted: Option<oneshot::Sender<Answer>>,
}

impl Port {
    /// The peer has answered the opening.
    pub(super) fn answer(&mut self, answer: Answer) {
        if let Some(accepted) = self.accepted.take() {
            let _ = accepted.send(answer);
        }
    }

    /// Nothing more is sent.
    pub(super) fn stop(&mut self, code: Code) {
        self.backlog.clear();
        self.shared.end(code);
    }

    /// The stream ends in both directions.
    pub(super) fn end(&mut self, code: Code) {
        self.stop(code);
        let _ = self.inbox.send(Inbound::Reset(code));
        self.answer(Err(StreamEnded(code)));
    }
}

/// The ports of a session's streams.
#[derive(Default)]
pub(super) struct Ports {
    ports: BTreeMap<StreamId, Port>,
    many_streams: ManyStreams,
}

impl Ports {
    /// A port for a new stream, and what the stream's handle needs of it. `accepted` hears the peer's
    /// answer to the opening.
    pub(super) fn open(
        &mut self,
        id: StreamId,
        accepted: Option<oneshot::Sender<Answer>>,
    ) -> (InboxReceiver, Arc<Shared>) {
        let (inbox, receiver) = inbox();
        let shared = Shared::new(self.many_streams.clone());
        let port = Port {
            inbox,
            shared: Arc::clone(&shared),
            backlog: VecDeque::new(),
            finish_after_backlog: false,
            accepted,
        };
        self.ports.insert(id, port);
        self.many_streams.set_for(self.ports.len());
        (receiver, shared)
    }

    pub(super) fn close(&mut self, id: StreamId) {
        self.ports.remove(&id);
        self.many_streams.set_for(self.ports.len());
    }

    pub(super) fn get(&self, id: StreamId) -> Option<&Port> {
        self.ports.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: StreamId) -> Option<&mut Port> {
        self.ports.get_mut(&id)
    }

    pub(super) fn ids(&self) -> Vec<StreamId> {
        self.ports.keys().copied().collect()
    }

    /// All streams end.
    pub(super) fn end(&mut self, code: Code) {
        self.ports.values_mut().for_each(|port| port.end(code));
    }

    pub(super) fn into_ports(self) -> impl Iterator<Item = (StreamId, Port)> {
        self.ports.into_iter()
    }
}
