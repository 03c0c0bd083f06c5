//! What is still to come of a migration: the bytes that really have to be copied, how long that takes, and
//! how long the guest will stand still. From figures to figures; what they cannot tell is not said.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Rates are over so long.
const WINDOW: Duration = Duration::from_secs(10);
/// Between two figures that are kept.
const SAMPLE_EVERY: Duration = Duration::from_millis(400);
/// Nothing is foretold from less.
const SEEN_MIN: Duration = Duration::from_secs(3);
/// What a copy that follows the guest lags behind.
const FOLLOWS_BYTES: u64 = 32 << 20;
/// Longer is not foretold.
const LEFT_MAX_S: u64 = 30 * 86_400;

/// A migration as a whole, over all its tries and all processes of its agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Whole {
    /// Bytes of disks and RAM that have been copied; what was copied again counts again.
    pub done_bytes: u64,
    /// Bytes that still have to be copied, as far as is known; grows while the guest writes.
    pub left_bytes: u64,
    /// How far it is, in thousandths; never falls.
    pub permille: u16,
    /// Seconds until the guest is at the destination; none where that cannot be foretold.
    pub left_s: Option<u64>,
    /// Milliseconds that the guest will stand still for the rest of its RAM and disks, commands and the
    /// start at the destination aside; none where that cannot be foretold.
    pub downtime_ms: Option<u64>,
    /// The part of the guest's RAM that is expected to have to be copied.
    pub ram_expected_bytes: Option<u64>,
}

impl Whole {
    fn count(&mut self, seen: &Seen) {
        self.done_bytes = self.done_bytes.max(seen.copied_bytes);
        self.left_bytes = seen.left_bytes;
        let all = u128::from(self.done_bytes) + u128::from(self.left_bytes);
        let permille = (u128::from(self.done_bytes) * 1000).checked_div(all).unwrap_or_default();
        // All of it is when the guest runs at the destination.
        self.permille = self.permille.max(permille.min(999) as u16);
    }

    /// Nothing is copied at this moment, and nothing can be foretold.
    pub fn stand_still(&mut self) {
        (self.left_s, self.downtime_ms) = (None, None);
    }

    /// It is over.
    pub fn end(&mut self, moved: bool) {
        self.stand_still();
        if moved {
            (self.left_bytes, self.permille) = (0, 1000);
        }
    }
}

/// A moment's figures.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) copied_bytes: u64,
    pub(crate) left_bytes: u64,
    /// Of that, what the disks lag behind.
    pub(crate) disks_left_bytes: u64,
    /// QEMU's figures of the RAM, once all of it was copied once.
    pub(crate) passes: Option<Passes>,
}

/// The later passes over a guest's RAM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passes {
    pub(crate) remaining_bytes: u64,
    pub(crate) dirty_bytes_per_s: u64,
    pub(crate) expected_downtime_ms: Option<u64>,
    pub(crate) downtime_limit_ms: u64,
}

/// The last figures.
#[derive(Debug, Default)]
pub(crate) struct Forecast {
    samples: VecDeque<(Instant, u64, u64)>,
    outrun: bool,
}

impl Forecast {
    /// Nothing moves for want of a connection: what was measured says nothing of what comes.
    pub(crate) fn forget(&mut self) {
        self.samples.clear();
        self.outrun = false;
    }

    /// Whether the guest makes more to copy than is copied, by the last look.
    pub(crate) fn is_outrun(&self) -> bool {
        self.outrun
    }

    pub(crate) fn look(&mut self, now: Instant, seen: &Seen, whole: &mut Whole) {
        let is_due = self.samples.back().is_none_or(|(at, ..)| now.duration_since(*at) >= SAMPLE_EVERY);
        if is_due {
            self.samples.push_back((now, seen.copied_bytes, seen.left_bytes));
            self.samples.retain(|(at, ..)| now.duration_since(*at) <= WINDOW);
        }
        whole.count(seen);
        let rate = self.rate(now, seen);
        self.outrun = rate.is_some_and(|rate| match &seen.passes {
            Some(passes) => !passes.converges(rate.copied),
            None => rate.is_outrun(seen.left_bytes),
        });
        whole.left_s = match (&seen.passes, &rate) {
            (_, None) => None,
            (Some(passes), Some(rate)) => passes.left_s(rate.copied),
            (None, Some(rate)) => rate.left_s(seen.left_bytes),
        };
        let copied = rate.map(|rate| rate.copied);
        whole.downtime_ms = seen.passes.and_then(|passes| passes.downtime_ms(copied?, seen.disks_left_bytes));
    }

