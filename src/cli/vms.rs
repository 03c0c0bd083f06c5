//! What each VM's QEMU has of its guest on this host, as text.

use crate::api::{Here, VmState};

/// The columns of a table, without an end of line.
pub(super) fn row(state: &VmState) -> String {
    format!("{:16} {}", state.vm, state_text(state))
}

pub(super) fn state_text(state: &VmState) -> String {
    let qemu = state.qemu_state.as_deref().unwrap_or("unknown");
    match state.here {
        Here::Runs => "runs here".into(),
        Here::Holds => format!("is here and does not run ({qemu})"),
        Here::NotBegun => format!("is here and has not run yet ({qemu})"),
        Here::Waits => "is not here; a QEMU waits for it".into(),
        Here::Receives => "comes here by a migration that is not vmferry's".into(),
        Here::Spent => "is not here; its QEMU waited for a migration that failed, and takes no other".into(),
        Here::GivenAway => format!("was moved away from here; its old QEMU is still there ({qemu})"),
        Here::NoQemu => "is not here; nobody listens at its monitor".into(),
        Here::InMigration => match state.migration {
            Some(id) => format!("is part of migration {id}"),
            None => "is being checked, or part of a migration that begins".into(),
        },
        Here::Unknown => {
            format!("unknown: {}", state.cause.as_deref().unwrap_or("its QEMU could not be asked"))
        }
    }
}

pub(super) fn list(states: &[VmState]) {
    if states.is_empty() {
        return;
    }
    println!("\n{:16} ON THIS HOST", "VM");
    states.iter().for_each(|state| println!("{}", row(state)));
}
