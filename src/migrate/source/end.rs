//! What becomes of a migration from its hand-over, or its failure, on.

use tokio::time::Instant;

use super::failure::Failure;
use crate::migrate::decide::Question;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::protocol::message::Started;

/// What becomes of a migration from its hand-over, or its failure, on.
#[derive(Default)]
pub(crate) struct End {
    /// Why it is not a plain success.
    pub(crate) failure: Option<Failure>,
    /// When the guest was handed over.
    pub(crate) since: Option<Instant>,
    /// Open: the destination is asked what became of the guest.
    pub(crate) question: Option<Question>,
    /// The destination's word on the guest's start.
    pub(crate) started: Option<Started>,
    /// What the destination said instead, when it was told to start the guest.
    pub(crate) refused: Option<String>,
    /// An operator gave the guest to the destination.
    pub(crate) forced: bool,
    /// The record that hands it over was begun.
    pub(crate) may_be_handed_over: bool,
    /// The guest was taken back.
    pub(crate) back: Option<Back>,
    pub(crate) leftovers: Vec<Leftover>,
}

/// A roll-back.
pub(crate) struct Back {
    /// In which phase it failed.
    pub(crate) phase: Phase,
    pub(crate) cause: String,
    /// Bitmaps stay for a further try.
    pub(crate) keeps: bool,
}

/// A guest that is the destination's, and was not seen to run there.
pub(crate) fn stands_there(
    peer: &str,
    started: Option<&Started>,
    refused: Option<String>,
) -> Option<Leftover> {
    let why = match started {
        Some(started) => started.stands.clone(),
        None => refused,
    };
    why.map(|why| Leftover::Guest(format!("{peer} has the guest, and has not seen it run: {why}")))
}

/// An operator's word alone does not end a QEMU that has the only copy of a guest's RAM.
pub(crate) fn kept_by_force(vm: &str) -> String {
    format!(
        "the QEMU of VM {vm}, paused: an operator gave the VM to the destination. Never continue it; end it \
         once the VM runs there"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_was_seen_to_run_leaves_nothing_to_look_at() {
        let started = |stands: Option<&str>| Started {
            hook_ms: None,
            warnings: Vec::new(),
            stands: stands.map(str::to_owned),
        };
        let refused = || Some("its QEMU has ended".to_owned());
        let stands = |started: Option<&Started>, refused| stands_there("bravo", started, refused);
        assert_eq!(stands(Some(&started(None)), None), None);
        assert_eq!(stands(Some(&started(None)), refused()), None, "it was asked again, and runs");
        assert!(stands(Some(&started(Some("it is off"))), None).is_some());
        assert!(stands(None, refused()).is_some_and(|left| left.to_string().contains("has ended")));
        assert_eq!(stands(None, None), None, "it was asked late, and says that it runs");
    }
}
