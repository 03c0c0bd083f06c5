//! What leaves: batches, filled in strict order from state that the rest of the session keeps.
//! Link frames, the replay, control frames, then data by the scheduler. Judges nothing.

use std::time::Instant;

use bytes::Bytes;

use super::StreamId;
use super::batch::Batch;
use super::frame::{self, FLAG_ABORT, FLAG_ACK_NOW, HEADER_LEN, Header, Kind};
use super::session::{Event, Session};
use super::stream::{RecvState, SendState, Stream};

impl Session {
    /// Fills `batch` with what is to be sent next; false if there is nothing. Call it again only
    /// when the batch before has left: what is not framed yet can still be overtaken.
    pub fn poll_transmit(&mut self, now: Instant, batch: &mut Batch) -> bool {
        batch.clear();
        if !self.connected {
            return false;
        }
        if self.has_failed() {
            self.fill_farewell(batch);
        } else {
            self.fill(now, batch);
        }
        if batch.is_empty() {
            return false;
        }
        self.scheduler.on_batch(now, batch.len_bytes());
        self.stats.batches += 1;
        self.stats.sent_frames += batch.parts().len() as u64;
        self.stats.sent_bytes += batch.len_bytes() as u64;
        true
    }

    fn fill(&mut self, now: Instant, batch: &mut Batch) {
        self.fill_link(now, batch);
        self.fill_replay(now, batch);
        // Nothing may overtake an OPEN or ACCEPT that did not fit.
        if !self.log.is_replaying() && self.fill_control(now, batch) {
            self.fill_data(now, batch);
        }
    }

    fn batch_limit(&self) -> usize {
        self.config.batch_limit(self.scheduler.rate())
    }

    fn frame_limit(&self, id: StreamId) -> usize {
        let stream = self.streams.0.get(&id);
        self.config.frame_limit(stream.map_or(0, |stream| self.scheduler.rate_of(&stream.turn)))
    }

    fn fill_link(&mut self, now: Instant, batch: &mut Batch) {
        if let Some(value) = self.liveness.take_pong() {
            batch.push(&Header::new(Kind::Pong, 0, value), Bytes::new());
        }
        if let Some(value) = self.liveness.take_ping(now) {
            batch.push(&Header::new(Kind::Ping, 0, value), Bytes::new());
        }
        let in_passing = !batch.is_empty() || self.has_work();
        if let Some(seq) = self.ack_state.take(in_passing) {
            self.stats.acks_sent += 1;
            batch.push(&Header::new(Kind::Ack, 0, seq), Bytes::new());
        }
        self.fill_farewell(batch);
        if std::mem::take(&mut self.farewell.detach_due) {
            batch.push(&Header::new(Kind::Detach, 0, 0), Bytes::new());
        }
    }

    /// The only thing that a failed session still says.
    fn fill_farewell(&mut self, batch: &mut Batch) {
        if std::mem::take(&mut self.farewell.due)
            && let Some((code, text)) = &self.farewell.ours
        {
            let highest = self.next_remote.map_or(u32::MAX, |next| next.saturating_sub(2));
            let value = frame::encode_goaway_value(*code, highest);
            let header = Header::new(Kind::GoAway, 0, value).with_len(text.len());
            batch.push(&header, Bytes::copy_from_slice(text.as_bytes()));
        }
    }

    /// Whether other frames will probably be sent, so that an ACK costs nothing.
    fn has_work(&self) -> bool {
        self.log.is_replaying() || !self.control.is_empty() || self.scheduler.has_work()
    }

    fn fill_replay(&mut self, now: Instant, batch: &mut Batch) {
        while self.log.is_replaying() {
            let room = self.batch_limit().saturating_sub(batch.len_bytes());
            let Some(entry) = self.log.replay_next(room) else { return };
            let bytes = HEADER_LEN + entry.payload.len();
            self.stats.replayed_frames += 1;
            self.stats.replayed_bytes += bytes as u64;
            self.scheduler.charge_session(bytes, now);
            batch.push(&entry.header, entry.payload);
        }
    }

    /// Puts a new numbered frame into the batch and the log.
    fn push_numbered(&mut self, now: Instant, batch: &mut Batch, header: Header, payload: Bytes) {
        let ack_now = if self.log.is_half_full() { FLAG_ACK_NOW } else { 0 };
        let header = header.with_len(payload.len()).with_flags(ack_now);
        if self.log.is_empty() {
            self.liveness.on_ack_progress(now);
        }
        batch.push(&header, payload.clone());
        self.log.push(header, payload);
    }

    /// True if all control frames had room.
    fn fill_control(&mut self, now: Instant, batch: &mut Batch) -> bool {
        while let Some(id) = self.control.front().copied() {
            while let Some((header, payload)) = self.next_control(now, id, batch) {
                self.push_numbered(now, batch, header, payload);
            }
            match self.streams.0.get_mut(&id) {
                Some(stream) if stream.has_control() => return false,
                Some(stream) => stream.control.listed = false,
                None => {}
            }
            self.control.pop_front();
            self.forget_if_over(id);
        }
        true
    }

