//! A session: its state, its connections, its deadlines and what it reports. The local side's calls
//! about streams are in `local`, frames that arrive are judged in `receive`, frames that leave are
//! made in `transmit`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use super::ack_state::AckState;
use super::assemble::Assembler;
use super::credit::Budget;
use super::deficit_round_robin::{Backlog, Turn};
use super::frame;
use super::hello::{Negotiated, PeerLimits};
use super::inflow::Inflow;
use super::liveness::Liveness;
use super::replay_log::ReplayLog;
use super::schedule::Scheduler;
use super::stream::{Phase, SendState, Stream};
use super::token_bucket::TokenBucket;
use super::{Code, Config, Open, Role, SessionError, Stats, StreamId, StreamStats};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The peer opened a stream; answer with [`Session::accept`] or [`Session::refuse`].
    Opened { id: StreamId, open: Open },
    /// The peer accepted a stream.
    Accepted { id: StreamId },
    /// There is something to [`Session::recv`]; take all of it.
    Readable { id: StreamId },
    /// There is room to send again after the queue was full.
    Writable { id: StreamId },
    /// The peer sends no more; what it has sent is still to be received first.
    Finished { id: StreamId },
    /// The peer does not want what we send; the other direction goes on.
    Stopped { id: StreamId, code: Code },
    /// Both directions ended at once: by the peer, or because it did not answer.
    Reset { id: StreamId, code: Code },
    /// Both directions have ended and the stream is forgotten.
    Closed { id: StreamId },
    /// The peer ends the session: no new streams.
    GoAway {
        code: Code,
        /// In its words, without control characters.
        text: String,
    },
}

/// All streams by number.
#[derive(Debug, Default)]
pub(super) struct Table(pub(super) BTreeMap<StreamId, Stream>);

impl Backlog for Table {
    fn turn(&mut self, id: StreamId) -> Option<&mut Turn> {
        self.0.get_mut(&id).map(|stream| &mut stream.turn)
    }

    fn is_ready(&self, id: StreamId) -> bool {
        self.0.get(&id).is_some_and(Stream::is_ready)
    }
}

/// Buckets against frames that are cheap to send.
#[derive(Debug)]
pub(super) struct Guards {
    pub(super) opens: TokenBucket,
    pub(super) resets: TokenBucket,
    pub(super) pings: TokenBucket,
    pub(super) noops: TokenBucket,
}

impl Guards {
    fn new(config: &Config, now: Instant) -> Self {
        Self {
            opens: TokenBucket::new(config.opens, now),
            resets: TokenBucket::new(config.resets, now),
            pings: TokenBucket::new(config.pings, now),
            noops: TokenBucket::new(config.noops, now),
        }
    }

    fn fill(&mut self, now: Instant) {
        for bucket in [&mut self.opens, &mut self.resets, &mut self.pings, &mut self.noops] {
            bucket.fill(now);
        }
    }
}

/// What each side has said about ending the session.
#[derive(Debug, Default)]
pub(super) struct Farewell {
    pub(super) ours: Option<(Code, String)>,
    /// Ours is still to be sent on this connection.
    pub(super) due: bool,
    pub(super) theirs: bool,
    pub(super) detach_due: bool,
    pub(super) detached: bool,
}

/// The protocol's state between two agents. No call waits or fails for want of I/O.
#[derive(Debug)]
pub struct Session {
    pub(super) role: Role,
    pub(super) config: Config,
    pub(super) peer: PeerLimits,
    pub(super) connected: bool,
    suspended: Option<Instant>,
    failed: Option<SessionError>,
    pub(super) log: ReplayLog,
    pub(super) ack_state: AckState,
    pub(super) liveness: Liveness,
    /// The beginning of an incomplete frame.
    pub(super) assembler: Assembler,
    pub(super) streams: Table,
    pub(super) budget: Budget,
    pub(super) scheduler: Scheduler,
    pub(super) inflow: Inflow,
    /// Streams with control frames to send, each once.
    pub(super) control: VecDeque<StreamId>,
    /// Streams that the peer has not answered, oldest first.
    pub(super) opening: VecDeque<StreamId>,
    /// Streams that the local side has not answered.
    pub(super) offered: usize,
    /// Streams refused without asking, until the peer has taken note.
    pub(super) refused_unasked: usize,
    pub(super) own_opens: TokenBucket,
    pub(super) guards: Guards,
    pub(super) next_local: Option<u32>,
    pub(super) next_remote: Option<u32>,
    pub(super) farewell: Farewell,
    events: VecDeque<Event>,
    pub(super) stats: Stats,
}

