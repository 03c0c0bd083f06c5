//! A virtual machine's QEMU on this host: reach its monitor, start a fresh one, end it.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use uuid::Uuid;

use super::last_words::LastWords;
use super::marked;
use super::start_order::{StartOrder, UnitEnvironment};
use super::state_files;
use crate::config::{Config, Start, VmConfig};
use crate::migrate::journal::{Past, Undo};
use crate::printable::printable;
use crate::qemu::{Events, Life, Qmp, QmpError, Quit};

/// How long a monitor that is there may take to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks for a monitor that is not there yet.
const MONITOR_POLL: Duration = Duration::from_millis(50);
/// How long a QEMU may take to end after `quit`: it writes out what it has cached.
const QUIT_DEADLINE: Duration = Duration::from_secs(60);
/// How long systemd may take to say how a unit is.
const ASK_UNIT_DEADLINE: Duration = Duration::from_secs(10);
/// What start commands print may tell of a guest.
const PRIVATE: u32 = 0o600;
/// How much of a failed start's output is shown.
const OUTPUT_BYTES_SHOWN: usize = 600;

/// Why no QEMU could be started or ended.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("cannot run the start command {command:?} of VM {vm}")]
    Spawn { vm: String, command: String, source: io::Error },
    #[error("the start command of VM {vm} failed with {status}: {output}{}", left_running(left))]
    Failed {
        vm: String,
        status: ExitStatus,
        output: String,
        /// Processes that it has left and that did not end.
        left: Vec<i32>,
    },
    #[error(
        "{{address}} in `disk_arguments` of VM {vm}: disk {disk} is not on the first PCI bus at the source"
    )]
    NoAddress { vm: String, disk: String },
    #[error("unit {unit} of VM {vm} is {state} already, but nobody listens at {}: is that the monitor of its QEMU?", qmp.display())]
    Active { vm: String, unit: String, state: String, qmp: PathBuf },
    #[error("the QEMU of VM {vm} was started but its monitor {} did not answer within {} s: {output}{}", qmp.display(), after.as_secs(), left_running(left))]
    NoMonitor {
        vm: String,
        qmp: PathBuf,
        after: Duration,
        output: String,
        /// Processes that it has left and that did not end.
        left: Vec<i32>,
    },
    #[error("the QEMU of VM {vm} did not end within {} s after `quit`", QUIT_DEADLINE.as_secs())]
    DoesNotEnd { vm: String },
    #[error("whether the QEMU of VM {vm}, which was to end, has ended is not known: {cause}")]
    NotProved { vm: String, cause: String },
}

/// What is said of processes that do not end; nothing of none.
fn left_running(pids: &[i32]) -> String {
    if pids.is_empty() {
        return String::new();
    }
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    format!("; what it has left running did not end: process {}", pids.join(", process "))
}

impl VmError {
    /// What a start that failed has left, in words.
    pub(crate) fn leftover(&self) -> Option<String> {
        match self {
            Self::Failed { vm, left, .. } | Self::NoMonitor { vm, left, .. } if !left.is_empty() => {
                Some(format!("the start command of VM {vm} failed{}", left_running(left)))
            }
            _ => None,
        }
    }
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
    /// What its start command and all that it has left running are told by.
    mark: String,
}

/// Where what a start command prints goes, so that it holds on to nothing of the agent's.
pub(crate) fn start_log(config: &Config, vm: &str) -> PathBuf {
    config.state_dir.join(format!("{vm}.start.log"))
}

/// Starts a fresh QEMU for `purpose`, a migration or a check, and waits for its monitor. If that does
/// not come, everything that was started is ended again.
pub(crate) async fn start(
    config: &Config,
    order: &StartOrder<'_>,
    purpose: Uuid,
) -> Result<(StartedQemu, Qmp, Events), VmError> {
    let (name, vm) = (order.vm, order.config);
    if let Some(disk) = order.without_address() {
        return Err(VmError::NoAddress { vm: name.into(), disk: disk.into() });
    }
    state_files::sweep(config, name);
    let (log, deadline) = (start_log(config, name), config.deadlines.qemu_start());
    let mark = purpose.to_string();
    let (mut command, unit) = command(order);
    command.env(marked::MARK, &mark);
    let _environment = match unit {
        Some(_) => Some(UnitEnvironment::write(&config.runtime_dir, order).map_err(|source| {
            VmError::Spawn { vm: name.into(), command: "its unit's environment".into(), source }
        })?),
        None => None,
    };
    if let Some(unit) = &unit {
        is_inactive(name, vm, unit).await?;
    }
    let words = unit.as_deref().map(LastWords::of_unit);
    let said = async || match &words {
        Some(words) => format!("{}{}", tail(&log), words.heard(None).await),
        None => tail(&log),
    };
    let shown = format!("{:?}", command.as_std());
    let mut child =
        spawn(command, &log).map_err(|source| VmError::Spawn { vm: name.into(), command: shown, source })?;
    let until = Instant::now() + deadline;
    let mut running = true;
    loop {
        if running && let Ok(Some(status)) = child.try_wait() {
            running = false;
            if !status.success() {
                let left = marked::end(&mark).await;
                return Err(VmError::Failed { vm: name.into(), status, output: said().await, left });
            }
        }
        let refused = match connect(vm).await {
            Ok((qmp, events)) => {
                let child = running.then_some(child);
                let started = StartedQemu { vm: name.into(), unit, child, mark };
                return Ok((started, qmp, events));
            }
            Err(e) => e,
        };
        if Instant::now() >= until {
            let output = format!("{} {}", crate::migrate::model::problem::chain(&refused), said().await);
            if let Some(unit) = &unit
                && stop_unit(unit).await.is_none()
            {
                tracing::error!(unit, "a unit that was started in vain does not stop");
            }
            let left = marked::end(&mark).await;
            let _ = child.start_kill();
            let (vm, qmp) = (name.to_owned(), vm.qmp.clone());
            return Err(VmError::NoMonitor { vm, qmp, after: deadline, output, left });
        }
        sleep(MONITOR_POLL).await;
    }
}

