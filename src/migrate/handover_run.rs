//! The interpreter of the hand-over: feeds its two machines, and carries out what they say. The only
//! one: the agent runs it on a journal, a control stream and a QEMU, `tests/handover/tests.rs` runs it on a
//! model of them and explores every way in which that can go. Knows no I/O, and does none.
//!
//! ```text
//!                        an effect, one after the other
//!              machine ─────────────────────────────────► world
//!                 ▲                                         │
//!                 ├──── how a write or a start ended ───────┤
//!                 └──── what was heard, or happened ────────┘   once nothing else is to be done
//! ```
//!
//! **Rules.**
//! - Effects are carried out in the machine's order, each to its end before the next one begins. Only the
//!   source's way back and its word of that are one, and so are its offer at the witness and what it asks then:
//!   neither waits for the other.
//! - A write, a start, and the taking of the guest at the witness end their step. The machine is told how they ended
//!   before anything else is done: what is said or done upon a record comes after the record, or not at all.
//! - What is heard meanwhile is kept until nothing else is to be done.
//! - An operator is answered once the records of his decision are written or refused and the witness has been
//!   asked, and before what follows from it.
//! - A world that cannot go on ends the run. What was still to be done is then not done, as in a crash:
//!   the journal says how it goes on.

use super::handover::{
    Answer, Ask, Destination, DestinationEffect, DestinationInput, Fate, Illegal, Mark, Move, Ran, Source,
    SourceEffect, SourceInput, Written,
};

/// Most effects of one step.
const EFFECTS_MAX: usize = 4;

pub trait Machine<I, E>: Copy {
    /// Goes on with what has happened.
    /// Errors: [`Illegal`]; nothing has changed then.
    fn step(&mut self, input: I) -> Result<Vec<E>, Illegal>;
}

impl Machine<SourceInput, SourceEffect> for Source {
    fn step(&mut self, input: SourceInput) -> Result<Vec<SourceEffect>, Illegal> {
        Source::step(self, input)
    }
}

impl AsRef<Self> for Source {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Machine<DestinationInput, DestinationEffect> for Destination {
    fn step(&mut self, input: DestinationInput) -> Result<Vec<DestinationEffect>, Illegal> {
        Destination::step(self, input)
    }
}

impl AsRef<Self> for Destination {
    fn as_ref(&self) -> &Self {
        self
    }
}

/// What a source's machine decides over. Each operation returns when it is done; an error ends the run.
pub trait SourceWorld {
    /// Why the run ends before its time.
    type Stop;

    /// What happens next; `None`: nothing that the machine is to know.
    fn wait(
        &mut self,
        machine: Source,
    ) -> impl Future<Output = Result<Option<SourceInput>, Self::Stop>> + Send;

    /// Writes a record and waits for the disk.
    fn write(&mut self, mark: Mark) -> impl Future<Output = Result<Written, Self::Stop>> + Send;

    /// Asks the destination. Returns its answer, or what happened instead; it need not come now, or ever.
    fn ask(
        &mut self,
        ask: Ask,
        machine: Source,
    ) -> impl Future<Output = Result<Option<SourceInput>, Self::Stop>> + Send;

    /// Undoes what was made and lets the guest run; tells the destination meanwhile, if `abort`.
    fn resume(&mut self, abort: bool)
    -> impl Future<Output = Result<Option<SourceInput>, Self::Stop>> + Send;

    /// Offers the guest at the witness, and asks the destination meanwhile, if there is something to ask. Its
    /// answer, as [`Self::ask`].
    fn offer(
        &mut self,
        ask: Option<Ask>,
        machine: Source,
    ) -> impl Future<Output = Result<Option<SourceInput>, Self::Stop>> + Send;

    /// Takes the guest back at the witness, if there is a QEMU here whose guest can be let run.
    fn take_back_at_witness(&mut self) -> impl Future<Output = Result<Answer, Self::Stop>> + Send;

    /// Sees to it that the guest here never runs again.
    fn release(&mut self) -> impl Future<Output = Result<(), Self::Stop>> + Send;

    /// Tells an operator what became of his decision.
    fn answer_operator(&mut self, machine: Source);

