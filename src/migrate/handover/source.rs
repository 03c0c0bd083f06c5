//! The source's side of the hand-over. Pure; see the module above for the rules.

use super::{Answer, Ask, Ended, Fate, Illegal, Known, Mark, Side, Written};

/// Who owns the guest, as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceState {
    /// The source's; nothing has been handed over.
    Ours,
    /// `handed-over` is being written.
    HandingOver,
    /// The destination's, unless it says that it never ran.
    Asking {
        /// `handed-over` is surely on the disk, so that the destination may be told to start.
        sure: bool,
    },
    /// Nobody knows whether `handed-over` is on the disk, and *start* was never said under it.
    Doubt {
        /// An operator has decided that the guest is the source's.
        forced: bool,
    },
    /// Nothing was handed over, as far as is known, and the guest's QEMU here is gone. Whose the guest is the
    /// destination knows: an operator may have decided there.
    Missing,
    /// The destination has said that it never ran; that is being written.
    TakingBack,
    /// The witness has said that it is the source's; that is being written, until it surely is on the disk.
    Won,
    /// An operator's decision is being written.
    Forcing {
        /// Whose the guest is to be.
        side: Side,
        /// What it was before, should the disk not take it.
        was: Undecided,
    },
    /// The source's for good.
    Back {
        /// A durable record says so: the destination's word is no longer needed.
        noted: bool,
        /// The destination or an operator says so as well.
        agreed: bool,
    },
    /// The destination has said that it runs there; that is being written.
    Noting,
    /// The destination's for good.
    Moved,
}

/// The states in which an operator may decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Undecided {
    /// [`SourceState::Asking`].
    Asking {
        /// The same.
        sure: bool,
    },
    /// [`SourceState::Doubt`].
    Doubt {
        /// The same.
        forced: bool,
    },
    /// [`SourceState::Missing`].
    Missing,
}

/// What happens to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceInput {
    /// Both QEMUs say that the whole guest has crossed.
    Complete {
        /// Both sides have agreed on a witness.
        witness: bool,
    },
    /// The migration failed or was cancelled. Without meaning once it is handed over.
    Fail,
    /// The write that was asked for has ended.
    Written(Written),
    /// The destination's word. It may be old, or come twice.
    Heard(Fate),
    /// It is time to try again.
    Again,
    /// An operator decides.
    Forced(Side),
    /// There is no QEMU any more that could be resumed, and the destination may have the whole guest.
    Gone,
    /// The destination has not said for long what became of the guest. Only where there is a witness.
    Unheard,
    /// What came of taking it back at the witness.
    TakenBack(Answer),
}

/// What a source does, in this order. A write is the last of a step, and how it ended is the next
/// input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceEffect {
    /// Write a record and wait for the disk.
    Write(Mark),
    /// Ask the destination.
    Ask(Ask),
    /// Offer the guest at the witness.
    Offer,
    /// Take it back at the witness. It is the last of a step, as a write is.
    TakeBack,
    /// Undo what was made, and let the guest run.
    Resume,
    /// The guest here never runs again.
    Release,
}

/// The source's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    state: SourceState,
    /// Both sides have agreed on a witness.
    witness: bool,
}

use SourceEffect as E;
use SourceInput as I;
use SourceState as S;

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

impl Source {
    /// At the beginning of a migration.
    pub fn new() -> Self {
        Self { state: S::Ours, witness: false }
    }

    /// Both sides have agreed on a witness.
    #[must_use]
    pub fn with_witness(self) -> Self {
        Self { witness: true, ..self }
    }

    /// After a restart, with what the journal says, and what to do about it first.
    pub fn restarted(known: Known) -> (Self, Vec<SourceEffect>) {
        let (state, effects) = match known {
            Known { ended: Some(Ended::Moved), .. } => (S::Moved, Vec::new()),
            // That end may have been read and not be on the disk.
            Known { ended: Some(Ended::Stayed), .. } => (S::Back { noted: false, agreed: true }, Vec::new()),
            Known { forced: Some(Side::There), .. } | Known { runs: true, .. } => {
                (S::Noting, vec![E::Write(Mark::Runs)])
            }
            // What was read may not be on the disk: without a record that surely is, the guest
            // might run here and a later restart might read `handed-over`.
            Known { handed_over: false, .. }
            | Known { never_ran: true, .. }
            | Known { forced: Some(Side::Here), .. } => {
                (S::Doubt { forced: known.forced.is_some() }, vec![E::Write(Mark::NeverRan)])
            }
            _ => (S::Asking { sure: false }, vec![E::Write(Mark::HandedOver)]),
        };
        (Self { state, witness: false }, effects)
    }

