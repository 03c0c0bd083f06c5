//! Machines with a mistake each, made by changing what goes in and what comes out of the right
//! ones. The exploration has to find every one of them.

use vmferry::migrate::handover::{
    Ask, DestinationEffect, DestinationInput, Mark, Ran, SourceEffect, SourceInput, SourceState, Written,
};
use vmferry::migrate::message::Fate;

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// None: the machines as they are.
    None,
    /// The source says *start*, and then writes that it has handed over.
    StartBeforeRecord,
    /// The source's guest runs before the record that takes it back.
    ResumeBeforeRecord,
    /// The source takes a write in doubt for one that has failed.
    SourceDoubtIsFailure,
    /// The destination takes a write in doubt for one that has failed.
    DestinationDoubtIsFailure,
    /// The destination says *never-ran*, and then writes it.
    NeverRanBeforeRecord,
    /// The destination starts the guest, and then writes that it does.
    StartsBeforeRecord,
    /// The destination takes a `cont` without an answer for one that was refused.
    NoAnswerIsRefusal,
    /// A restart takes what it reads for what is on the disk.
    BelievesWhatItReads,
    /// The destination throws away what the source has not yet confirmed to know.
    ForgetsUnconfirmed,
    /// The source never asks what became of the guest.
    NeverAsks,
}

impl Mutant {
    /// All mistakes.
    pub const ALL: [Self; 10] = [
        Self::StartBeforeRecord,
        Self::ResumeBeforeRecord,
        Self::SourceDoubtIsFailure,
        Self::DestinationDoubtIsFailure,
        Self::NeverRanBeforeRecord,
        Self::StartsBeforeRecord,
        Self::NoAnswerIsRefusal,
        Self::BelievesWhatItReads,
        Self::ForgetsUnconfirmed,
        Self::NeverAsks,
    ];

    pub fn source_input(self, input: SourceInput) -> SourceInput {
        match (self, input) {
            (Self::SourceDoubtIsFailure, SourceInput::Written(Written::InDoubt)) => {
                SourceInput::Written(Written::Failed)
            }
            _ => input,
        }
    }

    pub fn destination_input(self, input: DestinationInput) -> DestinationInput {
        match (self, input) {
            (Self::DestinationDoubtIsFailure, DestinationInput::Written(Written::InDoubt)) => {
                DestinationInput::Written(Written::Failed)
            }
            (Self::NoAnswerIsRefusal, DestinationInput::Ran(Ran::Perhaps)) => DestinationInput::Ran(Ran::No),
            _ => input,
        }
    }

    pub fn source_effects(self, state: Option<SourceState>, effects: Vec<SourceEffect>) -> Vec<SourceEffect> {
        let first = match (self, effects.as_slice()) {
            (Self::StartBeforeRecord, [SourceEffect::Write(Mark::HandedOver)]) => {
                SourceEffect::Ask(Ask::Start)
            }
            (Self::ResumeBeforeRecord, [SourceEffect::Write(Mark::NeverRan)])
                if state == Some(SourceState::Doubt) =>
            {
                SourceEffect::Resume
            }
            (Self::NeverAsks, _) => {
                let asks = |e: &SourceEffect| *e == SourceEffect::Ask(Ask::Settle);
                return effects.into_iter().filter(|e| !asks(e)).collect();
            }
            _ => return effects,
        };
        [vec![first], effects].concat()
    }

    pub fn destination_effects(self, effects: Vec<DestinationEffect>) -> Vec<DestinationEffect> {
        match (self, effects.as_slice()) {
            (Self::NeverRanBeforeRecord, [DestinationEffect::Write(Mark::NeverRan)]) => {
                [vec![DestinationEffect::Say(Fate::NeverRan)], effects].concat()
            }
            _ => effects,
        }
    }
}
