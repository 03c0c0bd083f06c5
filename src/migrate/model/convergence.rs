//! Whether the copies of disks come to an end, or their guest outruns them. From figures to a decision. A round
//! lasts until as much was copied as was left at its beginning: what is left then is what the guest has written
//! meanwhile, however fast the link and however large the disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::progress::DiskProgress;

/// A round copies so much at least.
const ROUND_BYTES_MIN: u64 = 32 << 20;
/// And lasts so long at least.
const ROUND_MIN: Duration = Duration::from_secs(3);
/// So many rounds in a row after which no less is left.
const ROUNDS: u32 = 2;
/// So many in all for a copy that was whole once.
const ROUNDS_MAX: u32 = 8;
/// A guest may write so much in a second in any case.
const LIMIT_BYTES_MIN: u64 = 64 << 10;
/// What a copy that follows its guest lags behind.
const LITTLE_BYTES: u64 = 4 << 20;

/// A disk whose guest outruns its copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outrun {
    pub(crate) disk: String,
    /// What was copied of it in a second.
    pub(crate) bytes_per_s: u64,
}

/// A disk's copy from one look to the next.
#[derive(Debug)]
struct Copy {
    began: Instant,
    copied_bytes: u64,
    left_bytes: u64,
    /// By the last round.
    bytes_per_s: u64,
    /// Rounds after which no less was left.
    unfallen: u32,
    /// Rounds since it was whole once.
    since_ready: u32,
}

impl Copy {
    fn begin(now: Instant, disk: &DiskProgress) -> Self {
        Self {
            began: now,
            copied_bytes: disk.done_bytes,
            left_bytes: left(disk),
            bytes_per_s: 0,
            unfallen: 0,
            since_ready: 0,
        }
    }

    fn look(&mut self, now: Instant, disk: &DiskProgress) {
        let long = now.duration_since(self.began);
        let copied = disk.done_bytes.saturating_sub(self.copied_bytes);
        if copied < self.left_bytes.max(ROUND_BYTES_MIN) || long < ROUND_MIN {
            return;
        }
        let has_fallen = left(disk) <= self.left_bytes / 4 * 3;
        *self = Self {
            bytes_per_s: (copied as f64 / long.as_secs_f64()) as u64,
            unfallen: if has_fallen { 0 } else { self.unfallen + 1 },
            since_ready: self.since_ready + u32::from(disk.ready),
            ..Self::begin(now, disk)
        };
    }

    fn is_outrun(&self) -> bool {
        self.unfallen >= ROUNDS || self.since_ready >= ROUNDS_MAX
    }
}

fn left(disk: &DiskProgress) -> u64 {
    disk.total_bytes.saturating_sub(disk.done_bytes)
}

/// What the guest has written to a disk, and what that makes to copy: from two looks to a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) at: Instant,
    pub(crate) guest_bytes: u64,
    pub(crate) to_copy_bytes: u64,
    pub(crate) copied_bytes: u64,
}

impl Written {
    pub(crate) fn of(at: Instant, guest_bytes: u64, disk: &DiskProgress) -> Self {
        Self { at, guest_bytes, to_copy_bytes: disk.total_bytes, copied_bytes: disk.done_bytes }
    }

    /// With how many bytes per second of the guest's writes half of what is copied is left for what is behind;
    /// none where its writes are not what outruns the copy. A small write can make much to copy. What is copied in
    /// passes counts once in each, at the pass's beginning mostly: there the rounds alone tell that it is outrun.
    pub(crate) fn limit_until(&self, now: &Self, in_passes: bool) -> Option<u64> {
        let long = now.at.duration_since(self.at).as_secs_f64();
        let per_s = |now: u64, before: u64| now.saturating_sub(before) as f64 / long.max(0.001);
        let guest = per_s(now.guest_bytes, self.guest_bytes);
        let dirtied = per_s(now.to_copy_bytes, self.to_copy_bytes);
        let copied = per_s(now.copied_bytes, self.copied_bytes);
        let dirtied = if in_passes { dirtied.max(copied) } else { dirtied };
        let limit = guest * (copied / 2.0) / dirtied.max(1.0);
        (guest >= 1.0 && limit < guest).then(|| (limit as u64).max(LIMIT_BYTES_MIN))
    }
}

