//! A peer that means harm, or has gone mad: every input ends in a typed error or a bounded change
//! of state, never in a panic and never in unbounded memory. And whatever the split of the bytes,
//! the outcome is the same.

use std::time::{Duration, Instant};

use super::attack::{assert_bounded, local_side, small};
use super::pair::{BULK, Pair, URGENT, content, drain, events, lone};
use super::rng::{Rng, number_from_env};
use vmferry_mux::mux::frame::{self, FLAG_ABORT, FLAG_IGNORABLE, HEADER_LEN, Header, Kind, PAYLOAD_MAX};
use vmferry_mux::mux::hello;
use vmferry_mux::mux::{Class, Code, Config, Event, Open, Role, SessionError, StreamId};

const MIB: u64 = 1 << 20;

pub(super) fn numbered(kind: Kind, stream: u32, value: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header::new(kind, stream, value).with_len(payload.len());
    [&header.encode()[..], payload].concat()
}

pub(super) fn link(kind: Kind, value: u64) -> Vec<u8> {
    numbered(kind, 0, value, &[])
}

pub(super) fn open(stream: u32) -> Vec<u8> {
    numbered(Kind::Open, stream, 64 << 10, &frame::encode_open(&BULK))
}

pub(super) fn data(stream: u32, offset: u64, len: usize) -> Vec<u8> {
    numbered(Kind::Data, stream, offset, &vec![1; len])
}

pub(super) fn reset(stream: u32, offset: u64) -> Vec<u8> {
    let payload = Code::Cancelled.to_wire().to_be_bytes();
    let header = Header::new(Kind::Reset, stream, offset).with_len(4).with_flags(FLAG_ABORT);
    [&header.encode()[..], &payload].concat()
}

fn raw(kind: u8, flags: u8, len: u16, stream: u32, payload: &[u8]) -> Vec<u8> {
    [&Header { kind, flags, len, stream, value: 0 }.encode()[..], payload].concat()
}

/// What an acceptor makes of these frames.
fn judge(frames: &[Vec<u8>]) -> Result<(), SessionError> {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    frames.iter().try_for_each(|bytes| session.handle_input(now, bytes))
}

