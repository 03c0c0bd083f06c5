//! The processes that a start command has left running. They may have left its process group, its
//! session and their parents, so they are told by their environment, which they all inherit: the
//! command is run with [`MARK`] set to a word of its own. What was started by somebody else on its
//! behalf (`systemctl`, `virsh`) does not have it, and is not ours.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, sleep};

/// The variable that a start command and what it starts have.
pub(crate) const MARK: &str = "VMFERRY_START";
/// How long a process may take to end when it is asked to, and again when it is killed.
const END_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One of them. Its number cannot be another's as long as this is held.
struct Marked {
    pid: i32,
    pidfd: OwnedFd,
}

/// Ends every process with this mark; the numbers of those that do not end.
pub(crate) async fn end(mark: &str) -> Vec<i32> {
    for signal in [Signal::TERM, Signal::KILL] {
        let until = Instant::now() + END_WITHIN;
        for one in all(mark) {
            tracing::warn!(pid = one.pid, ?signal, "a process that the start command has left is ended");
            // That it has ended meanwhile is what is wanted.
            let _ = pidfd_send_signal(&one.pidfd, signal);
        }
        while Instant::now() < until {
            if all(mark).is_empty() {
                return Vec::new();
            }
            sleep(LOOK_EVERY).await;
        }
    }
    all(mark).into_iter().map(|one| one.pid).collect()
}

/// Whether there is any.
pub(crate) fn exists(mark: &str) -> bool {
    !all(mark).is_empty()
}

fn all(mark: &str) -> Vec<Marked> {
    let wanted = format!("{MARK}={mark}");
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let own = std::process::id();
    let others = pids.filter(|pid: &i32| u32::try_from(*pid).is_ok_and(|pid| pid != own));
    others.filter_map(|pid| Marked::new(pid, wanted.as_bytes())).collect()
}

impl Marked {
    /// The environment of another user's process cannot be read; nor is there one of a process that
    /// has ended and is not yet waited for.
    fn new(pid: i32, wanted: &[u8]) -> Option<Self> {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        environment.split(|byte| *byte == 0).any(|entry| entry == wanted).then_some(Self { pid, pidfd })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[tokio::test]
    async fn what_has_left_its_session_and_its_parent_is_found_and_ended() {
        let mark = uuid::Uuid::new_v4().to_string();
        let other = uuid::Uuid::new_v4().to_string();
        let start = |mark: &str| {
            let script =
                "setsid sh -c 'trap \"\" TERM; sleep 600 & wait' </dev/null >/dev/null 2>&1 & exec true";
            let mut command = Command::new("sh");
            command.args(["-c", script]).env(MARK, mark).stdout(Stdio::null());
            assert!(command.status().unwrap().success());
        };
        start(&mark);
        start(&other);
        while all(&mark).len() < 2 || all(&other).len() < 2 {
            sleep(LOOK_EVERY).await;
        }
        assert_eq!(end(&mark).await, Vec::<i32>::new());
        assert!(!exists(&mark) && exists(&other));
        assert_eq!(end(&other).await, Vec::<i32>::new());
    }
}