/// All disks of a migration, from look to look.
#[derive(Debug, Default)]
pub(crate) struct Convergence {
    copies: BTreeMap<String, Copy>,
    /// How many disks were copied once.
    ready: usize,
}

impl Convergence {
    /// Nothing was copied for a while, for want of a connection: what was measured says nothing.
    pub(crate) fn forget(&mut self) {
        self.copies.clear();
    }

    /// Whether it is still open for one of these whether its copy comes to an end.
    pub(crate) fn is_open(&self) -> bool {
        !self.copies.is_empty()
    }

    /// The disks whose guest has to be slowed down, once none of the others comes any nearer to its end: until
    /// then they take from the link what these are short of. `disks` are those that are being copied.
    pub(crate) fn look<'a>(
        &mut self,
        now: Instant,
        disks: impl Iterator<Item = &'a DiskProgress>,
        pause: Duration,
    ) -> Vec<Outrun> {
        let (mut seen, mut ready) = (BTreeMap::new(), 0);
        for disk in disks {
            ready += usize::from(disk.ready);
            let mut copy = self.copies.remove(&disk.name).unwrap_or_else(|| Copy::begin(now, disk));
            copy.look(now, disk);
            if !is_in_step(disk, copy.bytes_per_s, pause) {
                seen.insert(disk.name.clone(), copy);
            }
        }
        if ready > std::mem::replace(&mut self.ready, ready) {
            // What it took from the link is the others' from now on.
            seen.clear();
        }
        self.copies = seen;
        let open = || self.copies.iter();
        if !open().all(|(_, copy)| copy.is_outrun()) {
            return Vec::new();
        }
        open().map(|(disk, copy)| Outrun { disk: disk.clone(), bytes_per_s: copy.bytes_per_s }).collect()
    }
}

