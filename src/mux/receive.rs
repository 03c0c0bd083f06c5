//! What arrives: frames are cut out of the byte stream and judged. Whatever the peer sends, the
//! result is a typed error or a bounded change of state. Sends nothing.

use std::time::Instant;

use super::assemble::Payload;
use super::credit::RecvCredit;
use super::frame::{self, Content, FLAG_ABORT, FLAG_ACK_NOW, FrameError, Header, Kind};
use super::session::{Event, Session};
use super::stream::{Phase, RecvState, SendState, Stream};
use super::{Class, Code, Name, Open, SessionError, StreamId, WEIGHT_DEFAULT};

/// Streams refused without asking whose end the peer has not confirmed yet.
const REFUSED_UNASKED_MAX: usize = 1024;

type Judged = Result<(), SessionError>;

fn protocol(what: &'static str) -> SessionError {
    SessionError::Protocol { what }
}

fn malformed(error: FrameError) -> SessionError {
    protocol(error.what())
}

impl Session {
    /// Bytes that the peer sent, in any split. While suspended they are dropped: they come from a
    /// connection that is fenced off.
    /// Errors: [`SessionError`]: the peer is not to be trusted any further, the session has failed.
    pub fn handle_input(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.check()?;
        if !self.connected || bytes.is_empty() {
            return Ok(());
        }
        self.liveness.on_input(now);
        self.stats.received_bytes += bytes.len() as u64;
        self.take_frames(now, bytes).map_err(|e| self.fail(e))
    }

    fn take_frames(&mut self, now: Instant, mut bytes: &[u8]) -> Judged {
        while let Some((header, payload)) = self.assembler.next(&mut bytes).map_err(malformed)? {
            self.on_frame(now, &header, payload)?;
        }
        Ok(())
    }

    fn on_frame(&mut self, now: Instant, header: &Header, payload: Payload<'_>) -> Judged {
        let content = header.content().map_err(malformed)?;
        self.stats.received_frames += 1;
        if header.kind >= frame::NUMBERED_FROM {
            let ack_now = header.flags & FLAG_ACK_NOW != 0;
            self.ack_state.on_frame(now, payload.len(), ack_now, &self.config);
        }
        match content {
            Content::Known(kind) if kind.is_numbered() => self.on_stream_frame(now, kind, header, payload),
            Content::Known(kind) => self.on_link_frame(now, kind, header, &payload),
            Content::Ignorable { .. } => self.noop(now),
        }
    }

    /// A frame that changes nothing is tolerated at a bounded rate.
    fn noop(&mut self, now: Instant) -> Judged {
        if self.guards.noops.take(now) {
            return Ok(());
        }
        Err(SessionError::Abuse { what: "too many frames without effect" })
    }

    fn on_link_frame(&mut self, now: Instant, kind: Kind, header: &Header, payload: &[u8]) -> Judged {
        match kind {
            Kind::Ack => self.on_ack(now, header.value),
            Kind::Ping => self.on_ping(now, header.value),
            Kind::Pong if self.liveness.on_pong(now, header.value) => Ok(()),
            Kind::Pong => self.noop(now),
            Kind::GoAway => self.on_goaway(now, header, payload),
            Kind::Detach => {
                self.farewell.detached = true;
                self.noop(now)
            }
            _ => Err(protocol("a second HELLO")),
        }
    }

    fn on_ack(&mut self, now: Instant, seq: u64) -> Judged {
        self.stats.acks_received += 1;
        if !self.log.on_ack(seq)? {
            return self.noop(now);
        }
        self.liveness.on_ack_progress(now);
        Ok(())
    }

    fn on_ping(&mut self, now: Instant, value: u64) -> Judged {
        if !self.guards.pings.take(now) {
            return Err(SessionError::Abuse { what: "too many PINGs" });
        }
        self.liveness.on_ping(value);
        Ok(())
    }

