//! A peer that means harm, or has gone mad: every input ends in a typed error or a bounded change
//! of state, never in a panic and never in unbounded memory. And whatever the split of the bytes,
//! the outcome is the same.

#[path = "mux/pair.rs"]
#[allow(dead_code)]
mod pair;
#[path = "mux/rng.rs"]
#[allow(dead_code)]
mod rng;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pair::{BULK, Pair, URGENT, content, drain, events, lone};
use proptest::prelude::*;
use rng::{Rng, number_from_env};
use vmferry::mux::frame::{self, FLAG_ABORT, FLAG_IGNORABLE, HEADER_LEN, Header, Kind, PAYLOAD_MAX};
use vmferry::mux::hello::{self, FirstFrame, Hello, HelloError, Mode, PeerLimits};
use vmferry::mux::{
    Batch, Class, Code, Config, Event, Open, PerClass, RateLimit, Role, Session, SessionError, StreamId,
    StreamStats,
};

const MIB: u64 = 1 << 20;

fn numbered(kind: Kind, stream: u32, value: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header::new(kind, stream, value).with_len(payload.len());
    [&header.encode()[..], payload].concat()
}

fn link(kind: Kind, value: u64) -> Vec<u8> {
    numbered(kind, 0, value, &[])
}

fn open(stream: u32) -> Vec<u8> {
    numbered(Kind::Open, stream, 64 << 10, &frame::encode_open(&BULK))
}

fn data(stream: u32, offset: u64, len: usize) -> Vec<u8> {
    numbered(Kind::Data, stream, offset, &vec![1; len])
}

