//! Stream handles: what the rest of the agent holds of a stream.
//!
//! A handle talks to the driver that owns the session over channels. What may wait in them is
//! bounded: outgoing chunks by a few permits per stream, incoming ones by the stream's credit.
//! Dropping a half tells the peer. Knows no socket.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::mux::{Code, StreamId};
use crate::net::driver::Command;

/// Chunks that may be on their way from one stream's handle to the driver: together a batch on a
/// fast connection.
const CHUNKS_IN_FLIGHT: usize = 4;

/// Why a stream cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was ended: {}", .0.name())]
pub struct StreamEnded(pub Code);

/// What the driver tells a stream's receiving half.
#[derive(Debug)]
pub(crate) enum Inbound {
    Data(Bytes),
    Finished,
    Reset(Code),
}

/// Whether the streams of a session are many: then one chunk of each may be on its way. Set by the
/// driver, read by the streams' owners.
#[derive(Debug, Clone, Default)]
pub(crate) struct Crowd(Arc<AtomicBool>);

impl Crowd {
    const STREAMS_FEW: usize = 32;

    pub(crate) fn set_for(&self, streams: usize) {
        self.0.store(streams > Self::STREAMS_FEW, Relaxed);
    }

    fn permits_per_chunk(&self) -> u32 {
        if self.0.load(Relaxed) { CHUNKS_IN_FLIGHT as u32 } else { 1 }
    }
}

/// State that the driver and both halves of a stream share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) permits: Arc<Semaphore>,
    ended: OnceLock<Code>,
    crowd: Crowd,
}

impl Shared {
    pub(crate) fn new(crowd: Crowd) -> Arc<Self> {
        let permits = Arc::new(Semaphore::new(CHUNKS_IN_FLIGHT));
        Arc::new(Self { permits, ended: OnceLock::new(), crowd })
    }

    /// Ends sending: waiting and later sends fail with `code`.
    pub(crate) fn end(&self, code: Code) {
        let _ = self.ended.set(code);
        self.permits.close();
    }

    fn ended(&self) -> StreamEnded {
        StreamEnded(self.ended.get().copied().unwrap_or(Code::SessionLost))
    }
}

/// One byte channel of a session.
#[derive(Debug)]
pub struct Stream {
    /// The half that sends.
    pub send: SendHalf,
    /// The half that receives.
    pub recv: RecvHalf,
    accepted: Option<oneshot::Receiver<Result<(), StreamEnded>>>,
}

impl Stream {
    pub(crate) fn new(
        id: StreamId,
        commands: mpsc::UnboundedSender<Command>,
        inbox: mpsc::UnboundedReceiver<Inbound>,
        shared: Arc<Shared>,
        accepted: Option<oneshot::Receiver<Result<(), StreamEnded>>>,
    ) -> Self {
        let send = SendHalf { id, commands: commands.clone(), shared, finished: false };
        let recv = RecvHalf { id, commands, inbox, pending_end: None, ended: false };
        Self { send, recv, accepted }
    }

    /// Waits until the peer has accepted the stream that we opened: its end is connected.
    ///
    /// # Errors
    /// The code with which the peer refused it, or with which the session ended.
    pub async fn accepted(&mut self) -> Result<(), StreamEnded> {
        match self.accepted.take() {
            None => Ok(()),
            Some(answer) => answer.await.unwrap_or(Err(StreamEnded(Code::SessionLost))),
        }
    }

    /// A stream whose directions have ended as far as said, in an earlier process.
    pub(super) fn taken_up(mut self, send_finished: bool, recv_ended: bool) -> Self {
        self.send.finished = send_finished;
        self.recv.ended = recv_ended;
        self
    }

    /// The stream's number in its session.
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.send.id
    }
}

/// Sends on a stream. Dropped before [`SendHalf::finish`], it resets the stream.
#[derive(Debug)]
pub struct SendHalf {
    id: StreamId,
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    finished: bool,
}

impl SendHalf {
    /// Queues a chunk; waits while the stream's queue is full.
    ///
    /// # Errors
    /// The code with which the peer or the session ended the stream.
    pub async fn send(&mut self, data: Bytes) -> Result<(), StreamEnded> {
        let permit = self.reserve().await?;
        self.send_reserved(permit, data)
    }

