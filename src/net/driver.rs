//! The driver: one task that owns a session and nothing else.
//!
//! While there is a connection the driver reads, opens and feeds the session; asks the session what to
//! send, seals it late and writes it; hands received chunks to stream handles. Reading never
//! waits for writing and never for a stream: what a stream may hold is bounded by its credit.
//! When the connection is lost the session goes on without one until it is resumed, or for too
//! long: the dialer dials again, the acceptor waits for it. Knows no QEMU.
//!
//! ```text
//! run ─► drive ─┬─► connected: commands ─► events ─► transmit ─► wait ──┐ until the connection is lost
//!               │        └───────────────◄────────────────────────────┘
//!               └─► away: commands, redialing, the deadline ─────────────► until there is another
//! then: close (says goodbye), or freeze (leaves everything to another process)
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;

use super::black_hole::BlackHole;
use super::connect_error::ConnectError;
use super::connection::{Connection, Resumed};
use super::cpu_time::CpuTime;
use super::frozen::{Backlog, FrozenConnection, FrozenSession};
use super::link::{Away, EndCause, LinkState, SessionEnd};
use super::resume::Redial;
use super::session::{IncomingStream, Session};
use super::session_key::SessionKey;
use super::stream::{Command, Stream};
use super::stream_inbox::Inbound;
use super::stream_port::{Answer, Port, Ports, StreamEnded};
use super::tls_socket::{Ready, TlsSocket};
use crate::error_chain::chain;
use crate::mux::{self, Batch, Code, Event, Open, Role, StreamId};

/// Bytes asked of the socket at once; smaller reads cost a system call per record.
const RECEIVE_BYTES: usize = 256 * 1024;
/// How long an orderly end may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);
/// How long the word that a session goes on elsewhere may take: without it the peer is told by the
/// kernel.
const FAREWELL_DEADLINE: Duration = Duration::from_millis(100);
/// Commands taken before the sockets are looked at again.
const COMMANDS_PER_TURN: usize = 256;
/// Batches sent before the sockets are looked at again: something urgent may have come.
const BATCHES_PER_TURN: usize = 4;

/// How a turn of sending ended.
#[derive(PartialEq, Eq)]
enum Sent {
    /// The socket takes no more, or there is no more.
    AllThatCould,
    /// There may be more.
    More,
}

/// What a session begins with.
pub(super) struct Beginning {
    /// None when it waits for one.
    pub(super) connection: Option<Connection>,
    pub(super) core: mux::Session,
    pub(super) ports: Ports,
    /// How to come back, on the side that dials.
    pub(super) redial: Option<Redial>,
    /// Of the last attempt to resume.
    pub(super) generation: u64,
    /// How long the session goes on without a connection.
    pub(super) resume_within: Duration,
    /// Where the streams go that the peer opens.
    pub(super) incoming: mpsc::Sender<IncomingStream>,
}

/// Owns a session until it ends.
pub(super) struct Driver {
    socket: Option<TlsSocket>,
    session: mux::Session,
    key: SessionKey,
    redial: Option<Redial>,
    resume_within: Duration,
    black_hole: BlackHole,
    /// Of the newest attempt to resume. It counts when it is begun: whoever takes the session up must
    /// not use its number again, for the peer may have let it in by then.
    generation: Arc<AtomicU64>,
    link: watch::Sender<LinkState>,
    commands: mpsc::UnboundedReceiver<Command>,
    handle: Session,
    incoming: mpsc::Sender<IncomingStream>,
    ports: Ports,
    closing: Option<(Code, String)>,
    freezing: Option<oneshot::Sender<FrozenSession>>,
    input: Box<[u8]>,
    batch: Batch,
}

impl Driver {
    /// Must be called on the runtime that will run it.
    pub(super) fn new(
        beginning: Beginning,
        (handle, commands): (Session, mpsc::UnboundedReceiver<Command>),
        link: watch::Sender<LinkState>,
    ) -> std::io::Result<Self> {
        let Beginning { connection, core, ports, redial, generation, resume_within, incoming } = beginning;
        Ok(Self {
            socket: connection.map(TlsSocket::adopt).transpose()?.map(|(socket, _)| socket),
            session: core,
            key: handle.key().clone(),
            redial,
            resume_within,
            black_hole: BlackHole::default(),
            generation: Arc::new(AtomicU64::new(generation)),
            link,
            commands,
            handle,
            incoming,
            ports,
            closing: None,
            freezing: None,
            input: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            batch: Batch::default(),
        })
    }

