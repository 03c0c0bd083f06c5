//! The peer's frames. Everything here is hostile until it has been checked: a breach of the
//! protocol is an error of the session, and nothing is allocated on a peer's word.

use std::time::Instant;

use super::super::code::Code;
use super::super::config::Class;
use super::super::frame::{self, FLAG_ACK_NOW, FLAG_IGNORABLE, Header, Kind};
use super::super::hello::read_goaway;
use super::super::stream::State;
use super::super::{Event, Open, SessionError, StreamId};
use super::{RTT_EVERY, Session};

/// Length of an OPEN's payload that this version understands; more is a later version's.
pub(super) const OPEN_LEN: usize = 23;
/// Longest OPEN payload.
const OPEN_LEN_MAX: usize = 1024;

impl Session {
    /// Takes plaintext in any split. Each payload is copied once, into its stream's buffers.
    ///
    /// # Errors
    /// [`SessionError`]: the session is over, tell the peer its code.
    pub fn handle_input(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.heard_at = self.heard_at.max(now);
        let mut assembler = std::mem::take(&mut self.assembler);
        let taken = assembler.feed(bytes, |header, payload| self.on_frame(now, header, payload));
        self.assembler = assembler;
        taken
    }

    fn on_frame(&mut self, now: Instant, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        self.stats.received_frames += 1;
        let Some(kind) = Kind::from_byte(header.kind) else {
            return self.on_unknown(now, header, payload);
        };
        if header.flags & !(FLAG_ACK_NOW | FLAG_IGNORABLE) != 0 {
            return Err(SessionError::Protocol("reserved flags"));
        }
        if !frame::is_numbered(header.kind) {
            return self.on_link_frame(now, kind, &header, payload);
        }
        self.on_session_frame(now, kind, &header, payload)?;
        self.number(now, &header);
        Ok(())
    }

    fn on_unknown(&mut self, now: Instant, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        if header.flags & FLAG_IGNORABLE == 0 {
            return Err(SessionError::Protocol("a frame of unknown type"));
        }
        let _ = payload;
        self.no_op(now)?;
        if frame::is_numbered(header.kind) {
            self.number(now, &header);
        }
        Ok(())
    }

    fn number(&mut self, now: Instant, header: &Header) {
        let bytes = frame::HEADER_LEN + usize::from(header.len);
        let at_once = header.flags & FLAG_ACK_NOW != 0;
        self.link.on_received(bytes, at_once, &self.config, now);
    }

    fn no_op(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.buckets.no_op.take(now) { Ok(()) } else { Err(SessionError::Abuse("empty")) }
    }

    fn on_link_frame(
        &mut self,
        now: Instant,
        kind: Kind,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        if header.stream != 0 {
            return Err(SessionError::Protocol("a link frame with a stream"));
        }
        if kind != Kind::GoAway && !payload.is_empty() {
            return Err(SessionError::Protocol("a link frame with a payload"));
        }
        match kind {
            Kind::Ack => {
                if !self.link.on_ack(header.value, now)? {
                    self.no_op(now)?;
                }
            }
            Kind::Ping => {
                if !self.buckets.ping.take(now) {
                    return Err(SessionError::Abuse("PING"));
                }
                self.pong_due = Some(header.value);
            }
            Kind::Pong => self.on_pong(now, header.value)?,
            Kind::GoAway => self.on_goaway(now, header, payload)?,
            Kind::Detach => self.no_op(now)?,
            _ => return Err(SessionError::Protocol("a second HELLO")),
        }
        Ok(())
    }

    fn on_pong(&mut self, now: Instant, number: u64) -> Result<(), SessionError> {
        match self.pinged_at {
            Some(at) if number == self.ping_number => {
                self.rtt.sample(now.saturating_duration_since(at), now);
                self.pinged_at = None;
                self.next_rtt_at = now + RTT_EVERY;
                Ok(())
            }
            _ => self.no_op(now),
        }
    }

