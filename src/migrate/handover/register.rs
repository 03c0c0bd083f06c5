//! What a witness keeps of one migration: one word, which is changed only from one word to the next. Pure.
//!
//! ```text
//!                offered by the source,
//!                whose hand-over is on the disk
//!      open ────────────────────────────► offered
//!       │ │                                │ │
//!       │ │      taken for good            │ │
//!       │ └───────────┬────────────────────┘ │
//!       │             ▼                      │
//!       │   sealed by the source   sealed by the destination
//!       │             ▲                      │ it gives the guest up for good
//!       │             │                      ▼
//!       └─────────────┴──────────────── yielded by the destination
//! ```
//!
//! **Rules.**
//! - Nobody but the destination takes it for the destination. It does so before its guest may run: at the source's
//!   word to start it, or by itself where the source has offered it.
//! - The source takes it only once it has handed over and has heard nothing, and only as long as there is a QEMU
//!   whose guest can be let run.
//! - What is sealed for one side is never the other's, unless the destination yields it.
//! - Every move may be made again, or late: it changes nothing then. What became of one in doubt is asked by making it
//!   again.

/// What the witness says of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Word {
    /// Both have agreed on it.
    Open,
    /// The source has handed over.
    Offered,
    /// The source has taken it for good.
    SealedBySource,
    /// The destination has taken it for good, unless it yields.
    SealedByDestination,
    /// The destination has given it up for good.
    Yielded,
}

impl Word {
    /// As it is kept.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Offered => "offered",
            Self::SealedBySource => "sealed-by-source",
            Self::SealedByDestination => "sealed-by-destination",
            Self::Yielded => "yielded",
        }
    }

    /// The word that is kept so.
    pub fn named(name: &str) -> Option<Self> {
        let all = [Self::Open, Self::Offered, Self::SealedBySource, Self::SealedByDestination, Self::Yielded];
        all.into_iter().find(|word| word.name() == name)
    }
}

/// A change of the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Move {
    /// The source has handed over, surely on its disk.
    Offer,
    /// The source takes the guest back.
    TakeBack,
    /// The destination takes it, at the source's word or at an operator's.
    TakeAsTold,
    /// The destination takes it if it is offered.
    TakeIfOffered,
    /// The destination gives it up for good.
    Yield,
}

/// What came of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// The word is what the move makes of it.
    Done,
    /// The other side has it, for good as far as this one knows.
    TheOthers,
    /// The destination has not been offered it.
    NotOffered,
    /// The witness knows nothing of the migration.
    Forgotten,
    /// Nobody has answered, or not in time. It may be done all the same, now or later.
    Unknown,
}

impl Move {
    /// What the word is then.
    pub fn makes(self) -> Word {
        match self {
            Self::Offer => Word::Offered,
            Self::TakeBack => Word::SealedBySource,
            Self::TakeAsTold | Self::TakeIfOffered => Word::SealedByDestination,
            Self::Yield => Word::Yielded,
        }
    }

    /// The word that the move makes of `word`; what is said of it where it makes none.
    pub fn of(self, word: Word) -> Result<Word, Answer> {
        let from: &[Word] = match self {
            Self::Offer => &[Word::Open],
            Self::TakeBack => &[Word::Open, Word::Offered, Word::Yielded],
            Self::TakeAsTold => &[Word::Open, Word::Offered],
            Self::TakeIfOffered => &[Word::Offered],
            Self::Yield => &[Word::Open, Word::Offered, Word::SealedByDestination],
        };
        if from.contains(&word) {
            return Ok(self.makes());
        }
        Err(match (self, word) {
            _ if word == self.makes() => Answer::Done,
            (Self::TakeIfOffered, Word::Open) => Answer::NotOffered,
            _ => Answer::TheOthers,
        })
    }
}