    /// Waits until a chunk may be queued. Who reads the chunk only then holds none while it waits.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub(super) async fn reserve(&self) -> Result<ChunkPermit, StreamEnded> {
        let permits = Arc::clone(&self.shared.permits);
        permits
            .acquire_many_owned(self.shared.crowd.permits_per_chunk())
            .await
            .map_err(|_| self.shared.ended())
    }

    /// Queues the chunk that room was reserved for.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub(super) fn send_reserved(&mut self, permit: ChunkPermit, data: Bytes) -> Result<(), StreamEnded> {
        self.command(Command::Data { id: self.id, data, permit })
    }

    /// Ends this direction after all that was sent.
    ///
    /// # Errors
    /// As [`SendHalf::send`].
    pub fn finish(&mut self) -> Result<(), StreamEnded> {
        self.finished = true;
        self.command(Command::Finish(self.id))
    }

    /// Ends both directions at once; what is queued is dropped.
    pub fn reset(&mut self, code: Code) {
        self.finished = true;
        let _ = self.commands.send(Command::Reset(self.id, code));
    }

    /// Whether this direction has been ended.
    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Lets go without a word to the driver: the stream's number, and whether it was finished.
    pub(super) fn let_go(mut self) -> (StreamId, bool) {
        (self.id, std::mem::replace(&mut self.finished, true))
    }

    fn command(&self, command: Command) -> Result<(), StreamEnded> {
        self.commands.send(command).map_err(|_| self.shared.ended())
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(Code::Cancelled);
        }
    }
}

/// Receives from a stream. Dropped before its end, it asks the peer to stop.
#[derive(Debug)]
pub struct RecvHalf {
    id: StreamId,
    commands: mpsc::UnboundedSender<Command>,
    inbox: mpsc::UnboundedReceiver<Inbound>,
    /// The end, when [`RecvHalf::try_recv`] met it; the next [`RecvHalf::recv`] reports it.
    pending_end: Option<Inbound>,
    ended: bool,
}

impl RecvHalf {
    /// The next chunk; `None` after the peer's FIN.
    ///
    /// # Errors
    /// The code with which the peer or the session ended the stream.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamEnded> {
        if self.ended {
            return Ok(None);
        }
        let inbound = match self.pending_end.take() {
            Some(end) => Some(end),
            None => self.inbox.recv().await,
        };
        self.take(inbound.unwrap_or(Inbound::Reset(Code::SessionLost)))
    }

    /// A chunk that is already there; `None` sends the caller to [`RecvHalf::recv`].
    pub(crate) fn try_recv(&mut self) -> Option<Bytes> {
        if self.pending_end.is_some() {
            return None;
        }
        match self.inbox.try_recv() {
            Ok(Inbound::Data(data)) => Some(data),
            Ok(end) => {
                self.pending_end = Some(end);
                None
            }
            Err(_) => None,
        }
    }

    /// Whether the peer's end has been taken.
    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// Lets go without a word to the driver: whether the end had been taken, and what else waits.
    pub(super) fn let_go(mut self) -> (bool, Vec<Inbound>) {
        let had_ended = std::mem::replace(&mut self.ended, true);
        let mut rest = Vec::new();
        while let Ok(inbound) = self.inbox.try_recv() {
            rest.push(inbound);
        }
        rest.extend(self.pending_end.take());
        (had_ended, rest)
    }

    /// Returns credit: the local side has taken `bytes` of what was received.
    pub fn consumed(&self, bytes: usize) {
        let _ = self.commands.send(Command::Consumed(self.id, bytes as u64));
    }

    fn take(&mut self, inbound: Inbound) -> Result<Option<Bytes>, StreamEnded> {
        match inbound {
            Inbound::Data(data) => Ok(Some(data)),
            Inbound::Finished => {
                self.ended = true;
                Ok(None)
            }
            Inbound::Reset(code) => {
                self.ended = true;
                Err(StreamEnded(code))
            }
        }
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.commands.send(Command::Stop(self.id, Code::Cancelled));
        }
    }
}

/// The permit for one chunk, held until the session has taken the chunk.
pub(crate) type ChunkPermit = OwnedSemaphorePermit;