    /// Who owns the guest.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// For good: `None` while it is open.
    pub fn ended(&self) -> Option<Ended> {
        match self.state {
            S::Back { .. } => Some(Ended::Stayed),
            S::Noting | S::Moved => Some(Ended::Moved),
            _ => None,
        }
    }

    /// Goes on.
    /// Errors: [`Illegal`] for an input that cannot come now; nothing has changed then.
    pub fn step(&mut self, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let (state, effects) = match (self.state, input) {
            (S::Ours, I::Complete { witness }) => {
                self.witness |= witness;
                (S::HandingOver, vec![E::Write(Mark::HandedOver)])
            }
            // Nothing was handed over and nothing is being: no record is needed to go back.
            (S::Ours, I::Fail) => {
                let undo = vec![E::Resume, E::Ask(Ask::Abort), E::Write(Mark::NeverRan)];
                (back(false), undo)
            }
            (S::Ours, I::Heard(_)) => (S::Ours, Vec::new()),
            (S::HandingOver, I::Written(written)) => self.handed_over(written),
            (S::Asking { sure }, input) => return self.asking(sure, input),
            (S::Doubt { forced }, input) => return self.doubt(forced, input),
            (S::Missing, input) => return self.missing(input),
            // The destination's word is durable; with a disk that takes no record it must do.
            (S::TakingBack, I::Written(written)) => taken_back(written),
            (S::Won, input) => return self.won(input),
            (S::Forcing { side, was }, I::Written(written)) => forced(side, was, written),
            (S::Back { noted, agreed }, I::Written(written)) => {
                (S::Back { noted: noted || written == Written::Durable, agreed }, Vec::new())
            }
            (S::Back { agreed: false, .. }, I::Gone) => (S::Missing, vec![E::Ask(Ask::Abort)]),
            (S::Back { noted: true, .. }, I::Heard(Fate::NeverRan)) => {
                (self.state, vec![E::Ask(Ask::Confirmed)])
            }
            (S::Noting, I::Written(Written::Durable)) => (S::Moved, vec![E::Ask(Ask::Confirmed), E::Release]),
            // `handed-over` is on the disk: a restart asks again.
            (S::Noting, I::Written(_)) => (S::Moved, vec![E::Release]),
            (S::Back { .. } | S::Moved, I::Heard(_) | I::Again | I::Fail | I::Gone | I::Unheard) => {
                (self.state, Vec::new())
            }
            (state, input) => return Err(Illegal::new(&state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    fn asking(&mut self, sure: bool, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let (state, effects) = match input {
            I::Heard(Fate::Runs) => (S::Noting, vec![E::Write(Mark::Runs)]),
            I::Heard(Fate::NeverRan) => (S::TakingBack, vec![E::Write(Mark::NeverRan)]),
            I::Heard(Fate::Loaded) if sure => (self.state, self.say_start()),
            I::Heard(Fate::Loaded | Fate::Open) | I::Fail | I::Gone => (self.state, Vec::new()),
            I::Written(Written::Durable | Written::Failed) => {
                (S::Asking { sure: true }, vec![E::Ask(Ask::Settle)])
            }
            // The destination's word decides as well, and needs no disk.
            I::Written(Written::InDoubt) => (self.state, vec![E::Ask(Ask::Settle)]),
            I::Again if sure => (self.state, self.ask_again()),
            I::Again => (self.state, vec![E::Write(Mark::HandedOver)]),
            I::Forced(side) => force(side, Undecided::Asking { sure }),
            I::Unheard if self.witness => (self.state, vec![E::TakeBack]),
            I::TakenBack(Answer::Done) if self.witness => (S::Won, vec![E::Write(Mark::NeverRan)]),
            // The destination has it, or nobody knows: it is asked on.
            I::TakenBack(_) | I::Unheard => (self.state, Vec::new()),
            I::Complete { .. } => return Err(Illegal::new(&self.state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    fn doubt(&mut self, forced: bool, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let (state, effects) = match input {
            I::Written(Written::Durable) => {
                (S::Back { noted: true, agreed: forced }, vec![E::Resume, E::Ask(Ask::Abort)])
            }
            // Surely nothing was added to what was read or known to be there, and that says ours.
            I::Written(Written::Failed) => {
                (S::Back { noted: false, agreed: forced }, vec![E::Resume, E::Ask(Ask::Abort)])
            }
            I::Written(Written::InDoubt) => (self.state, vec![E::Ask(Ask::Abort)]),
            I::Again => (self.state, vec![E::Write(Mark::NeverRan)]),
            I::Heard(Fate::NeverRan) => (S::TakingBack, vec![E::Write(Mark::NeverRan)]),
            // That was said before the operator decided, or is what he was warned of.
            I::Heard(Fate::Runs) if forced => (self.state, Vec::new()),
            // Only an earlier life can have said *start*, under a record that was not doubtful.
            I::Heard(Fate::Runs) => (S::Noting, vec![E::Write(Mark::Runs)]),
            I::Heard(Fate::Loaded | Fate::Open) | I::Fail | I::Gone | I::Unheard => (self.state, Vec::new()),
            I::Forced(side) => force(side, Undecided::Doubt { forced }),
            I::Complete { .. } | I::TakenBack(_) => return Err(Illegal::new(&self.state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    /// The witness has said so for good, and the guest runs once a restart would read the same.
    fn won(&mut self, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let (state, effects) = match input {
            I::Written(Written::Durable) => (back(true), vec![E::Resume, E::Ask(Ask::Abort)]),
            I::Heard(Fate::NeverRan) => (S::TakingBack, vec![E::Write(Mark::NeverRan)]),
            // An operator has started it there without the witness.
            I::Heard(Fate::Runs) => (S::Noting, vec![E::Write(Mark::Runs)]),
            I::Again => (S::Won, vec![E::Write(Mark::NeverRan)]),
            I::Written(_) | I::Heard(_) | I::Fail | I::Gone | I::Unheard | I::Forced(_) => {
                (S::Won, Vec::new())
            }
            I::Complete { .. } | I::TakenBack(_) => return Err(Illegal::new(&self.state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    fn handed_over(&self, written: Written) -> Step {
        match written {
            Written::Durable => (S::Asking { sure: true }, self.say_start()),
            Written::Failed => {
                let undo = vec![E::Resume, E::Ask(Ask::Abort), E::Write(Mark::NeverRan)];
                (back(false), undo)
            }
            Written::InDoubt => (S::Doubt { forced: false }, vec![E::Write(Mark::NeverRan)]),
        }
    }

    /// Only under a `handed-over` that is surely on the disk.
    fn say_start(&self) -> Vec<SourceEffect> {
        self.offering(Ask::Start)
    }

    /// It is offered again: the witness may not have heard it.
    fn ask_again(&self) -> Vec<SourceEffect> {
        self.offering(Ask::Settle)
    }

    fn offering(&self, ask: Ask) -> Vec<SourceEffect> {
        let offer = self.witness.then_some(E::Offer);
        offer.into_iter().chain([E::Ask(ask)]).collect()
    }

    /// Nothing can be resumed, so that nothing is lost by asking.
    fn missing(&mut self, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        let (state, effects) = match input {
            I::Heard(Fate::NeverRan) => (S::TakingBack, vec![E::Write(Mark::NeverRan)]),
            I::Heard(Fate::Runs) => (S::Noting, vec![E::Write(Mark::Runs)]),
            I::Again => (S::Missing, vec![E::Ask(Ask::Abort)]),
            I::Forced(side) => force(side, Undecided::Missing),
            I::Heard(Fate::Loaded | Fate::Open) | I::Fail | I::Gone | I::Written(_) | I::Unheard => {
                (S::Missing, Vec::new())
            }
            I::Complete { .. } | I::TakenBack(_) => return Err(Illegal::new(&self.state, &input)),
        };
        self.state = state;
        Ok(effects)
    }
}

/// The source's by its own word alone.
fn back(noted: bool) -> SourceState {
    S::Back { noted, agreed: false }
}

type Step = (SourceState, Vec<SourceEffect>);

fn taken_back(written: Written) -> Step {
    match written {
        Written::Durable => (S::Back { noted: true, agreed: true }, vec![E::Resume, E::Ask(Ask::Confirmed)]),
        Written::Failed | Written::InDoubt => (S::Back { noted: false, agreed: true }, vec![E::Resume]),
    }
}

fn force(side: Side, was: Undecided) -> Step {
    (S::Forcing { side, was }, vec![E::Write(Mark::Forced(side))])
}

fn forced(side: Side, was: Undecided, written: Written) -> Step {
    match (written, side) {
        (Written::Durable, Side::Here) => {
            (S::Back { noted: true, agreed: true }, vec![E::Resume, E::Ask(Ask::Abort)])
        }
        // The old QEMU is not ended on somebody's word alone: a restart reads this as `runs`.
        (Written::Durable, Side::There) => (S::Noting, vec![E::Write(Mark::Runs)]),
        (Written::Failed | Written::InDoubt, _) => match was {
            Undecided::Asking { sure } => (S::Asking { sure }, Vec::new()),
            Undecided::Doubt { forced } => (S::Doubt { forced }, Vec::new()),
            Undecided::Missing => (S::Missing, Vec::new()),
        },
    }
}
