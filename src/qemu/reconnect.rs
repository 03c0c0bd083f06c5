//! A lost monitor is reached again: the same one, of the same process, however long its main loop
//! takes to greet. Gives up only where waiting cannot help.

use super::error::QmpError;
use super::monitor_socket::{Lost, MonitorSocket};
use super::process::{Life, Process};
use super::wire::{Message, command_line};
use backon::{ExponentialBackoff, ExponentialBuilder};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The longest wait before another try.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Waits that grow while connections are lost again at once.
pub(super) const WAITS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(50))
    .with_max_delay(LONGEST_WAIT)
    .without_max_times();

/// A connection that lived for this long was a good one.
pub(super) const GOOD_AFTER: Duration = Duration::from_secs(10);

/// Nobody has listened for this long and nothing is known of the process: nobody will.
const VANISHED_AFTER: Duration = Duration::from_secs(10);

/// Reaches the monitor again; why that is impossible.
pub(super) async fn reconnect(
    path: &Path,
    process: &Process,
    waits: &mut ExponentialBackoff,
) -> Result<MonitorSocket, Lost> {
    let mut nobody_since = None;
    loop {
        tokio::select! {
            biased;
            () = process.ended() => return Err(ended(process)),
            () = sleep(waits.next().unwrap_or(LONGEST_WAIT)) => {}
        }
        // There is no deadline for the greeting: QEMU's main loop may be busy.
        let monitor = tokio::select! {
            biased;
            () = process.ended() => return Err(ended(process)),
            monitor = command_mode(path) => monitor,
        };
        match monitor {
            Ok(monitor) => return is_same(process, &monitor.process()).map(|()| monitor),
            Err(error) if error.is_not_listening() && process.life() == Life::Unknown => {
                let since = *nobody_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= VANISHED_AFTER {
                    return Err(Lost::Vanished);
                }
            }
            Err(error) => {
                nobody_since = None;
                tracing::debug!(%error, "QEMU's monitor is not back yet");
            }
        }
    }
}

fn ended(process: &Process) -> Lost {
    process.pid().map_or(Lost::Vanished, Lost::Ended)
}

/// Whoever answers must be who answered before.
fn is_same(before: &Process, now: &Process) -> Result<(), Lost> {
    match before.life() {
        Life::Ended => Err(ended(before)),
        _ if before.is_same(now) => Ok(()),
        _ => Err(Lost::Replaced),
    }
}

async fn command_mode(path: &Path) -> Result<MonitorSocket, QmpError> {
    let name = "qmp_capabilities";
    let mut monitor = MonitorSocket::connect(path).await?;
    let lost = |cause: Lost| cause.error(name, path);
    monitor.send(&command_line(name, 0, Value::Null)).await.map_err(lost)?;
    loop {
        if let Message::Reply { .. } = monitor.first_message().await.map_err(lost)? {
            return Ok(monitor);
        }
    }
}
