//! A migration that an earlier life of this agent left open.

use std::sync::Arc;

use crate::migrate::handover::Side;
use crate::migrate::host::Host;
use crate::migrate::host::reservations::Reservation;
use crate::migrate::journal::{Ending, Journal, Past, Role};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::progress::{Outcome, Progress, ProgressSink};

/// A journal that an earlier life of this agent left open, and where to report on it.
pub struct Open {
    pub journal: Journal,
    pub progress: ProgressSink,
    /// No later migration of its VM is open: its QEMU is this one's to touch.
    pub(super) heir: bool,
    /// Nothing else begins with this VM until all that is open of it is settled.
    pub(super) _reservation: Arc<Reservation>,
}

/// Why a migration that was found open was not finished.
pub(super) fn cause(heir: bool, why: &str) -> String {
    match heir {
        true => why.to_owned(),
        false => "a later migration of the VM began before this one was settled".to_owned(),
    }
}

pub(super) fn end(host: &Host, journal: Journal, progress: &ProgressSink, phase: Phase, outcome: Outcome) {
    tracing::info!(vm = journal.past().header.vm, result = outcome.label(), "settled");
    host.journals.end(journal, outcome.clone());
    progress.end(phase, outcome);
}

/// Where an open migration is: in the pause the journal has records of whose the guest is, and no
/// phases.
pub(crate) fn phase_of(past: &Past) -> Phase {
    let is_source = past.header.role == Role::Source;
    let forced_away = past.forced.is_some_and(|side| (side == Side::There) == is_source);
    let forced_back = past.forced.is_some() && !forced_away;
    if past.never_ran || forced_back {
        Phase::RollBack
    } else if past.runs || (is_source && forced_away) {
        Phase::Confirm
    } else if past.handed_over || past.starting || forced_away {
        Phase::HandOver
    } else {
        past.phase
    }
}

pub(super) fn told(past: &Past) -> Progress {
    let header = &past.header;
    let id = header.retry.as_ref().map_or(header.migration, |r| r.first);
    let mut progress = Progress::new(id, &header.vm, header.role, &header.peer);
    progress.began_at = header.began_at;
    progress.phase = match &past.ended {
        Some(Ending::Moved { .. } | Ending::Failed { replicated: true, .. }) => Phase::Done,
        Some(_) => Phase::Failed,
        None => phase_of(past),
    };
    progress.outcome = past.ended.clone().map(Outcome::from);
    progress
}
