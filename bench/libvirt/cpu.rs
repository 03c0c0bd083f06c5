//! Processor time of everything that this program starts, by a control group of its own: QEMUs are nobody's
//! children, and end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A control group, left and taken away when dropped.
pub(crate) struct Group {
    above: PathBuf,
    own: PathBuf,
}

impl Group {
    /// Makes one and enters it: what is started from now on belongs to it.
    pub(crate) fn enter() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mut words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = words.find(|words| words.get(2) == Some(&"cgroup2")).context("no cgroup2 is mounted")?;
        let root = Path::new(mount[1]);
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let now = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let group =
            Self { above: root.join(now), own: root.join(format!("vmferry-bench-{}", std::process::id())) };
        fs::create_dir(&group.own).with_context(|| format!("cannot make {}", group.own.display()))?;
        fs::write(group.own.join("cgroup.procs"), std::process::id().to_string())?;
        Ok(group)
    }

    /// Seconds so far, of user and system.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn seconds(&self) -> Result<f64> {
        let text = fs::read_to_string(self.own.join("cpu.stat"))?;
        let usage =
            text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
        Ok(usage.trim().parse::<u64>()? as f64 / 1e6)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.above.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.own);
    }
}
