//! What either role asks of the witness that its journal tells of.

use crate::audit::{Event, Subject};
use crate::migrate::handover::{Answer, Move};
use crate::migrate::host::Host;
use crate::migrate::journal::{FORMAT_WITH_WITNESS, Past};

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
        Some(witness) => witness.why_not(),
    }
}

/// At the destination: the source durably knows the end, by a record of this life, and never asks again.
pub(crate) async fn forget_confirmed(host: &Host, past: &Past) {
    if let (Some(witness), Some(_), true) = (&host.witness, &past.witness, past.confirmed) {
        witness.forget(past.header.migration).await;
    }
}

/// At the source: it has never handed over, so that nobody may start the guest but by an operator's word.
pub(crate) async fn forget_never_offered(host: &Host, past: &Past) {
    let has_begun = past.header.format >= FORMAT_WITH_WITNESS && !past.handed_over;
    if let (Some(witness), true) = (&host.witness, has_begun) {
        witness.forget(past.header.migration).await;
    }
}
