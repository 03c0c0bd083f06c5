//! What either role asks of the witness that its journal tells of.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::audit::{Event, Subject};
use crate::migrate::handover::{Answer, Move};
use crate::migrate::host::Host;
use crate::migrate::journal::{FORMAT_WITH_WITNESS, Past, Role};

/// How long it may take to hear of what an operator has decided, whose word is enough.
pub(crate) const ORDERED_WITHIN: Duration = Duration::from_secs(3);

/// Between two tries in the background.
const AGAIN: Duration = Duration::from_secs(5);

/// Makes a move for a migration at the witness that both sides have agreed on.
pub(crate) async fn at_witness(host: &Host, past: &Past, by: Move) -> Answer {
    match (&host.witness, &past.witness) {
        (Some(witness), Some(agreed)) => {
            let answer = witness.make(past.header.migration, agreed, by).await;
            // Offers are repeated, what is refused is asked again, and of what it has begun in vain a peer would fill
            // the record.
            if answer == Answer::Done && !matches!(by, Move::Offer | Move::Yield) {
                host.audit.record(Event::Witness { subject: subject(past), word: by.makes().name() });
            }
            answer
        }
        _ => Answer::Unknown,
    }
}

fn subject(past: &Past) -> Subject {
    Subject {
        migration: past.header.migration,
        first: past.header.retry.as_ref().map(|retry| retry.first),
        role: past.header.role.name(),
        vm: past.header.vm.clone(),
        peer: past.header.peer.clone(),
    }
}

/// Why the witness does not answer; none where it does, or is not asked.
pub(crate) fn witness_trouble(host: &Host, past: &Past) -> Option<String> {
    past.witness.as_ref()?;
    match &host.witness {
        None => Some("the migration has a witness, and [witness] is not in this host's configuration".into()),
        Some(witness) => witness.why_not(past.header.migration),
    }
}

/// What is asked of it when nobody waits for the answer, and nothing depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// The guest was given up here.
    Yield,
    /// An operator has decided that it is this host's: the witness keeps it from the other one, as soon as it answers.
    Take,
    /// The word is not needed any more.
    Forget,
}

/// Asks it in the background, until it answers or the agent stops, which waits for the question under way. An operator's
/// decision is always told; the rest is not while very much is asked.
pub(crate) fn afterwards(host: &Arc<Host>, past: &Past, what: Afterwards) {
    let Some(witness) = host.witness.as_ref().filter(|_| past.header.format >= FORMAT_WITH_WITNESS) else {
        return;
    };
    let place = Arc::clone(&witness.places).try_acquire_owned().ok();
    if place.is_none() && what != Afterwards::Take {
        tracing::debug!(migration = %past.header.migration, "the witness is not told: too much is waiting for it");
        return;
    }
    let (its_host, past) = (Arc::clone(host), past.clone());
    witness.background.spawn(async move {
        let _place = place;
        let by = match (what, past.header.role) {
            (Afterwards::Forget, _) => return forget(&its_host, &past).await,
            (Afterwards::Yield, _) => Move::Yield,
            (Afterwards::Take, Role::Source) => Move::TakeBack,
            (Afterwards::Take, Role::Destination) => Move::TakeAsTold,
        };
        // What is given up is given up also where it was being taken meanwhile.
        while at_witness(&its_host, &past, by).await == Answer::Unknown {
            tokio::select! {
                () = sleep(AGAIN) => {}
                () = its_host.stopping.cancelled() => return,
            }
        }
    });
}

async fn forget(host: &Host, past: &Past) {
    if let Some(witness) = &host.witness {
        witness.forget(past.header.migration).await;
    }
}

/// At the destination: the source durably knows the end, by a record of this life, and never asks again.
pub(crate) fn is_confirmed(past: &Past) -> bool {
    past.witness.is_some() && past.confirmed
}

/// At the source: it has never handed over, so that nobody may start the guest but by an operator's word.
pub(crate) fn is_never_offered(past: &Past) -> bool {
    past.header.format >= FORMAT_WITH_WITNESS && !past.handed_over
}
