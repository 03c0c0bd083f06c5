//! A session and a peer that has proved who it is, and sends what it likes.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use bytes::Bytes;
use vmferry::mux::frame::{self, FLAG_ABORT, HEADER_LEN, Header, Kind, PAYLOAD_MAX};
use vmferry::mux::hello::{Hello, Mode, negotiate};
use vmferry::mux::{
    Batch, Class, Code, Config, Event, Name, Open, PerClass, RateLimit, Role, Session, SessionError,
    SharedLimit, StreamId, purpose,
};

use super::script::{Script, pieces};

const BUDGET: u64 = 256 << 10;
const QUEUE: usize = 8 << 10;
const STREAMS: u32 = 8;
/// What the local side sends at once.
const SENT_MAX: usize = 4096;
const KINDS: [Kind; 14] = [
    Kind::Open,
    Kind::Data,
    Kind::Ack,
    Kind::Credit,
    Kind::Fin,
    Kind::Stop,
    Kind::Reset,
    Kind::Accept,
    Kind::Prio,
    Kind::Ping,
    Kind::Pong,
    Kind::GoAway,
    Kind::Detach,
    Kind::Hello,
];

/// Limits so small that they are met soon.
fn small() -> Config {
    let rate = RateLimit { per_second: 1000, burst: 1000 };
    Config {
        max_streams: STREAMS,
        initial_credit: PerClass { urgent: 4096, bulk: 4096 },
        start_credit: PerClass { urgent: 4096, bulk: 32 << 10 },
        budget_bytes: BUDGET,
        replay_cap_bytes: BUDGET as usize,
        send_queue_bytes_per_stream: QUEUE,
        pending_open_max: 4,
        opens: rate,
        resets: rate,
        noops: rate,
        ..Config::default()
    }
}

fn lone(role: Role, now: Instant) -> Session {
    let config = small();
    let hello = Hello::new(&config, [1; 16], Mode::Accepted { secret_share: [1; 32] });
    let negotiated = negotiate(&hello, &hello).expect("the same on both sides");
    Session::new(role, config, &negotiated, now)
}

fn assert_bounded(session: &Session) {
    let stats = session.stats();
    let holds = stats.credit_committed_bytes <= BUDGET
        && stats.recv_queued_bytes as u64 <= stats.credit_outstanding_bytes
        && stats.credit_outstanding_bytes <= stats.credit_committed_bytes
        && stats.log_bytes_max <= BUDGET as usize
        && stats.send_queued_bytes <= 2 * STREAMS as usize * (QUEUE + SENT_MAX)
        && stats.partial_bytes < HEADER_LEN + PAYLOAD_MAX
        && stats.streams <= 2 * STREAMS as usize + 1024;
    assert!(holds, "{stats:?}");
}

/// What the session wants to send; it comes to an end.
fn drain(session: &mut Session, now: Instant) -> Vec<u8> {
    let (mut batch, mut out) = (Batch::default(), Vec::new());
    for batches in 0.. {
        assert!(batches < 10_000, "a session that never stops sending");
        if !session.poll_transmit(now, &mut batch) {
            return out;
        }
        batch.io_slices().for_each(|slice| out.extend_from_slice(&slice));
    }
    out
}

/// How a session ended, and what it has told, holds and says.
type Outcome = (Result<(), SessionError>, Vec<Event>, String, Vec<u8>);

fn fed<'a>(parts: impl Iterator<Item = &'a [u8]>, now: Instant) -> Outcome {
    let mut session = lone(Role::Acceptor, now);
    let mut ended = Ok(());
    for part in parts {
        ended = session.handle_input(now, part);
        assert_bounded(&session);
        if ended.is_err() {
            assert_eq!(session.handle_input(now, part), ended, "a failed session stays failed");
            break;
        }
    }
    let events = std::iter::from_fn(|| session.poll_event()).collect();
    let mut stats = session.stats();
    // In pieces fewer bytes come after the one that is wrong.
    stats.received_bytes = 0;
    let said = drain(&mut session, now);
    (ended, events, format!("{stats:?}"), said)
}

/// Bytes as they come from a connection: in pieces they do what they do at once.
pub(crate) fn frames(data: &[u8]) {
    let now = Instant::now();
    let at_once = fed(std::iter::once(data), now);
    assert_eq!(fed(pieces(data, false), now), at_once, "in pieces");
    if data.len() < 2048 {
        assert_eq!(fed(pieces(data, true), now), at_once, "byte by byte");
    }
    if let Some(head) = data.first_chunk() {
        let header = Header::decode(head);
        assert_eq!(&header.encode(), head);
    }
    payloads(data);
}

fn payloads(data: &[u8]) {
    if let Ok(Some(open)) = frame::decode_open(data) {
        // Without the extensions that nobody knows.
        assert_eq!(frame::decode_open(&frame::encode_open(&open)), Ok(Some(open)));
    }
    if let Ok(code) = frame::decode_reset(data) {
        assert_eq!(Code::from_wire(code.to_wire()), code);
    }
    if let Some(value) = data.first_chunk().map(|value| u64::from_be_bytes(*value))
        && let Some((class, weight)) = frame::decode_prio(value)
    {
        assert_eq!(frame::encode_prio(class, weight), value);
    }
}

