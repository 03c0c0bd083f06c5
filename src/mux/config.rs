//! The protocol's limits and times with their defaults (WIRE §4, §5, §8). Knows no state.

use std::time::Duration;

use super::Class;
use super::frame::{FRAME_LEN_MAX, RECORD_LEN};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// See [`Config::batch_bytes_fast`].
const BATCH_TIME: Duration = Duration::from_millis(1);
/// Half of the rate at which a peer takes PINGs.
const PING_INTERVAL_MIN: Duration = Duration::from_millis(200);

/// One value for each class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerClass<T> {
    pub urgent: T,
    pub bulk: T,
}

impl<T: Copy> PerClass<T> {
    /// The value for `class`.
    pub fn of(&self, class: Class) -> T {
        match class {
            Class::Urgent => self.urgent,
            Class::Bulk => self.bulk,
        }
    }
}

/// A rate with a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Sustained, per second.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

/// The limits and times of a session. Sizes in bytes.
#[derive(Debug, Clone)]
pub struct Config {
    /// Streams that the peer may have open, and that we open at most.
    pub max_streams: u32,
    /// What the peer may send on a stream before it is accepted. It is set aside for every stream
    /// that either side may open, so it is also what a stream is always entitled to.
    pub initial_credit: PerClass<u64>,
    /// What a stream gets once both sides want it, as far as the budget allows.
    pub start_credit: PerClass<u64>,
    /// Largest window of an urgent stream.
    pub window_max_urgent: u64,
    /// Largest window of a bulk stream: 5 Gbit/s over a round trip of 100 ms. (A `blockdev-mirror`
    /// has 16 MiB under way at most: `MAX_IN_FLIGHT` requests of 1 MiB in QEMU 7.2 to 10.)
    pub window_max_bulk: u64,
    /// Bound of all that peers may send without our having taken it.
    pub budget_bytes: u64,
    /// A window grows while half of it is consumed within twice the round trip, or, by a sender
    /// that is at the end of its credit, within this: a local network's round trip under load is
    /// far above its minimum.
    pub growth_time_min: Duration,
    /// A stream that received nothing for this long starts again with the smallest window.
    pub window_idle_after: Duration,
    /// Memory for frames that the peer has not acknowledged.
    pub replay_cap_bytes: usize,
    /// The part of it kept for control frames and urgent streams.
    pub replay_reserve_bytes: usize,
    /// Bytes queued on a stream before [`Session::send`](super::Session::send) refuses. A chunk
    /// that is taken while there is room may pass it.
    pub send_queue_bytes_per_stream: usize,
    /// The same for all streams together: with many streams each may queue less, though never less
    /// than a record.
    pub send_queue_bytes: usize,
    /// Bytes of one batch, at least those of the longest frame; a multiple of
    /// [`frame::RECORD_LEN`](super::frame::RECORD_LEN).
    pub batch_bytes: usize,
    /// The same on a connection so fast that it is gone within a millisecond: fewer system calls.
    pub batch_bytes_fast: usize,
    /// How long a frame that is longer than a record may take, at the rate that its stream is held to:
    /// streams take turns and limits are kept by the frame.
    pub frame_time: Duration,
    /// Time between two pings; less if the connection would be dead before the third.
    pub ping_after: Duration,
    /// Silence after which the connection is dead.
    pub dead_after: Duration,
    /// Unacknowledged bytes received after which an ACK is due.
    pub ack_bytes: usize,
    /// Unacknowledged frames received after which an ACK is due.
    pub ack_frames: u32,
    /// Time after which an ACK is due.
    pub ack_delay: Duration,
    /// Without progress of the peer's ACKs for this long the session fails.
    pub ack_stall_after: Duration,
    /// Time for the peer to accept a stream.
    pub open_deadline: Duration,
    /// Streams that may wait for acceptance, in each direction.
    pub pending_open_max: usize,
    /// OPEN frames from the peer. We open at a quarter of this, so that two honest agents never
    /// come near it, whatever a slow connection bunches together.
    pub opens: RateLimit,
    /// Unsolicited RESET and STOP frames from the peer. The burst must cover one of each for all
    /// streams of both sides: an honest agent that shuts down sends them together.
    pub resets: RateLimit,
    /// PING frames from the peer.
    pub pings: RateLimit,
    /// Frames from the peer that change nothing, or only a priority.
    pub noops: RateLimit,
    /// What urgent streams may send before others at least, in bytes; a tenth of the measured
    /// rate if that is more.
    pub urgent: RateLimit,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            initial_credit: PerClass { urgent: 64 * KIB, bulk: 64 * KIB },
            start_credit: PerClass { urgent: 64 * KIB, bulk: MIB },
            window_max_urgent: 256 * KIB,
            window_max_bulk: 64 * MIB,
            budget_bytes: 256 * MIB,
            growth_time_min: Duration::from_millis(5),
            window_idle_after: Duration::from_secs(10),
            replay_cap_bytes: 64 << 20,
            replay_reserve_bytes: 1 << 20,
            send_queue_bytes_per_stream: 256 << 10,
            send_queue_bytes: 16 << 20,
            batch_bytes: 64 << 10,
            batch_bytes_fast: 256 << 10,
            frame_time: Duration::from_millis(1),
            ping_after: Duration::from_secs(1),
            dead_after: Duration::from_secs(5),
            ack_bytes: 256 << 10,
            ack_frames: 64,
            ack_delay: Duration::from_millis(5),
            ack_stall_after: Duration::from_secs(30),
            open_deadline: Duration::from_secs(30),
            pending_open_max: 64,
            opens: RateLimit { per_second: 200, burst: 1024 },
            resets: RateLimit { per_second: 200, burst: 4096 },
            pings: RateLimit { per_second: 10, burst: 64 },
            noops: RateLimit { per_second: 1000, burst: 1024 },
            urgent: RateLimit { per_second: MIB, burst: MIB },
        }
    }
}

