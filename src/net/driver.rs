//! The driver: one task that owns a session, its connection and nothing else.
//!
//! It reads, opens and feeds the session; asks the session what to send, seals it late and
//! writes it; hands received chunks to stream handles. Reading never waits for writing and
//! never for a stream: what a stream may hold is bounded by its credit. Knows no QEMU.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use super::record::{OpenError, Record};
use super::session::{EndCause, IncomingStream, Session, SessionEnd};
use super::stream::{ChunkPermit, Inbound, Shared, Stream, StreamEnded};
use crate::mux::{self, Batch, Code, Event, Open, StreamId};

/// Bytes asked of the socket at once; smaller reads cost a system call per record.
const RECEIVE_BYTES: usize = 256 * 1024;
/// Commands taken before the sockets are looked at again.
const COMMANDS_PER_TURN: usize = 256;
/// Batches sent before the sockets are looked at again: something urgent may have come.
const BATCHES_PER_TURN: usize = 4;
/// How long an orderly end may take.
const CLOSE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(2);

/// What handles ask of the driver.
#[derive(Debug)]
pub(crate) enum Command {
    Open(Open, oneshot::Sender<Result<Stream, mux::OpenError>>),
    Accept(StreamId, oneshot::Sender<Result<Stream, StreamEnded>>),
    Refuse(StreamId, Code),
    Data { id: StreamId, data: Bytes, permit: ChunkPermit },
    Finish(StreamId),
    Reset(StreamId, Code),
    Stop(StreamId, Code),
    Consumed(StreamId, u64),
    Stats(oneshot::Sender<mux::Stats>),
    Close(Code, String),
}

/// A stream's local side, as the driver sees it.
struct Edge {
    inbox: mpsc::UnboundedSender<Inbound>,
    shared: Arc<Shared>,
    backlog: VecDeque<(Bytes, ChunkPermit)>,
    finish_after_backlog: bool,
    accepted: Option<oneshot::Sender<Result<(), StreamEnded>>>,
}

/// How a turn of sending ended.
#[derive(PartialEq, Eq)]
enum Sent {
    /// The socket takes no more, or there is no more.
    AllThatCould,
    /// There may be more.
    More,
}

/// Owns a session and its connection until either ends.
pub(crate) struct Driver {
    tcp: TcpStream,
    record: Record,
    session: mux::Session,
    commands: mpsc::UnboundedReceiver<Command>,
    handle: Session,
    incoming: mpsc::Sender<IncomingStream>,
    edges: BTreeMap<StreamId, Edge>,
    closing: Option<(Code, String)>,
}

impl Driver {
    pub(crate) fn new(
        tcp: TcpStream,
        record: Record,
        session: mux::Session,
        (handle, commands): (Session, mpsc::UnboundedReceiver<Command>),
        incoming: mpsc::Sender<IncomingStream>,
    ) -> Self {
        Self { tcp, record, session, commands, handle, incoming, edges: BTreeMap::new(), closing: None }
    }

    /// Runs until the connection, the session or its users end it, then tells every stream.
    pub(crate) async fn run(mut self) -> SessionEnd {
        let cause = match self.drive().await {
            Ok(()) => {
                let (code, text) = self.closing.take().unwrap_or((Code::Shutdown, String::new()));
                self.close(code, &text).await;
                EndCause::Closed(code)
            }
            Err(EndCause::Session(error)) => {
                self.close(error.code(), &error.to_string()).await;
                EndCause::Session(error)
            }
            Err(cause) => cause,
        };
        for edge in self.edges.values_mut() {
            edge.end(Code::SessionLost);
        }
        SessionEnd { cause, stats: self.session.stats() }
    }

    async fn drive(&mut self) -> Result<(), EndCause> {
        let mut input = vec![0; RECEIVE_BYTES].into_boxed_slice();
        let mut batch = Batch::default();
        // The peer may have sent more than its HELLO in the same record.
        self.open_input(&[])?;
        let mut read_more = false;
        loop {
            self.take_commands();
            self.dispatch();
            let write_more = self.transmit(&mut batch)? == Sent::More;
            self.dispatch();
            if self.closing.is_some() {
                return Ok(());
            }
            read_more = self.wait(&mut input, read_more || write_more).await?;
        }
    }