fn reset(stream: u32, offset: u64) -> Vec<u8> {
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
        ("too long", Code::Protocol, vec![open(1), raw(0x12, 0, 16_369, 1, &[])]),
        ("ignorable but too long", Code::Protocol, vec![raw(0x77, FLAG_IGNORABLE, 16_369, 1, &[])]),
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
        ("more than credit", Code::Flow, [vec![open(1)], (0..5).map(full).collect()].concat()),
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
    let mut later_class = frame::encode_open(&BULK);
    later_class[2] = 9;
    let cases: [(&str, Vec<Vec<u8>>); 5] = [
        ("ignorable", vec![ignorable.clone(), ignorable]),
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
    let mut payload = frame::encode_open(&BULK);
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
}

/// Feeds `make(n)` at a fixed rate of virtual time and says how many were taken.
fn flood(per_second: u64, most: u64, make: fn(u64) -> Vec<u8>) -> (u64, Option<SessionError>) {
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
    type Make = fn(u64) -> Vec<u8>;
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
    let floods: [(&str, fn(u64) -> Vec<u8>, u64); 3] =
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

    let wrong = raw(0x12, 0, 16_369, 1, &[]);
    for byte in &wrong[..15] {
        session.handle_input(now, &[*byte]).unwrap();
    }
    assert!(session.handle_input(now, &wrong[15..]).is_err());
}

/// Limits so small that they are met soon.
fn small() -> Config {
    Config {
        max_streams: 8,
        initial_credit: PerClass { urgent: 4096, bulk: 4096 },
        start_credit: PerClass { urgent: 4096, bulk: 32 << 10 },
        budget_bytes: 256 << 10,
        replay_cap_bytes: 64 << 10,
        send_queue_bytes_per_stream: 8 << 10,
        pending_open_max: 4,
        opens: RateLimit { per_second: 1000, burst: 100_000 },
        resets: RateLimit { per_second: 1000, burst: 100_000 },
        noops: RateLimit { per_second: 1000, burst: 100_000 },
        ..Config::default()
    }
}

fn assert_bounded(session: &Session, context: &str) {
    let stats = session.stats();
    let holds = stats.credit_committed_bytes <= 256 << 10
        && stats.recv_queued_bytes as u64 <= stats.credit_outstanding_bytes
        && stats.credit_outstanding_bytes <= stats.credit_committed_bytes
        && stats.log_bytes_max <= 64 << 10
        && stats.send_queued_bytes <= 16 * (8 << 10) + 16 * 5000
        && stats.partial_bytes < HEADER_LEN + PAYLOAD_MAX
        && stats.streams <= 8 + 8 + 1024;
    assert!(holds, "{context}: {stats:?}");
}

/// The local side does something to some stream. Says how many numbered frames it sent.
fn local_side(session: &mut Session, rng: &mut Rng, now: Instant) -> u64 {
    let id = StreamId(rng.range(1, 20) as u32);
    match rng.below(12) {
        0 | 1 => assert!(session.accept(id).is_err() || session.stream_stats(id).is_some()),
        2 => session.refuse(id, Code::Denied),
        3 if rng.one_in(4) => session.reset(id, Code::Cancelled),
        4 if rng.one_in(4) => session.stop(id, Code::Cancelled),
        5 if rng.one_in(4) => session.finish(id),
        6 => assert!(session.open(now, URGENT).is_err() || session.stats().streams > 0),
        7 => {
            let sent = session.send(now, id, content(0, 0, rng.size(5000)));
            assert!(sent.is_err() || session.stats().send_queued_bytes > 0);
        }
        8 => session.consumed(now, id, rng.next() % 10_000),
        9 => session.set_priority(id, Class::Bulk, rng.next() as u16),
        10 => return drain_counted(session, now),
        _ => while session.recv(id).is_some() {},
    }
    0
}

fn drain_counted(session: &mut Session, now: Instant) -> u64 {
    let mut batch = Batch::default();
    let mut numbered = 0;
    while session.poll_transmit(now, &mut batch) {
        numbered += batch.parts().iter().filter(|part| part.header[0] >= frame::NUMBERED_FROM).count();
    }
    numbered as u64
}

/// A peer that keeps to the rules nearly always, so that what passes one check meets the next.
struct Attacker {
    rng: Rng,
    next_open: u32,
    /// Streams whose direction to us is open; ours only once accepted.
    speaking: Vec<u32>,
    answered: Vec<u32>,
    acked: u64,
}

impl Attacker {
    fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), next_open: 1, speaking: Vec::new(), answered: Vec::new(), acked: 0 }
    }

    fn frame(&mut self, session: &Session, sent: u64) -> Vec<u8> {
        let wild = self.rng.one_in(150);
        let kind = self.rng.below(14);
        if kind < 2 || self.speaking.is_empty() {
            self.speaking.push(self.next_open);
            self.next_open += 2;
            let limit = self.rng.next() % 100_000;
            return numbered(Kind::Open, self.next_open - 2, limit, &frame::encode_open(&BULK));
        }
        if kind == 2 {
            self.acked += self.rng.next() % (sent - self.acked + 1);
            return link(Kind::Ack, self.acked + u64::from(wild));
        }
        if let Some(id) = self.unanswered(session) {
            self.answered.push(id);
            self.speaking.push(id);
            return numbered(Kind::Accept, id, self.rng.next() % 100_000, &[]);
        }
        let any = self.rng.range(1, 20) as u32;
        let id = self.rng.pick(&self.speaking).copied().filter(|_| !wild).unwrap_or(any);
        self.stream_frame(kind, id, session.stream_stats(StreamId(id)), wild)
    }

    fn unanswered(&self, session: &Session) -> Option<u32> {
        let known = |id: &u32| session.stream_stats(StreamId(*id)).is_some() && !self.answered.contains(id);
        // Ours are known to the peer only when their OPEN was sent; it may guess.
        (2..20).step_by(2).find(known).filter(|_| self.answered.len() < 9)
    }

    fn stream_frame(&mut self, kind: usize, id: u32, stats: Option<StreamStats>, wild: bool) -> Vec<u8> {
        let offset = stats.map_or(0, |s| s.received_bytes) + u64::from(wild && self.rng.one_in(2));
        let credit = stats.map_or(1, |s| (s.recv_limit_bytes - s.received_bytes) as usize);
        let rng = &mut self.rng;
        match kind {
            8 if rng.one_in(3) => numbered(Kind::Stop, id, rng.next() % 50, &[]),
            9 => numbered(Kind::Credit, id, stats.map_or(0, |s| s.sent_bytes) + rng.next() % 50_000, &[]),
            10 => numbered(Kind::Prio, id, rng.next() % (3 << 16), &[]),
            11 | 12 if rng.one_in(3) => {
                self.speaking.retain(|other| *other != id);
                match rng.below(3) {
                    0 => reset(id, offset),
                    1 => numbered(Kind::Reset, id, offset, &[0, 0, 0, 7]),
                    _ => numbered(Kind::Fin, id, offset, &[]),
                }
            }
            _ if credit == 0 && !wild => link(Kind::Pong, 0),
            _ => data(id, offset, if wild { 5000 } else { rng.size(credit.min(PAYLOAD_MAX)) }),
        }
    }
}