    fn rate(&self, now: Instant, seen: &Seen) -> Option<Rate> {
        let (since, copied, left) = *self.samples.front()?;
        let long = now.checked_duration_since(since).filter(|long| *long >= SEEN_MIN)?;
        let per_s = |bytes: u64| (bytes as f64 / long.as_secs_f64()) as u64;
        let moved = seen.copied_bytes.checked_sub(copied)?;
        let (all, all_before) = (seen.left_bytes + seen.copied_bytes, left + copied);
        Some(Rate {
            copied: per_s(moved),
            grown: per_s(all.saturating_sub(all_before)),
            skipped: per_s(all_before.saturating_sub(all)),
        })
    }
}

/// Bytes per second.
#[derive(Clone, Copy)]
struct Rate {
    copied: u64,
    /// That there is more to copy.
    grown: u64,
    /// That turned out not to have to be copied.
    skipped: u64,
}

impl Rate {
    /// What is left when a copy only follows the guest is no sign of it.
    fn is_outrun(self, left_bytes: u64) -> bool {
        left_bytes > FOLLOWS_BYTES && self.copied > 0 && self.grown >= self.copied / 10 * 9
    }

    fn left_s(self, left_bytes: u64) -> Option<u64> {
        // Through a large hole: the time is neither that of the hole nor that without it.
        let in_a_hole = self.skipped > self.copied;
        let net = self.copied.checked_sub(self.grown).filter(|net| *net > self.copied / 20)?;
        let left_s = left_bytes.div_ceil(net.max(1));
        (!in_a_hole && left_s <= LEFT_MAX_S).then_some(left_s)
    }
}

impl Passes {
    /// Whether the RAM is copied faster than it changes.
    fn converges(&self, rate: u64) -> bool {
        self.dirty_bytes_per_s < rate / 10 * 9
    }

    fn left_s(&self, rate: u64) -> Option<u64> {
        if !self.converges(rate) {
            return None;
        }
        // QEMU ends the passes when the rest fits into the pause.
        let in_the_pause = rate.saturating_mul(self.downtime_limit_ms) / 1000;
        let before = self.remaining_bytes.saturating_sub(in_the_pause);
        Some(before.div_ceil((rate - self.dirty_bytes_per_s).max(1)).max(1)).filter(|s| *s <= LEFT_MAX_S)
    }

    fn downtime_ms(&self, rate: u64, disks_left_bytes: u64) -> Option<u64> {
        let ram_ms = self.expected_downtime_ms?;
        let ram_ms = if self.converges(rate) { ram_ms.min(self.downtime_limit_ms) } else { ram_ms };
        let disks_ms = disks_left_bytes.saturating_mul(1000).checked_div(rate)?;
        Some(ram_ms + disks_ms)
    }
}

