//! A virtual machine's QEMU on this host: reach its monitor, start a fresh one, end it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::config::{Start, VmConfig};
use crate::qemu::{Events, Life, Qmp, QmpError, Quit};

/// How long a monitor that is there may take to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks for a monitor that is not there yet.
const MONITOR_POLL: Duration = Duration::from_millis(50);
/// How long a QEMU may take to end after `quit`: it writes out what it has cached.
const QUIT_DEADLINE: Duration = Duration::from_secs(60);
/// How much of a failed start's output is shown.
const OUTPUT_BYTES_SHOWN: usize = 600;

/// Why no QEMU could be started or ended.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The program of the start command cannot be run.
    #[error("cannot run the start command {command:?} of VM {vm}")]
    Spawn {
        /// The virtual machine.
        vm: String,
        /// Its command.
        command: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The start command or `systemctl` failed.
    #[error("the start command of VM {vm} failed with {status}: {output}")]
    Failed {
        /// The virtual machine.
        vm: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        output: String,
    },
    /// No monitor in time.
    #[error("the QEMU of VM {vm} was started but its monitor {} did not answer within {} s: {output}", qmp.display(), after.as_secs())]
    NoMonitor {
        /// The virtual machine.
        vm: String,
        /// Where the monitor was expected.
        qmp: PathBuf,
        /// How long it was waited for.
        after: Duration,
        /// The end of what the start command said, or why the monitor could not be used.
        output: String,
    },
    /// It does not end.
    #[error("the QEMU of VM {vm} did not end within {} s after `quit`", QUIT_DEADLINE.as_secs())]
    DoesNotEnd {
        /// The virtual machine.
        vm: String,
    },
    /// It was to end, and whether it has cannot be told.
    #[error("whether the QEMU of VM {vm}, which was to end, has ended is not known: {cause}")]
    NotProved {
        /// The virtual machine.
        vm: String,
        /// What is to be seen of it.
        cause: String,
    },
}

/// Connects to the VM's monitor.
pub(crate) async fn connect(vm: &VmConfig) -> Result<(Qmp, Events), QmpError> {
    Qmp::connect(&vm.qmp, GREETING_DEADLINE).await
}

/// A QEMU that this agent started.
#[derive(Debug)]
pub(crate) struct StartedQemu {
    vm: String,
    unit: Option<String>,
    child: Option<Child>,
}

/// Starts a fresh QEMU and waits for its monitor. What the command prints goes to a file in
/// `logs`, so that it holds on to nothing of the agent's.
pub(crate) async fn start(
    name: &str,
    vm: &VmConfig,
    how: &Start,
    logs: &Path,
    deadline: Duration,
) -> Result<(StartedQemu, Qmp, Events), VmError> {
    let log = logs.join(format!("{name}.start.log"));
    let (command, unit) = command(how);
    let shown = format!("{:?}", command.as_std());
    let mut child =
        spawn(command, &log).map_err(|source| VmError::Spawn { vm: name.into(), command: shown, source })?;
    let until = Instant::now() + deadline;
    let mut running = true;
    loop {
        if running && let Ok(Some(status)) = child.try_wait() {
            running = false;
            if !status.success() {
                return Err(VmError::Failed { vm: name.into(), status, output: tail(&log) });
            }
        }
        let refused = match connect(vm).await {
            Ok((qmp, events)) => {
                let started = StartedQemu { vm: name.into(), unit, child: running.then_some(child) };
                return Ok((started, qmp, events));
            }
            Err(e) => e,
        };
        if Instant::now() >= until {
            let _ = child.start_kill();
            let output = format!("{} {}", super::problem::chain(&refused), tail(&log));
            return Err(VmError::NoMonitor { vm: name.into(), qmp: vm.qmp.clone(), after: deadline, output });
        }
        sleep(MONITOR_POLL).await;
    }
}