    fn on_goaway(&mut self, now: Instant, header: &Header, payload: &[u8]) -> Result<(), SessionError> {
        if self.peer_going_away {
            return self.no_op(now);
        }
        self.peer_going_away = true;
        let (code, text) = read_goaway(header, payload);
        self.events.push_back(Event::GoAway { code, text });
        Ok(())
    }

    fn on_session_frame(
        &mut self,
        now: Instant,
        kind: Kind,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        let id = StreamId(header.stream);
        if kind == Kind::Open {
            return self.on_open(now, id, header.value, payload);
        }
        if !self.streams.contains_key(&id) {
            return self.on_forgotten(now, kind, id);
        }
        match kind {
            Kind::Data => return self.on_data(id, header.value, payload),
            Kind::Reset => return self.on_reset(now, id, header.value, payload),
            Kind::Prio => return self.on_prio(now, id, payload),
            _ if !payload.is_empty() => return Err(SessionError::Protocol("an unexpected payload")),
            _ => {}
        }
        match kind {
            Kind::Accept => self.on_accept(id, header.value),
            Kind::Credit => self.on_credit(now, id, header.value),
            Kind::Fin => self.on_fin(id, header.value),
            Kind::Stop => self.on_stop(now, id, header.value),
            _ => Err(SessionError::Protocol("a frame out of place")),
        }
    }

    /// A frame for a stream that is over here: what was on its way is harmless, except bytes.
    fn on_forgotten(&mut self, now: Instant, kind: Kind, id: StreamId) -> Result<(), SessionError> {
        let next = if self.is_local(id) { self.next_local } else { self.next_remote };
        if id.0 == 0 || id.0 >= next {
            return Err(SessionError::Protocol("a frame for a stream that was never opened"));
        }
        match kind {
            Kind::Data | Kind::Accept | Kind::Fin => {
                Err(SessionError::Protocol("bytes for a stream that has ended"))
            }
            _ => self.no_op(now),
        }
    }

    fn on_open(
        &mut self,
        now: Instant,
        id: StreamId,
        credit: u64,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        if id.0 != self.next_remote {
            return Err(SessionError::Protocol("stream numbers must rise by two"));
        }
        if !self.buckets.open.take(now) {
            return Err(SessionError::Abuse("OPEN"));
        }
        if self.remote_open >= self.config.max_streams {
            return Err(SessionError::Protocol("more streams than allowed"));
        }
        let open = read_open(payload).ok_or(SessionError::Protocol("a malformed OPEN"))?;
        self.next_remote = id.0.checked_add(2).ok_or(SessionError::Protocol("no stream numbers left"))?;
        self.remote_open += 1;
        let stream = self.new_stream(open, State::Offered, credit, now);
        self.streams.insert(id, stream);
        self.offered += 1;
        if self.going_away || self.offered > self.config.pending_open_max {
            self.refuse(id, if self.going_away { Code::Shutdown } else { Code::Limit });
        } else {
            self.events.push_back(Event::Opened { id, open });
        }
        Ok(())
    }

