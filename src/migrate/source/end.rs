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
    /// An operator gave the guest to the destination.
    pub(crate) forced: bool,
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

/// An operator's word alone does not end a QEMU that has the only copy of a guest's RAM.
pub(crate) fn kept_by_force(vm: &str) -> String {
    format!(
        "the QEMU of VM {vm}, paused: an operator gave the VM to the destination. Never continue it; end it \
         once the VM runs there"
    )
}
