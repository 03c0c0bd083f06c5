//! The session: its table of streams, and what its user may ask of it.
//!
//! `receive.rs` takes the peer's frames, `transmit.rs` makes ours; both work on this state.

mod receive;
mod transmit;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::code::Code;
use super::config::{Class, Config};
use super::credit::{Budget, Credit};
use super::frame::Assembler;
use super::hello::Negotiated;
use super::limit::{Buckets, MinRtt, earliest};
use super::link::Link;
use super::schedule::Scheduler;
use super::stats::Stats;
use super::stream::{State, Stream};
use super::{Event, Open, OpenError, Role, SessionError, StreamError, StreamId};

/// Round trips are measured this often, and never more than once a second.
const RTT_EVERY: Duration = Duration::from_secs(10);

/// What two agents share: streams over a link that may change its connection.
#[derive(Debug)]
pub struct Session {
    config: Config,
    role: Role,
    peer_initial_credit: u64,
    peer_max_streams: u32,
    streams: BTreeMap<StreamId, Stream>,
    next_local: u32,
    next_remote: u32,
    local_open: u32,
    remote_open: u32,
    offered: usize,
    events: VecDeque<Event>,
    assembler: Assembler,
    link: Link,
    scheduler: Scheduler,
    budget: Budget,
    buckets: Buckets,
    stats: Stats,
    rtt: MinRtt,
    connected: bool,
    heard_at: Instant,
    pinged_at: Option<Instant>,
    next_rtt_at: Instant,
    ping_due: bool,
    ping_number: u64,
    pong_due: Option<u64>,
    goaway_due: Option<(Code, String)>,
    going_away: bool,
    peer_going_away: bool,
}

impl Session {
    /// A session over a connection whose HELLOs were exchanged.
    #[must_use]
    pub fn new(role: Role, config: Config, negotiated: &Negotiated, now: Instant) -> Self {
        let (next_local, next_remote) = match role {
            Role::Dialer => (1, 2),
            Role::Acceptor => (2, 1),
        };
        // Both sides' streams carry bytes to us under our initial credit.
        let initial = u64::from(config.initial_credit_bytes);
        let reserved = initial * 2 * u64::from(config.max_streams);
        Self {
            role,
            peer_initial_credit: u64::from(negotiated.peer.initial_credit_bytes),
            peer_max_streams: negotiated.peer.max_streams,
            streams: BTreeMap::new(),
            next_local,
            next_remote,
            local_open: 0,
            remote_open: 0,
            offered: 0,
            events: VecDeque::new(),
            assembler: Assembler::default(),
            link: Link::new(),
            scheduler: Scheduler::default(),
            budget: Budget::new(config.budget_bytes.max(reserved), reserved),
            buckets: Buckets::new(now),
            stats: Stats::default(),
            rtt: MinRtt::default(),
            connected: true,
            heard_at: now,
            pinged_at: None,
            next_rtt_at: now,
            ping_due: false,
            ping_number: 0,
            pong_due: None,
            goaway_due: None,
            going_away: false,
            peer_going_away: false,
            config,
        }
    }