    /// Runs until the session or its users end it, then tells every stream.
    pub(super) async fn run(mut self) -> SessionEnd {
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
            Err(EndCause::Frozen) => return self.freeze().await,
            Err(cause) => cause,
        };
        self.ports.end(Code::SessionLost);
        SessionEnd { cause, stats: self.session.stats() }
    }

    /// Leaves everything behind. What the streams' owners have said until now still counts.
    async fn freeze(mut self) -> SessionEnd {
        while let Ok(command) = self.commands.try_recv() {
            if self.obey(command).is_err() {
                tracing::debug!("a session that is left behind has nothing to resume or to end");
            }
        }
        self.dispatch();
        self.session.detach();
        if let Some(socket) = self.socket.take() {
            socket.close(FAREWELL_DEADLINE, |batch| self.session.poll_transmit(Instant::now(), batch)).await;
        }
        self.dispatch();
        let stats = self.session.stats();
        let (info, key) = (self.handle.info(), self.key);
        let frozen = FrozenSession {
            peer: info.peer.clone(),
            is_dialer: info.role == Role::Dialer,
            id: key.id,
            secret: key.secret,
            peer_instance: key.peer_instance,
            version: key.version,
            generation: self.generation.load(Relaxed),
            address: self.redial.map(|redial| redial.address),
            connection: FrozenConnection::new(&self.link.borrow().connection),
            age_s: info.since.elapsed().as_secs(),
            core: self.session.into_snapshot(Instant::now()),
            backlogs: self.ports.into_ports().filter_map(|(id, port)| Backlog::of(id, port)).collect(),
        };
        if let Some(reply) = self.freezing.take() {
            let _ = reply.send(frozen);
        }
        SessionEnd { cause: EndCause::Frozen, stats }
    }

    async fn drive(&mut self) -> Result<(), EndCause> {
        self.ports.ids().into_iter().for_each(|id| self.feed(id));
        if self.socket.is_none() {
            self.away(EndCause::Frozen).await?;
        }
        while self.closing.is_none() {
            let lost = match self.connected().await {
                Ok(()) => continue,
                Err(cause) if cause.is_resumable() => cause,
                Err(cause) => return Err(cause),
            };
            self.suspend();
            self.away(lost).await?;
        }
        Ok(())
    }

    /// Serves the connection until it is lost; returns when the session is to be closed.
    async fn connected(&mut self) -> Result<(), EndCause> {
        // The peer may have sent more than its HELLO in the same record.
        self.open_input(0)?;
        loop {
            self.take_commands()?;
            self.dispatch();
            let write_more = self.transmit()? == Sent::More;
            self.dispatch();
            self.black_hole.look(self.session.unacknowledged());
            if self.closing.is_some() {
                return Ok(());
            }
            self.wait(write_more).await?;
        }
    }

    /// Sleeps until there is something to do, and reads what there is to read. Who is busy does
    /// not sleep, but lets the pumps have their turn first: what was received is written while
    /// the cache still has it, and what waits at a local socket is not held up by a connection
    /// that never pauses.
    async fn wait(&mut self, write_more: bool) -> Result<(), EndCause> {
        let Some(socket) = &mut self.socket else { return Err(EndCause::Replaced) };
        let busy = write_more || socket.has_more();
        if busy {
            tokio::task::yield_now().await;
        }
        socket.rested();
        let deadline = self.session.poll_timeout();
        let mut received = 0;
        tokio::select! {
            biased;
            ready = socket.ready(&mut self.input) => if let Ready::Received(n) = ready? {
                received = n;
            },
            command = self.commands.recv() => {
                if let Some(command) = command {
                    self.obey(command)?;
                }
            }
            () = std::future::ready(()), if busy => {}
            () = sleep_until(deadline.unwrap_or_else(Instant::now).into()), if deadline.is_some() => {}
        }
        if received > 0 {
            self.open_input(received)?;
        }
        self.session.handle_timeout(Instant::now()).map_err(EndCause::Session)
    }

    fn open_input(&mut self, received: usize) -> Result<(), EndCause> {
        let Some(socket) = &mut self.socket else { return Err(EndCause::Replaced) };
        let (session, now) = (&mut self.session, Instant::now());
        socket.open(&self.input[..received], |plain| session.handle_input(now, plain))
    }

    /// Seals a batch only when the one before has left for the kernel.
    fn transmit(&mut self) -> Result<Sent, EndCause> {
        for _ in 0..BATCHES_PER_TURN {
            let Some(socket) = &mut self.socket else { return Err(EndCause::Replaced) };
            if !socket.flush()? || !self.session.poll_transmit(Instant::now(), &mut self.batch) {
                return Ok(Sent::AllThatCould);
            }
            socket.seal(&self.batch)?;
            // What was framed has left its queue: the ports may follow up within this turn.
            self.dispatch();
        }
        let Some(socket) = &mut self.socket else { return Err(EndCause::Replaced) };
        Ok(if socket.flush()? { Sent::More } else { Sent::AllThatCould })
    }

    /// The connection is gone; nothing of it is read any more.
    fn suspend(&mut self) {
        self.socket = None;
        self.session.handle_disconnected(Instant::now());
    }

    /// Goes on without a connection until there is one again. Local sockets are read until the
    /// queues are full, and then no more: QEMU sees a pause.
    async fn away(&mut self, lost: EndCause) -> Result<(), EndCause> {
        let since = self.black_hole.lost(Instant::now(), self.session.unacknowledged());
        let until = since + self.resume_within;
        let peer = self.handle.info().peer.clone();
        let cause = match self.black_hole.words() {
            Some(words) => format!("{}; {words}", chain(&lost)),
            None => chain(&lost),
        };
        tracing::warn!(%peer, cause, deadline_s = self.resume_within.as_secs(), "connection lost; the session waits for another");
        let away = Away { since, until, cause };
        self.link.send_modify(|link| link.away = Some(away));
        let redialing = {
            let (redial, key) = (self.redial.clone(), self.key.clone());
            let generation = Arc::clone(&self.generation);
            let rx_seq = self.session.rx_seq();
            async move {
                let Some(redial) = redial else { return std::future::pending().await };
                redial.until_resumed(&key, &generation, rx_seq).await
            }
        };
        tokio::pin!(redialing);
        loop {
            self.dispatch();
            if self.closing.is_some() || self.socket.is_some() {
                break;
            }
            tokio::select! {
                biased;
                command = self.commands.recv() => if let Some(command) = command {
                    self.obey(command)?;
                },
                resumed = &mut redialing => match resumed {
                    Ok(resumed) => self.rejoin(resumed)?,
                    Err(e) => return Err(lost_for_good(lost, since.elapsed(), Some(e))),
                },
                () = sleep_until(until.into()) => {
                    let lost = match self.black_hole.words() {
                        Some(words) => EndCause::Stuck { words, source: Box::new(lost) },
                        None => lost,
                    };
                    return Err(lost_for_good(lost, since.elapsed(), None));
                }
            }
        }
        if self.socket.is_some() {
            let after_ms = since.elapsed().as_millis() as u64;
            let replay_bytes = self.session.stats().log_bytes;
            tracing::info!(%peer, after_ms, replay_bytes, "session resumed over another connection");
        }
        Ok(())
    }

    /// The acceptor's part of a resumption: what it has received by now, and nothing more.
    fn fence(&mut self, generation: u64, reply: oneshot::Sender<u64>) -> Result<(), EndCause> {
        if self.redial.is_some() || generation <= self.generation.load(Relaxed) {
            return Ok(());
        }
        self.generation.store(generation, Relaxed);
        let was_connected = self.socket.is_some();
        self.suspend();
        let _ = reply.send(self.session.rx_seq());
        // Whoever waits on the old connection is told that there is none.
        if was_connected { Err(EndCause::Replaced) } else { Ok(()) }
    }

    fn rejoin(&mut self, resumed: Resumed) -> Result<(), EndCause> {
        let (socket, info) = TlsSocket::adopt(resumed.connection).map_err(EndCause::Io)?;
        self.session.handle_reconnected(Instant::now(), resumed.peer_rx_seq).map_err(EndCause::Session)?;
        self.socket = Some(socket);
        self.link.send_modify(|link| {
            link.away = None;
            link.connection = Arc::new(info);
        });
        Ok(())
    }

    fn take_commands(&mut self) -> Result<(), EndCause> {
        for _ in 0..COMMANDS_PER_TURN {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), EndCause> {
        match command {
            Command::Open(open, reply) => self.open(open, reply),
            Command::Accept(id, reply) => self.accept(id, reply),
            Command::Refuse(id, code) => self.session.refuse(id, code),
            Command::Data { id, data, permit } => {
                self.at_port(id, |port| port.backlog.push_back((data, Some(permit))));
                self.feed(id);
            }
            Command::Finish(id) => {
                self.at_port(id, |port| port.finish_after_backlog = true);
                self.feed(id);
            }
            Command::Reset(id, code) => {
                if let Some(port) = self.ports.get_mut(id) {
                    self.session.reset(id, code);
                    port.end(code);
                }
            }
            Command::Stop(id, code) => {
                if self.ports.get(id).is_some() {
                    self.session.stop(id, code);
                }
            }
            Command::Consumed(id, bytes) => self.session.consumed(Instant::now(), id, bytes),
            Command::Limit(limit) => self.session.set_limit(limit),
            Command::ReceiveLimit(limit) => self.session.set_receive_limit(limit),
            Command::Share(migration, share) => self.session.set_share(migration, share),
            Command::Stats(reply) => drop(reply.send(self.session.stats())),
            Command::CpuTime(reply) => drop(reply.send(CpuTime::of_this_thread())),
            Command::StreamStats(id, reply) => drop(reply.send(self.session.stream_stats(id))),
            Command::Fence(generation, reply) => self.fence(generation, reply)?,
            Command::Rejoin(generation, resumed) => {
                if generation == self.generation.load(Relaxed) && self.socket.is_none() {
                    self.rejoin(*resumed)?;
                }
            }
            Command::Renew if self.socket.is_some() => return Err(EndCause::Outdated),
            // The next one is new.
            Command::Renew => {}
            Command::Close(code, text) => self.closing = Some((code, text)),
            Command::Freeze(reply) => {
                self.freezing = Some(reply);
                return Err(EndCause::Frozen);
            }
        }
        Ok(())
    }

    fn open(&mut self, open: Open, reply: oneshot::Sender<Result<Stream, mux::OpenError>>) {
        let opened = self.session.open(Instant::now(), open).map(|id| {
            let (sender, receiver) = oneshot::channel();
            self.add_stream(id, Some(sender), Some(receiver))
        });
        // A caller that is gone drops the stream, which resets it.
        let _ = reply.send(opened);
    }

    fn accept(&mut self, id: StreamId, reply: oneshot::Sender<Result<Stream, StreamEnded>>) {
        let accepted = match self.session.accept(id) {
            Ok(()) => Ok(self.add_stream(id, None, None)),
            Err(_) => Err(StreamEnded(Code::Cancelled)),
        };
        let _ = reply.send(accepted);
        self.deliver(id);
    }

    fn add_stream(
        &mut self,
        id: StreamId,
        tell_accepted: Option<oneshot::Sender<Answer>>,
        accepted: Option<oneshot::Receiver<Answer>>,
    ) -> Stream {
        let (inbox, shared) = self.ports.open(id, tell_accepted);
        Stream::new(id, self.handle.commands().clone(), inbox, shared, accepted)
    }

    /// Moves chunks from the port into the session while it has room for them.
    fn feed(&mut self, id: StreamId) {
        let Some(port) = self.ports.get_mut(id) else { return };
        while self.session.send_capacity(id) > 0 {
            let Some((data, permit)) = port.backlog.pop_front() else { break };
            if let Err(e) = self.session.send(Instant::now(), id, data) {
                tracing::debug!(stream = ?id, error = %e, "chunk dropped: the stream has ended");
            }
            drop(permit);
        }
        if port.backlog.is_empty() && std::mem::take(&mut port.finish_after_backlog) {
            self.session.finish(id);
        }
    }

    fn deliver(&mut self, id: StreamId) {
        let Some(port) = self.ports.get(id) else { return };
        while let Some(data) = self.session.recv(id) {
            if port.inbox.send(Inbound::Data(data)).is_err() {
                self.session.stop(id, Code::Cancelled);
                return;
            }
        }
    }

    fn dispatch(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Opened { id, open } => self.offer(id, open),
                Event::Accepted { id } => self.at_port(id, |port| port.answer(Ok(()))),
                Event::Readable { id } => self.deliver(id),
                Event::Writable { id } => self.feed(id),
                Event::Finished { id } => {
                    self.deliver(id);
                    self.at_port(id, |port| drop(port.inbox.send(Inbound::Finished)));
                }
                Event::Stopped { id, code } => self.at_port(id, |port| port.stop(code)),
                Event::Reset { id, code } => self.at_port(id, |port| port.end(code)),
                Event::Closed { id } => self.ports.close(id),
                Event::GoAway { code, text } => {
                    tracing::info!(code = code.name(), text, "the peer ends the session");
                    self.closing.get_or_insert((Code::Shutdown, String::new()));
                }
            }
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

    fn at_port(&mut self, id: StreamId, act: impl FnOnce(&mut Port)) {
        if let Some(port) = self.ports.get_mut(id) {
            act(port);
        }
    }

    /// Says goodbye, if there is anybody to hear it.
    async fn close(&mut self, code: Code, text: &str) {
        self.session.go_away(code, text);
        let Some(socket) = self.socket.take() else { return };
        socket.close(CLOSE_DEADLINE, |batch| self.session.poll_transmit(Instant::now(), batch)).await;
    }
}

/// The session ends because no connection came in time, or the peer would have none.
fn lost_for_good(lost: EndCause, after: Duration, refusal: Option<ConnectError>) -> EndCause {
    EndCause::Lost { after, refusal: refusal.map(Box::new), source: Box::new(lost) }
}
