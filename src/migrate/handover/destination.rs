//! The destination's side of the hand-over. Pure; see the module above for the rules.

use serde::{Deserialize, Serialize};

use super::{Answer, Ask, Ended, Fate, Illegal, Known, Mark, Move, Side, Written};

/// Who owns the guest, as the destination sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DestinationState {
    /// The source's; `starting` was never written.
    Waiting {
        /// The whole guest is here.
        loaded: bool,
    },
    /// The source's, which stays away: the witness is asked whether it has offered the guest.
    Alone,
    /// `starting` is being written, for the first time.
    Beginning {
        /// An operator has decided so.
        forced: bool,
    },
    /// An earlier life wrote `starting`, which is being made sure.
    Resuming {
        /// An operator had decided so, and the witness was not needed.
        forced: bool,
    },
    /// `starting` is on the disk, and the guest is being taken at the witness.
    Sealing {
        /// An earlier life may have started it already: nothing leads back but that the other side has it.
        again: bool,
        /// An operator has decided so: the witness keeps it from the source, if that can be.
        forced: bool,
    },
    /// Ours: its start is under way.
    Starting {
        /// An earlier life may have started it already: nothing leads back.
        again: bool,
    },
    /// An earlier life was about to start it, and its QEMU is gone. Whether it ran nobody knows; it is ours, unless an
    /// operator has decided otherwise at the source, which is asked.
    Claiming,
    /// Ours for good.
    Runs,
    /// It shall never run; that is being proved.
    GivingUp {
        /// Whether `starting` is on the disk.
        starting: OnDisk,
    },
    /// An operator's decision is being written.
    Forcing {
        /// Whose the guest is to be.
        side: Side,
        /// What is known of `starting`.
        starting: OnDisk,
        /// It was being taken at the witness; whether an earlier life may have started it.
        sealing: Option<bool>,
    },
    /// The source's for good.
    NeverRan,
}

/// What is known of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OnDisk {
    /// It was never written.
    No,
    /// It may be there unless a later write ends in one of the two sure ways.
    Perhaps,
    /// It is there: only a later record helps.
    Yes,
}

/// How the start of a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ran {
    /// QEMU runs it.
    Yes,
    /// QEMU refused to run it, or was gone before it was told to.
    No,
    /// QEMU was told to and did not answer.
    Perhaps,
}

/// What happens to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationInput {
    /// QEMU has the whole guest.
    Loaded,
    /// The source was lost for too long, QEMU is gone, the agent stops: whatever prevents it.
    /// Without meaning once the guest is ours.
    Trouble,
    /// The source asks. It may be an old question, or come twice.
    Asked(Ask),
    /// The write that was asked for has ended.
    Written(Written),
    /// The start that was asked for has ended.
    Ran(Ran),
    /// It is time to try again.
    Again,
    /// An operator decides.
    Forced(Side),
    /// The source's migration has ended like this, for good.
    Told(Ended),
    /// The source stays away for too long. Only where there is a witness; else that is trouble.
    Alone,
    /// What came of the move at the witness.
    Moved(Answer),
}

/// What a destination does, in this order. A write, or a start, is the last of a step, and how it
/// ended is the next input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationEffect {
    /// Write a record and wait for the disk.
    Write(Mark),
    /// Say it to the source that asked, or that listens.
    Say(Fate),
    /// Let the guest run.
    Start,
    /// End the guest that never ran, undo what was made.
    Undo,
    /// Take the guest at the witness. It is the last of a step, as a write is.
    Seal(Move),
    /// Give it up at the witness, if that can be reached.
    Yield,
}

/// The destination's machine. As plain data it goes from one process of an agent to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Destination {
    state: DestinationState,
    /// Both sides have agreed on a witness.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    witness: bool,
}

use DestinationEffect as E;
use DestinationInput as I;
use DestinationState as S;

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

impl Destination {
    /// At the beginning of a migration.
    pub fn new() -> Self {
        Self { state: S::Waiting { loaded: false }, witness: false }
    }

    /// Both sides have agreed on a witness.
    #[must_use]
    pub fn with_witness(self) -> Self {
        Self { witness: true, ..self }
    }

    /// Whether it is so.
    pub fn has_witness(&self) -> bool {
        self.witness
    }

