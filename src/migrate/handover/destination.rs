//! The destination's side of the hand-over. Pure; see the module above for the rules.

use serde::{Deserialize, Serialize};

use super::{Ask, Ended, Fate, Illegal, Known, Mark, Side, Written};

/// Who owns the guest, as the destination sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DestinationState {
    /// The source's; `starting` was never written.
    Waiting {
        /// The whole guest is here.
        loaded: bool,
    },
    /// `starting` is being written, for the first time.
    Beginning,
    /// An earlier life wrote `starting`, which is being made sure.
    Resuming,
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
}

/// The destination's machine. As plain data it goes from one process of an agent to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Destination {
    state: DestinationState,
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
        Self { state: S::Waiting { loaded: false } }
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
            _ => (S::Resuming, vec![E::Write(Mark::Starting)]),
        };
        (Self { state }, effects)
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
            S::Waiting { loaded: true } => Fate::Loaded,
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
            (S::Waiting { loaded: true }, I::Asked(Ask::Start)) => {
                (S::Beginning, vec![E::Write(Mark::Starting)])
            }
            (S::Waiting { .. }, I::Asked(Ask::Abort) | I::Trouble) => {
                (S::GivingUp { starting: OnDisk::No }, never_ran())
            }
            (S::Waiting { loaded: true }, I::Forced(side)) => force(side, OnDisk::No),
            (S::GivingUp { starting }, I::Forced(Side::There)) => force(Side::There, starting),
            (S::Beginning, I::Written(Written::Durable)) => (S::Starting { again: false }, vec![E::Start]),
            (S::Beginning, I::Written(Written::Failed)) => {
                (S::GivingUp { starting: OnDisk::No }, never_ran())
            }
            (S::Beginning, I::Written(Written::InDoubt)) => {
                (S::GivingUp { starting: OnDisk::Perhaps }, never_ran())
            }
            (S::Resuming, I::Written(Written::Durable | Written::Failed)) => {
                (S::Starting { again: true }, vec![E::Start])
            }
            (S::Resuming, I::Again) => (S::Resuming, vec![E::Write(Mark::Starting)]),
            (S::Starting { again: false }, I::Ran(Ran::No)) => {
                (S::GivingUp { starting: OnDisk::Yes }, never_ran())
            }
            (S::Starting { again: true }, I::Ran(Ran::No)) => (S::Claiming, vec![E::Say(Fate::Runs)]),
            (S::Claiming, I::Told(Ended::Moved)) => runs(),
            (S::Claiming, I::Told(Ended::Stayed)) => (S::GivingUp { starting: OnDisk::Yes }, never_ran()),
            (S::Claiming, I::Forced(side)) => force(side, OnDisk::Yes),
            // `starting` is on the disk, so that this is true after any crash.
            (S::Starting { .. }, I::Ran(_)) => runs(),
            (S::GivingUp { starting }, I::Written(written)) => gave_up(starting, written),
            (S::GivingUp { .. }, I::Again) => (self.state, never_ran()),
            (S::Forcing { side, starting }, I::Written(written)) => forced(side, starting, written),
            (S::Runs | S::NeverRan, I::Asked(Ask::Confirmed)) => {
                (self.state, vec![E::Write(Mark::Confirmed)])
            }
            (state, I::Asked(Ask::Start | Ask::Abort | Ask::Settle)) => (state, vec![E::Say(self.fate())]),
            (state, I::Asked(Ask::Confirmed)) => (state, Vec::new()),
            (S::Runs | S::NeverRan | S::Resuming, I::Written(_)) => (self.state, Vec::new()),
            (state, I::Trouble | I::Loaded | I::Told(_)) => (state, Vec::new()),
            (S::Runs | S::NeverRan | S::Waiting { .. } | S::Claiming, I::Again) => (self.state, Vec::new()),
            (state, input) => return Err(Illegal::new(&state, &input)),
        };
        self.state = state;
        Ok(effects)
    }
}

type Step = (DestinationState, Vec<DestinationEffect>);

fn gave_up(starting: OnDisk, written: Written) -> Step {
    let proved = match (written, starting) {
        (Written::Durable, _) | (_, OnDisk::No) => true,
        (Written::Failed, OnDisk::Perhaps) => true,
        (Written::InDoubt, OnDisk::Perhaps) | (_, OnDisk::Yes) => false,
    };
    if proved {
        return (S::NeverRan, vec![E::Undo, E::Say(Fate::NeverRan)]);
    }
    (S::GivingUp { starting }, Vec::new())
}

fn runs() -> Step {
    (S::Runs, vec![E::Say(Fate::Runs), E::Write(Mark::Runs)])
}

fn force(side: Side, starting: OnDisk) -> Step {
    (S::Forcing { side, starting }, vec![E::Write(Mark::Forced(side))])
}

fn forced(side: Side, starting: OnDisk, written: Written) -> Step {
    match (side, written, starting) {
        (Side::Here, Written::Durable, OnDisk::Yes) => runs(),
        (Side::Here, _, OnDisk::Yes) => (S::Claiming, Vec::new()),
        (Side::Here, Written::Durable, _) => (S::Beginning, vec![E::Write(Mark::Starting)]),
        (Side::Here, _, _) => (S::Waiting { loaded: true }, Vec::new()),
        (Side::There, ..) => (S::GivingUp { starting }, vec![E::Write(Mark::NeverRan)]),
    }
}
