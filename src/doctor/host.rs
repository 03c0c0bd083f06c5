//! The host itself: what its kernel can do, its clock, and what the agent may use of it.

use std::fs;
use std::process::Command;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::finding::{Finding, RunningAgent};
use crate::error_chain::chain;

/// Descriptors that an agent with a few hundred streams needs: two sockets and a pipe each, and reserve.
const DESCRIPTORS_MIN: u64 = 4096;
/// Descriptors that travel in the store are one pair; older programs left each of them there.
const STORE_MIN: u64 = 2;

pub(super) fn kernel() -> Vec<Finding> {
    let pidfd = match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_) => Finding::ok("kernel: pidfd", "can be opened"),
        Err(e) => {
            let remedy = "use Linux 5.3 or newer: without it nobody can prove that a QEMU has ended";
            Finding::failed("kernel: pidfd", e.to_string(), remedy)
        }
    };
    // Made and thrown away: nothing is confined by it.
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let landlock = match ruleset.handle_access(AccessFs::from_all(ABI::V1)).and_then(|rules| rules.create()) {
        Ok(_) => Finding::ok("kernel: Landlock", "there"),
        Err(e) => {
            let remedy = "add landlock to the kernel's `lsm=`; the agent works without it, less confined";
            Finding::warning("kernel: Landlock", chain(&e), remedy)
        }
    };
    let what = "kernel: seccomp";
    let seccomp = match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "errno") => {
            Finding::ok(what, "there")
        }
        Ok(_) => Finding::warning(what, "has no `errno`", "use a newer kernel"),
        Err(e) => Finding::unknown(what, e.to_string(), "see /proc/sys/kernel/seccomp"),
    };
    vec![pidfd, landlock, seccomp]
}

/// Whether somebody keeps the clock. What it shows is judged by the certificates.
pub(super) fn clock() -> Finding {
    let what = "clock";
    let said = said("timedatectl", &["show", "--property=NTPSynchronized", "--value"]);
    match said.as_deref() {
        Some("yes") => Finding::ok(what, "synchronised"),
        Some("no") => {
            let remedy = "run chrony or systemd-timesyncd: certificates are judged by it";
            Finding::warning(what, "not synchronised", remedy)
        }
        _ => {
            Finding::unknown(what, "timedatectl does not say whether it is synchronised", "look at `date -u`")
        }
    }
}

/// How many descriptors the running agent may have.
pub(super) fn descriptors(agent: Option<&RunningAgent>) -> Finding {
    let what = "descriptors of the agent";
    let Some(pid) = agent.and_then(|agent| agent.pid) else {
        return Finding::unknown(what, "no agent answers", "start it, and look again");
    };
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"));
    let limit = limits.as_deref().ok().and_then(open_files);
    match limit {
        Some(limit) if limit >= DESCRIPTORS_MIN => Finding::ok(what, format!("{limit} at most")),
        Some(limit) => {
            Finding::warning(what, format!("{limit} at most"), "set LimitNOFILE=65536 in its unit")
        }
        None => Finding::unknown(what, format!("/proc/{pid}/limits cannot be read"), "run it as root"),
    }
}

/// The soft limit.
fn open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Whether a restart finds what the process before has left.
pub(super) fn descriptor_store() -> Finding {
    let what = "descriptor store";
    let said =
        said("systemctl", &["show", "vmferry.service", "--property=FileDescriptorStoreMax", "--value"]);
    match said.as_deref().map(str::parse::<u64>) {
        Some(Ok(places)) if places >= STORE_MIN => Finding::ok(what, format!("{places} places")),
        Some(Ok(places)) => {
            let remedy = "use deploy/vmferry.service, or set FileDescriptorStoreMax=";
            let text = format!("{places} places: a restart ends the migrations that are under way");
            Finding::warning(what, text, remedy)
        }
        _ => Finding::unknown(what, "systemd does not answer", "a restart by `--take-over` needs no store"),
    }
}

/// What a program says, in one line.
fn said(program: &str, words: &[&str]) -> Option<String> {
    let done = Command::new(program).args(words).output().ok()?;
    let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    (done.status.success() && !text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_what_counts() {
        let text = "Limit      Soft Limit  Hard Limit  Units\nMax open files            1024                 524288   files\n";
        assert_eq!(open_files(text), Some(1024));
        assert_eq!(open_files("Max open files   unlimited unlimited files"), Some(u64::MAX));
        assert_eq!(open_files("Max processes 3 3"), None);
    }
}