/// A unit that runs already is not ours to start, and must not be stopped: it may have a guest.
async fn is_inactive(name: &str, vm: &VmConfig, unit: &str) -> Result<(), VmError> {
    let asked = Command::new("systemctl").args(["is-active", unit]).stdin(Stdio::null()).output();
    let Ok(Ok(output)) = timeout(ASK_UNIT_DEADLINE, asked).await else { return Ok(()) };
    let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !["active", "activating", "reloading"].contains(&state.as_str()) {
        return Ok(());
    }
    Err(VmError::Active { vm: name.into(), unit: unit.into(), state, qmp: vm.qmp.clone() })
}

/// `None`: it does not stop.
async fn stop_unit(unit: &str) -> Option<()> {
    let stop = Command::new("systemctl").args(["stop", unit]).stdin(Stdio::null()).status();
    let status = timeout(QUIT_DEADLINE * 2, stop).await.ok()?.ok()?;
    status.success().then_some(())
}

/// Whether the journal says that this agent started the destination's QEMU, or was about to.
pub(crate) fn started_qemu(past: &Past) -> bool {
    past.undo.contains(&Undo::Qemu)
}

/// Whether the start of a QEMU was begun for `past`, and no monitor of one was ever seen.
pub(crate) fn started_in_vain(past: &Past) -> bool {
    started_qemu(past) && past.qemu.is_none()
}

/// Ends what a start command has left for `past`; what does not end, in words.
pub(crate) async fn end_started(past: &Past) -> Option<String> {
    let left = marked::end(&past.header.migration.to_string()).await;
    (!left.is_empty()).then(|| format!("the start command of VM {}{}", past.header.vm, left_running(&left)))
}

fn command(order: &StartOrder<'_>) -> (Command, Option<String>) {
    match order.how {
        Start::Unit(unit) => {
            let mut command = Command::new("systemctl");
            command.args(["start", unit]);
            (command, Some(unit.clone()))
        }
        Start::Command(words) => {
            let mut words = words.iter();
            let mut command = Command::new(words.next().map_or("", String::as_str));
            command.args(words).args(order.disk_words()).envs(order.environment());
            (command, None)
        }
    }
}

fn spawn(mut command: Command, log: &Path) -> io::Result<Child> {
    let log = private_log(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own: what is sent to the agent's group must not reach a guest.
    command.process_group(0).kill_on_drop(false).spawn()
}

/// An empty file that the agent's user alone may read; one that an earlier version left open to others is
/// closed to them.
pub(crate) fn private_log(path: &Path) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(true).mode(PRIVATE).open(path)?;
    file.set_permissions(Permissions::from_mode(PRIVATE))?;
    Ok(file)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let from = text.len().saturating_sub(OUTPUT_BYTES_SHOWN);
    printable(&String::from_utf8_lossy(&text[from..]).trim().replace('\n', " | "))
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
            let cause = qmp.failure().map_or_else(String::new, |e| crate::migrate::model::problem::chain(&e));
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
    Some(format!("{}; {rest}", crate::migrate::model::problem::chain(&error)))
}

impl StartedQemu {
    /// The unit that it was started by, for another process to know.
    pub(crate) fn into_unit(self) -> Option<String> {
        self.unit
    }

    /// A QEMU that an earlier process has started.
    pub(crate) fn of_earlier(vm: &str, unit: Option<String>, purpose: Uuid) -> Self {
        Self { vm: vm.to_owned(), unit, child: None, mark: purpose.to_string() }
    }

    /// How it ended, if it is a process of ours and has.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// Ends the QEMU that we started, however deaf it is.
    pub(crate) async fn stop(mut self, qmp: &Qmp) -> Result<(), VmError> {
        let asked = if qmp.is_closed() { Ok(()) } else { quit(&self.vm, qmp).await };
        if let Some(unit) = &self.unit {
            return stop_unit(unit).await.ok_or(VmError::DoesNotEnd { vm: self.vm });
        }
        if asked.is_err() && marked::exists(&self.mark) && marked::end(&self.mark).await.is_empty() {
            return Ok(());
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_start_command_prints_is_the_agents_alone_also_in_a_file_that_was_open_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new"), folder.path().join("old"));
        std::fs::write(&old, "an earlier start").unwrap();
        std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        for log in [new, old] {
            let mut command = Command::new("echo");
            command.arg("said");
            assert!(spawn(command, &log).unwrap().wait().await.unwrap().success());
            assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
            assert_eq!(tail(&log), "said");
        }
    }
}
