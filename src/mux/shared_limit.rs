//! A limit in bytes per second that several sessions share, as the lanes of one peer do. Together they
//! keep to it; of those that wait for it, none is left behind.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::frame::RECORD_LEN;
use super::pacer::Pacer;

/// What one may have more than another that waits.
const AHEAD_BYTES: u64 = 4 * RECORD_LEN as u64;
/// For how long it gives way then, unless the other comes before: a timer's grain.
const GIVE_WAY: Duration = Duration::from_millis(1);
/// How late the other may come to be given way: who has nothing to send any more never comes.
const LATE: Duration = Duration::from_millis(10);
/// Who neither waits nor sends for this long is owed nothing when it comes back.
const IDLE: Duration = Duration::from_millis(100);

/// Streams are refused while the peer has sent so much more than it may.
pub const DEBT_REFUSED_BYTES: u64 = 16 << 20;
/// A peer that sends so much more than it may, on streams that are refused, loses its session.
pub(super) const DEBT_MAX_BYTES: u64 = 4 * DEBT_REFUSED_BYTES;

/// A limit that may be changed at any time; clones are the same one.
#[derive(Debug, Clone)]
pub struct SharedLimit(Arc<Mutex<Shared>>);

/// The same limit, not the same rate.
impl PartialEq for SharedLimit {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for SharedLimit {}

#[derive(Debug)]
struct Shared {
    pacer: Pacer,
    drawers: BTreeMap<u64, Drawer>,
    /// The name of the next drawer.
    next: u64,
    /// The most that one has had.
    most: u64,
}

#[derive(Debug)]
struct Drawer {
    had: u64,
    /// When it asked or sent last; `None` before it ever did.
    seen: Option<Instant>,
    /// Set while it waits: until when it may be expected.
    expected: Option<Instant>,
}

impl SharedLimit {
    /// So much per second from now on.
    pub fn new(per_second: NonZeroU64, now: Instant) -> Self {
        let pacer = Pacer::new(per_second, now);
        Self(Arc::new(Mutex::new(Shared { pacer, drawers: BTreeMap::new(), next: 0, most: 0 })))
    }

    /// A limit on what arrives: what cannot wait is counted to the last byte, as far as [`DEBT_MAX_BYTES`].
    pub fn of_arrivals(per_second: NonZeroU64, now: Instant) -> Self {
        let limit = Self::new(per_second, now);
        let mut shared = limit.locked();
        shared.pacer = Pacer::new(per_second, now).owing(DEBT_MAX_BYTES);
        drop(shared);
        limit
    }

    /// `before` at another rate, or a first one.
    pub fn renewed(before: Option<Self>, per_second: NonZeroU64, now: Instant) -> Self {
        match before {
            Some(limit) => {
                limit.set(per_second, now);
                limit
            }
            None => Self::new(per_second, now),
        }
    }

    /// Another rate. A session that waits learns of it when it is given the limit again.
    pub fn set(&self, per_second: NonZeroU64, now: Instant) {
        let mut shared = self.locked();
        if shared.pacer.per_second() != per_second {
            shared.pacer.change(per_second, now);
        }
    }

    /// The rate now.
    pub fn per_second(&self) -> NonZeroU64 {
        self.locked().pacer.per_second()
    }

