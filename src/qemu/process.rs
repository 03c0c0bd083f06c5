//! The process behind a monitor: whether it lives, by the kernel's word. A monitor that is lost,
//! silent or slow says nothing about that.
//!
//! The kernel tells who called `listen()` on the monitor's socket (`SO_PEERCRED`). That is QEMU
//! itself, also with `-daemonize` and on a listening descriptor passed to it, because QEMU calls
//! `listen()` again (seen on 7.2 and 10.0). Behind a proxy it is the proxy, whose life says nothing:
//! so a process counts only if it goes by the name of a QEMU, and else nothing is known.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::sleep;

/// The longest command line that is read.
const COMMAND_LINE_BYTES_MAX: u64 = 1 << 20;
/// How often is looked whether a process that is waited for has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Whether a process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Alive,
    /// It has ended, which is proved.
    Ended,
    /// Not known. It may well live.
    Unknown,
}

/// Which process it is, to be recognised by another life of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// When it was started, in ticks since the host was: the number is used again some day.
    pub started_ticks: u64,
    /// In which the number is valid.
    pub pid_namespace: String,
}

/// A QEMU's process, as far as it is known. Clones share it.
#[derive(Clone, Default)]
pub struct Process {
    known: Option<Arc<Known>>,
    /// Who listens at the monitor, QEMU or not.
    listener: Option<i32>,
}

struct Known {
    id: ProcessId,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
}

impl Process {
    /// The one that listens at the other end of a monitor's socket.
    pub(super) fn behind(socket: &UnixStream) -> Self {
        let listener = socket.peer_cred().ok().and_then(|cred| cred.pid());
        Self { known: listener.and_then(Known::qemu).map(Arc::new), listener }
    }

    /// Whether both are the same process, by all that is known.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.id() == other.id() && self.listener == other.listener
    }

    /// The one that an earlier life of the agent has recorded.
    /// Errors: the answer, if there is none of that identity any more ([`Life::Ended`]) or that cannot be
    /// told ([`Life::Unknown`]).
    pub fn find(id: &ProcessId) -> Result<Self, Life> {
        if pid_namespace().as_ref() != Some(&id.pid_namespace) {
            return Err(Life::Unknown);
        }
        match open(id.pid) {
            Err(rustix::io::Errno::SRCH) => Err(Life::Ended),
            Err(_) => Err(Life::Unknown),
            Ok(pidfd) => match started_ticks(id.pid) {
                None => Err(Life::Unknown),
                Some(ticks) if ticks != id.started_ticks => Err(Life::Ended),
                Some(_) => {
                    let known = Some(Arc::new(Known { id: id.clone(), pidfd }));
                    Ok(Self { known, listener: Some(id.pid) })
                }
            },
        }
    }

    /// Whether it lives.
    pub fn life(&self) -> Life {
        match &self.known {
            None => Life::Unknown,
            Some(known) if known.has_ended() => Life::Ended,
            Some(_) => Life::Alive,
        }
    }

    /// Which one it is, if that is known.
    pub fn id(&self) -> Option<&ProcessId> {
        self.known.as_ref().map(|known| &known.id)
    }

    /// Its number, if it is known.
    pub fn pid(&self) -> Option<i32> {
        self.id().map(|id| id.pid)
    }

    /// The words that it was started with. None where it is not known, has ended, or may not be looked at.
    pub fn command_line(&self) -> Option<Vec<String>> {
        use std::io::Read;
        let known = self.known.as_ref()?;
        let file = std::fs::File::open(format!("/proc/{}/cmdline", known.id.pid)).ok()?;
        let mut bytes = Vec::new();
        file.take(COMMAND_LINE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        // Looked at last: the number may be another process's by now.
        if known.has_ended() || bytes.pop() != Some(0) {
            return None;
        }
        Some(bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    /// Waits until it is proved that it has ended: for ever if nothing is known of it.
    pub async fn ended(&self) {
        let Some(known) = &self.known else { return std::future::pending().await };
        while !known.has_ended() {
            sleep(LOOK_EVERY).await;
        }
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({:?}, {:?})", self.pid(), self.life())
    }
}

impl Known {
    fn qemu(pid: i32) -> Option<Self> {
        let pidfd = open(pid).ok()?;
        let known = Self {
            id: ProcessId { pid, started_ticks: started_ticks(pid)?, pid_namespace: pid_namespace()? },
            pidfd,
        };
        // Looked at last: a number that was used anew in between has another name, or is gone.
        (is_qemu(pid) && !known.has_ended()).then_some(known)
    }

    fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }
}

fn open(pid: i32) -> rustix::io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::empty())
}

