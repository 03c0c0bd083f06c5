//! What one try of a migration leaves for the next: how it ended, and bitmaps that go on recording.

use crate::migrate::guest::{life, undo};
use crate::migrate::host::Host;
use crate::migrate::journal::Journal;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::Outcome;
use crate::migrate::transfer::disk::tracking::Tracking;

#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) phase: Phase,
    /// What became of the guest.
    pub(crate) outcome: Outcome,
    /// Whether the cause may be gone by itself the next time.
    pub(crate) may_pass: bool,
    /// The destination had the guest durably, and gave it back.
    pub(crate) handed_over: bool,
    /// What stays for a further try.
    pub(crate) held: Option<Held>,
}

/// What a try that failed leaves for the next one: bitmaps that go on recording, and its journal,
/// open because it is what a restarted agent removes them by.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) journal: Journal,
    pub(crate) outcome: Outcome,
    pub(crate) tracking: Tracking,
}

impl Held {
    /// To a try whose journal tells of it.
    pub(crate) fn pass_on(self, host: &Host) -> Tracking {
        host.journals.end(self.journal, self.outcome);
        self.tracking
    }

    /// There is no further try; what could not be removed.
    pub(crate) async fn release(self, host: &Host, vm: &str) -> Vec<String> {
        let left = match host.config.vm(vm) {
            None => vec![format!(
                "dirty bitmaps in the source's QEMU of VM {vm}, which is not in the configuration: `vmferry recover` \
                 removes them when it is"
            )],
            Some(config) => match life::reach(self.journal.past(), &config).await {
                Ok((qmp, _events)) => undo::end_following(&qmp, self.journal.past()).await,
                // They went with it.
                Err((known, _)) if known.has_ended() => Vec::new(),
                Err((_, e)) => vec![format!("dirty bitmaps in the source's QEMU of VM {vm}: {}", chain(&e))],
            },
        };
        let mut outcome = self.outcome;
        add_leftovers(&mut outcome, left.clone());
        host.journals.end(self.journal, outcome);
        left
    }
}

pub(crate) fn add_leftovers(outcome: &mut Outcome, more: Vec<String>) {
    match outcome {
        Outcome::Failed { leftovers, .. }
        | Outcome::Moved { leftovers }
        | Outcome::Replicated { leftovers } => {
            leftovers.extend(more.into_iter().map(Leftover::from));
        }
        Outcome::Undecided { .. } => {}
    }
}