impl Config {
    /// What every stream is entitled to.
    pub fn credit_floor(&self) -> u64 {
        self.initial_credit.urgent.max(self.initial_credit.bulk).max(1)
    }

    /// Streams that each side may open: no more than a quarter of the budget can back.
    pub fn streams_max(&self) -> u32 {
        let backed = self.budget_bytes / 4 / self.credit_floor();
        self.max_streams.min(u32::try_from(backed).unwrap_or(u32::MAX))
    }

    /// Largest window of a stream.
    pub fn window_max(&self, class: Class) -> u64 {
        let max = match class {
            Class::Urgent => self.window_max_urgent,
            Class::Bulk => self.window_max_bulk,
        };
        max.max(self.credit_floor())
    }

    /// How fast we open streams ourselves.
    pub fn own_opens(&self) -> RateLimit {
        RateLimit { per_second: (self.opens.per_second / 4).max(1), burst: (self.opens.burst / 4).max(1) }
    }

    /// What each of so many streams may queue.
    pub(super) fn send_queue_bound(&self, streams: usize) -> usize {
        let part = (self.send_queue_bytes / streams.max(1)).max(RECORD_LEN);
        self.send_queue_bytes_per_stream.min(part)
    }

    /// A batch that any frame fits into, on a connection of so many bytes per second: what is
    /// urgent waits for no more than one.
    pub(super) fn batch_limit(&self, rate: u64) -> usize {
        let in_time = u128::from(rate) * BATCH_TIME.as_nanos() / 1_000_000_000;
        let is_fast = in_time >= self.batch_bytes_fast as u128;
        let bytes = if is_fast { self.batch_bytes_fast.max(self.batch_bytes) } else { self.batch_bytes };
        bytes.max(FRAME_LEN_MAX)
    }

    /// The longest frame at so many bytes per second.
    pub(super) fn frame_limit(&self, rate: u64) -> usize {
        let in_time = u128::from(rate) * self.frame_time.as_nanos() / 1_000_000_000;
        let in_time = usize::try_from(in_time).unwrap_or(FRAME_LEN_MAX);
        (in_time - in_time % RECORD_LEN).clamp(RECORD_LEN, FRAME_LEN_MAX)
    }

    /// Time between two pings: a connection is asked before it is given up, at a rate that the
    /// peer allows.
    pub(super) fn ping_interval(&self) -> Duration {
        self.ping_after.min(self.dead_after / 3).max(PING_INTERVAL_MIN)
    }

    pub(super) fn reserve_bytes(&self) -> usize {
        self.replay_reserve_bytes.min(self.replay_cap_bytes / 4)
    }
}
