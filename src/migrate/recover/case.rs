//! One migration that is not closed, as it is told to an operator, and whose its virtual machine is by
//! all that is known.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::migrate::handover::{Ended, Known, Side};
use crate::migrate::journal::{self, Past, Role};
use crate::migrate::model::phase::Phase;
use crate::migrate::settle;

/// What sort of case it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CaseKind {
    /// A migration that is under way, or is being settled, and needs nobody.
    UnderWay,
    /// Nobody knows yet whose the virtual machine is.
    Undecided,
    /// It has ended, and something is left to clean up.
    Leftovers,
    /// Its journal is not believed: nobody knows whose the virtual machine is.
    Refused,
    /// It has ended and left nothing. Shown only when it is asked for by its id.
    Closed,
}

/// Whose the virtual machine is, by what is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    Here,
    There,
    Unknown,
}

/// One migration that is not closed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Case {
    /// What sort of case it is.
    pub kind: CaseKind,
    /// The migration, or the try of one: by the file's name if the journal is not believed.
    pub id: Option<Uuid>,
    /// The virtual machine, where that can be read.
    pub vm: Option<String>,
    /// This host's part.
    pub role: Option<Role>,
    /// The other host, as its certificate names it.
    pub peer: Option<String>,
    /// Seconds since the epoch.
    pub began_at: Option<i64>,
    /// The journal's last.
    pub phase: Option<Phase>,
    /// What this host's journal says, in its own words.
    pub journal: Vec<String>,
    /// What the other host's agent says now, or why it cannot be asked.
    pub peer_says: Option<String>,
    /// What the virtual machine's QEMU on this host says now, or why it cannot be asked.
    pub qemu_says: Option<String>,
    /// Whose the virtual machine is by all that.
    pub owner: Owner,
    /// What is done about it, and why.
    pub plan: String,
    /// What is left to clean up.
    pub left: Vec<String>,
    /// Whether an operator may decide it.
    pub may_force: bool,
    /// The journal's.
    pub file: PathBuf,
}

impl Case {
    /// By all that is known of a file: what its journal says, if that can be read.
    pub(super) fn of(file: PathBuf, past: Option<&Past>) -> Self {
        let header = past.map(|past| &past.header);
        Self {
            kind: if past.is_some() { CaseKind::Leftovers } else { CaseKind::Refused },
            id: header.map_or_else(|| journal::migration_of(&file), |header| Some(header.migration)),
            vm: header.map_or_else(|| journal::vm_of(&file), |header| Some(header.vm.clone())),
            role: header.map(|header| header.role),
            peer: header.map(|header| header.peer.clone()),
            began_at: header.map(|header| header.began_at),
            phase: past.map(settle::phase_of),
            journal: past.map_or_else(Vec::new, |past| records(&past.known())),
            peer_says: None,
            qemu_says: None,
            owner: Owner::Unknown,
            plan: String::new(),
            left: Vec::new(),
            may_force: false,
            file,
        }
    }
}

/// Its records, in words.
pub(super) fn records(known: &Known) -> Vec<String> {
    let forced = match known.forced {
        None => "",
        Some(Side::Here) => "forced here",
        Some(Side::There) => "forced there",
    };
    let ended = match known.ended {
        None => "",
        Some(Ended::Moved) => "ended: moved",
        Some(Ended::Stayed) => "ended: not moved",
    };
    let all = [
        (known.handed_over, "handed-over"),
        (known.starting, "starting"),
        (known.runs, "runs"),
        (known.never_ran, "never-ran"),
        (!forced.is_empty(), forced),
        (!ended.is_empty(), ended),
    ];
    all.iter().filter(|(is, _)| *is).map(|(_, word)| (*word).to_owned()).collect()
}

