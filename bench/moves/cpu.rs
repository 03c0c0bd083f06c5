//! Processor seconds of running processes. Must not know what they do.

use std::fs;

use anyhow::{Context, Result};

/// The unit of proc(5); on Linux programs always see this one.
const TICKS_PER_SECOND: f64 = 100.0;
/// Behind the name in parentheses: state, ppid, …
const USER: usize = 11;
const SYSTEM: usize = 12;

/// What these processes have used so far, threads that have ended included, in steps of 10 ms each.
///
/// # Errors
/// One does not run.
pub(crate) fn seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|pid| of(*pid).with_context(|| format!("process {pid}"))).sum()
}

#[allow(clippy::cast_precision_loss)]
fn of(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no stat of a process")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |at: usize| -> Result<u64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    Ok((ticks(USER)? + ticks(SYSTEM)?) as f64 / TICKS_PER_SECOND)
}
