//! Which parts of a disk are known to be equal on both hosts. Pure.
//!
//! # What counts as equal
//!
//! Parts are compared in rounds. A round begins when a dirty bitmap begins to record; after that the
//! mirror has written everything that was written before (`source/copies.rs` says how that is known);
//! then both sides hash. It ends when the next bitmap begins to record and the first one is read.
//! QEMU sets a bit when a write of the guest is over. So of a part whose hashes are equal and that is not
//! in the round's bitmap: nothing of the mirror's was outstanding for it, and the guest has not written
//! to it, from before both hashes to the round's end. A write that was under way meanwhile is in the next
//! bitmap when it ends, and takes the part back out of what is known.
//!
//! # What counts as different
//!
//! A write of the guest that is under way may be at the source's image, and in no bitmap, and not at the
//! destination. So a part that differs is compared again, and is a difference when it differs in two rounds
//! that lie [`CONFIRM_AFTER`] apart, and is in the bitmap of neither.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What is known is known of so many bytes at once: the granularity of the bitmaps.
pub(crate) const UNIT_BYTES: u64 = 64 * 1024;
/// The longest part that has one hash.
pub(crate) const PIECE_BYTES_MAX: u64 = 1 << 20;
/// A part that differs is compared again until so long after the first time. No write of a guest takes as long
/// on a disk that works.
pub(crate) const CONFIRM_AFTER: Duration = Duration::from_secs(3);
/// Units that may be under suspicion at once; a disk that differs all over is found out by these.
const SUSPECTS_MAX: usize = 256;

/// A set of units.
#[derive(Debug, Clone)]
struct Units(Vec<u64>);

impl Units {
    fn none(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    fn has(&self, unit: u64) -> bool {
        self.0.get((unit / 64) as usize).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    fn set(&mut self, unit: u64, to: bool) {
        if let Some(word) = self.0.get_mut((unit / 64) as usize) {
            let bit = 1 << (unit % 64);
            if to { *word |= bit } else { *word &= !bit }
        }
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The first one from `unit` on that `others`, as many, have not.
    fn next_but(&self, others: &Self, unit: u64) -> Option<u64> {
        let word = |at: usize| Some(*self.0.get(at)? & !others.0.get(at).copied().unwrap_or(0));
        let mut at = (unit / 64) as usize;
        let mut word_here = word(at)? >> (unit % 64) << (unit % 64);
        while word_here == 0 {
            at += 1;
            word_here = word(at)?;
        }
        Some(at as u64 * 64 + u64::from(word_here.trailing_zeros()))
    }

    fn remove(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= !other);
    }
}

#[derive(Debug, Clone)]
struct Suspect {
    since: Instant,
    last: Instant,
    /// Rounds in which it differed and was left alone.
    rounds: u32,
    /// It differed in this round.
    differs: bool,
}

/// What is known of one disk.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    bytes: u64,
    /// What is compared at all.
    asked: Units,
    /// Of that, what is not known to be equal.
    open: Units,
    /// What was equal in this round.
    equal: Units,
    suspects: BTreeMap<u64, Suspect>,
    /// Known to differ.
    different: Vec<u64>,
}

impl Ledger {
    /// Of a disk of so many bytes. `is_asked` says of each piece, by its number, whether it is compared.
    pub(crate) fn new(bytes: u64, mut is_asked: impl FnMut(u64) -> bool) -> Self {
        let units = bytes.div_ceil(UNIT_BYTES);
        let mut asked = Units::none(units);
        let per_piece = PIECE_BYTES_MAX / UNIT_BYTES;
        for piece in (0..units.div_ceil(per_piece)).filter(|piece| is_asked(*piece)) {
            let begin = piece * per_piece;
            (begin..units.min(begin + per_piece)).for_each(|unit| asked.set(unit, true));
        }
        let (open, equal) = (asked.clone(), Units::none(units));
        Self { bytes, asked, open, equal, suspects: BTreeMap::new(), different: Vec::new() }
    }

    /// What is compared at all, in bytes.
    pub(crate) fn asked_bytes(&self) -> u64 {
        self.bytes_of(&self.asked)
    }

    /// What of that is not known to be equal, in bytes.
    pub(crate) fn open_bytes(&self) -> u64 {
        self.bytes_of(&self.open)
    }

    fn bytes_of(&self, units: &Units) -> u64 {
        let whole = units.count() * UNIT_BYTES;
        let last = self.bytes.div_ceil(UNIT_BYTES).saturating_sub(1);
        let missing = (last + 1) * UNIT_BYTES - self.bytes;
        if units.has(last) { whole - missing } else { whole }
    }

