//! Our frames: what goes into the next batch, and in which order.
//!
//! Link frames, then what an earlier connection lost, then the streams' control frames, then
//! urgent bytes, then bulk. A session frame enters the replay log in the moment in which its
//! place in the order is fixed.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};

use super::super::Batch;
use super::super::config::Class;
use super::super::frame::{FLAG_ACK_NOW, Frame, HEADER_LEN, Kind, PAYLOAD_MAX};
use super::super::hello::goaway;
use super::super::schedule::quantum;
use super::super::{Event, Open, StreamId};
use super::Session;
use super::receive::OPEN_LEN;

/// A TLS record's plaintext (RFC 8446 §5.1).
const RECORD_BYTES: usize = HEADER_LEN + PAYLOAD_MAX;
/// With less room than this left in a record, a DATA frame rather straddles it.
const ROOM_MIN_BYTES: usize = 512;
/// The most that one control turn of a stream adds to the log.
const CONTROL_BYTES_MAX: usize = 256;

impl Session {
    /// Fills `batch` with what should be sealed and written next. False: nothing to send.
    pub fn poll_transmit(&mut self, now: Instant, batch: &mut Batch) -> bool {
        batch.clear();
        if !self.connected {
            return false;
        }
        self.link_frames(now, batch);
        self.replay(now, batch);
        if self.link.replay_done() {
            self.control_frames(now, batch);
            self.urgent_frames(now, batch);
            self.bulk_frames(now, batch);
        }
        self.stats.sent_frames += batch.frames().len() as u64;
        !batch.frames().is_empty()
    }

    fn link_frames(&mut self, now: Instant, batch: &mut Batch) {
        let mut add = |kind, value| batch.push(Frame::new(kind, 0, 0, value, Bytes::new()));
        if let Some(seq) = self.link.take_ack(now) {
            add(Kind::Ack, seq);
        }
        if let Some(number) = self.pong_due.take() {
            add(Kind::Pong, number);
        }
        if std::mem::take(&mut self.ping_due) {
            self.ping_number += 1;
            self.pinged_at = Some(now);
            add(Kind::Ping, self.ping_number);
        }
        if let Some((code, text)) = self.goaway_due.take() {
            let highest = self.next_remote.saturating_sub(2);
            batch.push(goaway(code, highest, &text));
        }
    }

    fn replay(&mut self, now: Instant, batch: &mut Batch) {
        while self.has_room(batch) {
            let Some(frame) = self.link.replay_next(now) else { break };
            batch.push(frame);
        }
    }

    fn has_room(&self, batch: &Batch) -> bool {
        batch.len_bytes() + HEADER_LEN + ROOM_MIN_BYTES <= self.config.batch_bytes
    }

    /// Whether the log takes another `bytes`; bulk leaves the reserve to the rest.
    fn log_takes(&mut self, bytes: usize, bulk: bool) -> bool {
        let reserve = if bulk { self.config.replay_reserve_bytes } else { 0 };
        let takes = self.link.log_bytes() + bytes + reserve <= self.config.replay_cap_bytes;
        if !takes {
            self.stats.log_stalls += 1;
        }
        takes
    }

    fn emit(&mut self, now: Instant, frame: Frame, batch: &mut Batch) {
        self.link.push(frame.clone(), now);
        batch.push(frame);
    }

    fn control_frames(&mut self, now: Instant, batch: &mut Batch) {
        while self.has_room(batch)
            && !self.scheduler.control.is_empty()
            && self.log_takes(CONTROL_BYTES_MAX, false)
        {
            let Some(id) = self.scheduler.control.pop_front() else { break };
            self.control_of(now, id, batch);
        }
    }

