//! What others do while a migration is under way, as causes of its end: the guest itself, its
//! operator at a monitor of his own, a backup tool. Nothing is tried again against somebody's will.
//! `docs/meanwhile.md` has the whole table.

use crate::qemu::{EventKind, MigrationStatus, RunState};

/// Why a migration ends that nothing of its own has failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Meanwhile {
    /// The guest has shut down, or its QEMU was told to end: QEMU's event `SHUTDOWN`.
    #[error("{}", shut_down(reason))]
    ShutDown { reason: String },
    /// QEMU has stopped the guest, and it cannot simply go on.
    #[error("{}", fell(state, failing))]
    Fell { state: RunState, failing: Vec<String> },
    /// Somebody has cancelled QEMU's migration.
    #[error("{}", cancelled(*told))]
    MigrationCancelled { told: bool },
    #[error("the source's machine has changed since the migration was planned: {}", changes.join("; "))]
    Changed { changes: Vec<String> },
    /// QEMU would abort, and the guest die.
    #[error(
        "bitmap {bitmap} of node {node} is in use at the source, by a backup for one: QEMU would abort at the \
         switchover; end the backup first"
    )]
    BitmapInUse { node: String, bitmap: String },
    /// The source's QEMU could not give the guest's disks up.
    #[error("{}", not_given_up(*told, exports))]
    NotGivenUp { told: bool, exports: Vec<String> },
    /// The guest ran again here between the end of QEMU's migration and the hand-over.
    #[error("somebody continued the guest at the source before it was handed over (cont)")]
    Continued,
    #[error("somebody else {what} the mirror of disk {disk}")]
    MirrorEnded { disk: String, what: &'static str },
}

impl Meanwhile {
    /// What an event of QEMU's says by itself, without a question to QEMU.
    pub(crate) fn told_by(event: &EventKind) -> Option<Self> {
        match event {
            EventKind::Shutdown { reason, .. } => Some(Self::ShutDown { reason: reason.clone() }),
            // QEMU cancels no migration by itself, and we do so only after its end.
            EventKind::Migration { status: MigrationStatus::Cancelling | MigrationStatus::Cancelled } => {
                Some(Self::MigrationCancelled { told: true })
            }
            _ => None,
        }
    }

    /// Whether the same migration, begun again later, may succeed: it is planned anew.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Changed { .. } | Self::BitmapInUse { .. } => true,
            Self::ShutDown { .. }
            | Self::Fell { .. }
            | Self::MigrationCancelled { .. }
            | Self::NotGivenUp { .. }
            | Self::Continued
            | Self::MirrorEnded { .. } => false,
        }
    }

    /// Whether somebody meant the guest to be off.
    pub(crate) fn is_off(&self) -> bool {
        matches!(self, Self::ShutDown { .. })
    }
}

fn cancelled(told: bool) -> String {
    match told {
        true => "somebody cancelled QEMU's migration at the source (migrate_cancel)".into(),
        false => "the source's QEMU ended the migration of the RAM by itself, and not for the destination: somebody \
                  cancelled it at the source (migrate_cancel), for all that is known"
            .into(),
    }
}

fn not_given_up(told: bool, exports: &[String]) -> String {
    let mut text = match told {
        true => "the source's QEMU could not give the guest's disks up for the switchover",
        false => {
            "the source's QEMU broke the switchover off by itself and gives no reason, as QEMU 7.2 does when it \
             cannot give the guest's disks up"
        }
    }
    .to_owned();
    text.push_str(
        ": it may no longer open the file of one, or something else writes to one in the same QEMU",
    );
    if !exports.is_empty() {
        text.push_str(&format!("; somebody's exports there: {}", exports.join(", ")));
    }
    text
}