    /// The first piece from `from` on that is not known to be equal, and was not equal in this round.
    pub(crate) fn next_piece(&self, from: u64) -> Option<Range<u64>> {
        let begin = self.open.next_but(&self.equal, from.div_ceil(UNIT_BYTES))?;
        let per_piece = PIECE_BYTES_MAX / UNIT_BYTES;
        let border = (begin / per_piece + 1) * per_piece;
        let end =
            (begin..border).find(|unit| !self.open.has(*unit) || self.equal.has(*unit)).unwrap_or(border);
        Some(begin * UNIT_BYTES..(end * UNIT_BYTES).min(self.bytes))
    }

    /// Of a part that is all zeroes, what a unit or more of it is; the end of the disk counts as a unit's.
    pub(crate) fn whole_units(&self, part: &Range<u64>) -> Range<u64> {
        let end = if part.end == self.bytes { part.end } else { part.end / UNIT_BYTES * UNIT_BYTES };
        part.start.next_multiple_of(UNIT_BYTES)..end
    }

    /// Both sides' hashes of a piece are the same, or it reads as zeroes on both.
    pub(crate) fn is_equal(&mut self, piece: &Range<u64>) {
        for unit in units(piece) {
            self.equal.set(unit, true);
            self.suspects.remove(&unit);
        }
    }

    /// They are not. What is to be compared again, smaller; nothing of what cannot be made smaller.
    pub(crate) fn differs(&mut self, piece: &Range<u64>, now: Instant) -> Vec<Range<u64>> {
        if piece.end - piece.start > UNIT_BYTES {
            let begins = (piece.start..piece.end).step_by(UNIT_BYTES as usize);
            return begins.map(|at| at..piece.end.min(at + UNIT_BYTES)).collect();
        }
        for unit in units(piece) {
            if self.suspects.len() < SUSPECTS_MAX || self.suspects.contains_key(&unit) {
                let first = Suspect { since: now, last: now, rounds: 0, differs: true };
                let suspect = self.suspects.entry(unit).or_insert(first);
                (suspect.last, suspect.differs) = (now, true);
            }
        }
        Vec::new()
    }

    /// The guest has written to a part since the round began.
    pub(crate) fn was_written(&mut self, part: &Range<u64>) {
        for unit in units(part) {
            self.equal.set(unit, false);
            self.suspects.remove(&unit);
            if self.asked.has(unit) {
                self.open.set(unit, true);
            }
        }
    }

    /// The round is over, and all that the guest has written in it is told.
    pub(crate) fn end_round(&mut self) {
        self.open.remove(&self.equal);
        self.equal.0.fill(0);
        // One that was not compared in this round is as suspect as before.
        for suspect in self.suspects.values_mut().filter(|suspect| suspect.differs) {
            (suspect.rounds, suspect.differs) = (suspect.rounds + 1, false);
        }
        let is_sure =
            |s: &Suspect| s.rounds > 1 && s.last.saturating_duration_since(s.since) >= CONFIRM_AFTER;
        self.different = self.suspects.iter().filter(|(_, s)| is_sure(s)).map(|(unit, _)| *unit).collect();
    }

    /// Whether a part is under suspicion.
    pub(crate) fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }

    /// The first part that is known to differ.
    pub(crate) fn difference(&self) -> Option<Range<u64>> {
        let first = *self.different.first()?;
        let in_a_row = self.different.iter().zip(first..).take_while(|(unit, next)| *unit == next).count();
        Some(first * UNIT_BYTES..((first + in_a_row as u64) * UNIT_BYTES).min(self.bytes))
    }
}

/// The units of which a part has a byte.
fn units(part: &Range<u64>) -> Range<u64> {
    part.start / UNIT_BYTES..part.end.div_ceil(UNIT_BYTES)
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "a failure here is a failure of the test"
)]
mod tests {
    use super::*;

    const ODD: u64 = 3 * PIECE_BYTES_MAX + UNIT_BYTES + 512;

    fn all(bytes: u64) -> Ledger {
        Ledger::new(bytes, |_| true)
    }

    fn pieces(ledger: &Ledger) -> Vec<Range<u64>> {
        let next = |before: &Range<u64>| ledger.next_piece(before.end);
        std::iter::successors(ledger.next_piece(0), next).collect()
    }

    #[test]
    fn pieces_cover_a_disk_of_any_size_once() {
        for bytes in [512, UNIT_BYTES, UNIT_BYTES + 1, PIECE_BYTES_MAX, ODD, 64 * UNIT_BYTES, 65 * UNIT_BYTES]
        {
            let ledger = all(bytes);
            let pieces = pieces(&ledger);
            let mut at = 0;
            for piece in &pieces {
                assert_eq!(piece.start, at);
                assert!(piece.end - piece.start <= PIECE_BYTES_MAX);
                at = piece.end;
            }
            assert_eq!(at, bytes);
            assert_eq!((ledger.asked_bytes(), ledger.open_bytes()), (bytes, bytes));
        }
        assert_eq!(all(0).next_piece(0), None);
    }

