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

/// Which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// A disk's: whichever is found first.
    Disk,
    /// The RAM's: the one that is not among those that were there when only disks were copied.
    Ram,
}

/// Cuts a stream between an agent and the QEMU of its side. `disks`: the streams of the disks.
///
/// # Errors
/// It is not there.
pub fn cut_stream(agent: &Agent, vm: &Vm, disks: &[u64], which: Cut) -> Result<()> {
    let pid = agent.pid().context("no agent")?;
    let fd = wait_for(&format!("stream {which:?}"), SEEN_WITHIN, || {
        let found = streams(agent, vm)?;
        let wanted = |inode| disks.contains(&inode) == (which == Cut::Disk);
        Ok(found.into_iter().find(|(inode, _)| wanted(*inode)).map(|(_, fd)| fd))
    })?;
    let end = duplicate(pid, fd).with_context(|| format!("descriptor {fd} of the agent"))?;
    socket2::SockRef::from(&end).shutdown(std::net::Shutdown::Both)?;
    Ok(())
}

/// An agent's sockets whose other end is QEMU's, monitors left out: inodes and descriptors.
///
/// # Errors
/// Either does not run, or `ss` fails.
pub fn streams(agent: &Agent, vm: &Vm) -> Result<Vec<(u64, i32)>> {
    let (pid, qemu) = (agent.pid().context("no agent")?, vm.pid().context("no QEMU")?);
    let text = run(agent.host().command("ss").args(["-xnpH"]), SHORT)?;
    let ends: Vec<End> = text.lines().filter_map(parse).collect();
    let of = |end: &End, pid: u32| end.owners.iter().find(|(owner, _)| *owner == pid).map(|(_, fd)| *fd);
    let found = ends.iter().filter_map(|end| {
        let other = ends.iter().find(|other| other.inode == end.peer)?;
        of(other, qemu).filter(|_| !end.named && !other.named)?;
        Some((end.inode, of(end, pid)?))
    });
    Ok(found.collect())
}

/// Cuts the connection between an agent and the monitor of a QEMU; both live on. False: there is none.
///
/// # Errors
/// `ss` fails.
pub fn cut_monitor(agent: &Agent, vm: &Vm) -> Result<bool> {
    let (Some(pid), Some(qemu)) = (agent.pid(), vm.pid()) else { return Ok(false) };
    let text = run(agent.host().command("ss").args(["-xnpH"]), SHORT)?;
    let ends: Vec<End> = text.lines().filter_map(parse).collect();
    let theirs = |end: &&End| end.named && end.owners.iter().any(|(owner, _)| *owner == qemu);
    let ours = |end: &End| {
        ends.iter().filter(theirs).find(|other| other.inode == end.peer)?;
        end.owners.iter().find(|(owner, _)| *owner == pid).map(|(_, fd)| *fd)
    };
    let Some(fd) = ends.iter().find_map(ours) else { return Ok(false) };
    // It may be closed at this very moment.
    if let Ok(end) = duplicate(pid, fd) {
        let _ = socket2::SockRef::from(&end).shutdown(std::net::Shutdown::Both);
    }
    Ok(true)
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