    /// Sleeps until there is something to do, and reads what there is to read; whether there is
    /// probably more. Who is `busy` does not sleep, but lets the pumps have their turn first:
    /// what was received is written while the cache still has it, and what waits at a local
    /// socket is not held up by a connection that never pauses.
    async fn wait(&mut self, input: &mut [u8], busy: bool) -> Result<bool, EndCause> {
        if busy {
            tokio::task::yield_now().await;
        }
        let deadline = self.session.poll_timeout();
        let wants_write = self.record.wants_write();
        let mut received = 0;
        let (mut reader, writer) = self.tcp.split();
        tokio::select! {
            biased;
            read = reader.read(input) => match read.map_err(EndCause::Io)? {
                0 => return Err(EndCause::PeerClosed),
                n => received = n,
            },
            ready = writer.writable(), if wants_write => ready.map_err(EndCause::Io)?,
            command = self.commands.recv() => {
                if let Some(command) = command {
                    self.obey(command);
                }
            }
            () = std::future::ready(()), if busy => {}
            () = sleep_until(deadline.unwrap_or_else(Instant::now).into()), if deadline.is_some() => {}
        }
        if received > 0 {
            self.open_input(&input[..received])?;
        }
        self.session.handle_timeout(Instant::now()).map_err(EndCause::Session)?;
        Ok(received == input.len())
    }

    fn open_input(&mut self, input: &[u8]) -> Result<(), EndCause> {
        let (record, session, now) = (&mut self.record, &mut self.session, Instant::now());
        record.open(input, |plain| session.handle_input(now, plain)).map_err(|e| match e {
            OpenError::CloseNotify => EndCause::PeerClosed,
            OpenError::Tls(e) => EndCause::Tls(e),
            OpenError::Io(e) => EndCause::Io(e),
            OpenError::Sink(e) => EndCause::Session(e),
        })
    }

    /// Seals a batch only when the one before has left for the kernel.
    fn transmit(&mut self, batch: &mut Batch) -> Result<Sent, EndCause> {
        for _ in 0..BATCHES_PER_TURN {
            if !self.write_sealed()? || !self.session.poll_transmit(Instant::now(), batch) {
                return Ok(Sent::AllThatCould);
            }
            let slices: Vec<IoSlice<'_>> = batch.io_slices().collect();
            self.record.seal(&slices).map_err(EndCause::Io)?;
            // What was framed has left its queue: the edges may follow up within this turn.
            self.dispatch();
        }
        Ok(if self.write_sealed()? { Sent::More } else { Sent::AllThatCould })
    }

    /// Whether nothing sealed is left.
    fn write_sealed(&mut self) -> Result<bool, EndCause> {
        while self.record.wants_write() {
            match self.record.write_to(&mut Socket(&self.tcp)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(EndCause::Io(e)),
            }
        }
        Ok(true)
    }

    fn take_commands(&mut self) {
        for _ in 0..COMMANDS_PER_TURN {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(_) => break,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Open(open, reply) => self.open(open, reply),
            Command::Accept(id, reply) => self.accept(id, reply),
            Command::Refuse(id, code) => self.session.refuse(id, code),
            Command::Data { id, data, permit } => {
                if let Some(edge) = self.edges.get_mut(&id) {
                    edge.backlog.push_back((data, permit));
                }
                self.feed(id);
            }
            Command::Finish(id) => {
                if let Some(edge) = self.edges.get_mut(&id) {
                    edge.finish_after_backlog = true;
                }
                self.feed(id);
            }
            Command::Reset(id, code) => {
                if let Some(edge) = self.edges.get_mut(&id) {
                    self.session.reset(id, code);
                    edge.end(code);
                }
            }
            Command::Stop(id, code) => {
                if self.edges.contains_key(&id) {
                    self.session.stop(id, code);
                }
            }
            Command::Consumed(id, bytes) => self.session.consumed(Instant::now(), id, bytes),
            Command::Stats(reply) => drop(reply.send(self.session.stats())),
            Command::Close(code, text) => self.closing = Some((code, text)),
        }
    }

    fn open(&mut self, open: Open, reply: oneshot::Sender<Result<Stream, mux::OpenError>>) {
        let opened = self.session.open(Instant::now(), open).map(|id| {
            let (sender, receiver) = oneshot::channel();
            self.add_edge(id, Some((sender, receiver)))
        });
        // A caller that is gone drops the stream, which resets it.
        let _ = reply.send(opened);
    }

    fn accept(&mut self, id: StreamId, reply: oneshot::Sender<Result<Stream, StreamEnded>>) {
        let accepted = match self.session.accept(id) {
            Ok(()) => Ok(self.add_edge(id, None)),
            Err(_) => Err(StreamEnded(Code::Cancelled)),
        };
        let _ = reply.send(accepted);
        self.deliver(id);
    }

