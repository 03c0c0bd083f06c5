//! Mistakes. Those of a machine change what goes in and what comes out of the right one, those of the
//! interpreter what it does to its world and what it is told of that. The exploration has to find every
//! one of them.

use vmferry_handover::handover::Fate;
use vmferry_handover::handover::{
    Answer, Ask, Destination, DestinationEffect, DestinationInput, DestinationState, Ended, Illegal, Mark,
    Move, Ran, Source, SourceEffect, SourceInput, SourceState, Word, Written,
};
use vmferry_handover::handover_run::Machine;

use super::witness::Witness;
use super::world::Scope;

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

    /// The interpreter says what follows upon a record, and then writes it.
    SaysFirst,
    /// It does what follows upon a record, and then writes it.
    DoesFirst,
    /// It goes on after a failed write as if that were done.
    GoesOnAfterAFailedWrite,
    /// It does not tell the machine of a failed write.
    IsSilentAboutAFailedWrite,
    /// It forgets what is still to be done when a question is not answered.
    NeedsAnAnswer,
    /// It starts the guest again when that ended in doubt.
    StartsTwice,
    /// It answers by what it is about to write.
    SaysWhatItIsAboutToProve,
    /// After a crash it goes on with what it remembers, as if what it was writing were written, and does not
    /// begin with what the journal says.
    RemembersOverACrash,
    /// It does an effect twice: it writes again what is written, it starts again what was started.
    WritesAgain,
    StartsAgain,
    /// It leaves an effect out: here and below.
    ForgetsToResume,
    ForgetsToRelease,
    ForgetsToSay,
    ForgetsToStart,
    ForgetsToUndo,
    /// It carries out the effects of a step in the reverse order: the source is told before what was made is undone.
    Reverses,
    /// It does not tell the machine that there was nothing to resume.
    IsSilentAboutAGuestThatIsGone,

    /// Once operators decide at any moment: the destination takes for its own what an earlier life was about to start,
    /// and asks nobody.
    ClaimsByItself,
    /// A restart of the source does not read an operator's decision.
    ForgetsADecision,
    /// The source takes a destination that has no record of the migration for one whose guest never ran.
    TakesNoRecordForNeverRan,

    /// Once there is a witness: the destination starts the guest, and does not take it there.
    StartsUnsealed,
    /// The destination takes it by itself, though it was not offered.
    SealsWhatIsNotOffered,
    /// The destination takes it though it is the source's.
    SealsWhatIsTheSources,
    /// A side takes a witness that does not answer for one that agrees.
    DestinationTakesNoAnswerForYes,
    SourceTakesNoAnswerForYes,
    /// The source takes the guest back, and does not ask the witness.
    TakesBackByItself,
    /// It takes it back though it is the destination's.
    TakesBackWhatIsTheDestinations,
    /// It takes back a guest whose QEMU is gone.
    TakesBackNothing,
    /// It offers the guest, and then writes that it has handed over.
    OffersBeforeRecord,
    /// It is left out: here and below.
    NeverOffers,
    NeverTakesBack,
    NeverYields,
    /// A destination that was restarted takes a guest that it takes at the witness for one that has not run.
    ForgetsThatItMayHaveRun,
    /// Whoever comes first has it, and nobody gives it up or offers it.
    FirstComeOnly,
    /// The interpreter starts the guest while it takes it at the witness.
    StartsMeanwhile,
    /// It does not tell the machine what the witness has answered.
    IsSilentAboutTheWitness,
    /// It tells it twice.
    TellsTheAnswerTwice,
    /// It does not read in the journal that there is a witness.
    ForgetsTheWitness,
}

impl Mutant {
    /// All mistakes.
    pub const ALL: [Self; 48] = [
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
        Self::SaysFirst,
        Self::DoesFirst,
        Self::GoesOnAfterAFailedWrite,
        Self::IsSilentAboutAFailedWrite,
        Self::NeedsAnAnswer,
        Self::StartsTwice,
        Self::SaysWhatItIsAboutToProve,
        Self::RemembersOverACrash,
        Self::WritesAgain,
        Self::StartsAgain,
        Self::ForgetsToResume,
        Self::ForgetsToRelease,
        Self::ForgetsToSay,
        Self::ForgetsToStart,
        Self::ForgetsToUndo,
        Self::Reverses,
        Self::IsSilentAboutAGuestThatIsGone,
        Self::ClaimsByItself,
        Self::ForgetsADecision,
        Self::TakesNoRecordForNeverRan,
        Self::StartsUnsealed,
        Self::SealsWhatIsNotOffered,
        Self::SealsWhatIsTheSources,
        Self::DestinationTakesNoAnswerForYes,
        Self::SourceTakesNoAnswerForYes,
        Self::TakesBackByItself,
        Self::TakesBackWhatIsTheDestinations,
        Self::TakesBackNothing,
        Self::OffersBeforeRecord,
        Self::NeverOffers,
        Self::NeverTakesBack,
        Self::NeverYields,
        Self::ForgetsThatItMayHaveRun,
        Self::FirstComeOnly,
        Self::StartsMeanwhile,
        Self::IsSilentAboutTheWitness,
        Self::TellsTheAnswerTwice,
        Self::ForgetsTheWitness,
    ];

