//! The driver: one task that owns a session and nothing else.
//!
//! While there is a connection it reads, opens and feeds the session; asks the session what to
//! send, seals it late and writes it; hands received chunks to stream handles. Reading never
//! waits for writing and never for a stream: what a stream may hold is bounded by its credit.
//! When the connection is lost the session goes on without one until it is resumed, or for too
//! long: the dialer dials again, the acceptor waits for it. Knows no QEMU.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;

use super::carrier::{Carrier, Ready};
use super::connect::{ConnectError, Connection};
use super::edge::{Answer, Edge, Edges};
use super::frozen::{FrozenSession, Left};
use super::resume::{Redial, Resumed, SessionKey};
use super::session::{Away, EndCause, IncomingStream, Lines, LinkState, Session, SessionEnd};
use super::stream::{ChunkPermit, Crowd, Inbound, Shared, Stream, StreamEnded};
use super::stuck::Stuck;
use crate::error_chain::chain;
use crate::mux::{self, Batch, Code, Event, MigrationId, Open, Share, SharedLimit, StreamId};

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

/// What handles ask of the driver.
pub(crate) enum Command {
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
    Share(MigrationId, Share),
    Stats(oneshot::Sender<mux::Stats>),
    /// Let go of the connection for the attempt of this number, and tell what was received; no
    /// answer if a later attempt has come first.
    Fence(u64, oneshot::Sender<u64>),
    /// Go on over this connection, unless a later attempt has come.
    Rejoin(u64, Box<Resumed>),
    Close(Code, String),
    /// Stop, and leave everything to another process.
    Freeze(oneshot::Sender<FrozenSession>),
}

/// How a turn of sending ended.
#[derive(PartialEq, Eq)]
enum Sent {
    /// The socket takes no more, or there is no more.
    AllThatCould,
    /// There may be more.
    More,
}

/// Owns a session until it ends.
pub(crate) struct Driver {
    carrier: Option<Carrier>,
    session: mux::Session,
    key: SessionKey,
    redial: Option<Redial>,
    resume_within: Duration,
    stuck: Stuck,
    /// Of the newest attempt to resume. It counts when it is begun: whoever takes the session up must
    /// not use its number again, for the peer may have let it in by then.
    generation: Arc<AtomicU64>,
    link: watch::Sender<LinkState>,
    commands: mpsc::UnboundedReceiver<Command>,
    handle: Session,
    incoming: mpsc::Sender<IncomingStream>,
    edges: BTreeMap<StreamId, Edge>,
    crowd: Crowd,
    closing: Option<(Code, String)>,
    freezing: Option<oneshot::Sender<FrozenSession>>,
    input: Box<[u8]>,
    batch: Batch,
}

impl Driver {
    /// Must be called on the runtime that will run it.
    pub(crate) fn new(
        connection: Option<Connection>,
        session: mux::Session,
        (edges, crowd): Edges,
        (handle, commands): (Session, mpsc::UnboundedReceiver<Command>),
        link: watch::Sender<LinkState>,
        lines: Lines,
    ) -> std::io::Result<Self> {
        Ok(Self {
            carrier: connection.map(Carrier::adopt).transpose()?.map(|(carrier, _)| carrier),
            session,
            key: handle.key().clone(),
            redial: lines.redial,
            resume_within: lines.resume_within,
            stuck: Stuck::default(),
            generation: Arc::new(AtomicU64::new(lines.generation)),
            link,
            commands,
            handle,
            incoming: lines.incoming,
            edges: edges.into_iter().collect(),
            crowd,
            closing: None,
            freezing: None,
            input: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            batch: Batch::default(),
        })
    }

