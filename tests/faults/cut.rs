//! Cuts one data stream and nothing else: takes a duplicate of the agent's end of the socket that
//! leads to QEMU, and shuts it down. The agent has no part in it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::support::process::{SHORT, run, wait_for};
use crate::support::{Agent, Vm};

/// Streams are made one after the other; each is there soon after its phase begins.
const SEEN_WITHIN: Duration = Duration::from_secs(20);

/// One end of a unix socket pair, as `ss -xnp` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    named: bool,
    inode: u64,
    peer: u64,
    /// Process and descriptor.
    owners: Vec<(u32, i32)>,
}

/// Which stream. They are told apart by the order in which they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Of the disk with that number.
    Disk(usize),
    /// The RAM's, which is made after those of all disks.
    Ram,
}

/// Cuts a stream between an agent and the QEMU of its side.
///
/// # Errors
/// It is not there.
pub fn cut_stream(agent: &Agent, vm: &Vm, which: Cut) -> Result<()> {
    let number = match which {
        Cut::Disk(disk) => disk,
        Cut::Ram => vm.spec.disks.len(),
    };
    let (pid, qemu) = (agent.pid().context("no agent")?, vm.pid().context("no QEMU")?);
    let fd = wait_for(&format!("stream {which:?}"), SEEN_WITHIN, || {
        Ok(streams(agent, pid, qemu)?.get(number).copied())
    })?;
    let end = duplicate(pid, fd).with_context(|| format!("descriptor {fd} of the agent"))?;
    socket2::SockRef::from(&end).shutdown(std::net::Shutdown::Both)?;
    Ok(())
}

/// The agent's descriptors of sockets whose other end is QEMU's, monitors left out, oldest first.
fn streams(agent: &Agent, pid: u32, qemu: u32) -> Result<Vec<i32>> {
    let text = run(agent.host().command("ss").args(["-xnpH"]), SHORT)?;
    let ends: Vec<End> = text.lines().filter_map(parse).collect();
    let of = |end: &End, pid: u32| end.owners.iter().find(|(owner, _)| *owner == pid).map(|(_, fd)| *fd);
    let mut found: Vec<(u64, i32)> = ends
        .iter()
        .filter_map(|end| {
            let other = ends.iter().find(|other| other.inode == end.peer)?;
            of(other, qemu).filter(|_| !end.named && !other.named)?;
            Some((end.inode, of(end, pid)?))
        })
        .collect();
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, fd)| fd).collect())
}

/// `u_str ESTAB 0 0 * 188013 * 188014 users:(("vmferry",pid=15029,fd=3))`. A monitor's end has a name.
fn parse(line: &str) -> Option<End> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, _, _, name, inode, _, peer, ..] = words[..] else { return None };
    let owners = line.split("pid=").skip(1).filter_map(|part| {
        let (pid, rest) = part.split_once(",fd=")?;
        let fd: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some((pid.parse().ok()?, fd.parse().ok()?))
    });
    let named = name.ends_with(".qmp");
    Some(End { named, inode: inode.parse().ok()?, peer: peer.parse().ok()?, owners: owners.collect() })
}

fn duplicate(pid: u32, fd: i32) -> Result<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("pid 0")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let found = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())?;
    ensure!(nix::sys::stat::fstat(&found)?.st_mode & 0o170_000 == 0o140_000, "it is no socket");
    Ok(found)
}