    /// Where it is looked for.
    pub fn scope(self) -> Scope {
        match self {
            Self::IsSilentAboutAGuestThatIsGone
            | Self::ClaimsByItself
            | Self::ForgetsADecision
            | Self::TakesNoRecordForNeverRan => Scope::Decisions,
            Self::StartsUnsealed
            | Self::SealsWhatIsNotOffered
            | Self::SealsWhatIsTheSources
            | Self::DestinationTakesNoAnswerForYes
            | Self::SourceTakesNoAnswerForYes
            | Self::TakesBackByItself
            | Self::TakesBackWhatIsTheDestinations
            | Self::OffersBeforeRecord
            | Self::NeverOffers
            | Self::NeverTakesBack
            | Self::NeverYields
            | Self::ForgetsThatItMayHaveRun
            | Self::TakesBackNothing
            | Self::FirstComeOnly
            | Self::StartsMeanwhile
            | Self::IsSilentAboutTheWitness
            | Self::TellsTheAnswerTwice
            | Self::ForgetsTheWitness => Scope::Witness,
            Self::ForgetsUnconfirmed | Self::NeverAsks | Self::ForgetsToSay => Scope::Nothing,
            _ => Scope::Disks,
        }
    }

    /// The move comes to the witness.
    pub fn at_witness(self, by: Move, witness: &mut Witness) -> Answer {
        let word = witness.word;
        match (self, by, word) {
            (Self::SealsWhatIsNotOffered, Move::TakeIfOffered, _) => witness.take(Move::TakeAsTold),
            (Self::SealsWhatIsTheSources, Move::TakeAsTold, Some(_)) => {
                witness.word = Some(Word::SealedByDestination);
                Answer::Done
            }
            (Self::TakesBackWhatIsTheDestinations, Move::TakeBack, Some(_)) => {
                witness.word = Some(Word::SealedBySource);
                Answer::Done
            }
            (Self::FirstComeOnly, Move::Yield, _) => Answer::Done,
            (Self::FirstComeOnly, Move::TakeIfOffered, _) => witness.take(Move::TakeAsTold),
            _ => witness.take(by),
        }
    }

    /// It does not wait for its disk.
    pub fn is_hasty(self) -> bool {
        matches!(self, Self::SaysFirst | Self::DoesFirst)
    }

    fn source_input(self, input: SourceInput) -> SourceInput {
        match (self, input) {
            (Self::SourceDoubtIsFailure, SourceInput::Written(Written::InDoubt)) => {
                SourceInput::Written(Written::Failed)
            }
            (Self::IsSilentAboutAGuestThatIsGone, SourceInput::Gone) => SourceInput::Heard(Fate::Open),
            (Self::TakesBackByItself, SourceInput::TakenBack(_)) => SourceInput::TakenBack(Answer::Done),
            (Self::SourceTakesNoAnswerForYes, SourceInput::TakenBack(Answer::Unknown)) => {
                SourceInput::TakenBack(Answer::Done)
            }
            _ => input,
        }
    }

    fn destination_input(self, input: DestinationInput) -> DestinationInput {
        match (self, input) {
            (Self::DestinationDoubtIsFailure, DestinationInput::Written(Written::InDoubt)) => {
                DestinationInput::Written(Written::Failed)
            }
            (Self::ClaimsByItself, DestinationInput::Ran(Ran::No)) => DestinationInput::Ran(Ran::Perhaps),
            (Self::NoAnswerIsRefusal, DestinationInput::Ran(Ran::Perhaps)) => DestinationInput::Ran(Ran::No),
            (Self::StartsUnsealed, DestinationInput::Moved(_)) => DestinationInput::Moved(Answer::Done),
            (Self::DestinationTakesNoAnswerForYes, DestinationInput::Moved(Answer::Unknown)) => {
                DestinationInput::Moved(Answer::Done)
            }
            _ => input,
        }
    }