    fn on_accept(&mut self, id: StreamId, credit: u64) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.state != State::Opening || stream.want_open {
            return Err(SessionError::Protocol("an ACCEPT out of place"));
        }
        stream.state = State::Open;
        stream.sending.limit = stream.sending.limit.max(credit);
        if !stream.is_reset {
            self.events.push_back(Event::Accepted { id });
        }
        self.wake(id);
        Ok(())
    }

    fn on_data(&mut self, id: StreamId, offset: u64, payload: &[u8]) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let receiving = &mut stream.receiving;
        if payload.is_empty() {
            return Err(SessionError::Protocol("empty DATA"));
        }
        if receiving.finished {
            return Err(SessionError::Protocol("DATA after the end"));
        }
        check_offset(id, receiving.offset, offset)?;
        let end = offset.checked_add(payload.len() as u64).ok_or(SessionError::Flow(id.0))?;
        if end > receiving.credit.advertised() {
            return Err(SessionError::Flow(id.0));
        }
        receiving.push(payload);
        if !receiving.discarding {
            self.tell_readable(id);
        }
        self.stats.received_bytes += payload.len() as u64;
        Ok(())
    }

    fn on_credit(&mut self, now: Instant, id: StreamId, limit: u64) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if limit <= stream.sending.limit {
            return self.no_op(now);
        }
        stream.sending.limit = limit;
        self.wake(id);
        Ok(())
    }

    fn on_fin(&mut self, id: StreamId, offset: u64) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.receiving.finished {
            return Err(SessionError::Protocol("a second end"));
        }
        check_offset(id, stream.receiving.offset, offset)?;
        stream.receiving.finished = true;
        stream.want_stop = None;
        if !stream.is_reset && !stream.receiving.discarding {
            self.events.push_back(Event::Finished { id });
        }
        self.forget_if_over(id);
        Ok(())
    }

    fn on_stop(&mut self, now: Instant, id: StreamId, code: u64) -> Result<(), SessionError> {
        self.take_end(now)?;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.sending.finished || stream.is_reset {
            return Ok(());
        }
        stream.sending.discard();
        stream.sending.fin_wanted = true;
        let code = Code::from_number(u32::try_from(code).unwrap_or(0));
        self.events.push_back(Event::Stopped { id, code });
        self.wake(id);
        Ok(())
    }

    fn on_reset(
        &mut self,
        now: Instant,
        id: StreamId,
        offset: u64,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        self.take_end(now)?;
        let Ok(code) = <[u8; 4]>::try_from(payload) else {
            return Err(SessionError::Protocol("a malformed RESET"));
        };
        let code = Code::from_number(u32::from_be_bytes(code));
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        // After its FIN the peer may still end our direction.
        if !stream.receiving.finished {
            check_offset(id, stream.receiving.offset, offset)?;
        }
        stream.receiving.finished = true;
        let was_reset = stream.is_reset;
        if !stream.sending.finished && stream.want_reset.is_none() {
            stream.want_reset = Some(code);
        }
        let user_knows = was_reset || stream.state == State::Offered;
        self.let_go(id);
        if !user_knows {
            self.events.push_back(Event::Reset { id, code });
        }
        self.wake_control(id);
        self.forget_if_over(id);
        Ok(())
    }

    fn on_prio(&mut self, now: Instant, id: StreamId, payload: &[u8]) -> Result<(), SessionError> {
        self.no_op(now)?;
        let Ok([class, high, low]) = <[u8; 3]>::try_from(payload) else {
            return Err(SessionError::Protocol("a malformed PRIO"));
        };
        if Class::from_byte(class).is_none() {
            return Err(SessionError::Protocol("an unknown class"));
        }
        if let Some(stream) = self.streams.get_mut(&id) {
            // A peer may ask for another share, never for another class.
            stream.open.weight = u16::from_be_bytes([high, low]).max(1);
        }
        Ok(())
    }

    fn take_end(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.buckets.end.take(now) { Ok(()) } else { Err(SessionError::Abuse("RESET and STOP")) }
    }
}

fn check_offset(id: StreamId, expected: u64, got: u64) -> Result<(), SessionError> {
    if expected == got { Ok(()) } else { Err(SessionError::Continuity { stream: id.0, expected, got }) }
}

fn read_open(payload: &[u8]) -> Option<Open> {
    if payload.len() > OPEN_LEN_MAX {
        return None;
    }
    let [p0, p1, class, w0, w1, rest @ ..] = payload.first_chunk::<OPEN_LEN>()?;
    let (migration, channel) = rest.split_first_chunk::<16>()?;
    Some(Open {
        purpose: u16::from_be_bytes([*p0, *p1]),
        class: Class::from_byte(*class)?,
        weight: u16::from_be_bytes([*w0, *w1]).max(1),
        migration: *migration,
        channel: u16::from_be_bytes(channel.try_into().ok()?),
    })
}
