//! What came of a migration, from what virsh said, where libvirt has the domain now, and what the tunnel saw.

use super::virsh::{Said, Virsh};
use crate::api::{Expected, LibvirtEnd, LibvirtMigration, Told};
use crate::cli::exit_code::{EXIT_FAILED, EXIT_LEFT, EXIT_UNDECIDED};

/// Where the domain is after virsh has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    Moved,
    /// It did not move, and libvirt has it here in this state.
    Here(String),
    /// Nobody has said.
    Unknown(String),
}

impl Fate {
    /// virsh has ended; after a failure libvirt is asked what it has.
    pub(super) async fn find(virsh: &Virsh, domain: &str, said: Option<&Said>) -> Self {
        if said.is_some_and(|said| said.ok) {
            return Self::Moved;
        }
        match virsh.ask(&["domstate", "--reason", domain]).await {
            Ok(state) if state.ok => Self::of_state(state.stdout.trim()),
            Ok(state) => Self::Unknown(state.error()),
            Err(e) => Self::Unknown(format!("{e:#}")),
        }
    }

    /// From what `domstate --reason` prints of it at the source.
    fn of_state(state: &str) -> Self {
        let is_here =
            ["running", "paused", "idle", "blocked", "pmsuspended"].iter().any(|s| state.starts_with(s));
        // The guest runs there already, or did.
        if state.contains("post-copy") || !is_here {
            return Self::Unknown(format!("libvirt has it here as: {state}"));
        }
        Self::Here(state.to_owned())
    }

    /// For programs: which of the three, and the state.
    pub(super) fn words(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Moved => ("moved", None),
            Self::Here(state) => ("here", Some(state)),
            Self::Unknown(state) => ("unknown", Some(state)),
        }
    }

    /// libvirt waits here with RAM that the guest there lacks.
    pub(super) fn can_be_resumed(&self) -> bool {
        matches!(self, Self::Unknown(state) if state.contains("post-copy failed"))
    }

    /// What the agent is told.
    pub(super) fn told(&self, expected: Expected) -> Told {
        match self {
            Self::Moved => Told::Moved(expected),
            Self::Here(_) => Told::Failed,
            Self::Unknown(_) => Told::Unknown,
        }
    }

    /// The same without a virsh of ours: what libvirt has of a domain that somebody may have moved.
    pub(super) async fn told_by_libvirt(virsh: &Virsh, domain: &str, expected: Option<Expected>) -> Told {
        match (Self::find(virsh, domain, None).await, expected) {
            (Self::Here(_), _) => Told::Failed,
            (Self::Unknown(state), Some(expected)) if state.contains("shut off (migrated)") => {
                Told::Moved(expected)
            }
            _ => Told::Unknown,
        }
    }

    /// The exit code, with what the agents have found at the end.
    pub(super) fn exit_code(&self, ended: Option<&LibvirtMigration>) -> u8 {
        let is_whole = ended.is_some_and(|e| e.left.is_empty() && e.ended != Some(LibvirtEnd::Bypassed));
        match self {
            Self::Moved if is_whole => 0,
            Self::Moved => EXIT_LEFT,
            Self::Here(_) => EXIT_FAILED,
            Self::Unknown(_) => EXIT_UNDECIDED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libvirt_has_here_decides_what_is_said_of_a_failure() {
        assert_eq!(Fate::of_state("running (booted)"), Fate::Here("running (booted)".into()));
        assert_eq!(Fate::of_state("paused (user)"), Fate::Here("paused (user)".into()));
        for unknown in
            ["paused (post-copy failed)", "paused (post-copy)", "shut off (migrated)", "crashed", ""]
        {
            let fate = Fate::of_state(unknown);
            assert!(matches!(fate, Fate::Unknown(_)), "{unknown}");
            assert_eq!(fate.can_be_resumed(), unknown == "paused (post-copy failed)", "{unknown}");
        }
        assert_eq!(Fate::Here(String::new()).exit_code(None), EXIT_FAILED);
        assert_eq!(Fate::Unknown(String::new()).exit_code(None), EXIT_UNDECIDED);
        assert_eq!(Fate::Moved.exit_code(None), EXIT_LEFT, "what the tunnel saw is not known");
    }
}
