//! The guest's RAM: how much there is, how much of it QEMU has ever touched, and how fast it changes.

use std::time::Duration;

use super::client::Qmp;
use super::commands::{CalcDirtyRate, QueryDirtyRate, QueryMemorySizeSummary};

/// Seconds over which a rate is measured.
const MEASURED_S: u32 = 1;
/// Questions for the result, and the time between them.
const ASKED_MAX: u32 = 50;
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Bytes of the guest's RAM that hold something, at most: what of its process is in memory, or swapped out.
/// All of the RAM where the kernel does not tell; none where QEMU does not.
pub async fn ram_in_use(qmp: &Qmp) -> Option<u64> {
    let memory = qmp.execute(QueryMemorySizeSummary).await.ok()?;
    let ram_bytes = memory.base_memory.saturating_add(memory.plugged_memory);
    let status =
        qmp.process().pid().and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let held = status.as_deref().and_then(held_bytes);
    Some(held.map_or(ram_bytes, |held| held.min(ram_bytes)))
}

/// Bytes of its RAM that the guest changes in a second, as QEMU estimates them from a sample of pages; none where
/// QEMU does not say.
pub async fn dirty_rate(qmp: &Qmp) -> Option<u64> {
    qmp.execute(CalcDirtyRate { calc_time: MEASURED_S }).await.ok()?;
    for _ in 0..ASKED_MAX {
        tokio::time::sleep(ASK_EVERY).await;
        let measured = qmp.execute(QueryDirtyRate).await.ok()?;
        match measured.status.as_str() {
            "measured" => return measured.dirty_rate.map(|mib| mib.saturating_mul(1 << 20)),
            "measuring" => {}
            _ => return None,
        }
    }
    None
}

/// What a process holds, by its `/proc/PID/status` (proc_pid_status(5)).
fn held_bytes(status: &str) -> Option<u64> {
    let of = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    let besides = ["VmSwap", "HugetlbPages"].into_iter().filter_map(of).sum::<u64>();
    Some((of("VmRSS")? + besides) * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_holds() {
        let status =
            "Name:\tqemu\nVmRSS:\t  2048 kB\nRssAnon:\t 1 kB\nVmSwap:\t 10 kB\nHugetlbPages:\t 100 kB\n";
        assert_eq!(held_bytes(status), Some(2158 * 1024));
        assert_eq!(held_bytes("VmRSS:\t5 kB\n"), Some(5 * 1024));
        assert_eq!(held_bytes("VmSwap:\t5 kB\n"), None);
        assert_eq!(held_bytes("VmRSS: many\n"), None);
    }
}
