//! A session at rest, as one process leaves it to the next: plain data, in which nothing depends
//! on a clock or a connection. Knows no encoding.
//!
//! What is measured (round trips, rates, buckets) is not in it: it begins anew, as after any
//! reconnection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::ack_state::AckState;
use super::assemble::Payload;
use super::credit::{Budget, CreditState, RecvCredit};
use super::frame::{HEADER_LEN, Header};
use super::hello::{Negotiated, PeerLimits};
use super::replay_log::ReplayLog;
use super::session::{Event, Session};
use super::stream::{Control, Phase, RecvState, SendState, Stream};
use super::{Class, Code, Config, Name, Open, PerClass, Role, StreamId};

/// A session without connection, deadlines and measurements.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    is_dialer: bool,
    peer: PeerSnapshot,
    /// The highest frame that the peer has acknowledged.
    acked: u64,
    /// The frames after that: header and payload.
    log: Vec<([u8; HEADER_LEN], Bytes)>,
    rx_seq: u64,
    streams: Vec<StreamSnapshot>,
    /// Streams with control frames to send, in their order.
    control: Vec<u32>,
    /// Streams that the peer has not answered, oldest first.
    opening: Vec<u32>,
    next_local: Option<u32>,
    next_remote: Option<u32>,
    counters: Counters,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PeerSnapshot {
    max_streams: u32,
    initial_urgent: u64,
    initial_bulk: u64,
    replay_cap: u64,
    budget: u64,
}