/// Whether what is left is copied in the guest's pause without making it much longer.
pub(crate) fn is_in_step(disk: &DiskProgress, bytes_per_s: u64, pause: Duration) -> bool {
    let in_the_pause = (bytes_per_s as f64 * pause.as_secs_f64()) as u64;
    disk.ready && left(disk) <= in_the_pause.max(LITTLE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const TICK: Duration = Duration::from_millis(250);
    const PAUSE: Duration = Duration::from_millis(300);

    /// A disk of so many MiB, a link that carries so much of it, and a guest that writes so much, each in MiB
    /// per second, to so many MiB again and again.
    struct Guest {
        disk: DiskProgress,
        link: u64,
        writes: u64,
        to: u64,
    }

    impl Guest {
        fn new(name: &str, size: u64, link: u64, writes: u64, to: u64) -> Self {
            Self { disk: DiskProgress::new(name, size * MIB, None), link, writes, to }
        }

        fn step(&mut self) {
            let disk = &mut self.disk;
            let copied = left(disk).min(self.link * MIB / 4);
            disk.done_bytes += copied;
            disk.ready |= left(disk) == 0;
            // What is to be copied already is not to be copied twice.
            let room = (self.to * MIB).saturating_sub(left(disk));
            disk.total_bytes += (self.writes * MIB / 4).min(room);
        }
    }

    /// After how many seconds the guest is found to outrun which of its disks' copies; within two hours.
    fn watch(
        guests: &mut [Guest],
        mut meanwhile: impl FnMut(u32, &mut [Guest], &mut Convergence),
    ) -> Option<(u32, Vec<String>)> {
        let (mut convergence, begin) = (Convergence::default(), Instant::now());
        (0..4 * 7200).find_map(|tick| {
            guests.iter_mut().for_each(Guest::step);
            meanwhile(tick / 4, guests, &mut convergence);
            let disks = guests.iter().map(|guest| &guest.disk);
            let outrun = convergence.look(begin + TICK * tick, disks, PAUSE);
            let names: Vec<_> = outrun.into_iter().map(|outrun| outrun.disk).collect();
            (!names.is_empty()).then_some((tick / 4, names))
        })
    }

    fn alone(size: u64, link: u64, writes: u64, to: u64) -> Option<u32> {
        watch(&mut [Guest::new("vda", size, link, writes, to)], |_, _, _| {}).map(|(seconds, _)| seconds)
    }

    #[test]
    fn a_guest_is_slowed_only_when_nothing_else_ends_its_disks_copy() {
        // Whatever the link, by how much it copies in vain: the disk once, what is written again twice.
        assert_eq!(alone(1000, 100, 200, 1000), Some(20), "all of the disk is left all the time");
        assert!(alone(1000, 100, 200, 300).is_some_and(|s| (14..20).contains(&s)));
        assert!(alone(1000, 10, 20, 300).is_some_and(|s| (140..200).contains(&s)), "a slower link");
        assert!(alone(1 << 20, 1000, 2000, 1000).is_some_and(|s| s > 1000), "a larger disk");
        assert_eq!(alone(1000, 100, 0, 0), None, "a guest at rest");
        assert_eq!(alone(1000, 100, 50, 1000), None, "one that writes less than the link carries");
        assert_eq!(alone(1000, 100, 200, 20), None, "what is behind is copied in the pause");
        assert_eq!(alone(1000, 100, 200, 2), None, "it writes the same little again and again");
    }

    #[test]
    fn a_disk_that_is_copied_beside_others_is_given_their_part_first() {
        let guests = || [Guest::new("big", 5000, 50, 0, 0), Guest::new("hot", 500, 50, 60, 100)];
        let found = watch(&mut guests(), |_, guests, _| {
            if guests[0].disk.ready {
                guests[1].link = 100;
            }
        });
        assert_eq!(found, None, "with all of the link it ends");
        let (seconds, names) = watch(&mut guests(), |_, _, _| {}).unwrap_or_default();
        assert!(names == ["hot"] && seconds >= 100, "after {seconds} s: {names:?}");
    }

    #[test]
    fn what_was_measured_around_an_outage_says_nothing() {
        let outage = |from: u32| {
            move |second: u32, guests: &mut [Guest], convergence: &mut Convergence| {
                let is_away = (from..from + 60).contains(&second);
                guests[0].link = if is_away { 0 } else { 100 };
                if is_away {
                    convergence.forget();
                }
            }
        };
        let mut guest = [Guest::new("vda", 1000, 100, 50, 1000)];
        assert_eq!(watch(&mut guest, outage(12)), None, "it catches up");
    }

    #[test]
    fn a_limit_leaves_half_of_the_link_to_what_is_behind() {
        let begin = Instant::now();
        let written = |seconds: u64, guest: u64, to_copy: u64, copied: u64| Written {
            at: begin + Duration::from_secs(seconds),
            guest_bytes: seconds * guest * MIB,
            to_copy_bytes: seconds * to_copy * MIB,
            copied_bytes: seconds * copied * MIB,
        };
        let limit = |guest, to_copy, copied| {
            written(0, guest, to_copy, copied).limit_until(&written(4, guest, to_copy, copied), false)
        };
        assert_eq!(limit(80, 80, 40), Some(20 * MIB));
        assert_eq!(limit(5, 80, 40), Some(5 * MIB / 4), "each write makes sixteen times as much to copy");
        assert_eq!(limit(20, 20, 80), None, "its writes are not what outruns the copy");
        assert_eq!(limit(0, 80, 40), None, "nor when it does not write, but discards");
        assert_eq!(limit(1, 1, 0), Some(LIMIT_BYTES_MIN), "never nothing");
        let in_passes = |guest, to_copy, copied| {
            written(0, guest, to_copy, copied).limit_until(&written(4, guest, to_copy, copied), true)
        };
        assert_eq!(in_passes(5, 80, 40), Some(5 * MIB / 4));
        assert_eq!(in_passes(6, 0, 40), Some(3 * MIB), "at the end of a pass all of it is dirty already");
        assert_eq!(in_passes(0, 0, 40), None);
    }

    #[test]
    fn a_copy_that_swings_and_never_ends_is_found_too() {
        let swing = |second: u32, guests: &mut [Guest], _: &mut Convergence| {
            guests[0].writes = if (second / 4).is_multiple_of(2) { 30 } else { 150 };
        };
        assert!(watch(&mut [Guest::new("vda", 100, 100, 0, 400)], swing).is_some());
    }
}