    /// Runs until the session or its users end it, then tells every stream.
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
            Err(EndCause::Frozen) => return self.freeze().await,
            Err(cause) => cause,
        };
        for edge in self.edges.values_mut() {
            edge.end(Code::SessionLost);
        }
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
        if let Some(carrier) = self.carrier.take() {
            carrier.close(FAREWELL_DEADLINE, |batch| self.session.poll_transmit(Instant::now(), batch)).await;
        }
        self.dispatch();
        let stats = self.session.stats();
        let (info, link) = (self.handle.info(), self.link.borrow().connection.clone());
        let left = Left {
            peer: &info.peer,
            role: info.role,
            key: &self.key,
            generation: self.generation.load(Relaxed),
            redial: self.redial.as_ref(),
            connection: &link,
            since: info.since,
        };
        let frozen = FrozenSession::new(
            left,
            self.session.into_snapshot(Instant::now()),
            std::mem::take(&mut self.edges).into_iter(),
        );
        if let Some(reply) = self.freezing.take() {
            let _ = reply.send(frozen);
        }
        SessionEnd { cause: EndCause::Frozen, stats }
    }

    async fn drive(&mut self) -> Result<(), EndCause> {
        let taken_up: Vec<StreamId> = self.edges.keys().copied().collect();
        taken_up.into_iter().for_each(|id| self.feed(id));
        if self.carrier.is_none() {
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
            self.stuck.look(self.session.unacknowledged());
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
        let Some(carrier) = &mut self.carrier else { return Err(EndCause::Replaced) };
        let busy = write_more || carrier.has_more();
        if busy {
            tokio::task::yield_now().await;
        }
        carrier.rested();
        let deadline = self.session.poll_timeout();
        let mut received = 0;
        tokio::select! {
            biased;
            ready = carrier.ready(&mut self.input) => if let Ready::Received(n) = ready? {
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
        let Some(carrier) = &mut self.carrier else { return Err(EndCause::Replaced) };
        let (session, now) = (&mut self.session, Instant::now());
        carrier.open(&self.input[..received], |plain| session.handle_input(now, plain))
    }

    /// Seals a batch only when the one before has left for the kernel.
    fn transmit(&mut self) -> Result<Sent, EndCause> {
        for _ in 0..BATCHES_PER_TURN {
            let Some(carrier) = &mut self.carrier else { return Err(EndCause::Replaced) };
            if !carrier.flush()? || !self.session.poll_transmit(Instant::now(), &mut self.batch) {
                return Ok(Sent::AllThatCould);
            }
            carrier.seal(&self.batch)?;
            // What was framed has left its queue: the edges may follow up within this turn.
            self.dispatch();
        }
        let Some(carrier) = &mut self.carrier else { return Err(EndCause::Replaced) };
        Ok(if carrier.flush()? { Sent::More } else { Sent::AllThatCould })
    }

    /// The connection is gone; nothing of it is read any more.
    fn suspend(&mut self) {
        self.carrier = None;
        self.session.handle_disconnected(Instant::now());
    }

    /// Goes on without a connection until there is one again. Local sockets are read until the
    /// queues are full, and then no more: QEMU sees a pause.
    async fn away(&mut self, lost: EndCause) -> Result<(), EndCause> {
        let since = self.stuck.lost(Instant::now(), self.session.unacknowledged());
        let until = since + self.resume_within;
        let peer = self.handle.info().peer.clone();
        let cause = match self.stuck.words() {
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
            if self.closing.is_some() || self.carrier.is_some() {
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
                    let lost = match self.stuck.words() {
                        Some(words) => EndCause::Stuck { words, source: Box::new(lost) },
                        None => lost,
                    };
                    return Err(lost_for_good(lost, since.elapsed(), None));
                }
            }
        }
        if self.carrier.is_some() {
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
        let was_connected = self.carrier.is_some();
        self.suspend();
        let _ = reply.send(self.session.rx_seq());
        // Whoever waits on the old connection is told that there is none.
        if was_connected { Err(EndCause::Replaced) } else { Ok(()) }
    }

    fn rejoin(&mut self, resumed: Resumed) -> Result<(), EndCause> {
        let (carrier, info) = Carrier::adopt(resumed.connection).map_err(EndCause::Io)?;
        self.session.handle_reconnected(Instant::now(), resumed.peer_rx_seq).map_err(EndCause::Session)?;
        self.carrier = Some(carrier);
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
                if let Some(edge) = self.edges.get_mut(&id) {
                    edge.backlog.push_back((data, Some(permit)));
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
            Command::Limit(limit) => self.session.set_limit(limit),
            Command::Share(migration, share) => self.session.set_share(migration, share),
            Command::Stats(reply) => drop(reply.send(self.session.stats())),
            Command::Fence(generation, reply) => self.fence(generation, reply)?,
            Command::Rejoin(generation, resumed) => {
                if generation == self.generation.load(Relaxed) && self.carrier.is_none() {
                    self.rejoin(*resumed)?;
                }
            }
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
            self.add_edge(id, Some(sender), Some(receiver))
        });
        // A caller that is gone drops the stream, which resets it.
        let _ = reply.send(opened);
    }

    fn accept(&mut self, id: StreamId, reply: oneshot::Sender<Result<Stream, StreamEnded>>) {
        let accepted = match self.session.accept(id) {
            Ok(()) => Ok(self.add_edge(id, None, None)),
            Err(_) => Err(StreamEnded(Code::Cancelled)),
        };
        let _ = reply.send(accepted);
        self.deliver(id);
    }

    fn add_edge(
        &mut self,
        id: StreamId,
        tell_accepted: Option<oneshot::Sender<Answer>>,
        accepted: Option<oneshot::Receiver<Answer>>,
    ) -> Stream {
        let (inbox, receiver) = mpsc::unbounded_channel();
        let shared = Shared::new(self.crowd.clone());
        self.edges.insert(id, Edge::new(inbox, Arc::clone(&shared), tell_accepted));
        self.crowd.set_for(self.edges.len());
        Stream::new(id, self.handle.commands().clone(), receiver, shared, accepted)
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
                Event::Closed { id } => {
                    self.edges.remove(&id);
                    self.crowd.set_for(self.edges.len());
                }
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

    fn answer(&mut self, id: StreamId, answer: Answer) {
        if let Some(edge) = self.edges.get_mut(&id) {
            edge.answer(answer);
        }
    }

    fn tell(&self, id: StreamId, inbound: Inbound) {
        if let Some(edge) = self.edges.get(&id) {
            let _ = edge.inbox.send(inbound);
        }
    }

    /// Says goodbye, if there is anybody to hear it.
    async fn close(&mut self, code: Code, text: &str) {
        self.session.go_away(code, text);
        let Some(carrier) = self.carrier.take() else { return };
        carrier.close(CLOSE_DEADLINE, |batch| self.session.poll_transmit(Instant::now(), batch)).await;
    }
}

/// The session ends because no connection came in time, or the peer would have none.
fn lost_for_good(lost: EndCause, after: Duration, refusal: Option<ConnectError>) -> EndCause {
    EndCause::Lost { after, refusal: refusal.map(Box::new), source: Box::new(lost) }
}