    fn source_effects(self, state: SourceState, effects: Vec<SourceEffect>) -> Vec<SourceEffect> {
        let first = match (self, effects.as_slice()) {
            (Self::StartBeforeRecord, [SourceEffect::Write(Mark::HandedOver)]) => {
                SourceEffect::Ask(Ask::Start)
            }
            (Self::ResumeBeforeRecord, [SourceEffect::Write(Mark::NeverRan)])
                if matches!(state, SourceState::Doubt { .. }) =>
            {
                SourceEffect::Resume
            }
            (Self::OffersBeforeRecord, [SourceEffect::Write(Mark::HandedOver)]) => SourceEffect::Offer,
            (Self::NeverOffers | Self::FirstComeOnly, _) => {
                return effects.into_iter().filter(|e| *e != SourceEffect::Offer).collect();
            }
            (Self::NeverTakesBack, _) => {
                return effects.into_iter().filter(|e| *e != SourceEffect::TakeBack).collect();
            }
            (Self::WritesAgain, _) => {
                return twice(effects, |e| matches!(e, SourceEffect::Write(_)));
            }
            (Self::Reverses, _) => return effects.into_iter().rev().collect(),
            (Self::NeverAsks, _) => {
                let asks = |e: &SourceEffect| *e == SourceEffect::Ask(Ask::Settle);
                return effects.into_iter().filter(|e| !asks(e)).collect();
            }
            _ => return effects,
        };
        [vec![first], effects].concat()
    }

    fn destination_effects(self, effects: Vec<DestinationEffect>) -> Vec<DestinationEffect> {
        match (self, effects.as_slice()) {
            (Self::NeverRanBeforeRecord, [DestinationEffect::Write(Mark::NeverRan)]) => {
                [vec![DestinationEffect::Say(Fate::NeverRan)], effects].concat()
            }
            (Self::WritesAgain, _) => twice(effects, |e| matches!(e, DestinationEffect::Write(_))),
            (Self::Reverses, _) => effects.into_iter().rev().collect(),
            (Self::StartsAgain, _) => twice(effects, |e| *e == DestinationEffect::Start),
            _ => effects,
        }
    }
}

/// The effect is there twice, if it is one of these and alone.
fn twice<E: Copy>(effects: Vec<E>, is: impl Fn(&E) -> bool) -> Vec<E> {
    match effects[..] {
        [effect] if is(&effect) => vec![effect, effect],
        _ => effects,
    }
}

/// A machine with a mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mutated<M> {
    pub machine: M,
    mutant: Mutant,
}

impl<M> Mutated<M> {
    pub fn new(machine: M, mutant: Mutant) -> Self {
        Self { machine, mutant }
    }
}

impl<M> AsRef<M> for Mutated<M> {
    fn as_ref(&self) -> &M {
        &self.machine
    }
}

impl Machine<SourceInput, SourceEffect> for Mutated<Source> {
    fn step(&mut self, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let effects = self.machine.step(self.mutant.source_input(input))?;
        Ok(self.mutant.source_effects(self.machine.state(), effects))
    }
}

impl Machine<DestinationInput, DestinationEffect> for Mutated<Destination> {
    fn step(&mut self, input: DestinationInput) -> Result<Vec<DestinationEffect>, Illegal> {
        let may_have_run = self.machine.state() == (DestinationState::Starting { again: true });
        if self.mutant == Mutant::ForgetsThatItMayHaveRun
            && may_have_run
            && input == DestinationInput::Ran(Ran::No)
        {
            self.machine.step(input)?;
            return self.machine.step(DestinationInput::Told(Ended::Stayed));
        }
        let input = self.mutant.destination_input(input);
        let effects = match (self.mutant, input) {
            (Mutant::IsSilentAboutTheWitness, DestinationInput::Moved(_)) => return Ok(Vec::new()),
            (Mutant::TellsTheAnswerTwice, DestinationInput::Moved(_)) => {
                let once = self.machine.step(input)?;
                [once, self.machine.step(input)?].concat()
            }
            _ => self.machine.step(input)?,
        };
        Ok(self.mutant.destination_effects(effects))
    }
}

impl Mutated<Source> {
    /// Of one that begins again, and what it wants done first.
    pub fn source(
        (mut machine, mut effects): (Source, Vec<SourceEffect>),
        mutant: Mutant,
    ) -> (Self, Vec<SourceEffect>) {
        if let (Mutant::BelievesWhatItReads, [SourceEffect::Write(_)]) = (mutant, effects.as_slice()) {
            effects = machine.step(SourceInput::Written(Written::Durable)).expect("a write ends");
        }
        let effects = mutant.source_effects(machine.state(), effects);
        (Self { machine, mutant }, effects)
    }
}

impl Mutated<Destination> {
    /// The same.
    pub fn destination(
        (mut machine, mut effects): (Destination, Vec<DestinationEffect>),
        mutant: Mutant,
    ) -> (Self, Vec<DestinationEffect>) {
        if let (Mutant::BelievesWhatItReads, [DestinationEffect::Write(_)]) = (mutant, effects.as_slice()) {
            effects = machine.step(DestinationInput::Written(Written::Durable)).expect("a write ends");
        }
        (Self { machine, mutant }, mutant.destination_effects(effects))
    }
}