    fn on_goaway(&mut self, now: Instant, header: &Header, payload: &[u8]) -> Judged {
        if std::mem::replace(&mut self.farewell.theirs, true) {
            return self.noop(now);
        }
        let (code, text) = (frame::decode_goaway_code(header.value), frame::clean_text(payload));
        self.push_event(Event::GoAway { code, text });
        Ok(())
    }

    fn on_stream_frame(&mut self, now: Instant, kind: Kind, header: &Header, payload: Payload<'_>) -> Judged {
        let id = StreamId(header.stream);
        if kind == Kind::Open {
            return self.on_open(now, id, header.value, &payload);
        }
        if !self.streams.0.contains_key(&id) {
            return self.on_forgotten(now, id, kind);
        }
        match kind {
            Kind::Data => self.on_data(now, id, header.value, payload),
            Kind::Credit => self.on_credit(now, id, header.value),
            Kind::Accept => self.on_accept(id, header.value),
            Kind::Fin => self.on_fin(id, header.value),
            Kind::Stop => self.on_stop(now, id, header.value),
            Kind::Reset => self.on_reset(now, id, header, &payload),
            _ => self.on_prio(now, id, header.value),
        }
    }

    /// Frames about our direction may cross its end; frames of the peer's direction cannot come
    /// after that.
    fn on_forgotten(&mut self, now: Instant, id: StreamId, kind: Kind) -> Judged {
        let ours = id.0 % 2 == self.role.first_id() % 2;
        let next = if ours { self.next_local } else { self.next_remote };
        if next.is_some_and(|next| id.0 >= next) {
            return Err(protocol("a frame for a stream that was never opened"));
        }
        match kind {
            Kind::Credit | Kind::Prio => self.noop(now),
            Kind::Stop => self.unsolicited_end(now),
            _ => Err(protocol("a frame after the end of its stream")),
        }
    }

    fn unsolicited_end(&mut self, now: Instant) -> Judged {
        if self.guards.resets.take(now) {
            return Ok(());
        }
        Err(SessionError::Abuse { what: "too many RESETs and STOPs" })
    }

    fn on_open(&mut self, now: Instant, id: StreamId, limit: u64, payload: &[u8]) -> Judged {
        if !self.guards.opens.take(now) {
            return Err(SessionError::Abuse { what: "too many OPENs" });
        }
        if self.next_remote != Some(id.0) {
            return Err(protocol("a stream number out of order"));
        }
        self.next_remote = id.0.checked_add(2);
        let open = frame::decode_open(payload).map_err(malformed)?;
        self.stats.streams_offered += 1;
        let refusal = match open {
            None => Some(Code::Unsupported),
            Some(_) if self.farewell.ours.is_some() => Some(Code::Refused),
            Some(_) if self.inflow.is_overdrawn(now) => Some(Code::Limit),
            Some(_) if self.offered >= self.config.pending_open_max => Some(Code::Limit),
            Some(_) if !self.budget.has_slot(false) => Some(Code::Limit),
            Some(_) => None,
        };
        match (open, refusal) {
            (Some(open), None) => self.offer(now, id, open, limit),
            (open, code) => self.refuse_unasked(now, id, open, code.unwrap_or(Code::Limit))?,
        }
        Ok(())
    }

    fn offer(&mut self, now: Instant, id: StreamId, open: Open, limit: u64) {
        self.budget.take_slot(false);
        let initial = self.config.initial_credit.of(open.class);
        let window_max = self.config.window_max(open.class);
        let credit = RecvCredit::new(&mut self.budget, initial, window_max, now);
        let mut stream = Stream::new(id, open, Phase::Offered, limit, credit);
        stream.slot = true;
        self.offered += 1;
        self.streams.0.insert(id, stream);
        self.push_event(Event::Opened { id, open });
    }