/// What operators look at must not fall back to zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Counters {
    sent_data_bytes: u64,
    received_data_bytes: u64,
    reconnects: u64,
    replayed_bytes: u64,
    away_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum PhaseSnapshot {
    Opening,
    Offered,
    Established,
    #[serde(rename = "Turned")]
    RefusedUnasked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum SendSnapshot {
    Open,
    Finishing,
    Resetting { code: u32, abort: bool },
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum RecvSnapshot {
    Open,
    Finished,
    Reset,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StreamSnapshot {
    id: u32,
    purpose: u16,
    class: u8,
    weight: u16,
    migration: [u8; 16],
    channel: u16,
    /// Empty for none, as in what earlier versions leave.
    #[serde(default)]
    name: Bytes,
    phase: PhaseSnapshot,
    send: SendSnapshot,
    send_queue: Vec<Bytes>,
    send_offset: u64,
    send_limit: u64,
    send_ended: Option<u32>,
    recv: RecvSnapshot,
    recv_queue: Vec<Bytes>,
    credit: CreditState,
    handed: u64,
    given_up: bool,
    turn: (u8, u16),
    /// OPEN, ACCEPT, CREDIT, PRIO wait to be sent.
    waits: [bool; 4],
    stop: Option<u32>,
    slot: bool,
    local: bool,
    answered: bool,
    stopped: Option<u32>,
    local_reset: bool,
}

impl Snapshot {
    /// Streams that the peer opened and nobody has answered.
    pub fn offered(&self) -> impl Iterator<Item = StreamId> {
        let offered = self.streams.iter().filter(|s| s.phase == PhaseSnapshot::Offered);
        offered.map(|s| StreamId(s.id))
    }

    /// Whether the peer has not answered this stream yet.
    pub fn is_opening(&self, id: StreamId) -> bool {
        self.opening.contains(&id.0)
    }

    /// Streams that both sides have wanted and that have not ended.
    pub fn established(&self) -> impl Iterator<Item = StreamId> {
        let established = self.streams.iter().filter(|s| s.phase == PhaseSnapshot::Established);
        established.map(|s| StreamId(s.id))
    }
}

impl Session {
    /// Leaves the session to another process. All events must have been taken.
    pub fn into_snapshot(mut self, now: Instant) -> Snapshot {
        self.handle_disconnected(now);
        let stats = self.stats();
        let unlisted = |id: &StreamId| self.streams.0.get(id).is_some_and(|s| !s.has_control());
        let waiting = self.inflow.waiting().filter(unlisted);
        let control = self.control.iter().copied().chain(waiting).map(|id| id.0).collect();
        let (acked, entries) = self.log.into_entries();
        Snapshot {
            is_dialer: self.role == Role::Dialer,
            peer: PeerSnapshot {
                max_streams: self.peer.max_streams,
                initial_urgent: self.peer.initial_credit.urgent,
                initial_bulk: self.peer.initial_credit.bulk,
                replay_cap: self.peer.replay_cap,
                budget: self.peer.budget,
            },
            acked,
            log: entries.map(|(header, payload)| (header.encode(), payload)).collect(),
            rx_seq: self.ack_state.rx_seq(),
            streams: self.streams.0.into_values().map(StreamSnapshot::of).collect(),
            control,
            opening: self.opening.iter().map(|id| id.0).collect(),
            next_local: self.next_local,
            next_remote: self.next_remote,
            counters: Counters {
                sent_data_bytes: stats.sent_data_bytes,
                received_data_bytes: stats.received_data_bytes,
                reconnects: stats.reconnects,
                replayed_bytes: stats.replayed_bytes,
                away_ms: stats.away.as_millis() as u64,
            },
        }
    }

    /// Takes a session up that another process has left. It is suspended until
    /// [`Session::handle_reconnected`]. Streams that the peer has opened and nobody has answered
    /// are told of again.
    pub fn from_snapshot(config: Config, snapshot: Snapshot, now: Instant) -> Self {
        let role = if snapshot.is_dialer { Role::Dialer } else { Role::Acceptor };
        let peer = PeerLimits {
            max_streams: snapshot.peer.max_streams,
            initial_credit: PerClass {
                urgent: snapshot.peer.initial_urgent,
                bulk: snapshot.peer.initial_bulk,
            },
            replay_cap: snapshot.peer.replay_cap,
            budget: snapshot.peer.budget,
        };
        let negotiated = Negotiated { version: 0, features: 0, peer, peer_instance: [0; 16] };
        let mut session = Self::new(role, config, &negotiated, now);
        let entries = snapshot.log.into_iter().map(|(header, payload)| (Header::decode(&header), payload));
        session.log = ReplayLog::from_entries(&session.config, snapshot.acked, entries);
        session.ack_state = AckState::resumed(snapshot.rx_seq);
        session.next_local = snapshot.next_local;
        session.next_remote = snapshot.next_remote;
        for one in snapshot.streams {
            session.take_up(one, now);
        }
        session.control = snapshot.control.into_iter().map(StreamId).collect();
        session.opening = snapshot.opening.into_iter().map(StreamId).collect();
        session.stats.sent_data_bytes = snapshot.counters.sent_data_bytes;
        session.stats.received_data_bytes = snapshot.counters.received_data_bytes;
        session.stats.reconnects = snapshot.counters.reconnects;
        session.stats.replayed_bytes = snapshot.counters.replayed_bytes;
        session.stats.away = Duration::from_millis(snapshot.counters.away_ms);
        session.handle_disconnected(now);
        session
    }

    fn take_up(&mut self, one: StreamSnapshot, now: Instant) {
        let id = StreamId(one.id);
        let open = one.open();
        if one.slot {
            self.budget.take_slot(one.local);
        }
        let credit = one.credit.clone().restore(&mut self.budget, one.slot, now);
        let phase = match one.phase {
            PhaseSnapshot::Opening => Phase::Opening { deadline: now + self.config.open_deadline },
            PhaseSnapshot::Offered => Phase::Offered,
            PhaseSnapshot::Established => Phase::Established,
            PhaseSnapshot::RefusedUnasked => Phase::RefusedUnasked,
        };
        self.offered += usize::from(phase == Phase::Offered);
        self.refused_unasked += usize::from(phase == Phase::RefusedUnasked);
        let stream = one.restore(open, phase, credit);
        self.streams.0.insert(id, stream);
        if phase == Phase::Offered {
            self.push_event(Event::Opened { id, open });
        }
        self.announce(id);
        self.wake(id, false);
    }
}

impl StreamSnapshot {
    fn of(stream: Stream) -> Self {
        Self {
            id: stream.id.0,
            purpose: stream.open.purpose,
            class: stream.open.class.to_wire(),
            weight: stream.open.weight,
            migration: stream.open.migration,
            channel: stream.open.channel,
            name: Bytes::copy_from_slice(stream.open.name.as_bytes()),
            phase: match stream.phase {
                Phase::Opening { .. } => PhaseSnapshot::Opening,
                Phase::Offered => PhaseSnapshot::Offered,
                Phase::Established => PhaseSnapshot::Established,
                Phase::RefusedUnasked => PhaseSnapshot::RefusedUnasked,
            },
            send: match stream.send.state {
                SendState::Open => SendSnapshot::Open,
                SendState::Finishing => SendSnapshot::Finishing,
                SendState::Resetting { code, abort } => {
                    SendSnapshot::Resetting { code: code.to_wire(), abort }
                }
                SendState::Done => SendSnapshot::Done,
            },
            send_queue: stream.send.queue.into_chunks().collect(),
            send_offset: stream.send.offset,
            send_limit: stream.send.limit,
            send_ended: stream.send.ended.map(Code::to_wire),
            recv: match stream.recv.state {
                RecvState::Open => RecvSnapshot::Open,
                RecvState::Finished => RecvSnapshot::Finished,
                RecvState::Reset => RecvSnapshot::Reset,
            },
            recv_queue: stream.recv.queue.into_chunks().collect(),
            credit: stream.recv.credit.state(),
            handed: stream.recv.handed,
            given_up: stream.recv.given_up,
            turn: (stream.turn.class.to_wire(), stream.turn.weight),
            waits: [
                stream.control.open,
                stream.control.accept,
                stream.control.credit || stream.recv.waits,
                stream.control.prio,
            ],
            stop: stream.control.stop.map(Code::to_wire),
            slot: stream.slot,
            local: stream.local,
            answered: stream.answered,
            stopped: stream.stopped.map(Code::to_wire),
            local_reset: stream.local_reset,
        }
    }

    fn open(&self) -> Open {
        Open {
            purpose: self.purpose,
            class: Class::from_wire(self.class).unwrap_or(Class::Bulk),
            weight: self.weight,
            migration: self.migration,
            channel: self.channel,
            name: Name::new(&self.name).unwrap_or(Name::NONE),
        }
    }

    fn restore(self, open: Open, phase: Phase, credit: RecvCredit) -> Stream {
        let mut stream = Stream::new(StreamId(self.id), open, phase, self.send_limit, credit);
        self.send_queue.into_iter().for_each(|chunk| stream.send.queue.push(chunk));
        stream.send.state = match self.send {
            SendSnapshot::Open => SendState::Open,
            SendSnapshot::Finishing => SendState::Finishing,
            SendSnapshot::Resetting { code, abort } => {
                SendState::Resetting { code: Code::from_wire(code), abort }
            }
            SendSnapshot::Done => SendState::Done,
        };
        stream.send.offset = self.send_offset;
        stream.send.ended = self.send_ended.map(Code::from_wire);
        // Whoever takes the stream up asks for room anew.
        stream.send.starved = true;
        self.recv_queue.into_iter().for_each(|chunk| stream.recv.queue.push(Payload::Joined(chunk)));
        stream.recv.state = match self.recv {
            RecvSnapshot::Open => RecvState::Open,
            RecvSnapshot::Finished => RecvState::Finished,
            RecvSnapshot::Reset => RecvState::Reset,
        };
        stream.recv.handed = self.handed;
        stream.recv.given_up = self.given_up;
        let class = Class::from_wire(self.turn.0).unwrap_or(open.class);
        stream.turn = super::deficit_round_robin::Turn::new(class, open.migration, self.turn.1);
        let [open_due, accept, credit_due, prio] = self.waits;
        stream.control = Control {
            open: open_due,
            accept,
            credit: credit_due,
            prio,
            stop: self.stop.map(Code::from_wire),
            listed: false,
        };
        stream.control.listed = stream.has_control();
        stream.slot = self.slot;
        stream.local = self.local;
        stream.answered = self.answered;
        stream.stopped = self.stopped.map(Code::from_wire);
        stream.local_reset = self.local_reset;
        stream
    }
}

impl ReplayLog {
    fn into_entries(self) -> (u64, impl Iterator<Item = (Header, Bytes)>) {
        let (acked, entries) = self.into_parts();
        (acked, entries.into_iter().map(|e| (e.header, e.payload)))
    }

    fn from_entries(config: &Config, acked: u64, entries: impl Iterator<Item = (Header, Bytes)>) -> Self {
        let entries: VecDeque<_> =
            entries.map(|(header, payload)| super::replay_log::Entry { header, payload }).collect();
        Self::from_parts(config, acked, entries)
    }
}

impl CreditState {
    fn restore(self, budget: &mut Budget, counted: bool, now: Instant) -> RecvCredit {
        RecvCredit::from_state(budget, self, counted, now)
    }
}