    /// After a restart, with what the journal says, and what to do about it first.
    pub fn restarted(known: Known) -> (Self, Vec<DestinationEffect>) {
        let (state, effects) = match known {
            Known { ended: Some(Ended::Moved), .. } | Known { runs: true, .. } => (S::Runs, Vec::new()),
            Known { ended: Some(Ended::Stayed), .. } => (S::NeverRan, Vec::new()),
            // What was read may not be on the disk, be it a `never-ran` or the lack of `starting`.
            Known { never_ran: true, .. } | Known { starting: false, .. } => {
                (S::GivingUp { starting: OnDisk::Perhaps }, vec![E::Write(Mark::NeverRan)])
            }
            // The witness is not asked again where an operator had decided so: of a source whose QEMU is gone it may
            // say all the same that it has taken the guest back.
            Known { forced, .. } => {
                let forced = forced == Some(Side::Here);
                (S::Resuming { forced }, vec![E::Write(Mark::Starting)])
            }
        };
        (Self { state, witness: false }, effects)
    }

    /// Who owns the guest.
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// For good: `None` while it is open.
    pub fn ended(&self) -> Option<Ended> {
        match self.state {
            S::Runs => Some(Ended::Moved),
            S::NeverRan => Some(Ended::Stayed),
            _ => None,
        }
    }

    /// Whether the whole guest is here and nobody has decided over it yet.
    pub fn is_loaded(&self) -> bool {
        self.state == S::Waiting { loaded: true }
    }

    /// What the source is told now.
    pub fn fate(&self) -> Fate {
        match self.state {
            // A source that comes back says whether it is to be started.
            S::Waiting { loaded: true } | S::Alone => Fate::Loaded,
            S::Runs | S::Claiming => Fate::Runs,
            S::NeverRan => Fate::NeverRan,
            _ => Fate::Open,
        }
    }

