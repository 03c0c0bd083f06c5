//! How much of a processor a thread has used, and how long it has waited for one, by the kernel's word.

use std::path::Path;
use std::time::Duration;

/// Of one thread, since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    pub used: Duration,
    /// It could have run, and others did.
    pub waited: Duration,
}

impl CpuTime {
    /// Of this thread. None where the kernel does not tell.
    pub(super) fn of_this_thread() -> Option<Self> {
        Self::read(Path::new("/proc/thread-self/schedstat"))
    }

    /// Of a process's first thread.
    pub fn of_process(pid: i32) -> Option<Self> {
        Self::read(Path::new(&format!("/proc/{pid}/schedstat")))
    }

    fn read(path: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(path).ok()?)
    }

    /// "used waited slices", the first two in nanoseconds (Documentation/scheduler/sched-stats.rst).
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_ascii_whitespace().map(|n| n.parse().ok().map(Duration::from_nanos));
        Some(Self { used: numbers.next()??, waited: numbers.next()?? })
    }

    /// Of `long`, the thousandths in which it had, or wanted, a processor.
    pub fn permille_since(self, before: Self, long: Duration) -> u64 {
        let busy = (self.used + self.waited).saturating_sub(before.used + before.waited);
        (busy.as_nanos() * 1000).checked_div(long.as_nanos()).map_or(0, |share| share.min(1000) as u64)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_understood_or_nothing_is_known() {
        let now = CpuTime::parse("3000000000 1000000000 17\n").unwrap();
        assert_eq!(now, CpuTime { used: Duration::from_secs(3), waited: Duration::from_secs(1) });
        assert_eq!(now.permille_since(CpuTime::default(), Duration::from_secs(5)), 800);
        assert_eq!(now.permille_since(CpuTime::default(), Duration::from_secs(1)), 1000);
        assert_eq!(now.permille_since(now, Duration::ZERO), 0);
        for text in ["", "1", "a b c"] {
            assert_eq!(CpuTime::parse(text), None, "{text:?}");
        }
    }
}
