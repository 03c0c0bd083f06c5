//! Records of the hand-over, and what is said of them.

use crate::migrate::handover::{Illegal, Mark, Written};
use crate::migrate::host::decisions::Decision;
use crate::migrate::journal::{Journal, JournalError, Record};
use crate::migrate::model::problem::chain;

/// Writes a record of the hand-over; `uid`: the operator's whose decision it is.
pub(crate) fn write(journal: &mut Journal, mark: Mark, uid: Option<u32>) -> (Written, Option<JournalError>) {
    let record = match mark {
        Mark::Forced(side) => {
            Record::Forced { side, uid, at: time::OffsetDateTime::now_utc().unix_timestamp() }
        }
        Mark::HandedOver => Record::HandedOver,
        Mark::Starting => Record::Starting,
        Mark::Runs => Record::Runs,
        Mark::NeverRan => Record::NeverRan,
        Mark::Confirmed => Record::Confirmed,
    };
    let (written, error) = journal.mark(record);
    if let Some(error) = &error {
        tracing::error!(?mark, ?written, error = chain(error), "the journal does not take a record");
    }
    (written, error)
}

/// A step that the machine does not have changes nothing, and is a mistake of ours.
pub(crate) fn report(error: &Illegal) {
    tracing::error!(error = chain(error), "please report this");
}

/// What the operator is told.
pub(crate) fn decision(decided: bool, journal: &Journal, error: Option<&JournalError>) -> Decision {
    let cause = error.map_or_else(|| "nothing is open any more".to_owned(), |e| chain(e));
    match (decided, journal.is_sure()) {
        (true, _) => Decision::Taken,
        (false, true) => Decision::Refused(cause),
        (false, false) => Decision::Unknown(format!("whether it is on the disk is not known: {cause}")),
    }
}
