//! Whether a migration's descriptors fit into the limits of the agent and of its QEMU (`RLIMIT_NOFILE`), as
//! far as the kernel shows them to this agent.

use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::qemu::Qmp;

/// Descriptors of a migration beside those of its disks: the RAM's, a listening socket, some to spare.
const BESIDE_DISKS: usize = 16;
/// A disk's stream: its two ends for a moment, and what a pump or an image may open.
const PER_DISK: usize = 3;

/// What a process may open, and has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    limit: usize,
    open: usize,
}

/// What does not fit on this host, for so many disks.
pub(crate) fn findings(qmp: &Qmp, side: &str, disks: usize) -> Vec<Problem> {
    let qemu = qmp.process().pid().map(|pid| (format!("the {side}'s QEMU"), pid.to_string()));
    let own = Some((format!("the {side}'s agent"), "self".to_owned()));
    let needs = BESIDE_DISKS + PER_DISK * disks;
    let named = [qemu, own].into_iter().flatten();
    named.filter_map(|(who, pid)| too_few(&who, room_of(&pid)?, needs)).collect()
}

fn too_few(who: &str, Room { limit, open }: Room, needs: usize) -> Option<Problem> {
    if open + needs <= limit {
        return None;
    }
    let text = format!(
        "{who} may open {limit} descriptors and has {open} open; this migration needs up to {needs} more"
    );
    let remedy = "raise its limit: `LimitNOFILE` of its unit, or `prlimit --nofile` while it runs";
    Some(Problem::new(ProblemKind::TooFewDescriptors, text, remedy))
}

/// None where the kernel does not show it: a process of another user.
fn room_of(pid: &str) -> Option<Room> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(Room { limit: soft_limit(&limits)?, open })
}

/// `Max open files            1024                 524288               files` (proc(5)).
fn soft_limit(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(usize::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_its_numbers() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             95842                95842                processes \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(limits), Some(1024));
        assert_eq!(
            soft_limit("Max open files            unlimited            unlimited   files"),
            Some(usize::MAX)
        );
        assert_eq!(soft_limit("of tomorrow"), None);
        assert_eq!(too_few("it", Room { limit: 1024, open: 1000 }, 24), None);
        let told = too_few("it", Room { limit: 1024, open: 1001 }, 24).map(|p| p.text);
        assert_eq!(
            told.as_deref(),
            Some("it may open 1024 descriptors and has 1001 open; this migration needs up to 24 more")
        );
    }
}
