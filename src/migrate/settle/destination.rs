//! Settling at the destination.

use std::sync::Arc;

use super::open::{self, Open};
use crate::migrate::destination::Settling;
use crate::migrate::guest::life::{self, Look};
use crate::migrate::handover::{Destination, Ended};
use crate::migrate::handover_run::DestinationRun;
use crate::migrate::host::Host;
use crate::migrate::journal::Past;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::progress::Outcome;

pub(crate) async fn settle(host: Arc<Host>, open: Open) {
    let Open { mut journal, progress, heir, _reservation } = open;
    let past = journal.past().clone();
    let (mut machine, effects) = Destination::restarted(past.known());
    if past.witness.is_some() {
        machine = machine.with_witness();
    }
    let mut handover = DestinationRun::restarted((machine, effects));
    let mut settling = Settling::new(&host, heir, &mut journal);
    if handover.run(&mut settling).await.is_err() {
        tracing::warn!(vm = past.header.vm, "the agent stops before that is settled; the next one goes on");
        return;
    }
    let mut leftovers = settling.leftovers();
    host.decisions.answered(past.header.migration);
    if handover.machine().ended() == Some(Ended::Moved) {
        // Else it was looked at when the guest was started.
        if heir && past.runs {
            leftovers.extend(unreachable(&host, &past).await);
        }
        return open::end(&host, journal, &progress, Phase::Done, Outcome::Moved { leftovers });
    }
    let cause = open::cause(heir, "the destination's agent was restarted during the migration");
    let outcome =
        Outcome::Failed { phase: past.reached, cause, problems: Vec::new(), cancelled: false, leftovers };
    open::end(&host, journal, &progress, Phase::Failed, outcome);
}

/// What is known of the QEMU of a guest that was started before.
async fn unreachable(host: &Host, past: &Past) -> Option<Leftover> {
    let config = host.vm(&past.header.vm, "destination").ok()?;
    match life::look(past, &config).await {
        Look::Answers(_) => None,
        Look::Lost(known) | Look::Silent(known) => Some(known.of_destination(&past.header.vm)),
    }
}