impl Session {
    /// A new session on a connection whose HELLOs are exchanged. `config` must be the one that
    /// our HELLO was made from.
    pub fn new(role: Role, config: Config, negotiated: &Negotiated, now: Instant) -> Self {
        Self {
            role,
            peer: negotiated.peer,
            connected: true,
            suspended: None,
            failed: None,
            log: ReplayLog::new(&config),
            ack_state: AckState::default(),
            liveness: Liveness::new(now),
            assembler: Assembler::default(),
            streams: Table::default(),
            budget: Budget::new(&config, negotiated.peer.max_streams),
            scheduler: Scheduler::new(&config, now),
            inflow: Inflow::default(),
            control: VecDeque::new(),
            opening: VecDeque::new(),
            offered: 0,
            refused_unasked: 0,
            own_opens: TokenBucket::new(config.own_opens(), now),
            guards: Guards::new(&config, now),
            next_local: Some(role.first_id()),
            next_remote: Some(role.peer().first_id()),
            farewell: Farewell::default(),
            events: VecDeque::new(),
            stats: Stats::default(),
            config,
        }
    }

    /// The connection is gone, or is about to be replaced. Streams stay, their queues fill, their
    /// timers stop; an incomplete frame is dropped.
    pub fn handle_disconnected(&mut self, now: Instant) {
        if std::mem::take(&mut self.connected) {
            self.suspended = Some(now);
        }
        self.assembler.clear();
    }

    /// A new connection, over which the peer has said that it received everything up to
    /// `peer_rx_seq`, and has been told our [`Session::rx_seq`]. The old one must not be read any
    /// more when these numbers are exchanged.
    /// Errors: [`SessionError::Continuity`]: the peer cannot have received that; the session is lost.
    pub fn handle_reconnected(&mut self, now: Instant, peer_rx_seq: u64) -> Result<(), SessionError> {
        self.check()?;
        self.handle_disconnected(now);
        if let Err(e) = self.log.rewind(peer_rx_seq) {
            return Err(self.fail(e));
        }
        self.postpone_deadlines(now);
        self.connected = true;
        self.liveness.restart(now);
        self.ack_state.settle();
        self.guards.fill(now);
        self.farewell.due = self.farewell.ours.is_some();
        self.farewell.detach_due = false;
        self.farewell.detached = false;
        self.stats.reconnects += 1;
        Ok(())
    }

    fn postpone_deadlines(&mut self, now: Instant) {
        let Some(since) = self.suspended.take() else { return };
        let pause = now.saturating_duration_since(since);
        self.stats.away += pause;
        for id in &self.opening {
            if let Some(Stream { phase: Phase::Opening { deadline }, .. }) = self.streams.0.get_mut(id) {
                *deadline += pause;
            }
        }
    }

    /// The last frame received without a gap: what a RESUME or RESUMED says.
    pub fn rx_seq(&self) -> u64 {
        self.ack_state.rx_seq()
    }

    /// The first frame sent that the peer has not acknowledged; `None` when it has all.
    pub fn unacknowledged(&self) -> Option<u64> {
        self.log.unacknowledged()
    }