    /// The machine has no step for what happened.
    fn illegal(&mut self, error: Illegal);
}

/// What a destination's machine decides over, as [`SourceWorld`].
pub trait DestinationWorld {
    /// Why the run ends before its time.
    type Stop;

    /// What happens next; `None`: nothing that the machine is to know.
    fn wait(
        &mut self,
        machine: Destination,
    ) -> impl Future<Output = Result<Option<DestinationInput>, Self::Stop>> + Send;

    /// Writes a record and waits for the disk.
    fn write(&mut self, mark: Mark) -> impl Future<Output = Result<Written, Self::Stop>> + Send;

    /// Says it to the source that asked, or that listens.
    fn say(&mut self, fate: Fate) -> impl Future<Output = Result<(), Self::Stop>> + Send;

    /// Lets the guest run.
    fn start(&mut self) -> impl Future<Output = Result<Ran, Self::Stop>> + Send;

    /// Ends the guest that never ran, undoes what was made.
    fn undo(&mut self) -> impl Future<Output = Result<(), Self::Stop>> + Send;

    /// Takes the guest at the witness.
    fn seal(&mut self, by: Move) -> impl Future<Output = Result<Answer, Self::Stop>> + Send;

    /// Gives it up at the witness, if that can be reached.
    fn give_up_at_witness(&mut self) -> impl Future<Output = Result<(), Self::Stop>> + Send;

    /// Tells an operator what became of his decision.
    fn answer_operator(&mut self, machine: Destination);

    /// The machine has no step for what happened.
    fn illegal(&mut self, error: Illegal);
}

/// A machine, and what it wants done that has not been done yet. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run<M, I, E> {
    machine: M,
    effects: [Option<E>; EFFECTS_MAX],
    /// A source has heard it, for when nothing else is to be done.
    heard: Option<I>,
    /// An operator waits for an answer.
    forced: bool,
}

pub type SourceRun<M = Source> = Run<M, SourceInput, SourceEffect>;
pub type DestinationRun<M = Destination> = Run<M, DestinationInput, DestinationEffect>;

impl<I: Copy, E: Copy, M: Machine<I, E>> Run<M, I, E> {
    /// Of a machine that wants nothing done.
    pub fn new(machine: M) -> Self {
        Self { machine, effects: [None; EFFECTS_MAX], heard: None, forced: false }
    }

    /// Of a machine after a restart, with what it wants done first.
    pub fn restarted((machine, effects): (M, Vec<E>)) -> Self {
        let mut run = Self::new(machine);
        run.want(effects);
        run
    }

    pub fn machine(&self) -> M {
        self.machine
    }

    /// Whether nothing is to be done until something happens.
    pub fn is_idle(&self) -> bool {
        self.effects[0].is_none() && self.heard.is_none()
    }

    /// Tells the machine what has happened. What it wants done follows upon what it wants done already.
    /// Errors: [`Illegal`] when it has no step for that.
    pub fn give(&mut self, input: I) -> Result<(), Illegal> {
        let effects = self.machine.step(input)?;
        self.want(effects);
        Ok(())
    }

    fn want(&mut self, effects: Vec<E>) {
        for effect in effects {
            let free = self.effects.iter_mut().find(|place| place.is_none());
            debug_assert!(free.is_some(), "a step of more than {EFFECTS_MAX} effects");
            let _ = free.map(|place| *place = Some(effect));
        }
    }

    /// The first effects have been carried out.
    fn done(&mut self, effects: usize) {
        self.effects[..effects].fill(None);
        self.effects.rotate_left(effects);
    }
}

impl<M: Machine<SourceInput, SourceEffect> + AsRef<Source>> SourceRun<M> {
    /// Runs until nothing is to be done and nothing more happens.
    /// Errors: the world's, when that ends the run before.
    pub async fn run<W: SourceWorld>(&mut self, world: &mut W) -> Result<(), W::Stop> {
        while self.step(world).await? {}
        Ok(())
    }

