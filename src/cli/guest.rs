//! `vmferry guest`: what the example units of guests ask of a QEMU that is their main process. Speaks to its monitor
//! by itself, for a moment; no agent is needed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Subcommand;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::{Value, json};

#[derive(Debug, Subcommand)]
pub(super) enum GuestCommand {
    /// Wait until QEMU has begun, or fail when it has ended.
    Ready {
        /// With its monitors, admin.qmp and agent.qmp.
        folder: PathBuf,
        #[arg(long, value_name = "PID", env = "MAINPID")]
        pid: Option<i32>,
    },
    /// Have a guest that runs shut itself down, and wait for QEMU's end.
    Powerdown {
        /// With its monitors, admin.qmp and agent.qmp.
        folder: PathBuf,
        #[arg(long, value_name = "PID", env = "MAINPID")]
        pid: Option<i32>,
        /// Longest wait, in seconds. A guest that ignores the button is left to whoever asked.
        #[arg(long, value_name = "SECONDS", default_value_t = 90)]
        within: u64,
    },
}

/// The units' own limit is shorter; this is for whoever has none.
const BEGIN_WITHIN: Duration = Duration::from_secs(600);
/// A monitor that somebody else holds does not answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest line of an answer.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// The agent's monitor last: the agent may need it.
const MONITORS: [&str; 2] = ["admin.qmp", "agent.qmp"];

pub(super) fn run(command: GuestCommand) -> anyhow::Result<()> {
    match command {
        GuestCommand::Ready { folder, pid } => ready(&folder, pid),
        GuestCommand::Powerdown { folder, pid, within } => {
            powerdown(&folder, pid, Duration::from_secs(within))
        }
    }
}

/// QEMU greets from its main loop: by then all that its command line asks for is there.
fn ready(folder: &Path, pid: Option<i32>) -> anyhow::Result<()> {
    let until = Instant::now() + BEGIN_WITHIN;
    let monitor = folder.join(MONITORS[0]);
    while Instant::now() < until {
        // Asked first: who has ended by now does not greet any more.
        let lives = pid.is_none_or(lives);
        if Monitor::connect(&monitor).is_ok() {
            return Ok(());
        }
        if !lives {
            bail!("QEMU has ended; its own words are in this unit's journal");
        }
        std::thread::sleep(LOOK_EVERY);
    }
    bail!("QEMU does not greet at {}", monitor.display())
}

fn powerdown(folder: &Path, pid: Option<i32>, within: Duration) -> anyhow::Result<()> {
    let Some(pid) = pid else { return Ok(()) };
    let until = Instant::now() + within;
    let open = MONITORS.iter().find_map(|name| Monitor::connect(&folder.join(name)).ok());
    let mut monitor = open.context("no monitor of this guest answers: it is not asked to shut down")?;
    let status = monitor.ask("query-status")?;
    if status["running"] != true {
        // One that waits for its guest, or has given it away, has nothing to shut down.
        println!("the guest does not run here ({}): it is not asked to shut down", status["status"]);
        return Ok(());
    }
    monitor.ask("system_powerdown")?;
    drop(monitor);
    while lives(pid) {
        if Instant::now() >= until {
            bail!("the guest has not shut down within {} s", within.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Whether there is such a process, whoever's it is.
fn lives(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// A connection to QEMU's monitor (QMP).
struct Monitor {
    socket: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> anyhow::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(ANSWER_WITHIN))?;
        socket.set_write_timeout(Some(ANSWER_WITHIN))?;
        let mut monitor = Self { socket: BufReader::new(socket) };
        let greeting = monitor.line()?;
        if greeting.get("QMP").is_none() {
            bail!("{} is no monitor", path.display());
        }
        monitor.ask("qmp_capabilities")?;
        Ok(monitor)
    }

    fn ask(&mut self, command: &str) -> anyhow::Result<Value> {
        writeln!(self.socket.get_mut(), "{}", json!({ "execute": command }))?;
        loop {
            let mut line = self.line()?;
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                bail!("{command}: {error}");
            }
            // An event.
        }
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.socket.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            bail!("the monitor was closed");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_before_it_greets_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        let said = ready(folder.path(), Some(pid)).unwrap_err().to_string();
        assert!(said.starts_with("QEMU has ended"), "{said}");
        powerdown(folder.path(), None, Duration::ZERO).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(powerdown(folder.path(), Some(own), Duration::ZERO).is_err());
    }
}
