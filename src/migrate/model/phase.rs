//! The phase table: which phase may follow which, for the source of a migration. Pure.
//!
//! ```text
//! begin ─► prepare ─► mirror ─► precopy ─► switchover ─► device ─► hand-over ─► confirm ─► done
//!   │         │          │         │           │            │          │
//!   └─────────┴──────────┴─────────┴───────────┴────────────┘      undecided ◄─► (settle)
//!                  roll-back ─► failed                              │        │
//!                                                                confirm  roll-back
//! ```
//! Everything up to and including `device` rolls back on failure. From `hand-over` on the
//! guest is the destination's, until the destination durably says that it never ran there.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Questions only; nothing is changed.
    Begin,
    /// The destination gets ready.
    Prepare,
    /// The disks are copied and then kept in step.
    Mirror,
    /// The RAM is copied while the guest runs.
    Precopy,
    /// The guest is paused; the mirrors are finished.
    Switchover,
    /// The rest of the RAM and the devices' state cross.
    Device,
    /// Durably handed over; the destination starts the guest.
    HandOver,
    /// The guest runs at the destination; the source tidies up.
    Confirm,
    /// Moved.
    Done,
    /// The source undoes what it did.
    RollBack,
    /// Not moved.
    Failed,
    /// Handed over, and the destination's word is missing.
    Undecided,
}

/// What ends a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// It did what it is for.
    Done,
    /// It failed, or the operator cancelled.
    Failed,
    /// The destination durably says that the guest never ran there.
    NeverRan,
}

/// A transition that the table does not have: a mistake in the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no phase follows {phase:?} on {step:?}")]
pub struct IllegalStep {
    phase: Phase,
    step: Step,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Begin,
        Self::Prepare,
        Self::Mirror,
        Self::Precopy,
        Self::Switchover,
        Self::Device,
        Self::HandOver,
        Self::Confirm,
        Self::Done,
        Self::RollBack,
        Self::Failed,
        Self::Undecided,
    ];

    /// The phase after this one.
    /// Errors: [`IllegalStep`] where the table has none.
    pub fn after(self, step: Step) -> Result<Self, IllegalStep> {
        match (self, step) {
            (Self::Begin, Step::Done) => Ok(Self::Prepare),
            (Self::Prepare, Step::Done) => Ok(Self::Mirror),
            (Self::Mirror, Step::Done) => Ok(Self::Precopy),
            (Self::Precopy, Step::Done) => Ok(Self::Switchover),
            (Self::Switchover, Step::Done) => Ok(Self::Device),
            (Self::Device, Step::Done) => Ok(Self::HandOver),
            (Self::HandOver | Self::Undecided, Step::Done) => Ok(Self::Confirm),
            (Self::Confirm, Step::Done) => Ok(Self::Done),
            (Self::RollBack, Step::Done) => Ok(Self::Failed),
            (phase, Step::Failed) if phase <= Self::Device => Ok(Self::RollBack),
            (Self::HandOver, Step::Failed) => Ok(Self::Undecided),
            (Self::HandOver | Self::Undecided, Step::NeverRan) => Ok(Self::RollBack),
            (phase, step) => Err(IllegalStep { phase, step }),
        }
    }

    /// Whether the operator may still cancel.
    pub fn may_cancel(self) -> bool {
        self <= Self::Device
    }

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Undecided)
    }

    /// As shown to people and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Prepare => "prepare",
            Self::Mirror => "mirror",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::Device => "device",
            Self::HandOver => "hand-over",
            Self::Confirm => "confirm",
            Self::Done => "done",
            Self::RollBack => "roll-back",
            Self::Failed => "failed",
            Self::Undecided => "undecided",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, written out: a change of it must be meant.
    #[test]
    fn the_table() {
        let mut table = String::new();
        for phase in Phase::ALL {
            for step in [Step::Done, Step::Failed, Step::NeverRan] {
                if let Ok(next) = phase.after(step) {
                    table += &format!("{} {step:?} {}\n", phase.name(), next.name());
                }
            }
        }
        let expected = "\
begin Done prepare
begin Failed roll-back
prepare Done mirror
prepare Failed roll-back
mirror Done precopy
mirror Failed roll-back
precopy Done switchover
precopy Failed roll-back
switchover Done device
switchover Failed roll-back
device Done hand-over
device Failed roll-back
hand-over Done confirm
hand-over Failed undecided
hand-over NeverRan roll-back
confirm Done done
roll-back Done failed
undecided Done confirm
undecided NeverRan roll-back
";
        assert_eq!(table, expected);
    }

    #[test]
    fn after_the_hand_over_only_the_destinations_word_leads_back() {
        for phase in [Phase::HandOver, Phase::Undecided, Phase::Confirm, Phase::Done] {
            assert!(!phase.may_cancel());
            assert_ne!(phase.after(Step::Failed), Ok(Phase::RollBack), "{phase:?}");
        }
    }
}