/// A script: frames that are nearly right, and a local side that does what it likes meanwhile.
pub(crate) fn session(data: &[u8]) {
    let mut script = Script::new(data);
    let mut now = Instant::now();
    let role = if script.byte() & 1 == 0 { Role::Acceptor } else { Role::Dialer };
    let mut session = lone(role, now);
    let mut next_open = if role == Role::Acceptor { 1 } else { 2 };
    while !script.is_over() {
        let step = script.byte();
        let judged = match step % 4 {
            0 | 1 => {
                let bytes = nearly_a_frame(&mut script, &session, &mut next_open);
                session.handle_input(now, &bytes)
            }
            2 => {
                local(&mut script, &mut session, now);
                Ok(())
            }
            _ => world(&mut script, &mut session, &mut now),
        };
        assert_bounded(&session);
        if judged.is_err() {
            break;
        }
    }
    drain(&mut session, now);
    let _ = session.handle_timeout(now + Duration::from_secs(1));
    // What it leaves to another process is taken up by that.
    let left = session.into_snapshot(now);
    let mut bytes = Vec::new();
    ciborium::into_writer(&left, &mut bytes).expect("a snapshot can be written");
    let read = ciborium::from_reader(&bytes[..]).expect("a snapshot can be read");
    assert_eq!(left, read);
    let mut again = Session::from_snapshot(small(), read, now);
    assert_bounded(&again);
    let _ = again.handle_reconnected(now, 0);
    drain(&mut again, now);
}

/// A frame whose fields are mostly those that would be right now.
fn nearly_a_frame(script: &mut Script<'_>, session: &Session, next_open: &mut u32) -> Vec<u8> {
    let kind = KINDS[usize::from(script.byte()) % KINDS.len()];
    let id = u32::from(script.byte());
    let wrong = script.number();
    let stats = session.stream_stats(StreamId(id));
    let received = stats.map_or(0, |stats| stats.received_bytes);
    let open = Open {
        purpose: purpose::NBD,
        class: if id & 2 == 0 { Class::Bulk } else { Class::Urgent },
        weight: script.u16(),
        migration: [7; 16],
        channel: 0,
        name: Name::NONE,
    };
    let (value, payload) = match kind {
        Kind::Open => (wrong << 8, frame::encode_open(&open).to_vec()),
        Kind::Data => (received.wrapping_add(wrong), vec![1; usize::from(script.u16())]),
        Kind::Fin => (received.wrapping_add(wrong), Vec::new()),
        Kind::Reset => (received.wrapping_add(wrong), u32::from(script.byte()).to_be_bytes().to_vec()),
        Kind::GoAway => (wrong, script.bytes(id as usize).to_vec()),
        Kind::Credit => (stats.map_or(0, |stats| stats.sent_bytes).wrapping_add(wrong), Vec::new()),
        _ => (wrong, Vec::new()),
    };
    let id = match kind {
        Kind::Open if id < 250 => {
            *next_open += 2;
            *next_open - 2
        }
        Kind::Ack | Kind::Ping | Kind::Pong | Kind::GoAway | Kind::Detach | Kind::Hello => 0,
        _ => id,
    };
    let flags = if kind == Kind::Reset { script.byte() & FLAG_ABORT } else { 0 };
    let payload = &payload[..payload.len().min(PAYLOAD_MAX)];
    let header = Header::new(kind, id, value).with_len(payload.len()).with_flags(flags);
    [&header.encode()[..], payload].concat()
}

/// The local side does something to some stream.
fn local(script: &mut Script<'_>, session: &mut Session, now: Instant) {
    let id = StreamId(u32::from(script.byte()));
    match script.byte() % 11 {
        0 | 1 => drop(session.accept(id)),
        2 => session.refuse(id, Code::Denied),
        3 => session.reset(id, Code::Cancelled),
        4 => session.stop(id, Code::Cancelled),
        5 => session.finish(id),
        6 => {
            let open = Open {
                purpose: purpose::RAM,
                class: Class::Bulk,
                weight: script.u16(),
                migration: [8; 16],
                channel: 0,
                name: Name::NONE,
            };
            let _ = session.open(now, open);
        }
        7 => {
            let length = usize::from(script.u16()) % SENT_MAX;
            let _ = session.send(now, id, Bytes::from(vec![2; length]));
        }
        8 => {
            let taken: usize = std::iter::from_fn(|| session.recv(id)).map(|chunk| chunk.len()).sum();
            session.consumed(now, id, taken as u64);
        }
        9 => session.set_priority(id, Class::Urgent, script.u16()),
        _ => session.consumed(now, id, script.number()),
    }
}

/// Time passes, connections come and go, and what is to be sent is sent.
fn world(script: &mut Script<'_>, session: &mut Session, now: &mut Instant) -> Result<(), SessionError> {
    match script.byte() % 6 {
        0 | 1 => drop(drain(session, *now)),
        2 => {
            *now += script.time();
            session.handle_timeout(*now)?;
        }
        3 => session.handle_disconnected(*now),
        4 => {
            session.handle_disconnected(*now);
            session.handle_reconnected(*now, script.number())?;
        }
        _ => {
            let rate = NonZeroU64::new(64 << 10 | script.number());
            session.set_limit(rate.map(|rate| SharedLimit::new(rate, *now)));
            session.set_receive_limit(
                rate.filter(|rate| rate.get() % 2 == 1).map(|rate| SharedLimit::of_arrivals(rate, *now)),
            );
        }
    }
    while session.poll_event().is_some() {}
    Ok(())
}
