//! The witness of the model: its word, and moves that are on their way to it. A move that was ever made may come to it
//! now, again, late, or never.

use vmferry_handover::handover::{Answer, DestinationState, Move, Word};

use super::world::{Kind, Lost, Qemu, Scope, Successors, World};

const MOVES: [Move; 5] = [Move::Offer, Move::TakeBack, Move::TakeAsTold, Move::TakeIfOffered, Move::Yield];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Witness {
    /// Both sides have agreed on it.
    pub agreed: bool,
    /// None: it knows nothing of the migration.
    pub word: Option<Word>,
    moves: u8,
}

impl Witness {
    pub const NONE: Self = Self { agreed: false, word: None, moves: 0 };
    pub const OPEN: Self = Self { agreed: true, word: Some(Word::Open), moves: 0 };

    /// The move comes to it.
    pub fn take(&mut self, by: Move) -> Answer {
        let Some(word) = self.word else {
            return Answer::Forgotten;
        };
        match by.of(word) {
            Ok(next) => {
                self.word = Some(next);
                Answer::Done
            }
            Err(answer) => answer,
        }
    }

    /// The move is on its way to it.
    pub fn is_sent(&mut self, by: Move, scope: Scope) {
        if scope.is_late() {
            self.moves |= 1 << by as u8;
        }
    }

    fn sent(self) -> impl Iterator<Item = Move> {
        MOVES.into_iter().filter(move |by| self.moves >> *by as u8 & 1 != 0)
    }
}

impl World {
    /// What comes to the witness late, and what it forgets.
    pub fn witness_changes(&self, out: &mut Successors) {
        for by in self.witness.sent() {
            let mut after = *self;
            after.witness.take(by);
            if after != *self {
                out.add(Kind::Fault, after, || format!("the witness: {by:?} comes late"));
            }
        }
        if self.scope.forgets() && self.witness.word.is_some() {
            let mut after = *self;
            after.witness.word = None;
            out.add(Kind::Fault, after, || "the witness forgets the migration".into());
        }
    }

    /// A guest that cannot run at the source is not taken from the destination. What was asked before its QEMU died
    /// may still come late.
    pub fn takes_back_nothing(&self, after: &Self) -> Option<&'static str> {
        let takes = self.witness.word != Some(Word::SealedBySource)
            && after.witness.word == Some(Word::SealedBySource);
        let nothing = takes && self.source.qemu == Qemu::Gone && !self.scope.is_late();
        nothing.then_some("the source takes back a guest that cannot run there")
    }

    /// Whether the destination is lost and only an operator can know what became of the guest.
    pub fn source_needs_operator(&self) -> bool {
        let Witness { agreed, word, .. } = self.witness;
        let nobody_knows =
            !agreed || word == Some(Word::SealedByDestination) || self.source.qemu == Qemu::Gone;
        self.has_no_word() || self.lost == Lost::Destination && nobody_knows
    }

    /// The same at the destination.
    pub fn destination_needs_operator(&self, state: DestinationState) -> bool {
        let nobody_knows = match state {
            DestinationState::Claiming => true,
            _ => !self.witness.agreed,
        };
        self.has_no_word() || self.lost == Lost::Source && nobody_knows
    }

    /// The witness has forgotten the migration, whether or not a host is lost.
    fn has_no_word(&self) -> bool {
        self.scope.forgets() && self.witness.agreed && self.witness.word.is_none()
    }
}