    #[test]
    fn what_reads_as_zeroes_on_both_sides_is_not_hashed_in_that_round() {
        let mut ledger = all(ODD);
        assert_eq!(ledger.whole_units(&(1..2 * UNIT_BYTES + 1)), UNIT_BYTES..2 * UNIT_BYTES);
        assert!(ledger.whole_units(&(1..UNIT_BYTES)).is_empty(), "none of these is whole");
        assert_eq!(ledger.whole_units(&(ODD - 512..ODD)), ODD - 512..ODD);
        ledger.is_equal(&(UNIT_BYTES..PIECE_BYTES_MAX));
        let rest = [0..UNIT_BYTES, PIECE_BYTES_MAX..2 * PIECE_BYTES_MAX];
        assert_eq!(pieces(&ledger)[..2], rest);
        // The guest writes there before the round ends.
        ledger.was_written(&(2 * UNIT_BYTES..3 * UNIT_BYTES));
        ledger.end_round();
        assert_eq!(pieces(&ledger)[..2], [0..UNIT_BYTES, 2 * UNIT_BYTES..3 * UNIT_BYTES]);
    }

    #[test]
    fn what_is_equal_and_was_left_alone_is_known_until_it_is_written_again() {
        let mut ledger = all(ODD);
        pieces(&ledger).iter().for_each(|piece| ledger.is_equal(piece));
        ledger.was_written(&(UNIT_BYTES + 7..UNIT_BYTES + 8));
        ledger.end_round();
        assert_eq!(pieces(&ledger), [UNIT_BYTES..2 * UNIT_BYTES]);
        ledger.is_equal(&(UNIT_BYTES..2 * UNIT_BYTES));
        ledger.end_round();
        assert_eq!((ledger.open_bytes(), ledger.next_piece(0)), (0, None));
        ledger.was_written(&(ODD - 1..ODD));
        ledger.end_round();
        assert_eq!(ledger.open_bytes(), 512);
    }

    #[test]
    fn a_difference_is_one_in_two_rounds_that_nobody_wrote_to() {
        let mut ledger = all(ODD);
        let began = Instant::now();
        let late = began + CONFIRM_AFTER;
        let unit = UNIT_BYTES..2 * UNIT_BYTES;
        let smaller = ledger.differs(&(0..PIECE_BYTES_MAX), began);
        assert_eq!(smaller.len(), 16);
        assert!(ledger.differs(&unit, began).is_empty());
        ledger.end_round();
        assert_eq!(ledger.difference(), None, "one round is not enough");
        ledger.differs(&unit, began);
        ledger.end_round();
        assert_eq!(ledger.difference(), None, "it may be a write that is under way");
        ledger.differs(&unit, late);
        ledger.end_round();
        assert_eq!(ledger.difference(), Some(unit.clone()));

        for (what, acquit) in [
            ("written", (|l: &mut Ledger, u: &Range<u64>| l.was_written(u)) as fn(&mut Ledger, &Range<u64>)),
            ("equal", |l, u| l.is_equal(u)),
        ] {
            let mut ledger = all(ODD);
            ledger.differs(&unit, began);
            ledger.end_round();
            ledger.differs(&unit, late);
            acquit(&mut ledger, &unit);
            ledger.end_round();
            assert_eq!((ledger.difference(), ledger.has_suspects()), (None, false), "{what}");
        }
    }

    #[test]
    fn neighbours_are_one_difference_and_a_disk_that_differs_all_over_is_bounded() {
        let mut ledger = all(1 << 30);
        let began = Instant::now();
        for round in 0..2 {
            let now = began + round * CONFIRM_AFTER;
            for unit in 1..10_000 {
                ledger.differs(&(unit * UNIT_BYTES..(unit + 1) * UNIT_BYTES), now);
            }
            ledger.end_round();
        }
        let found = ledger.difference().unwrap();
        assert_eq!(found, UNIT_BYTES..(1 + SUSPECTS_MAX as u64) * UNIT_BYTES);
    }

    #[test]
    fn only_the_sample_is_compared() {
        let mut ledger = Ledger::new(ODD, |piece| piece == 1);
        assert_eq!(pieces(&ledger), [PIECE_BYTES_MAX..2 * PIECE_BYTES_MAX]);
        ledger.was_written(&(0..ODD));
        ledger.end_round();
        assert_eq!(ledger.asked_bytes(), PIECE_BYTES_MAX);
        assert_eq!(ledger.open_bytes(), PIECE_BYTES_MAX);
    }
}