/// Of what a copy still has to go over, the bytes that have to be copied: holes and pages of zeroes cost
/// nothing. `moved_bytes` were copied for `covered_bytes`; `expected_bytes` are those in all, if that is known.
pub(crate) fn really_left(left: u64, covered: u64, moved: u64, expected: Option<u64>) -> u64 {
    match expected {
        None => left,
        Some(expected) if expected > moved => left.min(expected - moved),
        // It was too little; as dense as what was covered.
        Some(_) => {
            let dense = u128::from(left) * u128::from(moved) / u128::from(covered.max(1));
            u64::try_from(dense).unwrap_or(u64::MAX).min(left)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Looks every quarter of a second for `seconds`, at (copied, left) MiB after so many seconds.
    fn run(seconds: u32, at: impl Fn(f64) -> (f64, f64)) -> Vec<Whole> {
        let (mut forecast, mut whole, begin) = (Forecast::default(), Whole::default(), Instant::now());
        let looks = (0..=seconds * 4).map(|n| {
            let long = Duration::from_millis(250) * n;
            let (copied, left) = at(long.as_secs_f64());
            let bytes = |mib: f64| (mib * MIB as f64) as u64;
            let seen = Seen { copied_bytes: bytes(copied), left_bytes: bytes(left), ..Seen::default() };
            forecast.look(begin + long, &seen, &mut whole);
            whole.clone()
        });
        looks.collect()
    }

    #[test]
    fn the_time_left_is_that_of_what_has_to_be_copied_or_is_not_told() {
        type Course = fn(f64) -> (f64, f64);
        let cases: [(&str, Course, Option<u64>); 7] = [
            ("steady", |t| (100.0 * t, 4000.0 - 100.0 * t), Some(20)),
            ("the guest writes half as fast", |t| (100.0 * t, 4000.0 - 50.0 * t), Some(60)),
            ("the guest writes as fast as it is copied", |t| (100.0 * t, 4000.0), None),
            ("faster", |t| (100.0 * t, 4000.0 + 10.0 * t), None),
            ("through a hole", |t| (t, 1e6 - 1000.0 * t), None),
            ("nothing moves", |_| (100.0, 4000.0), None),
            ("so slow that nobody knows", |t| (t, 4e6 - t), None),
        ];
        for (name, course, expected) in cases {
            let seen = run(20, course);
            assert_eq!(seen.last().unwrap().left_s, expected, "{name}");
            assert!(seen[..12].iter().all(|whole| whole.left_s.is_none()), "{name}: too early");
        }
    }

    #[test]
    fn a_guest_that_outruns_the_copy_is_told_from_a_copy_that_follows_it() {
        let outrun = |left: u64, grown: u64, passes: Option<Passes>| {
            let (mut forecast, mut whole, begin) = (Forecast::default(), Whole::default(), Instant::now());
            for second in 0..10 {
                let (copied_bytes, left_bytes) =
                    (100 * MIB * second, left + grown * second - 100 * MIB * second);
                let seen = Seen { copied_bytes, left_bytes, passes, ..Seen::default() };
                forecast.look(begin + Duration::from_secs(second), &seen, &mut whole);
            }
            let while_it_lasts = forecast.is_outrun();
            forecast.forget();
            (while_it_lasts, forecast.is_outrun())
        };
        let passes = |dirty| {
            Some(Passes {
                remaining_bytes: 500 * MIB,
                dirty_bytes_per_s: dirty,
                expected_downtime_ms: None,
                downtime_limit_ms: 300,
            })
        };
        assert_eq!(outrun(4000 * MIB, 100 * MIB, None), (true, false), "as fast as it is copied");
        assert_eq!(outrun(4000 * MIB, 50 * MIB, None), (false, false), "half as fast");
        assert_eq!(outrun(FOLLOWS_BYTES, 100 * MIB, None), (false, false), "the copy follows it");
        assert_eq!(outrun(4000 * MIB, 0, passes(95 * MIB)), (true, false), "its RAM changes as fast");
        assert_eq!(outrun(4000 * MIB, 0, passes(50 * MIB)), (false, false), "half as fast");
    }

    #[test]
    fn what_was_faster_before_is_forgotten() {
        let seen = run(30, |t| {
            (
                100.0 * t.min(10.0) + 10.0 * (t - 10.0).max(0.0),
                2000.0 - 100.0 * t.min(10.0) - 10.0 * (t - 10.0).max(0.0),
            )
        });
        assert_eq!(seen.last().unwrap().left_s, Some(80));
    }

    #[test]
    fn the_total_never_jumps_back() {
        // A try fails after 6 s and all of it begins again; then the guest writes a lot.
        let course = |t: f64| {
            let left = if t < 6.0 { 1000.0 - 100.0 * t } else { 1000.0 - 100.0 * (t - 6.0) };
            (100.0 * t, if t < 12.0 { left } else { left + 5000.0 })
        };
        let seen = run(15, course);
        assert!(
            seen.windows(2).all(|w| w[0].permille <= w[1].permille && w[0].done_bytes <= w[1].done_bytes)
        );
        assert_eq!((seen[23].permille, seen[24].permille), (575, 575), "held, not taken back");
        assert!(seen[46].permille > 575, "and goes on before the second try ends: {:?}", seen[46]);
        let mut whole = seen.last().unwrap().clone();
        assert!(whole.permille < 1000);
        whole.end(true);
        assert_eq!((whole.permille, whole.left_bytes, whole.left_s), (1000, 0, None));
    }

    #[test]
    fn holes_and_zeroes_cost_nothing() {
        for (left, covered, moved, expected, really) in [
            (100, 0, 0, None, 100),
            (100, 0, 0, Some(10), 10),
            (95, 5, 5, Some(10), 5),
            (3, 97, 5, Some(10), 3),
            // More was allocated than was said, as in a compressed image.
            (50, 50, 25, Some(20), 25),
            (50, 50, 80, Some(20), 50),
            (50, 0, 80, Some(20), 50),
        ] {
            assert_eq!(really_left(left, covered, moved, expected), really, "{left} {covered} {moved}");
        }
    }

    #[test]
    fn the_pause_is_foretold_once_the_ram_was_copied_once() {
        let passes = Passes {
            remaining_bytes: 500 * MIB,
            dirty_bytes_per_s: 20 * MIB,
            expected_downtime_ms: Some(5000),
            downtime_limit_ms: 300,
        };
        let rate = 100 * MIB;
        assert_eq!(passes.left_s(rate), Some(6), "470 MiB at 80 MiB/s");
        assert_eq!(passes.downtime_ms(rate, 10 * MIB), Some(400), "QEMU pauses no longer than its limit");
        let faster = Passes { dirty_bytes_per_s: 95 * MIB, ..passes };
        assert_eq!((faster.left_s(rate), faster.downtime_ms(rate, 0)), (None, Some(5000)));
        assert_eq!(passes.downtime_ms(0, 0), None, "nothing moves");
    }
}
