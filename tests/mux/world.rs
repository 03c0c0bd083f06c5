//! A simulated world for two sessions: a virtual clock, a link that splits, delays, stalls and
//! cuts, users that read slowly, and a model of what each stream must deliver.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use bytes::Bytes;
use vmferry_mux::mux::{
    Batch, Class, Code, Config, Event, Name, Open, PerClass, Role, Session, SessionError, Share, SharedLimit,
    Snapshot, StreamId, purpose,
};

use vmferry_mux::mux::frame::FRAME_LEN_MAX;
use vmferry_mux::mux::hello::Negotiated;

use super::pair::{agree, bytes_of, content};
use super::rng::Rng;

/// Longest chunk that a user sends at once.
const CHUNK_MAX: usize = 40_000;
/// Migrations that streams belong to.
const MIGRATIONS: usize = 4;
/// Smallest limit in bytes per second.
const LIMIT_MIN: usize = 100_000;
/// Virtual time in which everything must have come to rest at the end.
const REST_DEADLINE: Duration = Duration::from_secs(600);

/// A stream as its user at one end sees it.
#[derive(Debug, Default)]
struct User {
    opened_here: bool,
    established: bool,
    sent: u64,
    finished: bool,
    got: u64,
    unconsumed: u64,
    peer_finished: bool,
    stopped_here: bool,
    stopped_by_peer: bool,
    reset_here: bool,
    reset_seen: bool,
    closed: bool,
    reads_from: Option<Instant>,
}

/// One end: a session and the users of its streams.
struct End {
    name: &'static str,
    session: Session,
    config: Config,
    /// To make a session from; its successors are made from what it leaves.
    origin: (Role, Negotiated),
    users: BTreeMap<StreamId, User>,
    offered: Vec<StreamId>,
    /// What was sealed and has not left.
    unsent: VecDeque<u8>,
}

/// One direction of the connection.
#[derive(Default)]
struct Pipe {
    flying: VecDeque<(Instant, Vec<u8>)>,
    stalled_until: Option<Instant>,
}

/// Everything.
pub(crate) struct World {
    seed: u64,
    rng: Rng,
    now: Instant,
    start: Instant,
    ends: [End; 2],
    pipes: [Pipe; 2],
    connected: bool,
    noticed: [bool; 2],
    streams_max: usize,
    delay_us: usize,
    bytes_per_ms: usize,
    pub(crate) steps: u64,
    pub(crate) moved_bytes: u64,
    pub(crate) cuts: u64,
    pub(crate) successions: u64,
    pub(crate) replayed_bytes: u64,
}