    /// Which side dialed.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        if let Event::Readable { id } = event
            && let Some(stream) = self.streams.get_mut(&id)
        {
            stream.readable_told = false;
        }
        Some(event)
    }

    /// Opens a stream. Bytes may be sent at once, up to the peer's initial credit.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(&mut self, now: Instant, open: Open) -> Result<StreamId, OpenError> {
        if self.going_away || self.peer_going_away {
            return Err(OpenError::GoingAway);
        }
        let max = self.peer_max_streams.min(self.config.max_streams);
        if self.local_open >= max {
            return Err(OpenError::TooMany(self.local_open as usize));
        }
        let id = StreamId(self.next_local);
        self.next_local = self.next_local.checked_add(2).ok_or(OpenError::Exhausted)?;
        self.local_open += 1;
        let stream = self.new_stream(open, State::Opening, self.peer_initial_credit, now);
        self.streams.insert(id, stream);
        self.wake_control(id);
        Ok(id)
    }

    fn new_stream(&mut self, open: Open, state: State, limit: u64, now: Instant) -> Stream {
        let initial = u64::from(self.config.initial_credit_bytes);
        let window_max = match open.class {
            Class::Urgent => self.config.urgent_window_max_bytes,
            Class::Bulk => self.config.bulk_window_max_bytes,
        };
        self.budget.open(initial);
        Stream::new(open, state, limit, Credit::new(initial, window_max, now), now)
    }

    /// Accepts a stream that the peer opened: its local end is connected.
    ///
    /// # Errors
    /// [`StreamError::Ended`]: the peer has given it up meanwhile.
    pub fn accept(&mut self, id: StreamId) -> Result<(), StreamError> {
        let stream = self.offered_stream(id).ok_or(StreamError::Ended)?;
        stream.state = State::Open;
        if stream.is_reset {
            self.forget_if_over(id);
            return Err(StreamError::Ended);
        }
        stream.want_accept = true;
        let readable = stream.receiving.held > 0;
        self.wake_control(id);
        if readable {
            self.tell_readable(id);
        }
        Ok(())
    }

    /// Refuses a stream that the peer opened.
    pub fn refuse(&mut self, id: StreamId, code: Code) {
        if let Some(stream) = self.offered_stream(id) {
            stream.state = State::Open;
            self.reset(id, code);
            self.forget_if_over(id);
        }
    }

    fn offered_stream(&mut self, id: StreamId) -> Option<&mut Stream> {
        let stream = self.streams.get_mut(&id).filter(|s| s.state == State::Offered)?;
        self.offered -= 1;
        Some(stream)
    }

    /// Bytes that may be queued now. A chunk may exceed it once; then wait for
    /// [`Event::Writable`].
    #[must_use]
    pub fn send_capacity(&self, id: StreamId) -> usize {
        let Some(stream) = self.streams.get(&id) else { return 0 };
        if stream.is_reset || stream.sending.finished || stream.sending.fin_wanted {
            return 0;
        }
        self.config.send_queue_bytes.saturating_sub(stream.sending.queued())
    }

    /// Queues bytes. They are shared, not copied, unless they are few.
    ///
    /// # Errors
    /// [`StreamError::Ended`]: nobody takes them any more.
    pub fn send(&mut self, now: Instant, id: StreamId, data: Bytes) -> Result<(), StreamError> {
        let _ = now;
        let limit = self.config.send_queue_bytes;
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Ended)?;
        if stream.is_reset || stream.sending.finished || stream.sending.fin_wanted {
            return Err(StreamError::Ended);
        }
        stream.sending.push(data);
        stream.sending.full = stream.sending.queued() >= limit;
        self.wake(id);
        Ok(())
    }

    /// Sends no more after what is queued.
    pub fn finish(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.sending.fin_wanted = true;
            self.wake(id);
        }
    }

    /// Ends both directions at once.
    pub fn reset(&mut self, id: StreamId, code: Code) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.is_reset || (stream.sending.finished && stream.receiving.finished) {
            return;
        }
        stream.want_reset = Some(code);
        self.let_go(id);
        self.wake_control(id);
    }

    /// Takes no more: what still comes is dropped, and the peer is told so.
    pub fn stop(&mut self, id: StreamId, code: Code) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.is_reset || stream.receiving.discarding {
            return;
        }
        stream.receiving.discard();
        if !stream.receiving.finished {
            stream.want_stop = Some(code);
            self.wake_control(id);
        }
        self.forget_if_over(id);
    }

    /// The next received bytes, in order.
    pub fn recv(&mut self, id: StreamId) -> Option<Bytes> {
        let stream = self.streams.get_mut(&id)?;
        if stream.state == State::Offered {
            return None;
        }
        let data = stream.receiving.pop();
        self.forget_if_over(id);
        data
    }

    /// The local side has taken `bytes` of what was received: credit may return to the peer.
    pub fn consumed(&mut self, now: Instant, id: StreamId, bytes: u64) {
        let rtt = self.rtt.min();
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let renewed = stream.receiving.credit.consume(bytes, rtt, &mut self.budget, now);
        if renewed && !stream.receiving.finished && !stream.is_reset {
            stream.want_credit = true;
            self.wake_control(id);
        }
    }

    /// Changes a stream's share, here and at the peer.
    pub fn set_weight(&mut self, id: StreamId, weight: u16) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.open.weight = weight.max(1);
            stream.want_prio = true;
            self.wake_control(id);
        }
    }

    /// Opens and accepts nothing further; tells the peer why.
    pub fn go_away(&mut self, code: Code, text: &str) {
        if !self.going_away {
            self.going_away = true;
            self.goaway_due = Some((code, text.to_owned()));
        }
    }

    /// Whether no stream is left and everything was acknowledged.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.streams.is_empty() && self.link.log_bytes() == 0
    }

    /// The connection is gone; the session waits for another one.
    pub fn handle_disconnected(&mut self, now: Instant) {
        let _ = now;
        self.connected = false;
        self.assembler.reset();
        self.link.on_disconnected();
        self.pinged_at = None;
        self.ping_due = false;
        self.pong_due = None;
    }

    /// Another connection, whose peer has received everything up to `peer_rx_seq`.
    ///
    /// # Errors
    /// [`SessionError::BadAck`]: the peer cannot have received that.
    pub fn handle_reconnected(&mut self, now: Instant, peer_rx_seq: u64) -> Result<(), SessionError> {
        self.link.on_reconnected(peer_rx_seq)?;
        self.connected = true;
        self.heard_at = now;
        // What waited for an answer could not be answered meanwhile.
        let waiting = self.streams.values_mut().filter(|s| s.state == State::Opening);
        waiting.for_each(|s| s.since = now);
        Ok(())
    }

    /// Highest session frame received without a gap.
    #[must_use]
    pub fn rx_seq(&self) -> u64 {
        self.link.rx_seq()
    }

    /// When [`Session::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.connected {
            return None;
        }
        let opening = self.streams.values().filter(|s| s.state == State::Opening).map(|s| s.since).min();
        earliest([
            self.link.ack_at(),
            Some(self.heard_at + self.config.dead_after),
            Some(self.next_ping_at()),
            opening.map(|since| since + self.config.open_deadline),
            self.link.waiting_since().map(|since| since + self.config.ack_stall_after),
        ])
    }

    fn next_ping_at(&self) -> Instant {
        let quiet = self.heard_at + self.config.ping_after;
        match self.pinged_at {
            // One at a time, and not again at once when it was answered.
            Some(at) => at + self.config.ping_after,
            None => quiet.min(self.next_rtt_at.max(self.heard_at)),
        }
    }

    /// Time has passed.
    ///
    /// # Errors
    /// [`SessionError::Dead`] and [`SessionError::AckStall`].
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if !self.connected {
            return Ok(());
        }
        let silent = now.saturating_duration_since(self.heard_at);
        if silent >= self.config.dead_after {
            return Err(SessionError::Dead(silent.as_millis()));
        }
        if let Some(since) = self.link.waiting_since() {
            let waited = now.saturating_duration_since(since);
            if waited >= self.config.ack_stall_after {
                return Err(SessionError::AckStall(waited.as_secs()));
            }
        }
        if now >= self.next_ping_at() {
            self.ping_due = true;
        }
        self.end_unanswered(now);
        Ok(())
    }

    fn end_unanswered(&mut self, now: Instant) {
        let deadline = self.config.open_deadline;
        let late = |s: &Stream| {
            s.state == State::Opening && !s.is_reset && now.saturating_duration_since(s.since) >= deadline
        };
        let ids: Vec<_> = self.streams.iter().filter(|(_, s)| late(s)).map(|(id, _)| *id).collect();
        for id in ids {
            self.reset(id, Code::Timeout);
            self.events.push_back(Event::Reset { id, code: Code::Timeout });
        }
    }

    /// The session's figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            open_streams: self.streams.len(),
            queued_bytes: self.streams.values().map(|s| s.sending.queued()).sum(),
            held_bytes: self.streams.values().map(|s| s.receiving.held).sum(),
            replay_log_bytes: self.link.log_bytes(),
            replayed_frames: self.link.replayed_frames,
            replayed_bytes: self.link.replayed_bytes,
            promised_bytes: self.budget.promised(),
            rtt_min: self.rtt.min(),
            rtt_last: self.rtt.last,
            ..self.stats.clone()
        }
    }

    /// Puts a stream into the scheduler's lists if it has something to send.
    fn wake(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.sending.is_stalled() {
            stream.credit_stalls += 1;
            self.stats.credit_stalls += 1;
        }
        if !stream.scheduled && !stream.is_reset && stream.sending.is_ready() {
            stream.scheduled = true;
            stream.deficit = super::schedule::quantum(stream.open.weight);
            self.scheduler.wake(id, stream.class());
        }
    }

    fn wake_control(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.in_control && stream.wants_control() {
            stream.in_control = true;
            self.scheduler.control.push_back(id);
        }
    }

    fn tell_readable(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.state != State::Offered && !stream.readable_told {
            stream.readable_told = true;
            self.events.push_back(Event::Readable { id });
        }
    }

    /// A stream is reset: its queues go at once, its entry when both sides know.
    fn let_go(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.is_reset = true;
        stream.sending.discard();
        stream.receiving.discard();
        stream.want_stop = None;
        stream.want_credit = false;
        stream.want_accept = false;
    }

    fn forget_if_over(&mut self, id: StreamId) {
        if !self.streams.get(&id).is_some_and(Stream::is_over) {
            return;
        }
        let Some(stream) = self.streams.remove(&id) else { return };
        let initial = u64::from(self.config.initial_credit_bytes);
        self.budget.close(stream.receiving.credit.outstanding(), initial);
        match self.is_local(id) {
            true => self.local_open -= 1,
            false => self.remote_open -= 1,
        }
        self.events.push_back(Event::Closed { id });
    }

    fn is_local(&self, id: StreamId) -> bool {
        let odd = id.0 % 2 == 1;
        odd == (self.role == Role::Dialer)
    }
}