    #[allow(clippy::type_complexity)]
    fn add_edge(
        &mut self,
        id: StreamId,
        accepted: Option<(
            oneshot::Sender<Result<(), StreamEnded>>,
            oneshot::Receiver<Result<(), StreamEnded>>,
        )>,
    ) -> Stream {
        let (inbox, receiver) = mpsc::unbounded_channel();
        let shared = Shared::new();
        let (sender, answer) = accepted.unzip();
        let edge = Edge {
            inbox,
            shared: Arc::clone(&shared),
            backlog: VecDeque::new(),
            finish_after_backlog: false,
            accepted: sender,
        };
        self.edges.insert(id, edge);
        Stream::new(id, self.handle.commands().clone(), receiver, shared, answer)
    }

    /// Moves chunks from the edge into the session while it has room for them.
    fn feed(&mut self, id: StreamId) {
        let Some(edge) = self.edges.get_mut(&id) else { return };
        while self.session.send_capacity(id) > 0 {
            let Some((data, permit)) = edge.backlog.pop_front() else { break };
            if let Err(e) = self.session.send(Instant::now(), id, data) {
                tracing::debug!(stream = ?id, error = %e, "chunk dropped: the stream has ended");
            }
            drop(permit);
        }
        if edge.backlog.is_empty() && std::mem::take(&mut edge.finish_after_backlog) {
            self.session.finish(id);
        }
    }

    fn deliver(&mut self, id: StreamId) {
        let Some(edge) = self.edges.get(&id) else { return };
        while let Some(data) = self.session.recv(id) {
            if edge.inbox.send(Inbound::Data(data)).is_err() {
                self.session.stop(id, Code::Cancelled);
                return;
            }
        }
    }

    fn dispatch(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Opened { id, open } => self.offer(id, open),
                Event::Accepted { id } => self.answer(id, Ok(())),
                Event::Readable { id } => self.deliver(id),
                Event::Writable { id } => self.feed(id),
                Event::Finished { id } => {
                    self.deliver(id);
                    self.tell(id, Inbound::Finished);
                }
                Event::Stopped { id, code } => {
                    if let Some(edge) = self.edges.get_mut(&id) {
                        edge.backlog.clear();
                        edge.shared.end(code);
                    }
                }
                Event::Reset { id, code } => self.on_reset(id, code),
                Event::Closed { id } => drop(self.edges.remove(&id)),
                Event::GoAway { code, text } => {
                    tracing::info!(code = code.name(), text, "the peer ends the session");
                    self.closing.get_or_insert((Code::Shutdown, String::new()));
                }
            }
        }
    }

    fn on_reset(&mut self, id: StreamId, code: Code) {
        if let Some(edge) = self.edges.get_mut(&id) {
            edge.end(code);
        }
    }

    fn offer(&mut self, id: StreamId, open: Open) {
        let offer = IncomingStream::new(id, open, self.handle.clone());
        if let Err(refused) = self.incoming.try_send(offer) {
            let code = match refused {
                mpsc::error::TrySendError::Full(_) => Code::Limit,
                mpsc::error::TrySendError::Closed(_) => Code::Refused,
            };
            self.session.refuse(id, code);
        }
    }

    fn answer(&mut self, id: StreamId, answer: Result<(), StreamEnded>) {
        if let Some(accepted) = self.edges.get_mut(&id).and_then(|e| e.accepted.take()) {
            let _ = accepted.send(answer);
        }
    }

    fn tell(&self, id: StreamId, inbound: Inbound) {
        if let Some(edge) = self.edges.get(&id) {
            let _ = edge.inbox.send(inbound);
        }
    }

    /// Says goodbye, lets the peer read it, and waits for its end, so that nothing that was
    /// sent is lost to a reset by the kernel (WIRE R13).
    async fn close(&mut self, code: Code, text: &str) {
        self.session.go_away(code, text);
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.say_goodbye()).await;
    }

    async fn say_goodbye(&mut self) -> Result<(), EndCause> {
        let mut batch = Batch::default();
        let mut notified = false;
        loop {
            self.transmit(&mut batch)?;
            if !self.record.wants_write() {
                if notified {
                    break;
                }
                self.record.close_notify();
                notified = true;
                continue;
            }
            self.tcp.writable().await.map_err(EndCause::Io)?;
        }
        socket2::SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Write).map_err(EndCause::Io)?;
        let mut rest = [0; 4096];
        loop {
            self.tcp.readable().await.map_err(EndCause::Io)?;
            match self.tcp.try_read(&mut rest) {
                Ok(0) => return Ok(()),
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Ok(()),
                _ => {}
            }
        }
    }
}

impl Edge {
    fn end(&mut self, code: Code) {
        self.backlog.clear();
        self.shared.end(code);
        let _ = self.inbox.send(Inbound::Reset(code));
        if let Some(accepted) = self.accepted.take() {
            let _ = accepted.send(Err(StreamEnded(code)));
        }
    }
}

/// The socket as rustls wants to write to it: vectored, never waiting.
struct Socket<'a>(&'a TcpStream);

impl io::Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
