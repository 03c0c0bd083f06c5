//! How far the copy of one disk's changes is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::bitmaps::Bitmaps;
use crate::qemu::{BlockDeviceInfo, BlockDirtyInfo};

/// What was counted when one process left the copy to the next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    bytes: u64,
    passed: u64,
    frozen: u64,
    once: bool,
    passes: u64,
}

/// How far one disk is, for whoever looks.
#[derive(Debug)]
pub(crate) struct Copied {
    bitmaps: Bitmaps,
    /// Bytes written to the destination.
    pub(crate) bytes: AtomicU64,
    /// Of them, those of the pass under way.
    passed: AtomicU64,
    /// What that pass has to copy in all.
    frozen: AtomicU64,
    /// What was recorded for the next one when QEMU was asked last.
    recorded: AtomicU64,
    /// The first pass is over.
    pub(crate) once: AtomicBool,
    /// Passes that are over.
    pub(crate) passes: AtomicU64,
    /// Little is left, so it waits.
    idle: AtomicBool,
}

impl Copied {
    /// Goes on counting from here.
    pub(super) fn new(bitmaps: Bitmaps, from: Counts) -> Self {
        let Counts { bytes, passed, frozen, once, passes } = from;
        let [bytes, passed, frozen, passes] = [bytes, passed, frozen, passes].map(AtomicU64::new);
        let (once, idle) = (AtomicBool::new(once), AtomicBool::new(false));
        Self { bitmaps, bytes, passed, frozen, recorded: AtomicU64::new(0), once, passes, idle }
    }

    pub(super) fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    pub(super) fn counts(&self) -> Counts {
        let [bytes, passed, frozen, passes] =
            [&self.bytes, &self.passed, &self.frozen, &self.passes].map(|count| count.load(Relaxed));
        Counts { bytes, passed, frozen, once: self.once.load(Relaxed), passes }
    }

    /// Whether nothing need move at this moment.
    pub(super) fn is_idle(&self) -> bool {
        self.idle.load(Relaxed)
    }

    pub(super) fn rests(&self, rests: bool) {
        self.idle.store(rests, Relaxed);
    }

    /// Bytes that are still to be copied: of the pass under way, and what the guest has written since it began.
    /// Which may be the same, so it is no less than there is.
    pub(crate) fn left(&self) -> u64 {
        let of_pass = self.frozen.load(Relaxed).saturating_sub(self.passed.load(Relaxed));
        of_pass.saturating_add(self.recorded.load(Relaxed))
    }

    pub(super) fn begin_pass(&self, bytes: u64) {
        self.passed.store(0, Relaxed);
        self.frozen.store(bytes, Relaxed);
        self.recorded.store(0, Relaxed);
    }

    pub(super) fn end_pass(&self) {
        self.frozen.store(0, Relaxed);
        self.once.store(true, Relaxed);
        self.passes.fetch_add(1, Relaxed);
    }

    pub(super) fn wrote(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        self.passed.fetch_add(bytes, Relaxed);
    }

    /// What QEMU says of its bitmaps.
    pub(super) fn learn(&self, nodes: &[BlockDeviceInfo]) {
        let ours = nodes.iter().filter(|n| n.node_name == self.bitmaps.node).flat_map(|n| &n.dirty_bitmaps);
        let ours = ours.filter(|b| self.bitmaps.names().contains(&b.name));
        let (recording, frozen): (Vec<_>, Vec<_>) = ours.partition(|b| b.recording);
        let bytes = |bitmaps: &[&BlockDirtyInfo]| bitmaps.iter().map(|b| b.count).sum::<u64>();
        self.frozen.store(bytes(&frozen), Relaxed);
        self.recorded.store(bytes(&recording), Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn nodes(node: &str, bitmaps: &[(&str, u64, bool)]) -> Vec<BlockDeviceInfo> {
        let bitmap = |(name, count, recording): &(&str, u64, bool)| json!({"name": name, "count": count, "granularity": 65536, "recording": recording});
        let bitmaps: Vec<_> = bitmaps.iter().map(bitmap).collect();
        let nodes = json!([{"node-name": node, "drv": "raw", "dirty-bitmaps": bitmaps}]);
        serde_json::from_value(nodes).unwrap()
    }

    #[test]
    fn what_the_guest_writes_during_a_pass_is_left_when_that_is_over() {
        let bitmaps = Bitmaps::new("n0", Uuid::nil());
        let [a, b] = bitmaps.names().clone();
        let copied = Copied::new(bitmaps, Counts::default());
        copied.learn(&nodes("n0", &[(&a, 100, true), ("somebodys", 9000, true)]));
        assert_eq!(copied.left(), 100, "before the first pass");
        copied.begin_pass(100);
        copied.wrote(60);
        assert_eq!(copied.left(), 40);
        copied.learn(&nodes("n0", &[(&a, 100, false), (&b, 70, true)]));
        assert_eq!(copied.left(), 40 + 70);
        copied.wrote(40);
        copied.end_pass();
        assert_eq!(copied.left(), 70, "a pass that was copied leaves what was written meanwhile");
        copied.learn(&nodes("n0", &[(&b, 90, true)]));
        assert_eq!(copied.left(), 90);
        copied.begin_pass(90);
        assert_eq!(copied.left(), 90, "and no more than that, when the next one begins");
        copied.learn(&nodes("n1", &[(&b, 90, true)]));
        assert_eq!(copied.left(), 0, "another node's are not its");
    }

    #[test]
    fn the_next_process_counts_on() {
        let copied = Copied::new(Bitmaps::new("n0", Uuid::nil()), Counts::default());
        copied.begin_pass(100);
        copied.wrote(100);
        copied.end_pass();
        copied.begin_pass(50);
        copied.wrote(30);
        let next = Copied::new(Bitmaps::new("n0", Uuid::nil()), copied.counts());
        assert_eq!((next.left(), next.bytes.load(Relaxed)), (20, 130));
        assert_eq!((next.passes.load(Relaxed), next.once.load(Relaxed)), (1, true));
    }
}
