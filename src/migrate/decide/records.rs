//! Records of the hand-over, and what is said of them.

use crate::migrate::handover::{Fate, Illegal, Mark, SourceInput, Written};
use crate::migrate::host::decisions::Decision;
use crate::migrate::journal::{Journal, JournalError, Record};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
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

/// What a source's machine is told once its guest has been resumed, or could not be. As long as the destination may
/// have the whole guest, one whose QEMU is gone is nobody's by the source's word alone.
pub(crate) fn after_resume(is_gone: bool, reached: Phase, heard: Option<Fate>) -> Option<SourceInput> {
    match heard {
        heard if is_gone && reached >= Phase::Device && heard != Some(Fate::NeverRan) => {
            Some(SourceInput::Gone)
        }
        heard => heard.map(SourceInput::Heard),
    }
}

/// What is left where the guest was taken back here, and the destination says that it runs there: after a decision of an
/// operator that was wrong.
pub(crate) fn runs_twice(vm: &str, peer: &str, is_gone: bool, heard: Option<Fate>) -> Option<Leftover> {
    if is_gone || heard != Some(Fate::Runs) {
        return None;
    }
    tracing::error!(vm, peer, "VM may be running at both hosts: end one of its two QEMUs at once");
    Some(Leftover::Other(format!(
        "VM {vm} may be running at both hosts: it was taken back here, and {peer} says that it runs there. End one of \
         the two QEMUs at once, the one whose writes since then may be lost, and never continue it"
    )))
}

/// Nothing leads back from there, and a restart goes on with it.
pub(crate) fn is_being_given_up() -> Decision {
    Decision::Unknown(
        "the guest is being given up here; the disk has not taken the record of it yet, which is tried every second"
            .into(),
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_at_both_hosts_is_said() {
        for (is_gone, heard, is_said) in [
            (false, Some(Fate::Runs), true),
            (true, Some(Fate::Runs), false),
            (false, Some(Fate::NeverRan), false),
            (false, Some(Fate::Open), false),
            (false, None, false),
        ] {
            let said = runs_twice("web1", "bravo", is_gone, heard).map(String::from);
            assert_eq!(
                said.is_some_and(|said| said.contains("at both hosts")),
                is_said,
                "{is_gone} {heard:?}"
            );
        }
    }
}