    fn locked(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One session's hold on a shared limit.
#[derive(Debug)]
pub(super) struct Draw {
    limit: SharedLimit,
    name: u64,
    /// Until when it lets another go first.
    gives_way: Option<Instant>,
}

impl Draw {
    pub(super) fn new(limit: SharedLimit) -> Self {
        let mut shared = limit.locked();
        let name = shared.next;
        shared.next += 1;
        shared.drawers.insert(name, Drawer { had: 0, seen: None, expected: None });
        drop(shared);
        Self { limit, name, gives_way: None }
    }

    /// Goes on with `draw` if it is one on the same limit.
    pub(super) fn renew(draw: &mut Option<Self>, limit: Option<SharedLimit>) {
        if draw.as_ref().map(|draw| &draw.limit) != limit.as_ref() {
            *draw = limit.map(Self::new);
        }
    }

    pub(super) fn per_second(&self) -> NonZeroU64 {
        self.limit.per_second()
    }

    /// Whether a frame may leave now; if not, the caller waits until [`Draw::ready_at`].
    pub(super) fn is_ready(&mut self, now: Instant) -> bool {
        let mut shared = self.limit.locked();
        self.gives_way = None;
        shared.comes(self.name, now);
        if !shared.pacer.is_ready(now) {
            let expected = shared.pacer.ready_at() + LATE;
            shared.waits(self.name, expected);
            return false;
        }
        if shared.is_another_behind(self.name, now) {
            shared.waits(self.name, now + GIVE_WAY + LATE);
            self.gives_way = Some(now + GIVE_WAY);
            return false;
        }
        true
    }

    /// When a frame may leave, if nothing else does before.
    pub(super) fn ready_at(&self) -> Instant {
        let ready_at = self.limit.locked().pacer.ready_at();
        self.gives_way.map_or(ready_at, |until| until.max(ready_at))
    }

    /// So much has left. Returns for how long it had been waited for.
    pub(super) fn charge(&mut self, bytes: usize, now: Instant) -> Duration {
        let mut shared = self.limit.locked();
        shared.has_had(self.name, bytes as u64, now);
        shared.pacer.charge(bytes, now)
    }
}

impl Draw {
    /// What has passed before its time.
    pub(super) fn debt_bytes(&self, now: Instant) -> u64 {
        self.limit.locked().pacer.debt_bytes(now)
    }
}

impl Drop for Draw {
    fn drop(&mut self) {
        self.limit.locked().drawers.remove(&self.name);
    }
}

impl Shared {
    fn comes(&mut self, name: u64, now: Instant) {
        let most = self.most;
        let Some(drawer) = self.drawers.get_mut(&name) else { return };
        let waited = drawer.expected.is_some_and(|at| at > now);
        if !waited && drawer.seen.is_none_or(|seen| seen + IDLE < now) {
            drawer.had = most;
        }
        drawer.seen = Some(now);
    }

    fn waits(&mut self, name: u64, until: Instant) {
        if let Some(drawer) = self.drawers.get_mut(&name) {
            drawer.expected = Some(until);
        }
    }

    fn is_another_behind(&self, name: u64, now: Instant) -> bool {
        let had = self.drawers.get(&name).map_or(0, |drawer| drawer.had);
        let mut others = self.drawers.iter().filter(|(other, _)| **other != name).map(|(_, drawer)| drawer);
        others.any(|other| other.expected.is_some_and(|at| at > now) && other.had + AHEAD_BYTES <= had)
    }

    fn has_had(&mut self, name: u64, bytes: u64, now: Instant) {
        let Some(drawer) = self.drawers.get_mut(&name) else { return };
        drawer.had += bytes;
        drawer.seen = Some(now);
        drawer.expected = None;
        self.most = self.most.max(drawer.had);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FRAME: usize = 16 * 1024;

    /// Sessions that always have something to send, each asleep until it believes that it may; a
    /// timer is late by up to `grain`, the first session's never.
    fn run(rate: u64, sessions: usize, long: Duration, grain: Duration) -> Vec<usize> {
        let begin = Instant::now();
        let limit = SharedLimit::new(NonZeroU64::new(rate).unwrap(), begin);
        let mut draws: Vec<_> = (0..sessions).map(|_| Draw::new(limit.clone())).collect();
        let mut wakes = vec![begin; sessions];
        let mut sent = vec![0; sessions];
        loop {
            let (at, now) = wakes.iter().copied().enumerate().min_by_key(|(_, wake)| *wake).unwrap();
            if now >= begin + long {
                return sent;
            }
            if draws[at].is_ready(now) {
                draws[at].charge(FRAME, now);
                sent[at] += FRAME;
            } else {
                let ready_at = draws[at].ready_at();
                assert!(ready_at > now, "a wait that ends before it begins");
                wakes[at] = ready_at + if at == 0 { Duration::ZERO } else { grain };
            }
        }
    }

    #[test]
    fn together_they_keep_the_rate_and_each_has_its_part() {
        for rate in [1 << 20, 100 << 20] {
            for (sessions, grain) in [(1, 0), (2, 0), (2, 1), (4, 1)] {
                let sent = run(rate, sessions, Duration::from_secs(4), Duration::from_millis(grain));
                let all: usize = sent.iter().sum();
                let ratio = all as f64 / (4 * rate) as f64;
                assert!((0.98..1.02).contains(&ratio), "{sessions} at {rate}: {ratio}");
                let (least, most) = (*sent.iter().min().unwrap(), *sent.iter().max().unwrap());
                let most_allowed = least + least / 10 + 2 * AHEAD_BYTES as usize;
                assert!(most <= most_allowed, "{grain} ms late at {rate}: {sent:?}");
            }
        }
    }

    #[test]
    fn who_has_nothing_to_send_keeps_nobody_waiting() {
        let begin = Instant::now();
        let limit = SharedLimit::new(NonZeroU64::new(100 << 20).unwrap(), begin);
        let (mut one, mut other) = (Draw::new(limit.clone()), Draw::new(limit.clone()));
        // It has asked once, and never comes.
        assert!(!other.is_ready(begin));
        let (mut now, mut sent) = (begin, 0);
        while now < begin + Duration::from_secs(1) {
            if one.is_ready(now) {
                one.charge(FRAME, now);
                sent += FRAME;
            } else {
                now = one.ready_at();
            }
        }
        let ratio = sent as f64 / f64::from(100 << 20);
        assert!((0.98..1.02).contains(&ratio), "{ratio}");
    }

    #[test]
    fn another_rate_counts_for_all_and_one_that_ends_is_forgotten() {
        let begin = Instant::now();
        let limit = SharedLimit::new(NonZeroU64::new(1 << 20).unwrap(), begin);
        let mut draw = Some(Draw::new(limit.clone()));
        limit.set(NonZeroU64::new(2 << 20).unwrap(), begin);
        assert_eq!(draw.as_ref().unwrap().per_second().get(), 2 << 20);
        Draw::renew(&mut draw, Some(limit.clone()));
        assert_eq!(limit.locked().drawers.len(), 1, "the same draw goes on");
        Draw::renew(&mut draw, None);
        assert!(draw.is_none() && limit.locked().drawers.is_empty());
    }
}