    /// Refuses without asking. What the peer has sent already is dropped as it comes.
    fn refuse_unasked(&mut self, now: Instant, id: StreamId, open: Option<Open>, code: Code) -> Judged {
        self.refused_unasked += 1;
        self.stats.streams_refused += 1;
        if self.refused_unasked > REFUSED_UNASKED_MAX {
            return Err(SessionError::Abuse { what: "too many refused streams without confirmation" });
        }
        let initial = open.map_or(self.config.credit_floor(), |o| self.config.initial_credit.of(o.class));
        let unknown = Open {
            purpose: 0,
            class: Class::Bulk,
            weight: WEIGHT_DEFAULT,
            migration: [0; 16],
            channel: 0,
            name: Name::NONE,
        };
        let credit = RecvCredit::refused(initial, now);
        let mut stream = Stream::new(id, open.unwrap_or(unknown), Phase::RefusedUnasked, 0, credit);
        stream.recv.given_up = true;
        stream.local_reset = true;
        stream.reset_send(code, true);
        self.streams.0.insert(id, stream);
        self.list_control(id);
        Ok(())
    }

    /// The stream, for a frame of the peer's direction: that must be open, and accepted if it is
    /// one of ours.
    fn receiving(&mut self, id: StreamId) -> Result<&mut Stream, SessionError> {
        let stream = self.streams.0.get_mut(&id).ok_or(protocol("a frame for an unknown stream"))?;
        if stream.recv.state != RecvState::Open {
            return Err(protocol("a frame after the end of its stream"));
        }
        if stream.local && !stream.answered {
            return Err(protocol("a frame before the stream was accepted"));
        }
        Ok(stream)
    }

    fn on_data(&mut self, now: Instant, id: StreamId, offset: u64, payload: Payload<'_>) -> Judged {
        let idle_after = self.config.window_idle_after;
        let stream = self.receiving(id)?;
        if offset != stream.recv.credit.received() {
            return Err(SessionError::Continuity { what: "data at an unexpected offset" });
        }
        let Some(stream) = self.streams.0.get_mut(&id) else { return Ok(()) };
        let len = payload.len() as u64;
        let free = self.config.initial_credit.of(stream.open.class).saturating_sub(offset).min(len);
        if !stream.recv.credit.on_data(&mut self.budget, now, len, idle_after) {
            return Err(SessionError::Flow { stream: id });
        }
        self.inflow.arrived(now, free)?;
        if stream.recv.given_up {
            return Ok(());
        }
        stream.recv.queue.push(payload);
        self.stats.received_data_bytes += len;
        self.announce(id);
        Ok(())
    }

    fn on_fin(&mut self, id: StreamId, offset: u64) -> Judged {
        let stream = self.receiving(id)?;
        if offset != stream.recv.credit.received() {
            return Err(SessionError::Continuity { what: "an end at an unexpected offset" });
        }
        stream.recv.state = RecvState::Finished;
        let told = !stream.recv.given_up && stream.phase != Phase::Offered;
        self.close_credit(id, offset);
        if told {
            self.push_event(Event::Finished { id });
        }
        self.forget_if_over(id);
        Ok(())
    }

