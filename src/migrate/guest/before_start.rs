//! A VM's `before_start` command: run before its guest starts here.
//!
//! An agent that crashes leaves its command running. The next agent runs the command again, and not
//! beside the one that was left: the command's standard input is an empty file with a lock that ends
//! with the last process that has it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::config::Config;

/// Between two looks whether an earlier agent's command has ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The lock's file is the agent's alone.
const PRIVATE: u32 = 0o600;

/// Whether an earlier agent may have run the command for the same migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It has not. Nothing is waited for, not even a process that an earlier migration's command
    /// left behind.
    First,
    /// It may have, and its command may still run.
    Again,
}

/// Runs the command of a VM. Its failure is told, not obeyed. `Ok(false)` when there is none.
pub(crate) async fn run(config: &Config, vm: &str, turn: Turn) -> Result<bool, String> {
    let words = config.vm(vm).map(|vm| vm.before_start).unwrap_or_default();
    let lock = config.state_dir.join(format!("{vm}.before_start"));
    run_command(&words, vm, lock, turn, config.deadlines.hook()).await
}

async fn run_command(
    words: &[String],
    vm: &str,
    lock: PathBuf,
    turn: Turn,
    deadline: Duration,
) -> Result<bool, String> {
    let Some((program, arguments)) = words.split_first() else { return Ok(false) };
    let told = |what: String| format!("before_start command {program} of VM {vm} {what}");
    let input = match lock_file(lock, turn, deadline).await {
        Ok(Some(lock)) => Stdio::from(lock),
        Ok(None) => {
            let what = "was left by an agent that crashed and still runs after";
            return Err(told(format!("{what} {} s; it was not run again", deadline.as_secs())));
        }
        Err(e) => {
            tracing::warn!(vm, cause = %e, "an agent that crashes now would run before_start twice at once");
            Stdio::null()
        }
    };
    let run = Command::new(program)
        .args(arguments)
        .env("VMFERRY_VM", vm)
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match timeout(deadline, run).await {
        Ok(Ok(status)) if status.success() => Ok(true),
        Ok(Ok(status)) => Err(told(format!("failed with {status}"))),
        Ok(Err(e)) => Err(told(format!("cannot be run: {e}"))),
        Err(_) => Err(told(format!("was killed after {} s", deadline.as_secs()))),
    }
}

/// The lock, for the command to inherit. `None` when another process has it for as long as the
/// deadline.
pub(crate) async fn lock_file(path: PathBuf, turn: Turn, deadline: Duration) -> io::Result<Option<File>> {
    if turn == Turn::First {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    let mut options = File::options();
    options.read(true).append(true).create(true).mode(PRIVATE);
    let file = options.open(&path)?;
    let until = Instant::now() + deadline;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(e)) => return Err(e),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_a_crashed_agent_left_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (lock, done) = (folder.path().join("lock"), folder.path().join("done"));
        // The first agent's command goes on without it.
        let input = lock_file(lock.clone(), Turn::First, Duration::ZERO).await.unwrap().unwrap();
        // Nothing here holds the lock beside it.
        let mut left = std::process::Command::new("sh")
            .args(["-c", "sleep 0.3; : >\"$0\""])
            .arg(&done)
            .stdin(input)
            .spawn()
            .unwrap();
        assert_eq!(run_command(&["true".into()], "web1", lock, Turn::Again, DEADLINE).await, Ok(true));
        assert!(done.exists(), "it was not waited for");
        left.wait().unwrap();
    }

    #[tokio::test]
    async fn what_does_not_end_is_told_and_is_in_no_later_migrations_way() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("lock");
        let input = lock_file(lock.clone(), Turn::First, Duration::ZERO).await.unwrap().unwrap();
        let run =
            async |turn| run_command(&["true".into()], "web1", lock.clone(), turn, Duration::ZERO).await;
        let told = run(Turn::Again).await.unwrap_err();
        assert!(told.contains("still runs") && told.contains("not run again"), "{told}");
        let told = run(Turn::First).await;
        assert!(!told.is_err_and(|told| told.contains("still runs")));
        drop(input);
    }
}