fn command(how: &Start) -> (Command, Option<String>) {
    match how {
        Start::Unit(unit) => {
            let mut command = Command::new("systemctl");
            command.args(["start", unit]);
            (command, Some(unit.clone()))
        }
        Start::Command(words) => {
            let mut words = words.iter();
            let mut command = Command::new(words.next().map_or("", String::as_str));
            command.args(words);
            (command, None)
        }
    }
}

fn spawn(mut command: Command, log: &Path) -> io::Result<Child> {
    let log = File::create(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own: what is sent to the agent's group must not reach a guest.
    command.process_group(0).kill_on_drop(false).spawn()
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let from = text.len().saturating_sub(OUTPUT_BYTES_SHOWN);
    String::from_utf8_lossy(&text[from..]).trim().replace('\n', " | ")
}

/// Ends a QEMU: `quit`, and waits until its process is gone. A monitor that closes is no proof.
pub(crate) async fn quit(name: &str, qmp: &Qmp) -> Result<(), VmError> {
    let asked = async {
        // The reply may be lost with the process, or the command with the monitor.
        while !qmp.is_closed() && qmp.execute_within(Quit {}, QUIT_DEADLINE).await.is_err() {}
        qmp.closed().await;
    };
    let ended = async {
        tokio::select! {
            () = qmp.process().ended() => {}
            () = asked => {}
        }
    };
    let in_time = timeout(QUIT_DEADLINE, ended).await.is_ok();
    match qmp.process().life() {
        Life::Ended => Ok(()),
        Life::Unknown if in_time => {
            let cause = qmp.failure().map_or_else(String::new, |e| super::problem::chain(&e));
            Err(VmError::NotProved { vm: name.into(), cause })
        }
        _ => Err(VmError::DoesNotEnd { vm: name.into() }),
    }
}

/// Ends the QEMU that a guest has left; what is left of it.
pub(crate) async fn end_the_old(name: &str, qmp: &Qmp) -> Option<String> {
    let error = quit(name, qmp).await.err()?;
    let rest = "it is the one that the guest has left: never continue it. `vmferry recover` ends it when its \
                monitor answers; else end it by hand";
    Some(format!("{}; {rest}", super::problem::chain(&error)))
}

impl StartedQemu {
    /// The unit that it was started by, for another process to know.
    pub(super) fn into_unit(self) -> Option<String> {
        self.unit
    }

    /// A QEMU that an earlier process has started.
    pub(super) fn of_earlier(vm: &str, unit: Option<String>) -> Self {
        Self { vm: vm.to_owned(), unit, child: None }
    }

    /// Ends the QEMU that we started, however deaf it is.
    pub(crate) async fn stop(mut self, qmp: &Qmp) -> Result<(), VmError> {
        let asked = if qmp.is_closed() { Ok(()) } else { quit(&self.vm, qmp).await };
        if let Some(unit) = &self.unit {
            let stop = Command::new("systemctl").args(["stop", unit]).stdin(Stdio::null()).status();
            return match timeout(QUIT_DEADLINE * 2, stop).await {
                Ok(Ok(status)) if status.success() => Ok(()),
                _ => Err(VmError::DoesNotEnd { vm: self.vm }),
            };
        }
        let Some(child) = &mut self.child else { return asked };
        if asked.is_err() {
            let _ = child.start_kill();
        }
        match timeout(QUIT_DEADLINE, child.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(VmError::DoesNotEnd { vm: self.vm }),
        }
    }
}

/// Runs a `before_start` command. Its failure is told, not obeyed.
pub(crate) async fn run_hook(words: &[String], vm: &str, deadline: Duration) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let run = Command::new(program)
        .args(arguments)
        .env("VMFERRY_VM", vm)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match timeout(deadline, run).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("before_start command {program} of VM {vm} failed with {status}")),
        Ok(Err(e)) => Err(format!("before_start command {program} of VM {vm} cannot be run: {e}")),
        Err(_) => Err(format!(
            "before_start command {program} of VM {vm} was killed after {} s",
            deadline.as_secs()
        )),
    }
}