fn pid_namespace() -> Option<String> {
    let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(link.to_string_lossy().into_owned())
}

/// Field 22 of `/proc/PID/stat`. The second, the name, may hold anything, brackets and blanks too.
fn started_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Whether it goes by the name of a QEMU. Where the agent may not look (`ProtectProc=`, a container
/// of its own), no process does.
fn is_qemu(pid: i32) -> bool {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let program = String::from_utf8_lossy(program).into_owned();
    let file = Path::new(&program).file_name().map_or("", |name| name.to_str().unwrap_or_default());
    [comm.trim(), file].into_iter().any(names_qemu)
}

fn names_qemu(name: &str) -> bool {
    // Proxmox calls it `kvm`, Red Hat `qemu-kvm`. What is cut off after 15 bytes still begins so.
    ["qemu-system-", "qemu-kvm"].iter().any(|begin| name.starts_with(begin))
        || name == "kvm"
        || name == "qemu"
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    fn own_id() -> ProcessId {
        let pid = i32::try_from(std::process::id()).unwrap();
        let started_ticks = started_ticks(pid).unwrap();
        ProcessId { pid, started_ticks, pid_namespace: pid_namespace().unwrap() }
    }

    #[test]
    fn qemu_has_several_names_and_a_proxy_none_of_them() {
        for name in ["qemu-system-x86_64", "qemu-system-x86", "qemu-kvm", "kvm"] {
            assert!(names_qemu(name), "{name}");
        }
        for name in ["socat", "qemu-storage-daemon", "qemu-nbd", "qemu-img", "real-0123abc", "", "kvmtool"] {
            assert!(!names_qemu(name), "{name}");
        }
    }

    #[tokio::test]
    async fn a_process_is_found_again_only_as_itself() {
        let own = own_id();
        assert_eq!(Process::find(&own).unwrap().life(), Life::Alive);
        let earlier = ProcessId { started_ticks: own.started_ticks + 1, ..own.clone() };
        assert_eq!(Process::find(&earlier).err(), Some(Life::Ended));
        let elsewhere = ProcessId { pid_namespace: "pid:[1]".into(), ..own };
        assert_eq!(Process::find(&elsewhere).err(), Some(Life::Unknown));
    }

    #[tokio::test]
    async fn the_words_of_a_process_are_told_while_it_lives() {
        use std::io::Read;
        let words = ["-c", "echo; read line", "", "0.0"];
        let mut command = std::process::Command::new("sh");
        command.args(words).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        // The kernel lets `spawn` return a little before a new program's words can be read.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = ProcessId { pid, started_ticks: started_ticks(pid).unwrap(), ..own_id() };
        let process = Process::find(&id).unwrap();
        assert_eq!(process.command_line().unwrap(), ["sh", "-c", "echo; read line", "", "0.0"]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.command_line(), None);
        assert_eq!(Process::default().command_line(), None);
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = ProcessId { pid, started_ticks: started_ticks(pid).unwrap(), ..own_id() };
        let process = Process::find(&id).unwrap();
        assert_eq!(process.life(), Life::Alive);
        child.kill().unwrap();
        process.ended().await;
        assert_eq!(process.life(), Life::Ended);
        child.wait().unwrap();
        assert_eq!(Process::find(&id).err(), Some(Life::Ended));
    }
}