fn what(error: &SessionError) -> &'static str {
    match error {
        SessionError::Protocol { what } => what,
        _ => "",
    }
}

#[test]
fn frames_that_are_nearly_right_do_no_harm() {
    let seeds = number_from_env("VMFERRY_SEED").map_or(0..3000, |seed| seed..seed + 1);
    let (mut survived, mut refused) = (0u64, BTreeMap::<String, u64>::new());
    for seed in seeds {
        let (mut peer, mut rng) = (Attacker::new(seed), Rng::new(!seed));
        let mut now = Instant::now();
        let mut session = lone(Role::Acceptor, small(), now);
        let mut sent = 0;
        for step in 0..400 {
            let bytes = peer.frame(&session, sent);
            if let Err(e) = session.handle_input(now, &bytes) {
                *refused.entry(format!("{} {}", e.code().name(), what(&e))).or_default() += 1;
                break;
            }
            survived += 1;
            for _ in 0..rng.below(4) {
                sent += local_side(&mut session, &mut rng, now);
            }
            if rng.one_in(20) {
                events(&mut session);
                now += Duration::from_millis(rng.size(100) as u64);
            }
            assert_bounded(&session, &format!("VMFERRY_SEED={seed} step {step}"));
        }
        // Whatever state it is in, it can still be driven.
        drain(&mut session, now);
        let _ = session.handle_timeout(now + Duration::from_secs(1));
    }
    println!("{survived} frames survived, {refused:#?}");
    if number_from_env("VMFERRY_SEED").is_none() {
        assert!(survived > 100_000 && refused.len() >= 5, "{survived} frames survived, {refused:#?}");
    }
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

fn any_limits() -> impl Strategy<Value = PeerLimits> {
    any::<(u32, u64, u64, u64, u64)>().prop_map(|(max_streams, urgent, bulk, replay_cap, budget)| {
        PeerLimits { max_streams, initial_credit: PerClass { urgent, bulk }, replay_cap, budget }
    })
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        any::<([u8; 16], [u8; 32])>()
            .prop_map(|(session_id, secret_share)| Mode::New { session_id, secret_share }),
        any::<[u8; 32]>().prop_map(|secret_share| Mode::Accepted { secret_share }),
        any::<([u8; 16], u64, u64, [u8; 32])>().prop_map(|(session_id, generation, rx_seq, proof)| {
            Mode::Resume { session_id, generation, rx_seq, proof }
        }),
        any::<(u64, [u8; 32])>().prop_map(|(rx_seq, proof)| Mode::Resumed { rx_seq, proof }),
    ]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    (any::<(u16, u16, u64, u64, [u8; 16])>(), any_limits(), any_mode()).prop_map(|(fields, limits, mode)| {
        Hello {
            version_min: fields.0.min(fields.1),
            version_max: fields.0.max(fields.1),
            features_offered: fields.2,
            features_required: fields.3,
            agent_instance: fields.4,
            limits,
            mode,
        }
    })
}