    /// All control frames that a stream wants, each with what is true now.
    fn control_of(&mut self, now: Instant, id: StreamId, batch: &mut Batch) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.in_control = false;
        let advertised = stream.receiving.credit.advertised();
        let mut frames: Vec<Frame> = Vec::new();
        let mut add = |kind, value, payload| frames.push(Frame::new(kind, 0, id.0, value, payload));
        if std::mem::take(&mut stream.want_open) {
            add(Kind::Open, advertised, open_payload(&stream.open));
        }
        if std::mem::take(&mut stream.want_accept) {
            add(Kind::Accept, advertised, Bytes::new());
        }
        if std::mem::take(&mut stream.want_credit) {
            add(Kind::Credit, advertised, Bytes::new());
        }
        if std::mem::take(&mut stream.want_prio) {
            add(Kind::Prio, 0, prio_payload(&stream.open));
        }
        if let Some(code) = stream.want_stop.take() {
            add(Kind::Stop, u64::from(code.number()), Bytes::new());
        }
        if let Some(code) = stream.want_reset.take() {
            stream.sending.finished = true;
            let payload = Bytes::copy_from_slice(&code.number().to_be_bytes());
            add(Kind::Reset, stream.sending.offset, payload);
        }
        for frame in frames {
            self.emit(now, frame, batch);
        }
        self.forget_if_over(id);
    }

    /// Urgent streams in turn; where bulk waits, they leave it half of the batch.
    fn urgent_frames(&mut self, now: Instant, batch: &mut Batch) {
        let share =
            if self.scheduler.bulk_waits() { self.config.batch_bytes / 2 } else { self.config.batch_bytes };
        while batch.len_bytes() < share && self.has_room(batch) {
            if self.scheduler.urgent.is_empty() || !self.log_takes(RECORD_BYTES, false) {
                return;
            }
            let Some(id) = self.scheduler.urgent.pop_front() else { return };
            if self.send_once(now, id, batch) {
                self.scheduler.urgent.push_back(id);
            }
        }
    }

    fn bulk_frames(&mut self, now: Instant, batch: &mut Batch) {
        while self.has_room(batch) && self.scheduler.bulk_waits() && self.log_takes(RECORD_BYTES, true) {
            let Some((id, sparse)) = self.scheduler.next_bulk() else { return };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if stream.deficit <= 0 {
                stream.deficit += quantum(stream.open.weight);
                self.scheduler.ring.push_back(id);
                continue;
            }
            if self.send_once(now, id, batch) {
                self.put_back(id, sparse);
            }
        }
    }

    /// A stream with deficit left goes on where it was; one without waits for its next round.
    fn put_back(&mut self, id: StreamId, sparse: bool) {
        let spent = self.streams.get(&id).is_none_or(|s| s.deficit <= 0);
        match (spent, sparse) {
            (true, _) => self.scheduler.ring.push_back(id),
            (false, true) => self.scheduler.sparse.push_front(id),
            (false, false) => self.scheduler.ring.push_front(id),
        }
    }

    /// Frames one piece of a stream; whether it has more to send.
    fn send_once(&mut self, now: Instant, id: StreamId, batch: &mut Batch) -> bool {
        let room = payload_room(batch.len_bytes());
        let ack_now = self.link.log_bytes() > self.config.replay_cap_bytes / 2;
        let Some(stream) = self.streams.get_mut(&id) else { return false };
        let offset = stream.sending.offset;
        let frame = match stream.sending.take(room) {
            Some(data) => {
                self.stats.sent_bytes += data.len() as u64;
                stream.deficit -= (HEADER_LEN + data.len()) as i64;
                let flags = if ack_now { FLAG_ACK_NOW } else { 0 };
                Some(Frame::new(Kind::Data, flags, id.0, offset, data))
            }
            None if stream.sending.is_ready() => {
                stream.sending.finished = true;
                Some(Frame::new(Kind::Fin, 0, id.0, offset, Bytes::new()))
            }
            None => None,
        };
        let more = stream.sending.is_ready() && !stream.is_reset;
        stream.scheduled = more;
        if stream.sending.is_stalled() {
            stream.credit_stalls += 1;
            self.stats.credit_stalls += 1;
        }
        if let Some(frame) = frame {
            self.emit(now, frame, batch);
        }
        self.tell_writable(id);
        self.forget_if_over(id);
        more
    }

    fn tell_writable(&mut self, id: StreamId) {
        let half = self.config.send_queue_bytes / 2;
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.sending.full
            && stream.sending.queued() <= half
        {
            stream.sending.full = false;
            self.events.push_back(Event::Writable { id });
        }
    }

    /// Whether a class has bytes waiting; for tests of the scheduler.
    #[must_use]
    pub fn waits(&self, class: Class) -> bool {
        match class {
            Class::Urgent => !self.scheduler.urgent.is_empty(),
            Class::Bulk => self.scheduler.bulk_waits(),
        }
    }
}

/// How long a DATA payload may be so that it ends with its record.
fn payload_room(len: usize) -> usize {
    let left = RECORD_BYTES - len % RECORD_BYTES;
    match left.checked_sub(HEADER_LEN) {
        Some(room) if room >= ROOM_MIN_BYTES => room.min(PAYLOAD_MAX),
        _ => (left + RECORD_BYTES - HEADER_LEN).min(PAYLOAD_MAX),
    }
}

fn open_payload(open: &Open) -> Bytes {
    let mut bytes = BytesMut::with_capacity(OPEN_LEN);
    bytes.put_u16(open.purpose);
    bytes.put_u8(open.class.byte());
    bytes.put_u16(open.weight);
    bytes.put_slice(&open.migration);
    bytes.put_u16(open.channel);
    bytes.freeze()
}

fn prio_payload(open: &Open) -> Bytes {
    let [high, low] = open.weight.to_be_bytes();
    Bytes::copy_from_slice(&[open.class.byte(), high, low])
}