fn shut_down(reason: &str) -> String {
    match reason {
        "guest-shutdown" => "the guest has shut down".into(),
        "guest-reset" => "the guest has rebooted, and its QEMU at the source shuts down instead".into(),
        "guest-panic" => "the guest has panicked, and its QEMU at the source shuts down then".into(),
        "host-qmp-quit" => "somebody ended the guest's QEMU at the source (quit)".into(),
        "host-qmp-system-reset" => {
            "somebody reset the guest at the source, and its QEMU shuts down instead".into()
        }
        "host-signal" => "a signal ended the guest's QEMU at the source".into(),
        "host-ui" => "somebody closed the window of the guest's QEMU at the source".into(),
        other => format!("the guest was shut down at the source ({other})"),
    }
}

fn fell(state: &RunState, failing: &[String]) -> String {
    match state {
        RunState::Shutdown => "the guest has shut down".into(),
        RunState::GuestPanicked => "the guest has panicked, and QEMU stopped it at the source".into(),
        RunState::Watchdog => "the guest's watchdog has expired, and QEMU stopped it at the source".into(),
        RunState::Suspended => {
            "the guest has suspended itself to RAM at the source; wake it up before it is moved".into()
        }
        RunState::IoError if failing.is_empty() => {
            "QEMU stopped the guest at the source for an I/O error of a disk; mend that and `cont` it".into()
        }
        RunState::IoError => format!(
            "QEMU stopped the guest at the source for an I/O error of {}; mend that and `cont` it",
            failing.join(", ")
        ),
        other => format!("the guest was stopped at the source, in state {other}"),
    }
}

/// What a state of the guest means for a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Runs,
    /// Somebody has paused it, and it can be continued at any time.
    Paused,
    /// QEMU has stopped it for a while: for the switchover, or for a snapshot.
    Passing,
    /// It cannot go on by itself; one that is so at the beginning is not moved either.
    Fell,
}

impl Standing {
    pub(crate) fn of(state: &RunState) -> Self {
        match state {
            RunState::Running => Self::Runs,
            // A paused guest that was reset.
            RunState::Paused | RunState::Prelaunch => Self::Paused,
            RunState::FinishMigrate
            | RunState::PostMigrate
            | RunState::SaveVm
            | RunState::RestoreVm
            | RunState::InMigrate
            | RunState::Colo
            | RunState::Other(_) => Self::Passing,
            RunState::Shutdown
            | RunState::GuestPanicked
            | RunState::Watchdog
            | RunState::IoError
            | RunState::InternalError
            | RunState::Suspended
            | RunState::Debug => Self::Fell,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_meant_ends_a_migration_by_its_event_alone() {
        let status = |status| Meanwhile::told_by(&EventKind::Migration { status });
        assert_eq!(status(MigrationStatus::Cancelling), Some(Meanwhile::MigrationCancelled { told: true }));
        assert_eq!(status(MigrationStatus::Failed), None, "the destination's doing, mostly");
        assert_eq!(
            Meanwhile::told_by(&EventKind::Stop),
            None,
            "QEMU stops the guest for the switchover, too"
        );
        assert_eq!(Meanwhile::told_by(&EventKind::Reset { guest: true }), None, "a reboot goes on");
        let off = EventKind::Shutdown { guest: false, reason: "host-qmp-quit".into() };
        let said = Meanwhile::told_by(&off).map(|m| m.to_string());
        assert_eq!(said.as_deref(), Some("somebody ended the guest's QEMU at the source (quit)"));
    }

    #[test]
    fn a_disk_with_an_error_is_named() {
        let failing = vec!["disk1 (no space left)".to_owned()];
        let text = Meanwhile::Fell { state: RunState::IoError, failing }.to_string();
        assert!(text.contains("disk1 (no space left)"), "{text}");
        let unknown = Meanwhile::Fell { state: RunState::IoError, failing: Vec::new() }.to_string();
        assert!(unknown.contains("a disk"), "{unknown}");
    }

    #[test]
    fn a_state_that_this_build_does_not_know_is_taken_for_a_passing_one() {
        assert_eq!(Standing::of(&RunState::Other("of-tomorrow".into())), Standing::Passing);
        assert_eq!(Standing::of(&RunState::FinishMigrate), Standing::Passing);
        assert_eq!(Standing::of(&RunState::Prelaunch), Standing::Paused);
    }
}
