//! What a pump's direction has waited for, and for how long. One writes, others read meanwhile.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Wait {
    /// For nothing: it works.
    Nothing = 0,
    /// For the session to take more.
    Session = 1,
    /// For the local program to give more, after it has been given something, or at first.
    Local = 2,
    /// For the local program to give more, which has not been given anything since it gave the last:
    /// it may wait for an answer itself.
    Answer = 3,
}

const KINDS: usize = 4;

/// How long each was waited for, up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waited {
    pub session: Duration,
    pub local: Duration,
    pub answer: Duration,
}

impl Waited {
    /// Since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            session: self.session.saturating_sub(before.session),
            local: self.local.saturating_sub(before.local),
            answer: self.answer.saturating_sub(before.answer),
        }
    }
}

/// Measures one direction.
#[derive(Debug)]
pub(super) struct Waits {
    begin: Instant,
    now: AtomicU8,
    since_ns: AtomicU64,
    spent_ns: [AtomicU64; KINDS],
    answered: AtomicU8,
}

impl Default for Waits {
    fn default() -> Self {
        let spent_ns = [const { AtomicU64::new(0) }; KINDS];
        Self { begin: Instant::now(), now: 0.into(), since_ns: 0.into(), spent_ns, answered: 1.into() }
    }
}

impl Waits {
    pub(super) fn enter(&self, wait: Wait) {
        let now_ns = self.now_ns();
        let before = self.now.swap(wait as u8, Relaxed);
        let since = self.since_ns.swap(now_ns, Relaxed);
        if let Some(spent) = self.spent_ns.get(usize::from(before)) {
            spent.fetch_add(now_ns.saturating_sub(since), Relaxed);
        }
    }

    /// Waits for the local program to give more.
    pub(super) fn enter_read(&self) {
        self.enter(if self.answered.load(Relaxed) == 1 { Wait::Local } else { Wait::Answer });
    }

    /// It has given something.
    pub(super) fn given(&self) {
        self.answered.store(0, Relaxed);
        self.enter(Wait::Nothing);
    }

    /// It was given something: it is its turn.
    pub(super) fn answer(&self) {
        if self.answered.swap(1, Relaxed) == 0 && self.now.load(Relaxed) == Wait::Answer as u8 {
            self.enter(Wait::Local);
        }
    }

    /// Up to now.
    pub(super) fn waited(&self) -> Waited {
        let (now, since) = (self.now.load(Relaxed), self.since_ns.load(Relaxed));
        let lasts = self.now_ns().saturating_sub(since);
        let of = |wait: Wait| {
            let ended = self.spent_ns.get(wait as usize).map_or(0, |spent| spent.load(Relaxed));
            Duration::from_nanos(ended + if now == wait as u8 { lasts } else { 0 })
        };
        Waited { session: of(Wait::Session), local: of(Wait::Local), answer: of(Wait::Answer) }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_now(waits: &Waits, wait: Wait) -> bool {
        waits.now.load(Relaxed) == wait as u8
    }

    #[test]
    fn whose_turn_it_is_is_known_by_what_was_given_last() {
        let waits = Waits::default();
        waits.enter_read();
        assert!(is_now(&waits, Wait::Local), "nothing was asked of anybody yet");
        waits.given();
        waits.enter(Wait::Session);
        waits.enter_read();
        assert!(is_now(&waits, Wait::Answer), "it may wait for an answer");
        waits.answer();
        assert!(is_now(&waits, Wait::Local), "which has come");
        waits.given();
        waits.answer();
        assert!(is_now(&waits, Wait::Nothing), "no wait begins by an answer");
        waits.enter_read();
        assert!(is_now(&waits, Wait::Local));
    }

    #[test]
    fn a_wait_that_lasts_counts_and_one_that_has_ended_no_longer_grows() {
        let waits = Waits::default();
        waits.enter(Wait::Session);
        while waits.waited().session.is_zero() {
            std::hint::spin_loop();
        }
        waits.enter(Wait::Answer);
        let first = waits.waited();
        while waits.waited().answer == first.answer {
            std::hint::spin_loop();
        }
        let later = waits.waited().since(first);
        assert_eq!((later.session, later.local), (Duration::ZERO, Duration::ZERO));
        assert!(later.answer > Duration::ZERO);
    }
}
