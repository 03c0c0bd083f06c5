//! What the local side asks of streams: open, accept, send, receive, end. Every call is a change
//! of state; what the peer is to hear of it is sent later, by `transmit`.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::credit::RecvCredit;
use super::frame::RECORD_LEN;
use super::session::{Event, Session};
use super::stream::{Phase, RecvState, SendState, Stream};
use super::{
    Class, Code, MigrationId, Open, OpenError, Share, SharedLimit, StreamError, StreamId, WEIGHT_MAX, purpose,
};

impl Session {
    /// Opens a stream. Data may be sent at once; the peer's answer is an event.
    /// Errors: [`OpenError`]; nothing has happened.
    pub fn open(&mut self, now: Instant, open: Open) -> Result<StreamId, OpenError> {
        let id = self.may_open(now)?;
        self.next_local = id.0.checked_add(2);
        self.budget.take_slot(true);
        self.stats.streams_opened += 1;
        let initial = self.config.initial_credit.of(open.class);
        let window_max = self.config.window_max(open.class);
        let mut credit = RecvCredit::new(&mut self.budget, initial, window_max, now);
        let is_limited = self.inflow.limit().is_some();
        credit.start(&mut self.budget, self.config.start_credit.of(open.class), is_limited);
        let phase = Phase::Opening { deadline: now + self.config.open_deadline };
        let limit = self.peer.initial_credit.of(open.class);
        let mut stream = Stream::new(id, open, phase, limit, credit);
        stream.slot = true;
        stream.control.open = true;
        stream.control.credit = is_limited;
        self.streams.0.insert(id, stream);
        self.opening.push_back(id);
        self.list_control(id);
        Ok(id)
    }

    fn may_open(&mut self, now: Instant) -> Result<StreamId, OpenError> {
        if self.farewell.ours.is_some() || self.farewell.theirs || self.has_failed() {
            return Err(OpenError::GoingAway);
        }
        if !self.budget.has_slot(true) {
            let max = self.config.streams_max().min(self.peer.max_streams);
            return Err(OpenError::Streams { max });
        }
        if self.opening.len() >= self.config.pending_open_max {
            return Err(OpenError::Pending { max: self.config.pending_open_max });
        }
        let id = self.next_local.ok_or(OpenError::Exhausted)?;
        if !self.own_opens.take(now) {
            return Err(OpenError::Rate);
        }
        Ok(StreamId(id))
    }

    /// Accepts a stream that the peer opened. What it has sent since follows as events.
    /// Errors: [`StreamError::Ended`]: the peer has reset it meanwhile. [`StreamError::Unknown`] or
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
        let is_limited = self.inflow.limit().is_some();
        stream.control.credit |= is_limited && stream.recv.state == RecvState::Open;
        stream.recv.credit.start(
            &mut self.budget,
            self.config.start_credit.of(stream.open.class),
            is_limited,
        );
        let (finished, stopped) = (stream.recv.state == RecvState::Finished, stream.stopped.take());
        if let Some(code) = stopped {
            stream.reset_send(code, false);
        }
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
    pub fn send_capacity(&self, id: StreamId) -> usize {
        let Some(stream) = self.streams.0.get(&id) else { return 0 };
        if stream.send.state != SendState::Open || stream.phase == Phase::Offered {
            return 0;
        }
        self.config.send_queue_bound(self.streams.0.len()).saturating_sub(stream.send.queue.len())
    }

    /// Queues a chunk. It may be longer than [`Session::send_capacity`], as long as that is not 0;
    /// the caller bounds its chunks.
    /// Errors: [`StreamError`]; the chunk is dropped.
    pub fn send(&mut self, _now: Instant, id: StreamId, data: Bytes) -> Result<(), StreamError> {
        let bound = self.config.send_queue_bound(self.streams.0.len());
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
        // The bound may be less by the time that more is to be queued: whoever has queued as much as
        // any bound may be waits for the word that there is room.
        stream.send.starved |= stream.send.queue.len() >= RECORD_LEN;
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
        let growth_times = self.growth_times();
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        let bytes = bytes.min(stream.recv.handed.saturating_sub(stream.recv.credit.consumed()));
        stream.recv.credit.on_consumed(&mut self.budget, now, bytes, growth_times);
        if stream.recv.state == RecvState::Open
            && !stream.recv.given_up
            && stream.recv.credit.wants_grant(&self.budget)
        {
            stream.control.credit = true;
            self.list_control(id);
        }
        self.forget_if_over(id);
    }

    /// Twice the smallest round trip, and the least time for a sender at the end of its credit.
    fn growth_times(&self) -> (Duration, Duration) {
        let two_round_trips = self.liveness.rtt_min().map(|rtt| rtt * 2);
        (two_round_trips.unwrap_or_default(), self.config.growth_time_min)
    }

    /// Limits what is sent on all bulk streams together, headers included; `None` for no limit. What
    /// must be sent again and urgent streams do not wait for it, but are paid for by what follows.
    /// The same limit again: its rate may be another.
    pub fn set_limit(&mut self, limit: Option<SharedLimit>) {
        self.scheduler.set_limit(limit);
    }

    /// Holds the peer to what it may send on all streams together; `None` for no limit. What a stream may receive
    /// before it is accepted does not wait, but is paid for by what follows. The same limit again: its rate may be
    /// another.
    pub fn set_receive_limit(&mut self, limit: Option<SharedLimit>) {
        for id in self.inflow.set(limit) {
            self.may_ask_for_credit(id);
        }
    }

    /// Has the next stream that waits for credit ask for it, if there may be some by now.
    pub(super) fn call_for_credit(&mut self, now: Instant) {
        if let Some(id) = self.inflow.on_timeout(now) {
            self.may_ask_for_credit(id);
        }
    }

    fn may_ask_for_credit(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.0.get_mut(&id) {
            stream.control.credit = true;
            self.list_control(id);
        }
    }

    /// What a migration may send from now on; [`Share::default`] forgets it.
    pub fn set_share(&mut self, migration: MigrationId, share: Share) {
        let ahead = share.ahead;
        self.scheduler.set_share(migration, share);
        for stream in self.streams.0.values_mut().filter(|s| s.open.migration == migration) {
            if matches!(stream.open.purpose, purpose::RAM | purpose::RAM_CHANNEL) {
                let weight = if ahead { WEIGHT_MAX } else { stream.open.weight };
                let class = stream.turn.class;
                self.scheduler.change(stream.id, &mut stream.turn, class, weight);
            }
        }
    }

    /// Changes how a stream is scheduled, here and at the peer.
    pub fn set_priority(&mut self, id: StreamId, class: Class, weight: u16) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if (stream.turn.class, stream.turn.weight) == (class, weight) {
            return;
        }
        self.scheduler.change(id, &mut stream.turn, class, weight);
        stream.control.prio = true;
        self.wake(id, false);
        self.list_control(id);
    }
}