/// Whose the virtual machine is: what this host knows for good, and else what the other one does.
pub(super) fn owner(role: Role, ours: Known, theirs: Option<Known>) -> Owner {
    let theirs = theirs.unwrap_or_default();
    let by_us = match role {
        Role::Source => at_source(ours),
        Role::Destination => at_destination(ours),
    };
    let by_them = match role {
        Role::Source => at_destination(theirs),
        Role::Destination => at_source(theirs),
    };
    let is_source = role == Role::Source;
    match by_us.or(by_them) {
        Some(Ended::Stayed) if is_source => Owner::Here,
        Some(Ended::Stayed) => Owner::There,
        Some(Ended::Moved) if is_source => Owner::There,
        Some(Ended::Moved) => Owner::Here,
        None => Owner::Unknown,
    }
}

/// Whether the other host has begun to start the guest and not said that it never ran, or it is that host's.
pub(super) fn is_theirs(role: Role, theirs: Known) -> bool {
    match owner(role, Known::default(), Some(theirs)) {
        Owner::There => true,
        Owner::Here => false,
        Owner::Unknown => role == Role::Source && theirs.starting,
    }
}

fn at_source(known: Known) -> Option<Ended> {
    match known {
        Known { ended: Some(ended), .. } => Some(ended),
        Known { forced: Some(Side::There), .. } | Known { runs: true, .. } => Some(Ended::Moved),
        Known { forced: Some(Side::Here), .. } | Known { never_ran: true, .. } => Some(Ended::Stayed),
        // Without `handed-over` it is under way, or the write of it is in doubt.
        _ => None,
    }
}

fn at_destination(known: Known) -> Option<Ended> {
    match known {
        Known { ended: Some(ended), .. } => Some(ended),
        Known { never_ran: true, .. } => Some(Ended::Stayed),
        Known { runs: true, .. } => Some(Ended::Moved),
        // With `starting` alone its QEMU may yet turn out to be gone before it was told to run.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_for_this_host_is_contradicted_by_who_may_run_the_guest() {
        let none = Known::default();
        let starting = Known { starting: true, ..none };
        let runs = Known { runs: true, ..starting };
        let moved = Known { ended: Some(Ended::Moved), ..runs };
        let never = Known { never_ran: true, ..starting };
        let handed = Known { handed_over: true, ..none };
        let given_back = Known { never_ran: true, ..handed };
        for (role, theirs, against) in [
            (Role::Source, none, false),
            (Role::Source, starting, true),
            (Role::Source, runs, true),
            (Role::Source, moved, true),
            (Role::Source, never, false),
            (Role::Destination, handed, false),
            (Role::Destination, given_back, true),
        ] {
            assert_eq!(is_theirs(role, theirs), against, "{role:?}: {theirs:?}");
        }
    }

    #[test]
    fn who_owns_it_is_said_only_when_somebody_knows() {
        let none = Known::default();
        let handed = Known { handed_over: true, ..none };
        let starting = Known { starting: true, ..none };
        let runs = Known { runs: true, ..starting };
        let never = Known { never_ran: true, ..none };
        let given_back = Known { handed_over: true, never_ran: true, ..none };
        assert_eq!(owner(Role::Source, handed, None), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(none)), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(starting)), Owner::Unknown);
        assert_eq!(owner(Role::Source, handed, Some(runs)), Owner::There);
        assert_eq!(owner(Role::Source, handed, Some(never)), Owner::Here);
        assert_eq!(owner(Role::Source, given_back, None), Owner::Here);
        assert_eq!(owner(Role::Destination, none, None), Owner::Unknown);
        assert_eq!(owner(Role::Destination, none, Some(handed)), Owner::Unknown);
        assert_eq!(owner(Role::Destination, none, Some(given_back)), Owner::There);
        assert_eq!(owner(Role::Destination, starting, Some(handed)), Owner::Unknown);
        assert_eq!(owner(Role::Destination, runs, Some(handed)), Owner::Here);
        assert_eq!(owner(Role::Destination, never, Some(handed)), Owner::There);
    }
}