    /// When [`Session::handle_timeout`] is to be called at the latest; `None` while suspended.
    /// It moves on with every call of that.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.connected || self.failed.is_some() {
            return None;
        }
        let alive = self.liveness.deadline(self.log.is_empty(), &self.config);
        let ack = self.ack_state.deadline(&self.config);
        let open = self.opening.front().and_then(|id| self.open_deadline(*id));
        [Some(alive), ack, open, self.scheduler.deadline(), self.inflow.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Time has passed. May be called at any time.
    /// Errors: [`SessionError::Dead`], after which the session may be suspended and resumed, or
    /// [`SessionError::AckStall`].
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        self.check()?;
        if !self.connected {
            return Ok(());
        }
        self.ack_state.on_timeout(now, &self.config);
        self.scheduler.on_timeout(now);
        self.call_for_credit(now);
        if let Err(e) = self.liveness.on_timeout(now, self.log.is_empty(), &self.config) {
            return Err(if e.is_resumable() { e } else { self.fail(e) });
        }
        while let Some(id) = self.opening.front().copied() {
            if self.open_deadline(id).is_some_and(|deadline| deadline > now) {
                break;
            }
            self.opening.pop_front();
            self.push_event(Event::Reset { id, code: Code::Timeout });
            self.reset(id, Code::Timeout);
        }
        Ok(())
    }

    fn open_deadline(&self, id: StreamId) -> Option<Instant> {
        match self.streams.0.get(&id)?.phase {
            Phase::Opening { deadline } => Some(deadline),
            _ => None,
        }
    }

    pub(super) fn check(&self) -> Result<(), SessionError> {
        self.failed.map_or(Ok(()), Err)
    }

    pub(super) fn fail(&mut self, error: SessionError) -> SessionError {
        *self.failed.get_or_insert(error)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// The next event, in the order in which they happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        while let Some(event) = self.events.pop_front() {
            if self.is_current(&event) {
                return Some(event);
            }
        }
        None
    }

    /// Whether an event still means something; a Readable one may be overtaken.
    fn is_current(&mut self, event: &Event) -> bool {
        match event {
            Event::Readable { id } => self.streams.0.get_mut(id).is_some_and(|stream| {
                stream.recv.announced = false;
                !stream.recv.queue.is_empty()
            }),
            Event::Writable { id } => {
                self.streams.0.get(id).is_some_and(|stream| stream.send.state == SendState::Open)
            }
            _ => true,
        }
    }

    pub(super) fn push_event(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// Ends the session in order: tells the peer, opens and takes no new streams; those that are
    /// open go on. Only the first call counts. A failed session can still say this and nothing else.
    pub fn go_away(&mut self, code: Code, text: &str) {
        if self.farewell.ours.is_none() {
            self.farewell.ours = Some((code, frame::cut_text(text).to_owned()));
            self.farewell.due = true;
        }
    }

    /// Tells the peer that this connection, but not the session, will be closed.
    pub fn detach(&mut self) {
        self.farewell.detach_due = true;
    }

    /// Whether the peer has said so.
    pub fn is_detached_by_peer(&self) -> bool {
        self.farewell.detached
    }

    /// Whether no stream is left and everything was sent.
    pub fn is_drained(&self) -> bool {
        let farewell_sent = !self.farewell.due && !self.farewell.detach_due;
        self.streams.0.is_empty() && self.control.is_empty() && !self.log.is_replaying() && farewell_sent
    }

    /// Figures of the session.
    pub fn stats(&self) -> Stats {
        let streams = self.streams.0.values();
        Stats {
            rtt_min: self.liveness.rtt_min(),
            rtt_last: self.liveness.rtt_last(),
            pings_sent: self.liveness.pings(),
            log_bytes: self.log.bytes(),
            log_bytes_max: self.log.bytes_max(),
            log_frames: self.log.frames(),
            limit: self.scheduler.limit(),
            receive_limit: self.inflow.limit(),
            held: self.scheduler.held_for(),
            credit_outstanding_bytes: self.budget.outstanding(),
            credit_committed_bytes: self.budget.committed(),
            send_queued_bytes: streams.clone().map(|s| s.send.queue.len()).sum(),
            recv_queued_bytes: streams.clone().map(|s| s.recv.queue.len()).sum(),
            partial_bytes: self.assembler.len(),
            events_queued: self.events.len(),
            streams: self.streams.0.len(),
            ..self.stats.clone()
        }
    }

    /// Figures of a stream; `None` when it is forgotten.
    pub fn stream_stats(&self, id: StreamId) -> Option<StreamStats> {
        self.streams.0.get(&id).map(Stream::stats)
    }

    /// Lists a stream for control frames, if it has any.
    pub(super) fn list_control(&mut self, id: StreamId) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.has_control() && !std::mem::replace(&mut stream.control.listed, true) {
            self.control.push_back(id);
        }
    }

    /// Lists a stream for DATA and FIN, if it can send any.
    pub(super) fn wake(&mut self, id: StreamId, fresh: bool) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.is_ready() {
            self.scheduler.wake(id, &mut stream.turn, fresh);
        } else if !stream.send.queue.is_empty()
            && stream.send_credit() == 0
            && !std::mem::replace(&mut stream.send.stalled, true)
        {
            stream.send.stalls += 1;
            self.stats.credit_stalls += 1;
        }
    }

    /// Reports received bytes once, unless nobody may read them yet.
    pub(super) fn announce(&mut self, id: StreamId) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        let readable = !stream.recv.queue.is_empty() && stream.phase != Phase::Offered;
        if readable && !std::mem::replace(&mut stream.recv.announced, true) {
            self.push_event(Event::Readable { id });
        }
    }

    /// Forgets a stream when nothing is left of it.
    pub(super) fn forget_if_over(&mut self, id: StreamId) {
        if !self.streams.0.get(&id).is_some_and(Stream::is_over) {
            return;
        }
        let Some(mut stream) = self.streams.0.remove(&id) else { return };
        self.scheduler.forget(id, &mut stream.turn);
        if stream.recv.waits {
            self.inflow.leave(id);
        }
        self.budget.retire(&stream.recv.credit, stream.slot, stream.local);
        self.opening.retain(|other| *other != id);
        if stream.phase == Phase::RefusedUnasked {
            self.refused_unasked -= 1;
        } else {
            self.push_event(Event::Closed { id });
        }
    }
}