fn random_config(rng: &mut Rng) -> Config {
    let floor = 1024 << rng.below(7);
    let initial = PerClass { urgent: floor, bulk: floor };
    Config {
        max_streams: rng.range(2, 40) as u32,
        initial_credit: initial,
        start_credit: PerClass { urgent: floor, bulk: floor << rng.below(5) },
        window_max_bulk: 256 << 10 << rng.below(3),
        // Long frames at all rates, or hardly any.
        frame_time: Duration::from_millis(if rng.below(2) == 0 { 1000 } else { 1 }),
        budget_bytes: (floor * 4 * rng.range(4, 60) as u64).max(16 << 10),
        replay_cap_bytes: 256 << 10 << rng.below(4),
        send_queue_bytes_per_stream: 4096 << rng.below(6),
        send_queue_bytes: 16 << 10 << rng.below(8),
        ack_bytes: 1024 << rng.below(9),
        ack_frames: rng.range(1, 64) as u32,
        pending_open_max: rng.range(1, 64),
        ..Config::default()
    }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let now = Instant::now();
        let configs = [random_config(&mut rng), random_config(&mut rng)];
        let (first, second) = agree(&configs[0], &configs[1]);
        let [dialer, acceptor] = configs;
        let end = |name, role, config: Config, negotiated: Negotiated| End {
            name,
            session: Session::new(role, config.clone(), &negotiated, now),
            config,
            origin: (role, negotiated),
            users: BTreeMap::new(),
            offered: Vec::new(),
            unsent: VecDeque::new(),
        };
        Self {
            seed,
            now,
            start: now,
            ends: [
                end("dialer", Role::Dialer, dialer, first),
                end("acceptor", Role::Acceptor, acceptor, second),
            ],
            pipes: [Pipe::default(), Pipe::default()],
            connected: true,
            noticed: [false; 2],
            streams_max: rng.range(1, 30),
            delay_us: rng.size(100_000),
            bytes_per_ms: 1000 << rng.below(11),
            rng,
            steps: 0,
            moved_bytes: 0,
            cuts: 0,
            successions: 0,
            replayed_bytes: 0,
        }
    }

    /// Steps at random, then brings everything to rest and checks that nothing is left.
    pub(crate) fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        self.rest();
        self.check_rest();
        self.replayed_bytes = self.ends.iter().map(|e| e.session.stats().replayed_bytes).sum();
    }

    fn fail(&self, what: &str) -> ! {
        let stats = self.ends.iter().map(|e| format!("{}: {:?}\n", e.name, e.session.stats()));
        panic!(
            "VMFERRY_SEED={} step {} at {:?}: {what}\n{}",
            self.seed,
            self.steps,
            self.now - self.start,
            stats.collect::<String>()
        )
    }

    fn step(&mut self) {
        self.steps += 1;
        let side = self.rng.below(2);
        match self.rng.below(100) {
            0..=4 => self.open(side),
            5..=9 => self.answer(side),
            10..=34 => self.send(side),
            35..=49 => self.read(side, None),
            50 => self.end_a_stream(side),
            51..=52 => self.finish(side),
            53 if self.rng.one_in(2) => self.prioritise(side),
            53 => self.share(side),
            54 => self.stall_reader(side),
            55 if self.rng.one_in(8) => self.cut(),
            56 if self.rng.one_in(4) => self.stall_pipe(side),
            57..=58 => self.notice_or_reconnect(),
            59 => self.succeed(side),
            60..=79 => self.deliver_some(side),
            80..=94 => self.transmit(side),
            _ => self.pass_time(),
        }
        self.after_step();
    }

    fn after_step(&mut self) {
        for side in 0..2 {
            self.take_events(side);
            self.check_limits(side);
        }
    }

    fn open(&mut self, side: usize) {
        if self.ends[side].users.values().filter(|u| !u.closed).count() >= self.streams_max {
            return;
        }
        let purposes = [purpose::CONTROL, purpose::RAM, purpose::NBD, purpose::FILE];
        let open = Open {
            purpose: *self.rng.pick(&purposes).unwrap(),
            class: if self.rng.one_in(4) { Class::Urgent } else { Class::Bulk },
            weight: self.rng.size(300) as u16,
            migration: [self.rng.below(MIGRATIONS) as u8; 16],
            channel: self.rng.below(9) as u16,
            name: Name::new(&vec![b'n'; self.rng.below(4) * 40]).unwrap(),
        };
        let end = &mut self.ends[side];
        if let Ok(id) = end.session.open(self.now, open) {
            let user = User { opened_here: true, established: true, ..User::default() };
            assert!(end.users.insert(id, user).is_none(), "stream number used twice");
        }
    }

    fn answer(&mut self, side: usize) {
        let end = &mut self.ends[side];
        if end.offered.is_empty() {
            return;
        }
        let id = end.offered.swap_remove(self.rng.below(end.offered.len()));
        let user = end.users.get_mut(&id).unwrap();
        if self.rng.one_in(8) {
            user.reset_here = true;
            end.session.refuse(id, Code::Denied);
        } else if end.session.accept(id).is_ok() {
            user.established = true;
        } else if !user.reset_seen {
            self.fail("accepting failed without a reset");
        }
    }

    fn pick(&mut self, side: usize, wanted: impl Fn(&User) -> bool) -> Option<StreamId> {
        let fit: Vec<StreamId> = self.ends[side]
            .users
            .iter()
            .filter(|(_, u)| u.established && !u.closed && wanted(u))
            .map(|(id, _)| *id)
            .collect();
        self.rng.pick(&fit).copied()
    }

    fn salt(&self, side: usize, id: StreamId) -> u64 {
        u64::from(id.0) * 2 + side as u64
    }

    fn send(&mut self, side: usize) {
        let Some(id) = self.pick(side, |u| !u.finished && !u.reset_here) else { return };
        let len = self.rng.size(CHUNK_MAX);
        let salt = self.salt(side, id);
        let end = &mut self.ends[side];
        let user = end.users.get_mut(&id).unwrap();
        let room = end.session.send_capacity(id);
        let sent = end.session.send(self.now, id, content(salt, user.sent, len));
        match sent {
            Ok(()) if room > 0 => user.sent += len as u64,
            Ok(()) => self.fail("sent without room"),
            Err(_) if room > 0 => self.fail("refused despite room"),
            Err(_) => {}
        }
    }

    /// Takes chunks and consumes some of what was taken.
    fn read(&mut self, side: usize, only: Option<StreamId>) {
        let now = self.now;
        let awake = |u: &User| u.reads_from.is_none_or(|from| from <= now);
        let Some(id) = only.or_else(|| self.pick(side, awake)) else { return };
        if self.rng.one_in(2) || only.is_some() {
            while let Some(chunk) = self.ends[side].session.recv(id) {
                self.check_chunk(side, id, &chunk);
            }
        }
        let all = self.rng.one_in(2) || only.is_some();
        let end = &mut self.ends[side];
        let user = end.users.get_mut(&id).unwrap();
        let amount = if all { user.unconsumed } else { self.rng.below(user.unconsumed as usize + 1) as u64 };
        user.unconsumed -= amount;
        end.session.consumed(now, id, amount);
    }

    fn check_chunk(&mut self, side: usize, id: StreamId, chunk: &Bytes) {
        let salt = self.salt(1 - side, id);
        let user = self.ends[side].users.get_mut(&id).unwrap();
        let expected = content(salt, user.got, chunk.len());
        user.got += chunk.len() as u64;
        user.unconsumed += chunk.len() as u64;
        let (got, ended) = (user.got, user.reset_seen || user.reset_here || user.stopped_here);
        let sent = self.ends[1 - side].users.get(&id).map_or(0, |peer| peer.sent);
        self.moved_bytes += chunk.len() as u64;
        if *chunk != expected {
            self.fail(&format!("stream {} has other bytes before offset {got}", id.0));
        }
        if got > sent {
            self.fail(&format!("stream {} has {got} bytes of {sent}", id.0));
        }
        if ended {
            self.fail(&format!("stream {} goes on after its end", id.0));
        }
    }

    fn finish(&mut self, side: usize) {
        let Some(id) = self.pick(side, |u| !u.finished && !u.reset_here) else { return };
        self.ends[side].users.get_mut(&id).unwrap().finished = true;
        self.ends[side].session.finish(id);
    }

    fn end_a_stream(&mut self, side: usize) {
        let reset = self.rng.one_in(2);
        let Some(id) = self.pick(side, |u| !u.reset_here) else { return };
        let user = self.ends[side].users.get_mut(&id).unwrap();
        if reset {
            user.reset_here = true;
            self.ends[side].session.reset(id, Code::Cancelled);
        } else {
            user.stopped_here = true;
            self.ends[side].session.stop(id, Code::IoError);
        }
    }

    fn prioritise(&mut self, side: usize) {
        let Some(id) = self.pick(side, |_| true) else { return };
        let class = if self.rng.one_in(2) { Class::Urgent } else { Class::Bulk };
        let weight = self.rng.size(2000) as u16;
        self.ends[side].session.set_priority(id, class, weight);
    }

    /// Another limit or share: what is sent comes later or earlier, and nothing else changes.
    fn share(&mut self, side: usize) {
        let limit = self.rng.one_in(2).then(|| self.rng.range(LIMIT_MIN, 10_000_000) as u64);
        let limit = limit.and_then(NonZeroU64::new).map(|rate| SharedLimit::new(rate, self.now));
        let session = &mut self.ends[side].session;
        if self.rng.one_in(3) {
            return session.set_limit(limit);
        }
        if self.rng.one_in(2) {
            return session.set_receive_limit(limit);
        }
        let migration = [self.rng.below(MIGRATIONS) as u8; 16];
        let share = Share { weight: self.rng.size(2000) as u16, limit, ahead: self.rng.one_in(4) };
        session.set_share(migration, share);
    }

    fn stall_reader(&mut self, side: usize) {
        let Some(id) = self.pick(side, |_| true) else { return };
        let long = Duration::from_millis(self.rng.size(30_000) as u64);
        self.ends[side].users.get_mut(&id).unwrap().reads_from = Some(self.now + long);
    }

    fn stall_pipe(&mut self, side: usize) {
        let long = Duration::from_millis(self.rng.size(2000) as u64);
        self.pipes[side].stalled_until = Some(self.now + long);
    }

    fn cut(&mut self) {
        if !self.connected {
            return;
        }
        self.connected = false;
        self.cuts += 1;
        for side in 0..2 {
            self.pipes[side] = Pipe::default();
            self.ends[side].unsent.clear();
        }
    }

    /// Each end notices a cut in its own time; when both have, a new connection is made.
    fn notice_or_reconnect(&mut self) {
        if self.connected {
            return;
        }
        let side = self.rng.below(2);
        if !self.noticed[side] {
            self.noticed[side] = true;
            self.ends[side].unsent.clear();
            self.ends[side].session.handle_disconnected(self.now);
        } else if self.noticed[1 - side] && self.rng.one_in(2) {
            self.reconnect();
        }
    }

    /// An end's process leaves its session to another, encoded as it would be.
    fn succeed(&mut self, side: usize) {
        if self.connected || self.rng.one_in(2) {
            return;
        }
        self.successions += 1;
        self.noticed[side] = true;
        let (now, end) = (self.now, &mut self.ends[side]);
        end.unsent.clear();
        let (role, negotiated) = &end.origin;
        let empty = Session::new(*role, end.config.clone(), negotiated, now);
        let left = std::mem::replace(&mut end.session, empty).into_snapshot(now);
        let mut encoded = Vec::new();
        ciborium::into_writer(&left, &mut encoded).expect("encoded");
        let read: Snapshot = ciborium::from_reader(&encoded[..]).expect("decoded");
        assert_eq!(read, left);
        end.session = Session::from_snapshot(end.config.clone(), read, now);
        // What nobody has answered is told of again, in order.
        let mut told = Vec::new();
        while let Some(event) = end.session.poll_event() {
            match event {
                Event::Opened { id, .. } => told.push(id),
                Event::Readable { .. } | Event::Writable { .. } => {}
                other => panic!("VMFERRY_SEED={} a successor heard {other:?}", self.seed),
            }
        }
        let mut offered = end.offered.clone();
        offered.retain(|id| end.users.get(id).is_some_and(|user| !user.closed && !user.reset_here));
        offered.sort_unstable();
        if told != offered {
            self.fail(&format!("offered {offered:?}, but a successor heard of {told:?}"));
        }
    }

    fn reconnect(&mut self) {
        let received = [self.ends[0].session.rx_seq(), self.ends[1].session.rx_seq()];
        for side in 0..2 {
            if let Err(e) = self.ends[side].session.handle_reconnected(self.now, received[1 - side]) {
                self.fail(&format!("resume failed: {e}"));
            }
        }
        self.connected = true;
        self.noticed = [false; 2];
    }

    /// Seals a batch when the one before has left, and lets some of it go.
    fn transmit(&mut self, side: usize) {
        let mut batch = Batch::default();
        let end = &mut self.ends[side];
        if end.unsent.is_empty() && end.session.poll_transmit(self.now, &mut batch) {
            let len = batch.len_bytes();
            if batch.is_empty() || len > end.config.batch_bytes.max(end.config.batch_bytes_fast) {
                self.fail(&format!("a batch of {len} bytes"));
            }
            self.ends[side].unsent.extend(bytes_of(&batch));
        }
        if self.pipes[side].stalled_until.is_some_and(|until| until > self.now) {
            return;
        }
        let allowed = self.rng.range(1, 100_000);
        let end = &mut self.ends[side];
        let leaving: Vec<u8> = end.unsent.drain(..allowed.min(end.unsent.len())).collect();
        if self.connected && !leaving.is_empty() {
            let slow = leaving.len() * 1000 / self.bytes_per_ms;
            let arrival = self.now + Duration::from_micros((self.delay_us + slow) as u64);
            let after = self.pipes[side].flying.back().map_or(arrival, |(at, _)| arrival.max(*at));
            self.pipes[side].flying.push_back((after, leaving));
        }
    }

    /// Delivers what has arrived at `side`, in any split.
    fn deliver_some(&mut self, side: usize) {
        let pipe = &mut self.pipes[1 - side];
        let Some((at, mut bytes)) = pipe.flying.pop_front() else { return };
        if at > self.now {
            pipe.flying.push_front((at, bytes));
            return;
        }
        let some = if self.rng.one_in(3) { self.rng.range(1, bytes.len()) } else { bytes.len() };
        let rest = bytes.split_off(some);
        if !rest.is_empty() {
            self.pipes[1 - side].flying.push_front((at, rest));
        }
        if self.noticed[side] {
            return;
        }
        if let Err(e) = self.ends[side].session.handle_input(self.now, &bytes) {
            self.fail(&format!("{} refuses an honest peer: {e}", self.ends[side].name));
        }
    }

    fn pass_time(&mut self) {
        let flying = self.pipes.iter().filter_map(|p| p.flying.front()).map(|(at, _)| *at).min();
        let jump = Duration::from_micros(self.rng.size(300_000) as u64);
        match flying.filter(|at| *at > self.now && self.rng.one_in(2)) {
            Some(at) => self.now = at,
            None => self.now += jump,
        }
        self.time_out();
    }

    fn time_out(&mut self) {
        for side in 0..2 {
            match self.ends[side].session.handle_timeout(self.now) {
                Ok(()) => {}
                Err(SessionError::Dead { .. }) => self.cut(),
                Err(e) => self.fail(&format!("timeout: {e}")),
            }
            let next = self.ends[side].session.poll_timeout();
            if self.connected && next.is_some_and(|at| at <= self.now) {
                self.fail("a deadline does not move on");
            }
        }
    }

    fn take_events(&mut self, side: usize) {
        while let Some(event) = self.ends[side].session.poll_event() {
            if let Err(what) = self.on_event(side, &event) {
                self.fail(&format!("{} {event:?}: {what}", self.ends[side].name));
            }
        }
    }

    fn on_event(&mut self, side: usize, event: &Event) -> Result<(), &'static str> {
        let (Event::Opened { id, .. }
        | Event::Accepted { id }
        | Event::Readable { id }
        | Event::Writable { id }
        | Event::Finished { id }
        | Event::Stopped { id, .. }
        | Event::Reset { id, .. }
        | Event::Closed { id }) = event
        else {
            return Err("nobody said goodbye");
        };
        let end = &mut self.ends[side];
        if matches!(event, Event::Opened { .. }) {
            end.offered.push(*id);
            let fresh = end.users.insert(*id, User::default()).is_none();
            return if fresh { Ok(()) } else { Err("a stream was opened twice") };
        }
        let user = end.users.get_mut(id).ok_or("an event of an unknown stream")?;
        if user.closed {
            return Err("an event after the last one");
        }
        if user.reset_here && !matches!(event, Event::Closed { .. }) {
            // Only what was queued before the reset may still come.
            return Ok(());
        }
        match event {
            Event::Accepted { .. } if !user.opened_here => return Err("not ours"),
            Event::Finished { .. } if user.peer_finished => return Err("finished twice"),
            Event::Finished { .. } => user.peer_finished = true,
            Event::Stopped { .. } if user.finished && user.stopped_by_peer => return Err("stopped twice"),
            Event::Stopped { .. } => user.stopped_by_peer = true,
            Event::Reset { .. } => user.reset_seen = true,
            Event::Closed { .. } => user.closed = true,
            _ => {}
        }
        Ok(())
    }

    fn check_limits(&self, side: usize) {
        let end = &self.ends[side];
        let (stats, config) = (end.session.stats(), &end.config);
        let per_stream = config.send_queue_bytes_per_stream + CHUNK_MAX;
        let checks = [
            (stats.credit_outstanding_bytes <= stats.credit_committed_bytes, "credit without commitment"),
            (stats.credit_committed_bytes <= config.budget_bytes, "credit above the budget"),
            (stats.recv_queued_bytes as u64 <= stats.credit_outstanding_bytes, "held without credit"),
            (stats.log_bytes_max <= config.replay_cap_bytes, "log above its cap"),
            (stats.send_queued_bytes <= per_stream * stats.streams, "send queues above their bound"),
            (stats.partial_bytes < FRAME_LEN_MAX, "more than a frame kept"),
        ];
        for (holds, what) in checks {
            if !holds {
                self.fail(&format!("{}: {what}", end.name));
            }
        }
    }

    /// No more faults and no new work: every user finishes, reads and goes.
    fn rest(&mut self) {
        let deadline = self.now + REST_DEADLINE;
        self.pipes.iter_mut().for_each(|pipe| pipe.stalled_until = None);
        while !self.is_at_rest() {
            if self.now > deadline {
                self.fail(&format!("no rest; open: {:?}", self.open_users()));
            }
            while !self.connected {
                self.notice_or_reconnect();
            }
            let moved = (0..2).map(|side| self.rest_end(side)).fold(false, |a, b| a | b);
            if !moved {
                self.wait_for_something();
            }
        }
    }

    /// True if anything moved.
    fn rest_end(&mut self, side: usize) -> bool {
        while !self.ends[side].offered.is_empty() {
            self.answer(side);
        }
        let ids: Vec<StreamId> = self.ends[side]
            .users
            .iter()
            .filter(|(_, u)| u.established && !u.closed)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.read(side, Some(id));
            let user = self.ends[side].users.get_mut(&id).unwrap();
            if !user.finished && !user.reset_here {
                user.finished = true;
                self.ends[side].session.finish(id);
            }
        }
        let before = (self.flying(), self.ends[side].unsent.len());
        self.transmit(side);
        self.deliver_some(side);
        self.after_step();
        before != (self.flying(), self.ends[side].unsent.len())
    }

    fn flying(&self) -> usize {
        self.pipes.iter().flat_map(|pipe| &pipe.flying).map(|(_, bytes)| bytes.len()).sum()
    }

    /// Sleeps to the next arrival or deadline: a wake-up that was lost is not made up for.
    fn wait_for_something(&mut self) {
        let arrivals = self.pipes.iter().filter_map(|pipe| pipe.flying.front()).map(|(at, _)| *at);
        let deadlines = self.ends.iter().filter_map(|end| end.session.poll_timeout());
        match arrivals.chain(deadlines).min() {
            Some(at) => self.now = self.now.max(at),
            None => self.fail("nothing to wait for"),
        }
        self.time_out();
    }

    fn is_at_rest(&self) -> bool {
        self.connected
            && self.flying() == 0
            && self.ends.iter().all(|end| {
                let stats = end.session.stats();
                end.unsent.is_empty() && stats.streams == 0 && stats.log_bytes == 0
            })
    }

    fn open_users(&self) -> Vec<(&'static str, StreamId, &User)> {
        let of =
            |end: &'_ End| end.users.iter().filter(|(_, u)| !u.closed).map(|(id, _)| *id).collect::<Vec<_>>();
        self.ends
            .iter()
            .flat_map(|end| of(end).into_iter().map(|id| (end.name, id, &end.users[&id])))
            .collect()
    }

    fn check_rest(&self) {
        for (side, end) in self.ends.iter().enumerate() {
            let stats = end.session.stats();
            if stats.credit_committed_bytes != 0
                || stats.send_queued_bytes != 0
                || stats.recv_queued_bytes != 0
            {
                self.fail(&format!("{}: memory is left", end.name));
            }
            if !end.session.is_drained() {
                self.fail(&format!("{} is not drained", end.name));
            }
            for (id, user) in &end.users {
                self.check_ended(side, *id, user);
            }
        }
    }

    /// A direction that nobody cut must have delivered all of it.
    fn check_ended(&self, side: usize, id: StreamId, user: &User) {
        if !user.closed {
            self.fail(&format!("{} stream {} never closed", self.ends[side].name, id.0));
        }
        let Some(peer) = self.ends[1 - side].users.get(&id) else { return };
        let cut =
            user.reset_here || user.reset_seen || user.stopped_here || peer.reset_here || peer.reset_seen;
        if !cut && !peer.stopped_by_peer && (user.got != peer.sent || !user.peer_finished) {
            self.fail(&format!("stream {} delivered {} of {} bytes", id.0, user.got, peer.sent));
        }
    }
}