    /// Carries out one effect, or waits for what happens next; false when nothing does.
    /// Errors: the world's. The run is over then.
    pub async fn step<W: SourceWorld>(&mut self, world: &mut W) -> Result<bool, W::Stop> {
        let next = self.effects[0];
        if self.forced && !matches!(next, Some(SourceEffect::Write(_))) {
            self.forced = false;
            world.answer_operator(*self.machine.as_ref());
        }
        let machine = *self.machine.as_ref();
        match next {
            None => {
                let happened = match self.heard.take() {
                    None => world.wait(machine).await?,
                    heard => heard,
                };
                let Some(input) = happened else {
                    return Ok(false);
                };
                self.forced = matches!(input, SourceInput::Forced(_));
                self.tell(input, world);
            }
            Some(SourceEffect::Write(mark)) => {
                let written = world.write(mark).await?;
                self.done(1);
                self.tell(SourceInput::Written(written), world);
            }
            Some(SourceEffect::Ask(ask)) => {
                self.heard = world.ask(ask, machine).await?.or(self.heard);
                self.done(1);
            }
            Some(SourceEffect::Offer) => {
                let ask = match self.effects[1] {
                    Some(SourceEffect::Ask(ask)) => Some(ask),
                    _ => None,
                };
                self.heard = world.offer(ask, machine).await?.or(self.heard);
                self.done(1 + usize::from(ask.is_some()));
            }
            Some(SourceEffect::TakeBack) => {
                let answer = world.take_back_at_witness().await?;
                self.done(1);
                self.tell(SourceInput::TakenBack(answer), world);
            }
            Some(SourceEffect::Resume) => {
                let abort = self.effects[1] == Some(SourceEffect::Ask(Ask::Abort));
                self.heard = world.resume(abort).await?.or(self.heard);
                self.done(1 + usize::from(abort));
            }
            Some(SourceEffect::Release) => {
                world.release().await?;
                self.done(1);
            }
        }
        Ok(true)
    }

    fn tell<W: SourceWorld>(&mut self, input: SourceInput, world: &mut W) {
        let _ = self.give(input).map_err(|e| world.illegal(e));
    }
}

impl<M: Machine<DestinationInput, DestinationEffect> + AsRef<Destination>> DestinationRun<M> {
    /// Runs until nothing is to be done and nothing more happens.
    /// Errors: the world's, when that ends the run before.
    pub async fn run<W: DestinationWorld>(&mut self, world: &mut W) -> Result<(), W::Stop> {
        while self.step(world).await? {}
        Ok(())
    }

    /// Carries out one effect, or waits for what happens next; false when nothing does.
    /// Errors: the world's. The run is over then.
    pub async fn step<W: DestinationWorld>(&mut self, world: &mut W) -> Result<bool, W::Stop> {
        let next = self.effects[0];
        if self.forced && !matches!(next, Some(DestinationEffect::Write(_) | DestinationEffect::Seal(_))) {
            self.forced = false;
            world.answer_operator(*self.machine.as_ref());
        }
        match next {
            None => {
                let machine = *self.machine.as_ref();
                let Some(input) = world.wait(machine).await? else {
                    return Ok(false);
                };
                self.forced = matches!(input, DestinationInput::Forced(_));
                self.tell(input, world);
            }
            Some(DestinationEffect::Write(mark)) => {
                let written = world.write(mark).await?;
                self.done(1);
                self.tell(DestinationInput::Written(written), world);
            }
            Some(DestinationEffect::Say(fate)) => {
                world.say(fate).await?;
                self.done(1);
            }
            Some(DestinationEffect::Start) => {
                let ran = world.start().await?;
                self.done(1);
                self.tell(DestinationInput::Ran(ran), world);
            }
            Some(DestinationEffect::Undo) => {
                world.undo().await?;
                self.done(1);
            }
            Some(DestinationEffect::Seal(by)) => {
                let answer = world.seal(by).await?;
                self.done(1);
                self.tell(DestinationInput::Moved(answer), world);
            }
            Some(DestinationEffect::Yield) => {
                world.give_up_at_witness().await?;
                self.done(1);
            }
        }
        Ok(true)
    }

    fn tell<W: DestinationWorld>(&mut self, input: DestinationInput, world: &mut W) {
        let _ = self.give(input).map_err(|e| world.illegal(e));
    }
}
