//! What an agent under a real systemd may do, by the kernel's word and by what others get to see of it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::booted::Machine;
use crate::support::process::{LONG, run_any, wait_for};

/// Users of the package: the agent's, its guests', and somebody else.
const AGENT: &str = "vmferry";
const GUESTS: &str = "vmferry-vm";
const NOBODY: &str = "nobody";

/// Where the agent has its private key from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// A file that belongs to the agent.
    File,
    /// A copy that systemd has made for it, of a file that belongs to root.
    Credential,
}

/// Prints which version of Landlock the kernel has (landlock_create_ruleset(2)), -1 for none.
const LANDLOCK_VERSION: &str = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))";

pub(crate) const KEY_FILE: &str = "/etc/vmferry/tls/key.pem";
pub(crate) const ROOT_KEY_FILE: &str = "/etc/vmferry/tls/root-key.pem";
const KEY_COPY: &str = "/run/credentials/vmferry.service/vmferry.key";

/// Everything that deploy/vmferry.service and docs/security.md claim of the running agent.
pub(crate) fn is_confined(machine: &Machine, key: Key) -> Result<()> {
    let pid = machine.shown("MainPID", "vmferry")?;
    let status = machine.run(&["cat", &format!("/proc/{pid}/status")])?;
    let field = |name: &str| {
        let found = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        found.map(str::trim).with_context(|| format!("no {name} in {status}"))
    };
    ensure!(field("Seccomp")? == "2" && field("NoNewPrivs")? == "1", "{status}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(field(set)?.trim_matches('0').is_empty(), "capabilities: {status}");
    }
    let uid = machine.run(&["id", "-u", AGENT])?;
    ensure!(field("Uid")?.split_whitespace().all(|id| id == uid.trim()), "{status}");
    own_filters(machine)?;
    leaves_no_core(machine, &pid)?;
    keeps_its_key(machine, key)
}

/// By its own word: the kernel tells of a filter, and neither whose it is nor anything of Landlock.
fn own_filters(machine: &Machine) -> Result<()> {
    let status: Value = serde_json::from_str(&machine.run(&["vmferry", "status", "--json"])?)?;
    let said = |what: &str| status["sandbox"][what].as_str().unwrap_or_default().to_owned();
    ensure!(said("seccomp").starts_with("on: "), "{}", said("seccomp"));
    // Asked by a service without the unit's filter, which might not let it be asked for.
    let kernel =
        machine.run(&["systemd-run", "--pipe", "--wait", "--quiet", "python3", "-c", LANDLOCK_VERSION])?;
    let landlock = said("landlock");
    match kernel.trim() {
        "-1" => eprintln!("  Landlock: not here ({landlock})"),
        version => {
            ensure!(landlock.starts_with("on: "), "the kernel has Landlock {version}, and it is {landlock}")
        }
    }
    Ok(())
}

/// Not even its own user looks into it, and root, for whom nothing is closed, shows that the look would see.
fn leaves_no_core(machine: &Machine, pid: &str) -> Result<()> {
    let memory = format!("/proc/{pid}/environ");
    machine.run(&["cat", &memory])?;
    ensure!(!reads(machine, AGENT, &memory)?, "the agent's user may look into its process");
    let limits = machine.run(&["cat", &format!("/proc/{pid}/limits")])?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    let values: Vec<_> = core.split_whitespace().skip(4).take(2).collect();
    ensure!(values == ["0", "0"], "{core}");
    Ok(())
}

fn keeps_its_key(machine: &Machine, key: Key) -> Result<()> {
    let (file, owner, readers): (_, _, &[&str]) = match key {
        Key::File => (KEY_FILE, AGENT, &[AGENT]),
        Key::Credential => (ROOT_KEY_FILE, "root", &[]),
    };
    let mode = machine.run(&["stat", "-c", "%a %U", file])?;
    ensure!(mode.trim() == format!("600 {owner}"), "{file} is {mode}");
    let may_read = |path: &str, who: &[&str]| -> Result<()> {
        for user in [AGENT, GUESTS, NOBODY] {
            let does = reads(machine, user, path)?;
            ensure!(does == who.contains(&user), "{user} and {path}: {does}");
        }
        Ok(())
    };
    may_read(file, readers)?;
    match key {
        Key::File => Ok(()),
        Key::Credential => may_read(KEY_COPY, &[AGENT]),
    }
}

/// Whether a user, with its own group alone, may read a file.
fn reads(machine: &Machine, user: &str, path: &str) -> Result<bool> {
    let group = machine.run(&["id", "-g", user])?;
    let (user, group) = (format!("--reuid={user}"), format!("--regid={}", group.trim()));
    let words = ["setpriv", &user, &group, "--clear-groups", "cat", path];
    Ok(run_any(&mut machine.command(&words), LONG)?.code == 0)
}

/// A reload: the same process goes on with what it reads.
pub(crate) fn reloads(machine: &Machine) -> Result<()> {
    let pid = machine.shown("MainPID", "vmferry")?;
    machine.systemctl(&["reload", "vmferry"])?;
    said(machine, "because=\"a reload was asked for\"")?;
    let (state, now) = (machine.shown("ActiveState", "vmferry")?, machine.shown("MainPID", "vmferry")?);
    ensure!(state == "active" && now == pid, "{state}, {now} after {pid}");
    Ok(())
}

/// An agent that says nothing any more is killed, leaves no core, and another one takes its place.
pub(crate) fn is_watched(machine: &Machine) -> Result<()> {
    // From the next start on; no shorter, for a busy machine must not look like an agent that hangs.
    machine.drop_in("watched", "WatchdogSec=10s\n")?;
    machine.restart()?;
    let pid = machine.shown("MainPID", "vmferry")?;
    machine.systemctl(&["kill", "--kill-whom=main", "--signal=STOP", "vmferry"])?;
    wait_for("another agent", LONG, || {
        let is_another = machine.shown("MainPID", "vmferry")? != pid;
        Ok((is_another && machine.shown("SubState", "vmferry")? == "running").then_some(()))
    })
    .with_context(|| machine.log())?;
    said(machine, "Watchdog timeout")?;
    // Not "dumped".
    said(machine, "code=killed, status=6/ABRT")?;
    ensure!(machine.shown("NRestarts", "vmferry")? == "1", "{}", machine.log());
    machine.run(&["vmferry", "status"])?;
    // The machine is as it was.
    std::fs::remove_dir_all(machine.units().join("vmferry.service.d"))?;
    machine.systemctl(&["daemon-reload"])
}

fn said(machine: &Machine, words: &str) -> Result<()> {
    let of_unit = ["journalctl", "-u", "vmferry", "-o", "cat"];
    let look = || Ok(machine.run(&of_unit)?.contains(words).then_some(()));
    wait_for(&format!("\"{words}\" in the journal"), LONG, look).with_context(|| machine.log())
}
