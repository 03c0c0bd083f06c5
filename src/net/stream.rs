//! Stream handles: what the rest of the agent holds of a stream, and the commands with which every
//! handle, of a stream or of a session, talks to the driver.
//!
//! What may wait in the channels is bounded: outgoing chunks by a few permits per stream, incoming ones by
//! the stream's credit. Dropping a half tells the peer. Knows no socket.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::connection::Resumed;
use super::cpu_time::CpuTime;
use super::frozen::{Ended, FrozenSession, FrozenStream};
use super::stream_inbox::{Inbound, InboxReceiver};
pub use super::stream_port::StreamEnded;
use super::stream_port::{Answer, ChunkPermit, Shared};
use crate::mux::{self, Code, MigrationId, Open, Share, SharedLimit, StreamId};

/// What handles ask of the driver.
pub(super) enum Command {
    Open(Open, oneshot::Sender<Result<Stream, mux::OpenError>>),
    Accept(StreamId, oneshot::Sender<Result<Stream, StreamEnded>>),
    Refuse(StreamId, Code),
    Data {
        id: StreamId,
        data: Bytes,
        permit: ChunkPermit,
    },
    Finish(StreamId),
    Reset(StreamId, Code),
    Stop(StreamId, Code),
    Consumed(StreamId, u64),
    Limit(Option<SharedLimit>),
    ReceiveLimit(Option<SharedLimit>),
    Share(MigrationId, Share),
    Stats(oneshot::Sender<mux::Stats>),
    CpuTime(oneshot::Sender<Option<CpuTime>>),
    StreamStats(StreamId, oneshot::Sender<Option<mux::StreamStats>>),
    /// Let go of the connection for the attempt of this number, and tell what was received; no
    /// answer if a later attempt has come first.
    Fence(u64, oneshot::Sender<u64>),
    /// Go on over this connection, unless a later attempt has come.
    Rejoin(u64, Box<Resumed>),
    /// Let go of the connection: its handshake is too long ago.
    Renew,
    Close(Code, String),
    /// Stop, and leave everything to another process.
    Freeze(oneshot::Sender<FrozenSession>),
}

/// One byte channel of a session.
#[derive(Debug)]
pub struct Stream {
    pub send: SendHalf,
    pub recv: RecvHalf,
    accepted: Option<oneshot::Receiver<Answer>>,
}

impl Stream {
    pub(super) fn new(
        id: StreamId,
        commands: mpsc::UnboundedSender<Command>,
        inbox: InboxReceiver,
        shared: Arc<Shared>,
        accepted: Option<oneshot::Receiver<Answer>>,
    ) -> Self {
        let send = SendHalf { id, commands: commands.clone(), shared, finished: false };
        let recv = RecvHalf { id, commands, inbox, pending_end: None, ended: false };
        Self { send, recv, accepted }
    }

    /// Waits until the peer has accepted the stream that we opened: its end is connected.
    /// Errors: the code with which the peer refused it, or with which the session ended.
    pub async fn accepted(&mut self) -> Result<(), StreamEnded> {
        match self.accepted.take() {
            None => Ok(()),
            Some(answer) => answer.await.unwrap_or(Err(StreamEnded(Code::SessionLost))),
        }
    }

    /// A stream whose directions have ended as far as said, in an earlier process.
    pub(super) fn taken_up(mut self, ended: Ended) -> Self {
        self.send.finished = ended.send;
        self.recv.ended = ended.recv;
        self
    }

    /// Stops, for another process to go on.
    pub fn stop(self) -> StoppedStream {
        StoppedStream::new(self.send, self.recv, Vec::new())
    }

    /// The stream's number in its session.
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
    /// Errors: the code with which the peer or the session ended the stream.
    pub async fn send(&mut self, data: Bytes) -> Result<(), StreamEnded> {
        let permit = self.reserve().await?;
        self.send_reserved(permit, data)
    }

    /// Waits until a chunk may be queued. Who reads the chunk only then holds none while it waits.
    pub(super) async fn reserve(&self) -> Result<ChunkPermit, StreamEnded> {
        self.shared.reserve().await
    }

    /// Queues the chunk that room was reserved for.
    pub(super) fn send_reserved(&mut self, permit: ChunkPermit, data: Bytes) -> Result<(), StreamEnded> {
        self.command(Command::Data { id: self.id, data, permit })
    }

    /// Ends this direction after all that was sent.
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
    inbox: InboxReceiver,
    /// The end, when [`RecvHalf::try_recv`] met it; the next [`RecvHalf::recv`] reports it.
    pending_end: Option<Inbound>,
    ended: bool,
}

impl RecvHalf {
    /// The next chunk; `None` after the peer's FIN.
    /// Errors: the code with which the peer or the session ended the stream.
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
    pub(super) fn try_recv(&mut self) -> Option<Bytes> {
        if self.pending_end.is_some() {
            return None;
        }
        match self.inbox.try_recv() {
            Some(Inbound::Data(data)) => Some(data),
            Some(end) => {
                self.pending_end = Some(end);
                None
            }
            None => None,
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
        while let Some(inbound) = self.inbox.try_recv() {
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

/// A stream's two ends between its owner's stop and its session's.
#[derive(Debug)]
pub struct StoppedStream {
    send: SendHalf,
    recv: RecvHalf,
    untaken: Vec<Bytes>,
}

impl StoppedStream {
    /// `untaken` was received and not delivered, in order.
    pub(super) fn new(send: SendHalf, recv: RecvHalf, untaken: Vec<Bytes>) -> Self {
        Self { send, recv, untaken }
    }

    /// The session that it belongs to has stopped: takes what else has arrived.
    pub fn settle(self) -> FrozenStream {
        let Self { send, recv, untaken } = self;
        let (id, send) = send.let_go();
        let (recv, rest) = recv.let_go();
        FrozenStream::new(id, untaken, rest, Ended { recv, send })
    }
}