    fn close_credit(&mut self, id: StreamId, at: u64) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        stream.control.credit = false;
        if !stream.recv.given_up {
            stream.recv.credit.close(&mut self.budget, at);
        }
    }

    fn on_accept(&mut self, id: StreamId, limit: u64) -> Judged {
        let Some(stream) = self.streams.0.get_mut(&id) else { return Ok(()) };
        if !stream.local || std::mem::replace(&mut stream.answered, true) {
            return Err(protocol("an ACCEPT for a stream that does not wait for one"));
        }
        if !matches!(stream.phase, Phase::Opening { .. }) {
            return Ok(());
        }
        stream.phase = Phase::Established;
        self.opening.retain(|other| *other != id);
        self.push_event(Event::Accepted { id });
        self.raise_limit(id, limit);
        Ok(())
    }

    /// True if that is more than before.
    fn raise_limit(&mut self, id: StreamId, limit: u64) -> bool {
        let Some(stream) = self.streams.0.get_mut(&id) else { return false };
        if limit <= stream.send.limit {
            return false;
        }
        stream.send.limit = limit;
        stream.send.stalled = false;
        self.wake(id, false);
        true
    }

    fn on_credit(&mut self, now: Instant, id: StreamId, limit: u64) -> Judged {
        let Some(stream) = self.streams.0.get(&id) else { return Ok(()) };
        if stream.local && !stream.answered {
            return Err(protocol("credit before the stream was accepted"));
        }
        let is_over = matches!(stream.send.state, SendState::Done | SendState::Resetting { .. });
        if self.raise_limit(id, limit) && !is_over { Ok(()) } else { self.noop(now) }
    }

    fn on_stop(&mut self, now: Instant, id: StreamId, code: u64) -> Judged {
        self.unsolicited_end(now)?;
        let code = Code::from_wire(u32::try_from(code).map_err(|_| protocol("a code out of range"))?);
        let Some(stream) = self.streams.0.get_mut(&id) else { return Ok(()) };
        if matches!(stream.send.state, SendState::Done | SendState::Resetting { .. }) {
            return Ok(());
        }
        if stream.phase == Phase::Offered {
            // Our answer comes first: the peer takes a RESET before ACCEPT for a refusal.
            stream.stopped.get_or_insert(code);
            return Ok(());
        }
        stream.reset_send(code, false);
        self.push_event(Event::Stopped { id, code });
        self.list_control(id);
        Ok(())
    }

    fn on_reset(&mut self, now: Instant, id: StreamId, header: &Header, payload: &[u8]) -> Judged {
        let code = frame::decode_reset(payload).map_err(malformed)?;
        let Some(stream) = self.streams.0.get_mut(&id) else { return Ok(()) };
        let refusal = stream.local && !std::mem::replace(&mut stream.answered, true);
        let solicited = refusal || stream.recv.given_up;
        let stream = self.receiving(id)?;
        if header.value != stream.recv.credit.received() {
            return Err(SessionError::Continuity { what: "a reset at an unexpected offset" });
        }
        if !solicited {
            self.unsolicited_end(now)?;
        }
        let one_way = self.end_receiving(id, header.flags & FLAG_ABORT != 0);
        if !one_way {
            self.end_sending(id, code);
        }
        self.list_control(id);
        self.forget_if_over(id);
        Ok(())
    }

    /// What was not handed out is dropped. True if our direction goes on: the reset only answers
    /// our STOP.
    fn end_receiving(&mut self, id: StreamId, abort: bool) -> bool {
        let Some(stream) = self.streams.0.get_mut(&id) else { return true };
        stream.recv.state = RecvState::Reset;
        stream.recv.queue.clear();
        let one_way = !abort && stream.recv.given_up && !stream.local_reset;
        let handed = stream.recv.handed;
        self.close_credit(id, handed);
        one_way
    }

    fn end_sending(&mut self, id: StreamId, code: Code) {
        let Some(stream) = self.streams.0.get_mut(&id) else { return };
        stream.send.ended.get_or_insert(code);
        stream.reset_send(Code::Cancelled, false);
        if stream.phase != Phase::Offered && stream.phase != Phase::RefusedUnasked {
            stream.phase = Phase::Established;
        }
        let told = !stream.local_reset;
        self.opening.retain(|other| *other != id);
        if told {
            self.stats.streams_reset += 1;
            self.push_event(Event::Reset { id, code });
        }
    }

    fn on_prio(&mut self, now: Instant, id: StreamId, value: u64) -> Judged {
        self.noop(now)?;
        let Some(stream) = self.streams.0.get_mut(&id) else { return Ok(()) };
        if let Some((class, weight)) = frame::decode_prio(value) {
            self.scheduler.change(id, &mut stream.turn, class, weight);
            self.wake(id, false);
        }
        Ok(())
    }
}
