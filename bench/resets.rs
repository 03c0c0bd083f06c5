//! Resets the relays' connections while they work, as a NAT that forgot its state would. The
//! kernel does it for us (INET_DIAG_DESTROY): nothing stands between the relays.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// For `span`, a reset of every TCP connection in our network namespace every `pause`; none so
/// late that there would be no time to come back.
pub(crate) fn every(pause: Duration, span: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + span;
    thread::sleep(pause);
    while Instant::now() + pause / 2 < end {
        // A complaint of ss about one of the two ends, which the other's reset has ended, is in order.
        let killed = ss(&["-K", "state", "established"])?;
        ensure!(!killed.is_empty(), "`ss -K` has reset nothing: no connection, or the kernel can't");
        thread::sleep(pause.min(end.saturating_duration_since(Instant::now())));
    }
    thread::sleep(end.saturating_duration_since(Instant::now()));
    Ok(())
}

/// The TCP connections of our network namespace, one a line: the same lines are the same ones.
pub(crate) fn connections() -> anyhow::Result<Vec<String>> {
    ss(&["state", "established"])
}

fn ss(words: &[&str]) -> anyhow::Result<Vec<String>> {
    let said = Command::new("ss").arg("-Htn").args(words).output().context("can't run ss")?;
    let text = String::from_utf8_lossy(&said.stdout);
    // Queue lengths come first.
    let mut lines: Vec<String> =
        text.lines().map(|line| line.split_whitespace().skip(2).collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    Ok(lines)
}