#[test]
fn every_violation_has_its_error() {
    let fin = |stream, offset| numbered(Kind::Fin, stream, offset, &[]);
    let full = |n: u64| data(1, n * PAYLOAD_MAX as u64, PAYLOAD_MAX);
    let cases: Vec<(&str, Code, Vec<Vec<u8>>)> = vec![
        ("unknown type", Code::Protocol, vec![raw(0x77, 0, 0, 0, &[])]),
        ("type 0", Code::Protocol, vec![raw(0, 0, 0, 0, &[])]),
        ("second HELLO", Code::Protocol, vec![raw(1, 0, 0, 0, &[])]),
        ("reserved flag", Code::Protocol, vec![open(1), raw(0x13, 4, 0, 1, &[])]),
        ("abort flag elsewhere", Code::Protocol, vec![open(1), raw(0x14, 2, 0, 1, &[])]),
        ("flag of a link frame", Code::Protocol, vec![raw(2, 1, 0, 0, &[])]),
        ("too long", Code::Protocol, vec![open(1), raw(0x12, 0, 65_521, 1, &[])]),
        ("ignorable but too long", Code::Protocol, vec![raw(0x77, FLAG_IGNORABLE, 65_521, 1, &[])]),
        ("DATA without data", Code::Protocol, vec![open(1), raw(0x12, 0, 0, 1, &[])]),
        ("ACK with payload", Code::Protocol, vec![raw(2, 0, 1, 0, &[0])]),
        ("long GOAWAY", Code::Protocol, vec![raw(5, 0, 257, 0, &[])]),
        ("PING in a stream", Code::Protocol, vec![raw(3, 0, 0, 1, &[])]),
        ("DATA in no stream", Code::Protocol, vec![data(0, 0, 1)]),
        ("short OPEN", Code::Protocol, vec![raw(0x10, 0, 22, 1, &[0; 22])]),
        ("long OPEN", Code::Protocol, vec![raw(0x10, 0, 1048, 1, &[0; 1048])]),
        ("torn extension", Code::Protocol, vec![raw(0x10, 0, 26, 1, &[0; 26])]),
        ("long extension", Code::Protocol, vec![raw(0x10, 0, 27, 1, &[1; 27])]),
        ("number skipped", Code::Protocol, vec![open(3)]),
        ("number of ours", Code::Protocol, vec![open(2)]),
        ("number again", Code::Protocol, vec![open(1), open(1)]),
        ("number back", Code::Protocol, vec![open(1), open(3), open(1)]),
        ("never opened", Code::Protocol, vec![data(1, 0, 1)]),
        ("never opened by us", Code::Protocol, vec![numbered(Kind::Credit, 2, 9, &[])]),
        ("ACCEPT of its own", Code::Protocol, vec![open(1), numbered(Kind::Accept, 1, 9, &[])]),
        ("after FIN", Code::Protocol, vec![open(1), fin(1, 0), data(1, 0, 1)]),
        ("FIN after FIN", Code::Protocol, vec![open(1), fin(1, 0), fin(1, 0)]),
        ("RESET after FIN", Code::Protocol, vec![open(1), fin(1, 0), reset(1, 0)]),
        ("RESET after RESET", Code::Protocol, vec![open(1), reset(1, 0), reset(1, 0)]),
        ("code out of range", Code::Protocol, vec![open(1), numbered(Kind::Stop, 1, u64::MAX, &[])]),
        ("gap in data", Code::Continuity, vec![open(1), data(1, 0, 5), data(1, 6, 1)]),
        ("doubled data", Code::Continuity, vec![open(1), data(1, 0, 5), data(1, 0, 5)]),
        ("FIN too far", Code::Continuity, vec![open(1), data(1, 0, 5), fin(1, 6)]),
        ("RESET too early", Code::Continuity, vec![open(1), data(1, 0, 5), reset(1, 4)]),
        ("offset overflow", Code::Continuity, vec![open(1), data(1, u64::MAX, 5)]),
        ("ACK of the future", Code::Continuity, vec![link(Kind::Ack, 1)]),
        ("more than credit", Code::Flow, vec![open(1), full(0), full(1)]),
        ("many refused", Code::Abuse, (0..1200).map(|n| open(2 * n + 1)).collect()),
    ];
    for (what, code, frames) in cases {
        let judged = judge(&frames);
        assert_eq!(judged.map_err(|e| e.code()), Err(code), "{what}");
        let (_, before) = frames.split_last().unwrap();
        if code != Code::Abuse {
            assert_eq!(judge(before), Ok(()), "{what}: the frames before are innocent");
        }
    }
}

#[test]
fn what_may_cross_or_come_later_is_tolerated() {
    let ignorable = raw(0x77, FLAG_IGNORABLE, 3, 9, &[1, 2, 3]);
    let extended = [&frame::encode_open(&BULK)[..], &[9, 9, 0, 2, 5, 5]].concat();
    let mut later_class = frame::encode_open(&BULK).to_vec();
    later_class[2] = 9;
    let name =
        |len: usize| [&frame::encode_open(&BULK)[..], &[0, 1, 0, len as u8], &vec![0xff; len]].concat();
    let cases: [(&str, Vec<Vec<u8>>); 7] = [
        ("ignorable", vec![ignorable.clone(), ignorable]),
        ("name", vec![numbered(Kind::Open, 1, 0, &name(128)), data(1, 0, 1)]),
        ("name that is too long", vec![numbered(Kind::Open, 1, 0, &name(129)), data(1, 0, 1), reset(1, 1)]),
        ("extension", vec![numbered(Kind::Open, 1, 0, &extended), data(1, 0, 1)]),
        ("class", vec![numbered(Kind::Open, 1, 0, &later_class), data(1, 0, 1), reset(1, 1)]),
        ("credit", vec![open(1), numbered(Kind::Credit, 1, u64::MAX, &[])]),
        ("priority", vec![open(1), numbered(Kind::Prio, 1, u64::MAX, &[])]),
    ];
    for (what, frames) in cases {
        assert_eq!(judge(&frames), Ok(()), "{what}");
    }
}

#[test]
fn ignorable_frames_are_numbered() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    session.handle_input(now, &raw(0x77, FLAG_IGNORABLE, 0, 9, &[])).unwrap();
    session.handle_input(now, &raw(0x0f, FLAG_IGNORABLE, 0, 0, &[])).unwrap();
    assert_eq!(session.rx_seq(), 1);
}

