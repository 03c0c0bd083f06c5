//! What a process and all that it has started have used, told when they are ended. Must not know
//! what they do.

use std::collections::BTreeMap;
use std::fs;
use std::process::Child;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// Processor seconds, all threads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

/// The unit of user time in proc(5); on Linux programs always see this one.
const TICKS_PER_SECOND: f64 = 100.0;

impl Cpu {
    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }
}

/// Of one relay.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    pub(crate) cpu: Cpu,
    /// Largest resident memory, summed over its processes.
    pub(crate) peak_mib: f64,
}

/// What a process and its descendants have used so far. The sum is exact; how much of it is the
/// user's is known in steps of 10 ms.
pub(crate) fn so_far(pid: u32) -> Cpu {
    let tree = std::iter::once(pid).chain(descendants(pid));
    let (total, user) = tree.map(|pid| (run_seconds(pid), user_seconds(pid))).fold((0.0, 0.0), add);
    Cpu { user, system: (total - user).max(0.0) }
}

fn add(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
    (a.0 + b.0, a.1 + b.1)
}

/// Of all threads that it has now; the kernel's scheduler counts nanoseconds.
#[allow(clippy::cast_precision_loss)]
fn run_seconds(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanoseconds: u64 = threads
        .filter_map(|thread| {
            fs::read_to_string(thread.path().join("schedstat")).ok()?.split(' ').next()?.parse::<u64>().ok()
        })
        .sum();
    nanoseconds as f64 / 1e9
}

#[allow(clippy::cast_precision_loss)]
fn user_seconds(pid: u32) -> f64 {
    let ticks = stat(pid).and_then(|fields| fields.get(11)?.parse::<u64>().ok());
    ticks.unwrap_or_default() as f64 / TICKS_PER_SECOND
}

/// From now on whoever loses its parent becomes our child, so that its usage comes to us.
///
/// # Errors
/// The operating system's answer.
pub(crate) fn adopt_orphans() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Ends a child and its descendants; what they have used since they had used `since`. The kernel adds a process's usage to ours when we wait for
/// it: the difference is theirs, those included that ended before and that they waited for.
pub(crate) fn end(child: &mut Child, since: Cpu) -> anyhow::Result<Used> {
    let tree = descendants(child.id());
    let peak_mib = std::iter::once(child.id()).chain(tree.iter().copied()).map(peak_mib).sum();
    let before = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    child.kill()?;
    child.wait()?;
    // Parents come first in the list: by now each is ours.
    for pid in tree {
        let pid = Pid::from_raw(pid.cast_signed());
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
    }
    let after = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let user = seconds(after.user_time()) - seconds(before.user_time()) - since.user;
    let system = seconds(after.system_time()) - seconds(before.system_time()) - since.system;
    let total = user + system;
    // What is not exact is only how it is divided.
    let user = user.clamp(0.0, total.max(0.0));
    let cpu = Cpu { user, system: total - user };
    Ok(Used { cpu, peak_mib })
}

#[allow(clippy::cast_precision_loss)]
fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

/// Children, their children, and so on, parents first.
fn descendants(of: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![of];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let of_this = children.remove(pid).unwrap_or_default();
        found.extend(of_this);
        next += 1;
    }
    found.split_off(1)
}

fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// proc(5): "PID (NAME) STATE PPID …", where the name may hold anything; what comes after it.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

#[allow(clippy::cast_precision_loss)]
fn peak_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: Option<u64> = line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or_default() as f64 / 1024.0
}
