//! The guest's QEMU as the source of its migration sees it: its monitor, its events, the machine of the plan.

use super::failure::Failure;
use super::reconnect::LOOKS_MAX;
use crate::migrate::guest::inventory::Inventory;
use crate::migrate::guest::last_words::LastWords;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::phase::Phase;
use crate::qemu::{EventKind, Events, Qmp};

/// The guest's QEMU as the source of its migration sees it.
pub(crate) struct Guest {
    pub(crate) qmp: Qmp,
    events: Events,
    /// The machine that the disks were planned for.
    pub(crate) inventory: Option<Inventory>,
    last_words: LastWords,
    /// Nobody has listened to QEMU for a while: the next phase asks what happened.
    missed_events: bool,
    /// How often a phase was begun again for that.
    looks: u32,
}

impl Guest {
    /// `missed_events`: nobody has listened to it for a while.
    pub(crate) fn new(
        (qmp, events): (Qmp, Events),
        inventory: Option<Inventory>,
        last_words: LastWords,
        missed_events: bool,
    ) -> Self {
        Self { qmp, events, inventory, last_words, missed_events, looks: 0 }
    }

    /// The next event; one that is missed is a failure of the view, not of the migration.
    pub(crate) async fn event(&mut self) -> Result<EventKind, Failure> {
        match self.events.recv().await {
            Some(event) if event.kind == EventKind::Missed => Err(Failure::Missed),
            Some(event) => Ok(event.kind),
            None => Err(Failure::of_monitor(&self.qmp)),
        }
    }

    /// What the events say that nobody has looked at, if it ends a migration.
    pub(crate) fn told_meanwhile(&mut self) -> Option<Meanwhile> {
        let mut told = None;
        while let Some(event) = self.events.try_recv() {
            told = told.or_else(|| Meanwhile::told_by(&event.kind));
        }
        told
    }

    /// Whether what happened has to be asked for.
    pub(crate) fn has_missed_events(&self) -> bool {
        self.missed_events
    }

    /// The same; whoever asks sees to it.
    pub(crate) fn take_missed_events(&mut self) -> bool {
        std::mem::take(&mut self.missed_events)
    }

    /// A phase in which the view of QEMU was lost for a while is begun again: it looks at what is
    /// there. Any other failure is one.
    pub(crate) fn look_again(&mut self, phase: Phase, failure: Failure) -> Result<(), Failure> {
        // What these two do may be done again; of what the others make, half may be there. Questions are asked
        // again in every phase.
        let repeats = matches!(phase, Phase::Switchover | Phase::Device);
        let may_repeat = matches!(failure, Failure::Missed) || (repeats && failure.is_interrupted());
        if !may_repeat {
            return Err(failure);
        }
        self.looks += 1;
        if self.looks > LOOKS_MAX {
            return Err(Failure::MonitorUnsteady(LOOKS_MAX));
        }
        tracing::info!(phase = phase.name(), "QEMU is asked what happened meanwhile");
        self.missed_events = true;
        Ok(())
    }

    /// How QEMU ended, with its last words if that is proved.
    pub(crate) async fn end_of_qemu(&self) -> String {
        match Failure::of_monitor(&self.qmp) {
            gone @ Failure::QemuGone(_) => format!("{gone}{}", self.last_words.heard(None).await),
            other => other.to_string(),
        }
    }
}