proptest! {
    #[test]
    fn a_hello_survives_the_wire(hello in any_hello(), later in prop::collection::vec(any::<u8>(), 0..50)) {
        let whole = hello.encode();
        prop_assert_eq!(hello::first_frame_len(&whole), Ok(whole.len()));
        for len in 0..whole.len() {
            prop_assert_eq!(hello::peek(&whole[..len]), Ok(None));
            if len >= HEADER_LEN {
                prop_assert_eq!(Hello::decode(&whole[HEADER_LEN..len]), Err(HelloError::Truncated));
            }
        }
        let followed = [&whole[..], &later].concat();
        let expected = FirstFrame::Hello { hello: Box::new(hello.clone()), consumed: whole.len() };
        prop_assert_eq!(hello::peek(&followed), Ok(Some(expected)));
        let grown = [&whole[HEADER_LEN..], &later].concat();
        prop_assert_eq!(Hello::decode(&grown), Ok(hello), "a later version may add fields");
    }

    #[test]
    fn a_header_survives_the_wire(bytes in any::<[u8; HEADER_LEN]>()) {
        let header = Header::decode(&bytes);
        prop_assert_eq!(header.encode(), bytes);
        let _ = header.content();
    }

    #[test]
    fn an_open_survives_the_wire(
        purpose: u16, urgent: bool, weight: u16, migration: [u8; 16], channel: u16,
    ) {
        let class = if urgent { Class::Urgent } else { Class::Bulk };
        let open = Open { purpose, class, weight, migration, channel };
        prop_assert_eq!(frame::decode_open(&frame::encode_open(&open)), Ok(Some(open)));
        let prio = frame::decode_prio(frame::encode_prio(class, weight));
        prop_assert_eq!(prio, Some((class, weight)));
    }

    #[test]
    fn a_code_survives_the_wire(number: u32) {
        prop_assert_eq!(Code::from_wire(number).to_wire(), number);
    }

    #[test]
    fn payloads_of_any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
        let _ = frame::decode_open(&bytes);
        let _ = frame::decode_reset(&bytes);
        let _ = Hello::decode(&bytes);
        let _ = hello::peek(&bytes);
        prop_assert!(!frame::clean_text(&bytes).chars().any(char::is_control));
    }
}

#[test]
fn the_first_frame_is_a_hello_or_a_refusal_or_nothing() {
    let text = "no\u{7}";
    let goaway = hello::encode_goaway(Code::Auth, 0, text);
    let expected =
        FirstFrame::GoAway { code: Code::Auth, text: "no\u{fffd}".to_owned(), consumed: goaway.len() };
    assert_eq!(hello::peek(&goaway), Ok(Some(expected)));
    assert_eq!(hello::encode_goaway(Code::Auth, 0, &"ä".repeat(200)).len(), HEADER_LEN + 256);
    for first in [b'G', 0x16, 0, 2, 0x10, 0xff] {
        assert_eq!(hello::peek(&[first]), Err(HelloError::NotHello), "{first:#x} is seen at once");
    }
    let long = Header { kind: 1, flags: 0, len: 4081, stream: 0, value: 0 }.encode();
    assert!(hello::first_frame_len(&long).is_err() && hello::peek(&long).is_err());
    let longest = Header { kind: 1, flags: 0, len: 4080, stream: 0, value: 0 }.encode();
    assert_eq!(hello::first_frame_len(&longest), Ok(hello::HELLO_LEN_MAX));
    assert_eq!(hello::first_frame_len(&longest[..15]), Err(HelloError::Truncated));
}

#[test]
fn versions_and_features_are_agreed_or_refused() {
    let base = Hello::new(&Config::default(), [0; 16], Mode::Accepted { secret_share: [0; 32] });
    let versions = |min, max| Hello { version_min: min, version_max: max, ..base.clone() };
    let agreed = |a: &Hello, b: &Hello| hello::negotiate(a, b).map(|n| n.version);
    assert_eq!(agreed(&versions(1, 3), &versions(2, 9)), Ok(3));
    assert_eq!(agreed(&versions(1, 3), &versions(3, 3)), Ok(3));
    assert_eq!(agreed(&versions(1, 3), &versions(4, 9)), Err(Code::Version));
    assert_eq!(agreed(&versions(4, 9), &versions(1, 3)), Err(Code::Version));
    let features =
        |features_offered, features_required| Hello { features_offered, features_required, ..base.clone() };
    let used = |a: &Hello, b: &Hello| hello::negotiate(a, b).map(|n| n.features);
    assert_eq!(used(&features(0b110, 0b010), &features(0b011, 0)), Ok(0b010));
    assert_eq!(used(&features(0b110, 0b100), &features(0b011, 0)), Err(Code::Feature));
    assert_eq!(used(&features(0b110, 0), &features(0b011, 0b001)), Err(Code::Feature));
}

/// A frame of the link arrives while a full conversation is going on, for its own sake.
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