#[test]
fn an_unknown_class_is_refused_without_asking() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    let mut payload = frame::encode_open(&BULK).to_vec();
    payload[2] = 9;
    session.handle_input(now, &numbered(Kind::Open, 1, 0, &payload)).unwrap();
    assert_eq!(events(&mut session), []);
    let refusal = drain(&mut session, now);
    let expected =
        [&Header::new(Kind::Reset, 1, 0).with_len(4).with_flags(FLAG_ABORT).encode()[..], &[0, 0, 0, 4]];
    assert!(refusal.ends_with(&expected.concat()));
    session.handle_input(now, &reset(1, 0)).unwrap();
    assert_eq!(session.stats().streams, 0);
}

#[test]
fn a_failed_session_stays_failed() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    let error = session.handle_input(now, &open(3)).unwrap_err();
    assert!(!error.is_resumable());
    assert_eq!(session.handle_input(now, &open(1)), Err(error));
    assert_eq!(session.handle_timeout(now), Err(error));
    assert_eq!(session.handle_reconnected(now, 0), Err(error));
    assert!(drain(&mut session, now).is_empty());
    assert!(session.open(now, BULK).is_err());
    assert_eq!(session.poll_timeout(), None);
    session.go_away(error.code(), "why");
    let goaway = hello::encode_goaway(Code::Protocol, 0, "why");
    assert_eq!(drain(&mut session, now), goaway[..], "it says why and nothing else");
    assert!(drain(&mut session, now).is_empty());
}

type Make = fn(u64) -> Vec<u8>;

/// Feeds `make(n)` at a fixed rate of virtual time and says how many were taken.
fn flood(per_second: u64, most: u64, make: Make) -> (u64, Option<SessionError>) {
    let start = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), start);
    for n in 0..most {
        let now = start + Duration::from_nanos(1_000_000_000 / per_second * n);
        let judged = session.handle_input(now, &make(n));
        // The local side answers at once, so that only the rate counts.
        for event in events(&mut session) {
            if let Event::Opened { id, .. } = event {
                session.refuse(id, Code::Refused);
            }
        }
        drain(&mut session, now);
        let stats = session.stats();
        assert!(stats.streams <= 2100 && stats.events_queued <= 2, "{stats:?}");
        if let Err(e) = judged {
            return (n, Some(e));
        }
    }
    (most, None)
}

#[test]
fn floods_are_cut_off_and_ordinary_rates_are_not() {
    let floods: [(&str, u64, u64, Make); 6] = [
        ("rapid reset", 200, 1024, |n| [open(2 * n as u32 + 1), reset(2 * n as u32 + 1, 0)].concat()),
        ("PING", 10, 64, |n| link(Kind::Ping, n)),
        ("PONG", 1000, 1024, |n| link(Kind::Pong, n)),
        ("ACK", 1000, 1024, |_| link(Kind::Ack, 0)),
        ("GOAWAY", 1000, 1024, |_| link(Kind::GoAway, 0)),
        ("ignorable", 1000, 1024, |_| raw(0x77, FLAG_IGNORABLE, 0, 1, &[])),
    ];
    for (what, per_second, burst, make) in floods {
        let (taken, error) = flood(per_second * 100, 20_000, make);
        assert_eq!(error.map(|e| e.code()), Some(Code::Abuse), "{what}: {taken} taken");
        assert!((burst..=burst + burst / 10 + 2).contains(&taken), "{what}: {taken} taken");
        let (taken, error) = flood(per_second, burst * 3, make);
        assert_eq!(error, None, "{what} at an allowed rate: {taken} taken");
    }
}

#[test]
fn floods_within_a_stream_are_cut_off() {
    let same_credit = |n| if n == 0 { open(1) } else { numbered(Kind::Credit, 1, 5, &[]) };
    let prio = |n| if n == 0 { open(1) } else { numbered(Kind::Prio, 1, n, &[]) };
    let stop = |n| if n == 0 { open(1) } else { numbered(Kind::Stop, 1, 1, &[]) };
    let floods: [(&str, Make, u64); 3] =
        [("CREDIT", same_credit, 1025), ("PRIO", prio, 1025), ("STOP", stop, 4097)];
    for (what, make, expected) in floods {
        let (taken, error) = flood(1_000_000, 20_000, make);
        assert_eq!(error.map(|e| e.code()), Some(Code::Abuse), "{what}");
        assert!((expected..expected + 50).contains(&taken), "{what}: {taken} taken");
    }
}

#[test]
fn a_reconnection_excuses_what_was_bunched() {
    let start = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), start);
    for round in 0..10 {
        (0..60).for_each(|n| session.handle_input(start, &link(Kind::Ping, n)).unwrap());
        session.handle_reconnected(start, 0).unwrap_or_else(|e| panic!("{e} in round {round}"));
    }
}

