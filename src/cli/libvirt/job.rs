//! What `virsh domjobinfo --rawstats` prints: how far libvirt's own job is.

use std::collections::BTreeMap;

use serde::Serialize;

/// A job of libvirt's, as far as it is of use here. Bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Job {
    pub(super) ram_done: u64,
    pub(super) ram_total: u64,
    pub(super) disks_done: u64,
    pub(super) disks_total: u64,
    /// The pause, once it is known.
    pub(super) downtime_ms: Option<u64>,
}

impl Job {
    /// Reads what virsh printed; none if there is no job.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        let pairs: BTreeMap<&str, &str> = pairs.map(|(name, value)| (name.trim(), value.trim())).collect();
        let number = |name: &str| pairs.get(name).and_then(|value| value.parse().ok());
        let of = |name: &str| number(name).unwrap_or_default();
        number("memory_total").or_else(|| number("disk_total")).map(|_| Self {
            ram_done: of("memory_processed"),
            ram_total: of("memory_total"),
            disks_done: of("disk_processed"),
            disks_total: of("disk_total"),
            downtime_ms: number("downtime"),
        })
    }

    /// All that has moved, in whatever phase: a job without progress has the same as before.
    pub(super) fn moved(&self) -> u64 {
        self.ram_done.saturating_add(self.disks_done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_and_no_job_is_none() {
        assert_eq!(Job::parse("Job type: 0\n"), None);
        assert_eq!(Job::parse(""), None);
        let text = "Job type: 2\n\n  time_elapsed: 1432\n  memory_total: 142024704\n  memory_processed: 5\n  \
                    disk_total: 134217728\n  disk_processed: 7\n  downtime: 33\n  odd line\n";
        let job = Job {
            ram_done: 5,
            ram_total: 142_024_704,
            disks_done: 7,
            disks_total: 134_217_728,
            downtime_ms: Some(33),
        };
        assert_eq!(Job::parse(text), Some(job));
    }
}