    /// Goes on.
    /// Errors: [`Illegal`] for an input that cannot come now; nothing has changed then.
    pub fn step(&mut self, input: DestinationInput) -> Result<Vec<DestinationEffect>, Illegal> {
        let never_ran = || vec![E::Write(Mark::NeverRan)];
        let (state, effects) = match (self.state, input) {
            (S::Waiting { .. }, I::Loaded) => (S::Waiting { loaded: true }, vec![E::Say(Fate::Loaded)]),
            (S::Waiting { loaded: true } | S::Alone, I::Asked(Ask::Start)) => begin(false),
            (S::Waiting { loaded: true }, I::Alone) if self.witness => ask_whether_offered(),
            (S::Alone, I::Again) => ask_whether_offered(),
            (S::Alone, I::Moved(Answer::Done)) => begin(false),
            (S::Alone, I::Moved(Answer::Unknown)) => (S::Alone, Vec::new()),
            (S::Alone, I::Moved(_)) | (S::Waiting { .. }, I::Alone) => {
                (S::GivingUp { starting: OnDisk::No }, never_ran())
            }
            (S::Waiting { .. } | S::Alone, I::Asked(Ask::Abort) | I::Trouble) => {
                (S::GivingUp { starting: OnDisk::No }, never_ran())
            }
            (S::Waiting { loaded: true } | S::Alone, I::Forced(side)) => force(side, OnDisk::No, None),
            (S::GivingUp { starting }, I::Forced(Side::There)) => force(Side::There, starting, None),
            (S::Beginning { forced }, I::Written(Written::Durable)) => self.begun(forced),
            (S::Beginning { .. }, I::Written(Written::Failed)) => {
                (S::GivingUp { starting: OnDisk::No }, never_ran())
            }
            (S::Beginning { .. }, I::Written(Written::InDoubt)) => {
                (S::GivingUp { starting: OnDisk::Perhaps }, never_ran())
            }
            (S::Resuming { forced: false }, I::Written(Written::Durable | Written::Failed))
                if self.witness =>
            {
                seal(true, false)
            }
            (S::Resuming { .. }, I::Written(Written::Durable | Written::Failed)) => {
                (S::Starting { again: true }, vec![E::Start])
            }
            (S::Resuming { .. }, I::Again) => (self.state, vec![E::Write(Mark::Starting)]),
            (S::Sealing { again, forced }, input) => return self.sealing((again, forced), input),
            (S::Starting { again: false }, I::Ran(Ran::No)) => {
                (S::GivingUp { starting: OnDisk::Yes }, never_ran())
            }
            (S::Starting { again: true }, I::Ran(Ran::No)) => (S::Claiming, vec![E::Say(Fate::Runs)]),
            (S::Claiming, I::Told(Ended::Moved)) => runs(),
            (S::Claiming, I::Told(Ended::Stayed)) => (S::GivingUp { starting: OnDisk::Yes }, never_ran()),
            (S::Claiming, I::Forced(side)) => force(side, OnDisk::Yes, None),
            // `starting` is on the disk, so that this is true after any crash.
            (S::Starting { .. }, I::Ran(_)) => runs(),
            (S::GivingUp { starting }, I::Written(written)) => self.gave_up(starting, written),
            (S::GivingUp { .. }, I::Again) => (self.state, never_ran()),
            (S::Forcing { side, starting, sealing }, I::Written(written)) => {
                forced(side, (starting, sealing), written)
            }
            (S::Runs | S::NeverRan, I::Asked(Ask::Confirmed)) => {
                (self.state, vec![E::Write(Mark::Confirmed)])
            }
            (state, I::Asked(Ask::Start | Ask::Abort | Ask::Settle)) => (state, vec![E::Say(self.fate())]),
            (state, I::Asked(Ask::Confirmed)) => (state, Vec::new()),
            (S::Runs | S::NeverRan | S::Resuming { .. }, I::Written(_)) => (self.state, Vec::new()),
            (state, I::Trouble | I::Loaded | I::Told(_) | I::Alone) => (state, Vec::new()),
            (S::Runs | S::NeverRan | S::Waiting { .. } | S::Claiming, I::Again) => (self.state, Vec::new()),
            (state, input) => return Err(Illegal::new(&state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    /// The guest is loaded and `starting` is on the disk.
    fn begun(&self, forced: bool) -> Step {
        match self.witness {
            true => seal(false, forced),
            false => (S::Starting { again: false }, vec![E::Start]),
        }
    }

    /// The source has handed over, or an operator has decided: that it was not offered does not matter.
    fn sealing(
        &mut self,
        (again, forced): (bool, bool),
        input: DestinationInput,
    ) -> Result<Vec<DestinationEffect>, Illegal> {
        let give_up = || (S::GivingUp { starting: OnDisk::Yes }, vec![E::Write(Mark::NeverRan)]);
        let (state, effects) = match input {
            I::Moved(Answer::Done) => (S::Starting { again }, vec![E::Start]),
            I::Moved(Answer::TheOthers) => give_up(),
            // An operator's word is enough.
            I::Moved(_) if forced => (S::Starting { again }, vec![E::Start]),
            // Nobody knows, and this life has not started it.
            I::Trouble | I::Asked(Ask::Abort) | I::Moved(Answer::Forgotten) if !again => give_up(),
            I::Again => seal(again, forced),
            I::Forced(side) => force(side, OnDisk::Yes, Some(again)),
            I::Asked(Ask::Start | Ask::Abort | Ask::Settle) => (self.state, vec![E::Say(self.fate())]),
            I::Moved(_) | I::Asked(_) | I::Trouble | I::Loaded | I::Told(_) | I::Alone => {
                (self.state, Vec::new())
            }
            I::Written(_) | I::Ran(_) => return Err(Illegal::new(&self.state, &input)),
        };
        self.state = state;
        Ok(effects)
    }

    fn gave_up(&self, starting: OnDisk, written: Written) -> Step {
        let proved = match (written, starting) {
            (Written::Durable, _) | (_, OnDisk::No) => true,
            (Written::Failed, OnDisk::Perhaps) => true,
            (Written::InDoubt, OnDisk::Perhaps) | (_, OnDisk::Yes) => false,
        };
        if !proved {
            return (S::GivingUp { starting }, Vec::new());
        }
        let yields = self.witness.then_some(E::Yield);
        (S::NeverRan, [E::Undo, E::Say(Fate::NeverRan)].into_iter().chain(yields).collect())
    }
}

type Step = (DestinationState, Vec<DestinationEffect>);

fn ask_whether_offered() -> Step {
    (S::Alone, vec![E::Seal(Move::TakeIfOffered)])
}

fn begin(forced: bool) -> Step {
    (S::Beginning { forced }, vec![E::Write(Mark::Starting)])
}

fn seal(again: bool, forced: bool) -> Step {
    (S::Sealing { again, forced }, vec![E::Seal(Move::TakeAsTold)])
}

fn runs() -> Step {
    (S::Runs, vec![E::Say(Fate::Runs), E::Write(Mark::Runs)])
}

fn force(side: Side, starting: OnDisk, sealing: Option<bool>) -> Step {
    (S::Forcing { side, starting, sealing }, vec![E::Write(Mark::Forced(side))])
}

fn forced(side: Side, (starting, sealing): (OnDisk, Option<bool>), written: Written) -> Step {
    match (side, written, starting, sealing) {
        (Side::Here, Written::Durable, _, Some(again)) => seal(again, true),
        (Side::Here, _, _, Some(again)) => (S::Sealing { again, forced: false }, Vec::new()),
        (Side::Here, Written::Durable, OnDisk::Yes, None) => runs(),
        (Side::Here, _, OnDisk::Yes, None) => (S::Claiming, Vec::new()),
        (Side::Here, Written::Durable, _, None) => begin(true),
        (Side::Here, _, _, None) => (S::Waiting { loaded: true }, Vec::new()),
        (Side::There, ..) => (S::GivingUp { starting }, vec![E::Write(Mark::NeverRan)]),
    }
}