#[test]
fn what_a_peer_can_make_us_hold_is_bounded() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    // All streams that it may open, all credit used, nobody reads.
    let mut accepted = 0;
    for n in 0..1024u32 {
        let id = 2 * n + 1;
        session.handle_input(now, &open(id)).unwrap();
        accepted += u32::from(session.accept(StreamId(id)).is_ok());
        let limit = session.stream_stats(StreamId(id)).unwrap().recv_limit_bytes;
        let mut offset = 0;
        while offset < limit {
            let len = (limit - offset).min(PAYLOAD_MAX as u64) as usize;
            session.handle_input(now, &data(id, offset, len)).unwrap();
            offset += len as u64;
        }
    }
    let stats = session.stats();
    assert_eq!(accepted, 1024);
    assert_eq!(stats.recv_queued_bytes as u64, stats.credit_outstanding_bytes);
    assert!(stats.credit_outstanding_bytes <= 256 * MIB, "{stats:?}");
    assert!(stats.credit_outstanding_bytes > 128 * MIB, "{stats:?}");
    // A further one is turned away, not held.
    session.handle_input(now + Duration::from_secs(1), &[open(2049), data(2049, 0, 1000)].concat()).unwrap();
    assert_eq!(session.stats().recv_queued_bytes, stats.recv_queued_bytes);
    assert_eq!(session.stats().streams_refused, 1);
}

#[test]
fn unanswered_offers_are_bounded() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    for n in 0..100 {
        session.handle_input(now, &open(2 * n + 1)).unwrap();
    }
    let opened = events(&mut session).len();
    assert_eq!((opened, session.stats().streams_refused), (64, 36));
}

#[test]
fn a_slow_drip_is_kept_small_and_a_wrong_header_is_seen_at_once() {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    let bytes = [open(1), data(1, 0, PAYLOAD_MAX)].concat();
    for byte in &bytes[..bytes.len() - 1] {
        session.handle_input(now, &[*byte]).unwrap();
        assert!(session.stats().partial_bytes <= HEADER_LEN + PAYLOAD_MAX);
        assert_eq!(session.stats().recv_queued_bytes, 0);
    }
    session.handle_input(now, &bytes[bytes.len() - 1..]).unwrap();
    assert_eq!((session.stats().partial_bytes, session.stats().recv_queued_bytes), (0, PAYLOAD_MAX));

    let wrong = raw(0x12, 0, 65_521, 1, &[]);
    for byte in &wrong[..15] {
        session.handle_input(now, &[*byte]).unwrap();
    }
    assert!(session.handle_input(now, &wrong[15..]).is_err());
}

/// An honest conversation, as the acceptor hears it.
fn transcript() -> Vec<u8> {
    let mut pair = Pair::new(Config::default());
    let mut heard = Vec::new();
    let opens = [URGENT, BULK, Open { weight: 3, ..BULK }];
    let ids: Vec<_> = opens.iter().map(|open| pair.dialer.open(pair.now, *open).unwrap()).collect();
    for round in 0..6 {
        for id in &ids {
            let _ = pair.dialer.send(pair.now, *id, content(id.0.into(), round * 3000, 3000));
        }
        match round {
            2 => pair.dialer.finish(ids[0]),
            3 => pair.dialer.set_priority(ids[1], Class::Bulk, 99),
            4 => pair.dialer.reset(ids[1], Code::Cancelled),
            _ => {}
        }
        let there = drain(&mut pair.dialer, pair.now);
        pair.acceptor.handle_input(pair.now, &there).unwrap();
        heard.extend(there);
        for event in events(&mut pair.acceptor) {
            if let Event::Opened { id, .. } = event {
                pair.acceptor.accept(id).unwrap();
            }
        }
        let back = drain(&mut pair.acceptor, pair.now);
        pair.dialer.handle_input(pair.now, &back).unwrap();
        pair.pass(Duration::from_secs(1));
    }
    heard
}