    /// The next control frame of a stream, when batch and log have room for it.
    fn next_control(&mut self, now: Instant, id: StreamId, batch: &Batch) -> Option<(Header, Bytes)> {
        let longest = frame::CONTROL_PAYLOAD_MAX;
        let room = batch.fits(longest, self.batch_limit()) && self.log.fits(longest);
        let stream = self.streams.0.get_mut(&id).filter(|_| room)?;
        if std::mem::take(&mut stream.control.open) {
            return Some(open_frame(stream));
        }
        if std::mem::take(&mut stream.control.accept) {
            let value = stream.recv.credit.advertised();
            return Some((Header::new(Kind::Accept, id.0, value), Bytes::new()));
        }
        if let SendState::Resetting { code, abort } = stream.send.state {
            stream.send.state = SendState::Done;
            return Some(reset_frame(stream, code.to_wire(), abort));
        }
        if let Some(code) = stream.control.stop.take()
            && stream.recv.state == RecvState::Open
        {
            return Some((Header::new(Kind::Stop, id.0, code.to_wire().into()), Bytes::new()));
        }
        if std::mem::take(&mut stream.control.prio) && stream.send.state != SendState::Done {
            let value = frame::encode_prio(stream.turn.class, stream.turn.weight);
            return Some((Header::new(Kind::Prio, id.0, value), Bytes::new()));
        }
        self.credit_frame(now, id)
    }

    fn credit_frame(&mut self, now: Instant, id: StreamId) -> Option<(Header, Bytes)> {
        let stream = self.streams.0.get_mut(&id)?;
        let due = std::mem::take(&mut stream.control.credit)
            && stream.recv.state == RecvState::Open
            && stream.recv.credit.wants_grant(&self.budget);
        if !due {
            if std::mem::take(&mut stream.recv.waits) {
                self.inflow.leave(id);
            }
            return None;
        }
        let most = self.inflow.may_grant(now, id, &mut stream.recv.waits)?;
        self.stats.credits_sent += 1;
        let before = stream.recv.credit.advertised();
        let value = stream.recv.credit.grant(&mut self.budget, most);
        self.inflow.granted(now, value - before);
        // What has to wait for its turn asks again.
        stream.control.credit = most != u64::MAX;
        Some((Header::new(Kind::Credit, id.0, value), Bytes::new()))
    }

    fn fill_data(&mut self, now: Instant, batch: &mut Batch) {
        while !batch.is_full(self.batch_limit()) {
            let (urgent, bulk) = (self.log.has_urgent_room(), self.log.has_bulk_room());
            if !urgent || !bulk {
                self.stats.log_stalls += u64::from(!self.scheduler.is_empty());
            }
            if !urgent {
                return;
            }
            let Some(id) = self.scheduler.next(now, &mut self.streams, bulk) else { return };
            let Some(room) = batch.data_room(self.frame_limit(id), self.batch_limit()) else { return };
            let Some((header, payload)) = self.next_data(now, id, room) else { return };
            self.push_numbered(now, batch, header, payload);
            self.after_data(id);
        }
    }

    /// A DATA or FIN frame of a stream that is ready.
    fn next_data(&mut self, now: Instant, id: StreamId, room: usize) -> Option<(Header, Bytes)> {
        let stream = self.streams.0.get_mut(&id)?;
        let offset = stream.send.offset;
        let (kind, payload) = if stream.send.queue.is_empty() {
            stream.send.state = SendState::Done;
            (Kind::Fin, Bytes::new())
        } else {
            let credit = usize::try_from(stream.send_credit()).unwrap_or(usize::MAX);
            (Kind::Data, stream.send.queue.take(room.min(credit)))
        };
        debug_assert!(kind == Kind::Fin || !payload.is_empty());
        stream.send.offset += payload.len() as u64;
        self.stats.sent_data_bytes += payload.len() as u64;
        self.scheduler.charge(&mut stream.turn, HEADER_LEN + payload.len(), now);
        Some((Header::new(kind, id.0, offset), payload))
    }

    /// Tells the local side of room, counts a stall, forgets a finished stream.
    fn after_data(&mut self, id: StreamId) {
        let half = self.config.send_queue_bound(self.streams.0.len()) / 2;
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        if stream.send.starved && stream.send.queue.len() <= half {
            stream.send.starved = false;
            self.push_event(Event::Writable { id });
        }
        self.wake(id, false);
        self.forget_if_over(id);
    }
}

fn open_frame(stream: &Stream) -> (Header, Bytes) {
    let value = stream.recv.credit.advertised();
    (Header::new(Kind::Open, stream.id.0, value), frame::encode_open(&stream.open))
}

fn reset_frame(stream: &Stream, code: u32, abort: bool) -> (Header, Bytes) {
    let flags = if abort { FLAG_ABORT } else { 0 };
    let header = Header::new(Kind::Reset, stream.id.0, stream.send.offset).with_flags(flags);
    (header, Bytes::copy_from_slice(&code.to_be_bytes()))
}
