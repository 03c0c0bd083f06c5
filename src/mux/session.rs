//! A session: what the local side asks of it, what it reports, its connections and its deadlines.
//! Frames that arrive are judged in `receive`, frames that leave are made in `transmit`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use bytes::Bytes;

use super::credit::{Budget, RecvCredit};
use super::frame;
use super::guards::Guards;
use super::hello::{Negotiated, PeerLimits};
use super::limit::TokenBucket;
use super::liveness::Liveness;
use super::log::ReplayLog;
use super::receipt::Receipt;
use super::schedule::{Backlog, Scheduler, Turn};
use super::stream::{Phase, RecvState, SendState, Stream};
use super::{
    Class, Code, Config, Event, Open, OpenError, Role, SessionError, Stats, StreamError, StreamId,
    StreamStats,
};

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
    pub(super) receipt: Receipt,
    pub(super) liveness: Liveness,
    /// The beginning of an incomplete frame.
    pub(super) partial: Vec<u8>,
    pub(super) streams: Table,
    pub(super) budget: Budget,
    pub(super) scheduler: Scheduler,
    /// Streams with control frames to send, each once.
    pub(super) control: VecDeque<StreamId>,
    /// Streams that the peer has not answered, oldest first.
    pub(super) opening: VecDeque<StreamId>,
    /// Streams that the local side has not answered.
    pub(super) offered: usize,
    /// Streams refused without asking, until the peer has taken note.
    pub(super) turned: usize,
    /// Streams opened here.
    local: u32,
    own_opens: TokenBucket,
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
    #[must_use]
    pub fn new(role: Role, config: Config, negotiated: &Negotiated, now: Instant) -> Self {
        Self {
            role,
            peer: negotiated.peer,
            connected: true,
            suspended: None,
            failed: None,
            log: ReplayLog::new(&config),
            receipt: Receipt::default(),
            liveness: Liveness::new(now),
            partial: Vec::new(),
            streams: Table::default(),
            budget: Budget::new(&config),
            scheduler: Scheduler::new(&config, now),
            control: VecDeque::new(),
            opening: VecDeque::new(),
            offered: 0,
            turned: 0,
            local: 0,
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
        self.partial.clear();
    }

    /// A new connection, over which the peer has said that it received everything up to
    /// `peer_rx_seq`, and has been told our [`Session::rx_seq`]. The old one must not be read any
    /// more when these numbers are exchanged.
    ///
    /// # Errors
    /// [`SessionError::Continuity`]: the peer cannot have received that; the session is lost.
    pub fn handle_reconnected(&mut self, now: Instant, peer_rx_seq: u64) -> Result<(), SessionError> {
        self.check()?;
        self.handle_disconnected(now);
        if let Err(e) = self.log.rewind(peer_rx_seq) {
            return Err(self.fail(e));
        }
        self.postpone_deadlines(now);
        self.connected = true;
        self.liveness.restart(now);
        self.receipt.settle();
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
        for id in &self.opening {
            if let Some(Stream { phase: Phase::Opening { deadline }, .. }) = self.streams.0.get_mut(id) {
                *deadline += pause;
            }
        }
    }

    /// The last frame received without a gap: what a RESUME or RESUMED says.
    #[must_use]
    pub fn rx_seq(&self) -> u64 {
        self.receipt.rx_seq()
    }

    /// When [`Session::handle_timeout`] is to be called at the latest; `None` while suspended.
    /// It moves on with every call of that.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.connected || self.failed.is_some() {
            return None;
        }
        let alive = self.liveness.deadline(self.log.is_empty(), &self.config);
        let ack = self.receipt.deadline(&self.config);
        let open = self.opening.front().and_then(|id| self.open_deadline(*id));
        [Some(alive), ack, open].into_iter().flatten().min()
    }

    /// Time has passed. May be called at any time.
    ///
    /// # Errors
    /// [`SessionError::Dead`], after which the session may be suspended and resumed, or
    /// [`SessionError::AckStall`].
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        self.check()?;
        if !self.connected {
            return Ok(());
        }
        self.receipt.on_timeout(now, &self.config);
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
    /// open go on. Only the first call counts.
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
    #[must_use]
    pub fn is_detached_by_peer(&self) -> bool {
        self.farewell.detached
    }

    /// Whether no stream is left and everything was sent.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        let farewell_sent = !self.farewell.due && !self.farewell.detach_due;
        self.streams.0.is_empty() && self.control.is_empty() && !self.log.is_replaying() && farewell_sent
    }

    /// Opens a stream. Data may be sent at once; the peer's answer is an event.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has happened.
    pub fn open(&mut self, now: Instant, open: Open) -> Result<StreamId, OpenError> {
        let id = self.may_open(now)?;
        self.next_local = id.0.checked_add(2);
        self.local += 1;
        self.stats.streams_opened += 1;
        let initial = self.config.initial_credit.of(open.class);
        let window_max = self.config.window_max(open.class, open.purpose);
        let mut credit = RecvCredit::new(&mut self.budget, initial, window_max, now);
        credit.start(&mut self.budget, self.config.start_credit.of(open.class));
        let phase = Phase::Opening { deadline: now + self.config.open_deadline };
        let limit = self.peer.initial_credit.of(open.class);
        let mut stream = Stream::new(id, open, phase, limit, credit);
        stream.control.open = true;
        self.streams.0.insert(id, stream);
        self.opening.push_back(id);
        self.list_control(id);
        Ok(id)
    }

    fn may_open(&mut self, now: Instant) -> Result<StreamId, OpenError> {
        if self.farewell.ours.is_some() || self.farewell.theirs || self.failed.is_some() {
            return Err(OpenError::GoingAway);
        }
        let max = self.config.streams_max().min(self.peer.max_streams);
        if self.local >= max {
            return Err(OpenError::Streams { max });
        }
        if self.opening.len() >= self.config.pending_open_max {
            return Err(OpenError::Pending { max: self.config.pending_open_max });
        }
        if !self.budget.has_floor() {
            return Err(OpenError::Budget);
        }
        let id = self.next_local.ok_or(OpenError::Exhausted)?;
        if !self.own_opens.take(now) {
            return Err(OpenError::Rate);
        }
        Ok(StreamId(id))
    }

    /// Accepts a stream that the peer opened. What it has sent since follows as events.
    ///
    /// # Errors
    /// [`StreamError::Ended`]: the peer has reset it meanwhile. [`StreamError::Unknown`] or
    /// [`StreamError::NotOffered`]: the caller is wrong.
    pub fn accept(&mut self, id: StreamId) -> Result<(), StreamError> {
        let stream = self.offered(id)?;
        stream.phase = Phase::Established;
        let ended = (stream.recv.state == RecvState::Reset).then_some(stream.send.ended);
        self.offered -= 1;
        if let Some(code) = ended {
            self.forget_if_over(id);
            return Err(StreamError::Ended { id, code: code.unwrap_or(Code::Cancelled) });
        }
        let Some(stream) = self.streams.0.get_mut(&id) else { return Err(StreamError::Unknown(id)) };
        stream.control.accept = true;
        stream.recv.credit.start(&mut self.budget, self.config.start_credit.of(stream.open.class));
        let (finished, stopped) = (stream.recv.state == RecvState::Finished, stream.stopped.take());
        self.list_control(id);
        self.announce(id);
        if finished {
            self.push_event(Event::Finished { id });
        }
        if let Some(code) = stopped {
            self.push_event(Event::Stopped { id, code });
        }
        Ok(())
    }

    /// Refuses a stream that the peer opened.
    pub fn refuse(&mut self, id: StreamId, code: Code) {
        if self.offered(id).is_ok() {
            self.reset(id, code);
        }
    }

    fn offered(&mut self, id: StreamId) -> Result<&mut Stream, StreamError> {
        let stream = self.streams.0.get_mut(&id).ok_or(StreamError::Unknown(id))?;
        if stream.phase == Phase::Offered { Ok(stream) } else { Err(StreamError::NotOffered(id)) }
    }

    /// Bytes that may be queued now; 0 when the stream's queue is full or it takes no more.
    #[must_use]
    pub fn send_capacity(&self, id: StreamId) -> usize {
        let Some(stream) = self.streams.0.get(&id) else { return 0 };
        if stream.send.state != SendState::Open || stream.phase == Phase::Offered {
            return 0;
        }
        self.config.send_queue_bytes_per_stream.saturating_sub(stream.send.queue.len())
    }

    /// Queues a chunk. It may be longer than [`Session::send_capacity`], as long as that is not 0;
    /// the caller bounds its chunks.
    ///
    /// # Errors
    /// [`StreamError`]; the chunk is dropped.
    pub fn send(&mut self, _now: Instant, id: StreamId, data: Bytes) -> Result<(), StreamError> {
        let bound = self.config.send_queue_bytes_per_stream;
        let stream = self.streams.0.get_mut(&id).ok_or(StreamError::Unknown(id))?;
        if stream.phase == Phase::Offered {
            return Err(StreamError::NotAccepted(id));
        }
        if stream.send.state != SendState::Open {
            let code = stream.send.ended.unwrap_or(Code::Cancelled);
            return Err(StreamError::Ended { id, code });
        }
        if stream.send.queue.len() >= bound {
            stream.send.starved = true;
            return Err(StreamError::Full(id));
        }
        let fresh = stream.send.queue.is_empty();
        stream.send.queue.push(data);
        stream.send.starved |= stream.send.queue.len() >= bound;
        self.wake(id, fresh);
        Ok(())
    }

    /// Ends what we send, after all that was queued. The other direction goes on.
    pub fn finish(&mut self, id: StreamId) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.send.state == SendState::Open && stream.phase != Phase::Offered {
            stream.send.state = SendState::Finishing;
            self.wake(id, true);
        }
    }

    /// Ends both directions at once; what is queued is dropped, and no event but
    /// [`Event::Closed`] follows. What the peer has been sent before a [`Session::finish`] that is
    /// already out stays valid.
    pub fn reset(&mut self, id: StreamId, code: Code) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.local_reset {
            return;
        }
        stream.local_reset = true;
        let was_offered = stream.phase == Phase::Offered;
        stream.phase = Phase::Established;
        let end_sent = stream.send.state == SendState::Done;
        stream.reset_send(code, true);
        stream.control.accept = false;
        stream.control.stop = (end_sent && stream.recv.state == RecvState::Open).then_some(code);
        stream.give_up(&mut self.budget);
        self.offered -= usize::from(was_offered);
        self.opening.retain(|other| *other != id);
        self.stats.streams_reset += 1;
        self.list_control(id);
        self.forget_if_over(id);
    }

    /// Tells the peer that nobody reads the stream any more; it will end its direction. What was
    /// received and not taken is dropped. The other direction goes on.
    pub fn stop(&mut self, id: StreamId, code: Code) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.phase == Phase::Offered {
            return self.reset(id, code);
        }
        if !stream.recv.given_up && stream.recv.state == RecvState::Open {
            stream.control.stop = Some(code);
        }
        stream.give_up(&mut self.budget);
        self.list_control(id);
        self.forget_if_over(id);
    }

    /// The next received chunk, at most 64 KiB. Nothing before the stream is accepted.
    pub fn recv(&mut self, id: StreamId) -> Option<Bytes> {
        let stream = self.streams.0.get_mut(&id)?;
        if stream.phase == Phase::Offered {
            return None;
        }
        let chunk = stream.recv.queue.pop()?;
        stream.recv.handed += chunk.len() as u64;
        Some(chunk)
    }

    /// The local side has taken `bytes` of what [`Session::recv`] handed out: the peer may send as
    /// many again. Every byte is to be reported, or the stream never closes, unless it is reset
    /// or stopped.
    pub fn consumed(&mut self, now: Instant, id: StreamId, bytes: u64) {
        let growth_time = self.growth_time();
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        let bytes = bytes.min(stream.recv.handed.saturating_sub(stream.recv.credit.consumed()));
        stream.recv.credit.on_consumed(&mut self.budget, now, bytes, growth_time);
        if stream.recv.state == RecvState::Open
            && !stream.recv.given_up
            && stream.recv.credit.wants_grant(&self.budget)
        {
            stream.control.credit = true;
            self.list_control(id);
        }
        self.forget_if_over(id);
    }

    /// Time within which half a window must be consumed for it to grow: twice the round trip.
    fn growth_time(&self) -> std::time::Duration {
        let round_trips = self.liveness.rtt_min().map(|rtt| rtt * 2);
        round_trips.unwrap_or_default().max(self.config.growth_time_min)
    }

    /// Changes how a stream is scheduled, here and at the peer.
    pub fn set_priority(&mut self, id: StreamId, class: Class, weight: u16) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if (stream.turn.class, stream.turn.weight()) == (class, weight) {
            return;
        }
        self.scheduler.change(id, &mut stream.turn, class, weight);
        stream.control.prio = true;
        self.wake(id, false);
        self.list_control(id);
    }

    /// Figures of the session.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let streams = self.streams.0.values();
        Stats {
            rtt_min: self.liveness.rtt_min(),
            rtt_last: self.liveness.rtt_last(),
            pings_sent: self.liveness.pings(),
            log_bytes: self.log.bytes(),
            log_bytes_max: self.log.bytes_max(),
            log_frames: self.log.frames(),
            credit_outstanding_bytes: self.budget.outstanding(),
            credit_committed_bytes: self.budget.committed(),
            send_queued_bytes: streams.clone().map(|s| s.send.queue.len()).sum(),
            recv_queued_bytes: streams.clone().map(|s| s.recv.queue.len()).sum(),
            partial_bytes: self.partial.len(),
            events_queued: self.events.len(),
            streams: self.streams.0.len(),
            ..self.stats.clone()
        }
    }

    /// Figures of a stream; `None` when it is forgotten.
    #[must_use]
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
        self.budget.retire(&stream.recv.credit, stream.slot);
        self.opening.retain(|other| *other != id);
        self.local -= u32::from(stream.local);
        if stream.phase == Phase::Turned {
            self.turned -= 1;
        } else {
            self.push_event(Event::Closed { id });
        }
    }
}