/// Feeds bytes in chunks of a random size; the local side accepts everything at the end only, so
/// that the split alone differs. Says what came out.
fn hear(
    bytes: &[u8],
    chunk_max: usize,
    rng: &mut Rng,
) -> (Result<(), SessionError>, Vec<Event>, Vec<u8>, u64) {
    let now = Instant::now();
    let mut session = lone(Role::Acceptor, Config::default(), now);
    let mut rest = bytes;
    let mut judged = Ok(());
    while !rest.is_empty() && judged.is_ok() {
        let (chunk, after) = rest.split_at(rng.range(1, chunk_max).min(rest.len()));
        judged = session.handle_input(now, chunk);
        rest = after;
    }
    let mut seen = events(&mut session);
    let mut read = Vec::new();
    for n in 0..4 {
        let id = StreamId(2 * n + 1);
        let _ = session.accept(id);
        while let Some(chunk) = session.recv(id) {
            read.extend_from_slice(&chunk);
        }
    }
    seen.extend(events(&mut session));
    (judged, seen, read, session.rx_seq())
}

#[test]
fn the_split_of_the_bytes_changes_nothing() {
    let bytes = honest_without_acks();
    let mut rng = Rng::new(number_from_env("VMFERRY_SEED").unwrap_or(11));
    for _ in 0..300 {
        let mut mutated = bytes.clone();
        for _ in 0..rng.below(3) {
            let at = rng.below(mutated.len());
            mutated[at] ^= 1 << rng.below(8);
        }
        let whole = hear(&mutated, usize::MAX, &mut rng);
        let seed = rng.clone();
        for chunk_max in [1, 7, 40, 5000] {
            let split = hear(&mutated, chunk_max, &mut rng);
            assert_eq!(split, whole, "chunks of up to {chunk_max}, {seed:?}");
        }
    }
}

/// [`transcript`] without ACKs, which mean something only to the session that was there.
fn honest_without_acks() -> Vec<u8> {
    let mut out = Vec::new();
    let all = transcript();
    let mut rest = &all[..];
    while let Some((header, _)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = Header::decode(header);
        let (whole, after) = rest.split_at(HEADER_LEN + usize::from(header.len));
        if header.kind != Kind::Ack.to_wire() && header.kind != Kind::Pong.to_wire() {
            out.extend_from_slice(whole);
        }
        rest = after;
    }
    assert_eq!(hear(&out, usize::MAX, &mut Rng::new(0)).0, Ok(()), "the conversation itself is honest");
    out
}

#[test]
fn mutated_conversations_and_garbage_do_no_harm() {
    let honest = honest_without_acks();
    let seeds = number_from_env("VMFERRY_SEED").map_or(0..1500, |seed| seed..seed + 1);
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let mut bytes = honest.clone();
        for _ in 0..rng.range(1, 6) {
            let (from, len) = (rng.below(bytes.len()), rng.size(400));
            let until = (from + len).min(bytes.len());
            match rng.below(5) {
                0 => drop(bytes.drain(from..until)),
                1 => bytes.extend_from_within(from..until),
                2 => bytes[from..until].iter_mut().for_each(|byte| *byte = rng.next() as u8),
                3 => bytes[from..until].reverse(),
                _ => bytes[from] = bytes[from].wrapping_add(1),
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        let now = Instant::now();
        let mut session = lone(Role::Acceptor, small(), now);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(rng.size(20_000).min(rest.len()));
            if session.handle_input(now, chunk).is_err() {
                break;
            }
            local_side(&mut session, &mut rng, now);
            assert_bounded(&session, &format!("VMFERRY_SEED={seed}"));
            rest = after;
        }
    }
}

#[test]
fn a_dialer_minds_answers_that_it_did_not_ask_for() {
    let now = Instant::now();
    for (what, frames, code) in [
        ("twice accepted", vec![accept(1), accept(1)], Code::Protocol),
        ("data before acceptance", vec![data(1, 0, 1)], Code::Protocol),
        ("end before acceptance", vec![numbered(Kind::Fin, 1, 0, &[])], Code::Protocol),
        ("credit before acceptance", vec![numbered(Kind::Credit, 1, 1 << 30, &[])], Code::Protocol),
        ("accepted after refusal", vec![reset(1, 0), accept(1)], Code::Protocol),
    ] {
        let mut session = lone(Role::Dialer, Config::default(), now);
        session.open(now, BULK).unwrap();
        drain(&mut session, now);
        let (last, before) = frames.split_last().unwrap();
        before.iter().for_each(|bytes| session.handle_input(now, bytes).unwrap());
        assert_eq!(session.handle_input(now, last).unwrap_err().code(), code, "{what}");
    }
}

fn accept(stream: u32) -> Vec<u8> {
    numbered(Kind::Accept, stream, 1 << 20, &[])
}
