//! What a migration would copy, how long it would take and how long the guest would stand still, foretold from what is
//! seen before it begins: as if the guest and the way to the destination went on as they are now. From figures to
//! figures.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longer is not foretold.
const SECONDS_MAX: u64 = 30 * 86_400;

/// A disk that would be copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskOutlook {
    pub disk: String,
    /// Bytes that the guest sees.
    pub virtual_bytes: u64,
    /// What its image occupies; none where QEMU does not say.
    pub allocated_bytes: Option<u64>,
    /// What was written to it since its replica at the destination was in step, which is all that is copied if the
    /// destination finds its image as it was left; none where there is no replica that could be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_bytes: Option<u64>,
}

impl DiskOutlook {
    /// What has to be copied of it at least, as far as is known.
    fn bytes(&self) -> u64 {
        if let Some(changed) = self.changed_bytes {
            return changed.min(self.virtual_bytes);
        }
        self.allocated_bytes.map_or(self.virtual_bytes, |bytes| bytes.min(self.virtual_bytes))
    }
}

/// A guest before it is moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outlook {
    /// Those that would be copied.
    pub disks: Vec<DiskOutlook>,
    /// Bytes of RAM that hold something, at most.
    pub ram_bytes: Option<u64>,
    /// Bytes of RAM that the guest changes in a second; 0 of one that is paused, none where that was not measured.
    pub ram_dirty_bytes_per_s: Option<u64>,
}

/// What would come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Prediction {
    /// Bytes that would be copied, disks and RAM together.
    pub bytes: u64,
    /// Seconds; none where the RAM would never be in step, or too many to be foretold.
    pub seconds: Option<u64>,
    /// Milliseconds that the guest would stand still for the rest of its RAM; commands and the start at the
    /// destination come on top. None where the RAM would never be in step.
    pub downtime_ms: Option<u64>,
    /// The guest changes its RAM faster than it can be copied: it would have to be slowed down.
    pub outruns: bool,
}

impl Outlook {
    /// At so many bytes in a second. None where too little is known.
    pub fn predict(&self, bytes_per_s: u64, downtime_limit_ms: u64) -> Option<Prediction> {
        let (ram, dirty) = (self.ram_bytes?, self.ram_dirty_bytes_per_s?);
        let rate = u128::from(bytes_per_s).max(1);
        let disks: u128 = self.disks.iter().map(|disk| u128::from(disk.bytes())).sum();
        let in_the_pause = rate * u128::from(downtime_limit_ms) / 1000;
        let (mut bytes, mut left) = (disks, u128::from(ram));
        let dirty = u128::from(dirty);
        let outruns = left > in_the_pause && dirty * 10 >= rate * 9;
        // Each pass leaves what the guest has changed during it; QEMU ends them when the rest fits into the pause.
        while left > in_the_pause && !outruns {
            bytes += left;
            left = (left * dirty / rate).min(u128::from(ram));
        }
        bytes += left;
        let narrow = |wide: u128| u64::try_from(wide).unwrap_or(u64::MAX);
        let seconds = narrow(bytes.div_ceil(rate));
        Some(Prediction {
            bytes: narrow(bytes),
            seconds: (!outruns && seconds <= SECONDS_MAX).then_some(seconds),
            downtime_ms: (!outruns).then(|| narrow(left * 1000 / rate)),
            outruns,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn outlook(disks: &[(u64, Option<u64>)], ram: u64, dirty: u64) -> Outlook {
        let disk = |(virtual_mib, allocated): &(u64, Option<u64>)| DiskOutlook {
            disk: "vda".into(),
            virtual_bytes: virtual_mib * MIB,
            allocated_bytes: allocated.map(|mib| mib * MIB),
            changed_bytes: None,
        };
        Outlook {
            disks: disks.iter().map(disk).collect(),
            ram_bytes: Some(ram * MIB),
            ram_dirty_bytes_per_s: Some(dirty * MIB),
        }
    }

    #[test]
    fn what_is_allocated_counts_and_passes_end_when_the_rest_fits_into_the_pause() {
        let predict = |outlook: Outlook| outlook.predict(100 * MIB, 300).unwrap();
        let seen = predict(outlook(&[(10_000, Some(500)), (100, None)], 400, 0));
        assert_eq!((seen.bytes, seen.seconds, seen.downtime_ms), (1000 * MIB, Some(10), Some(0)));
        // 1000, then 100 in which it changes 10, which fits.
        let seen = predict(outlook(&[], 1000, 10));
        assert_eq!((seen.bytes, seen.seconds, seen.downtime_ms), (1110 * MIB, Some(12), Some(100)));
        // Small enough from the beginning: nothing is copied twice.
        assert_eq!(predict(outlook(&[], 20, 50)).downtime_ms, Some(200));
        // An image can occupy more than its guest sees.
        assert_eq!(predict(outlook(&[(10, Some(11))], 0, 0)).bytes, 10 * MIB);
        // Of one that has a replica only what changed since is copied.
        let mut replicated = outlook(&[(100, Some(50)), (100, Some(50))], 0, 0);
        replicated.disks[0].changed_bytes = Some(3 * MIB);
        assert_eq!(predict(replicated).bytes, 53 * MIB);
    }

    #[test]
    fn a_guest_that_is_faster_than_the_way_is_said_to_be() {
        for dirty in [90, 100, 100_000] {
            let seen = outlook(&[(50, None)], 1000, dirty).predict(100 * MIB, 300).unwrap();
            assert_eq!((seen.outruns, seen.seconds, seen.downtime_ms), (true, None, None), "{dirty}");
            assert_eq!(seen.bytes, 1050 * MIB);
        }
    }

    #[test]
    fn no_figure_makes_it_endless_or_false() {
        for (disk, ram, dirty, rate) in
            [(u64::MAX >> 21, u64::MAX >> 21, 0, 1), (0, 0, 0, 0), (1, 1, 1, u64::MAX)]
        {
            let seen = outlook(&[(disk, None)], ram, dirty).predict(rate, 300).unwrap();
            assert!(seen.seconds.is_none_or(|seconds| seconds <= SECONDS_MAX), "{seen:?}");
        }
        assert_eq!(Outlook { ram_bytes: None, ..outlook(&[], 1, 1) }.predict(1, 1), None);
        assert_eq!(Outlook { ram_dirty_bytes_per_s: None, ..outlook(&[], 1, 1) }.predict(1, 1), None);
    }
}
