//! The world as the interpreter sees it, one operation at a time: each can end in several ways, and each
//! of them is one successor. The interpreter is the agent's own.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use vmferry_handover::handover::Fate;
use vmferry_handover::handover::{
    Answer, Ask, Destination, DestinationInput, DestinationState, Illegal, Mark, Move, Ran, Side, Source,
    SourceInput, SourceState, Written,
};
use vmferry_handover::handover_run::{DestinationWorld, Run, SourceWorld};

use super::disk::bit;
use super::mutants::Mutant;
use super::world::{Kind, Lost, Qemu, Scope, Successors, World};

/// The agent crashes.
pub struct Crash;

/// What the interpreter does counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Live,
    /// For an interpreter that does not wait for its disk: every write is done, and nothing else is.
    Blind,
    /// For the same: what follows upon that write is done, up to the next one.
    Early,
}

/// One operation in one of its outcomes.
struct Model {
    world: World,
    mutant: Mutant,
    mode: Mode,
    /// Which outcome.
    choice: usize,
    /// Of how many.
    outcomes: usize,
    kind: Kind,
    /// A mutant drops what is to be done.
    drops: bool,
    /// It was writing a record.
    writes: bool,
    /// In words, where they are asked for.
    name: Option<String>,
}

type Done<T> = Result<T, Crash>;

impl Model {
    fn new(world: World, mutant: Mutant, choice: usize, name: Option<String>) -> Self {
        let (mode, kind) = (Mode::Live, Kind::Step);
        Self { world, mutant, mode, choice, outcomes: 1, kind, drops: false, writes: false, name }
    }

    fn choose<T>(&mut self, mut outcomes: Vec<(Kind, T)>) -> T {
        self.outcomes = outcomes.len();
        let (kind, outcome) = outcomes.swap_remove(self.choice);
        self.kind = kind;
        outcome
    }

    fn name(&mut self, name: impl FnOnce() -> String) {
        if let Some(into) = &mut self.name {
            *into = name();
        }
    }

    /// Whether an operation other than a write is done at all.
    fn does(&self, says: bool) -> Done<bool> {
        match self.mode {
            Mode::Live => Ok(true),
            Mode::Blind => Err(Crash),
            Mode::Early => Ok(says == (self.mutant == Mutant::SaysFirst)),
        }
    }

    /// Every way in which a move can end.
    fn at_witness(&mut self, by: Move) -> Done<Answer> {
        if self.mode != Mode::Live {
            return Err(Crash);
        }
        // Whether it comes to the witness, is answered, and the agent crashes.
        let outcomes = vec![
            (Kind::Step, (true, true, false)),
            (Kind::Fault, (true, false, false)),
            (Kind::Fault, (false, false, false)),
            (Kind::Fault, (true, false, true)),
            (Kind::Fault, (false, false, true)),
        ];
        let (comes, is_answered, crashes) = self.choose(outcomes);
        let mut answer = Answer::Unknown;
        match comes {
            true => answer = self.mutant.at_witness(by, &mut self.world.witness),
            false => self.world.witness.is_sent(by, self.world.scope),
        }
        if !is_answered {
            answer = Answer::Unknown;
        }
        self.name(|| format!("{by:?} at the witness: {answer:?}, crashes: {crashes}"));
        if crashes { Err(Crash) } else { Ok(answer) }
    }

    /// Every way in which one write can end.
    fn record(&mut self, mark: Mark, at_source: bool) -> Done<Written> {
        match self.mode {
            Mode::Live => {}
            Mode::Blind => return Ok(Written::Durable),
            Mode::Early => return Err(Crash),
        }
        self.writes = true;
        let disk = if at_source { self.world.source.disk } else { self.world.destination.disk };
        let outcomes = disk
            .write(bit(mark, at_source), self.world.scope)
            .into_iter()
            .map(|(disk, written, kind, how)| (kind, (disk, written, how)));
        let (disk, written, how) = self.choose(outcomes.collect());
        match at_source {
            true => self.world.source.disk = disk,
            false => self.world.destination.disk = disk,
        }
        self.name(|| format!("record {mark:?} {how}"));
        let written = written.ok_or(Crash)?;
        self.drops = self.mutant == Mutant::IsSilentAboutAFailedWrite && written != Written::Durable;
        Ok(if self.mutant == Mutant::GoesOnAfterAFailedWrite { Written::Durable } else { written })
    }
}

impl SourceWorld for Model {
    type Stop = Crash;

    async fn wait(&mut self, machine: Source) -> Done<Option<SourceInput>> {
        if self.mode != Mode::Live {
            return Err(Crash);
        }
        let mut inputs = Vec::new();
        if machine.state() == SourceState::Ours {
            // At the latest by a deadline; or somebody cancels it, or something fails.
            inputs.push(SourceInput::Fail);
            if self.world.said.said().any(|fate| fate == Fate::Loaded) {
                inputs.push(SourceInput::Complete { witness: self.world.witness.agreed });
            }
        }
        inputs.extend(self.world.said.said().map(SourceInput::Heard));
        if self.mutant == Mutant::TakesNoRecordForNeverRan
            && machine.state() == SourceState::Missing
            && self.world.forgotten
        {
            inputs.push(SourceInput::Heard(Fate::NeverRan));
        }
        if machine.ended().is_none() && machine.state() != SourceState::Ours {
            inputs.push(SourceInput::Again);
        }
        let mut inputs: Vec<_> = inputs.into_iter().map(|input| (Kind::Step, input)).collect();
        if matches!(
            machine.state(),
            SourceState::Asking { .. } | SourceState::Doubt { .. } | SourceState::Missing
        ) {
            // In the end, of one that is lost; of others, if they are slow.
            if self.world.witness.agreed && matches!(machine.state(), SourceState::Asking { .. }) {
                let kind = if self.world.lost == Lost::Destination { Kind::Step } else { Kind::Fault };
                inputs.push((kind, SourceInput::Unheard));
            }
            // Whose agent has no record of it says nothing, so that an operator looks there. One that is asked by a
            // source which has handed over has a record, unless its folder was lost.
            let no_record = self.world.forgotten
                && (self.world.scope.is_decided_wrongly() || machine.state() == SourceState::Missing);
            let truth = self.world.source_needs_operator() || no_record;
            let sides = decisions(self.world.scope, truth.then_some(self.world.destination.ran));
            inputs.extend(sides.map(|(kind, side)| (kind, SourceInput::Forced(side))));
        }
        if inputs.is_empty() {
            return Ok(None);
        }
        let input = self.choose(inputs);
        if let SourceInput::Forced(side) = input {
            self.world.source_declares(side);
        }
        self.name(|| format!("{input:?}"));
        Ok(Some(input))
    }

    async fn write(&mut self, mark: Mark) -> Done<Written> {
        self.record(mark, true)
    }

    /// The answer may come at once, and be an old one.
    async fn ask(&mut self, ask: Ask, _: Source) -> Done<Option<SourceInput>> {
        if self.does(true)? {
            self.world.asked.ask(ask);
        }
        if self.mode != Mode::Live {
            return Ok(None);
        }
        let fates = self.world.said.said().map(|fate| Some(SourceInput::Heard(fate)));
        let heard = self.choose([None].into_iter().chain(fates).map(|heard| (Kind::Step, heard)).collect());
        self.drops = self.mutant == Mutant::NeedsAnAnswer && heard.is_none();
        self.name(|| format!("asks {ask:?}, hears {heard:?}"));
        Ok(heard)
    }

    /// In between the agent may crash. What the destination does in between it may as well do after.
    async fn resume(&mut self, abort: bool) -> Done<Option<SourceInput>> {
        let does = self.does(false)? && self.mutant != Mutant::ForgetsToResume;
        let (mut resumes, mut tells, mut crashes) = (does, abort && self.mode == Mode::Live, false);
        let mut heard = None;
        if self.mode == Mode::Live && abort {
            // The answer may be an old one, or none.
            let fates = self.world.said.said().map(|fate| Some(SourceInput::Heard(fate)));
            let whole = [None].into_iter().chain(fates).map(|heard| (Kind::Step, (true, true, false, heard)));
            let half = [(true, false, true, None), (false, true, true, None)].map(|half| (Kind::Fault, half));
            let outcomes = whole.chain(half).collect();
            let (resumed, told, crashed, answer) = self.choose(outcomes);
            (resumes, tells, crashes, heard) = (resumes && resumed, told, crashed, answer);
        }
        if resumes && self.world.source.qemu != Qemu::Gone {
            self.world.source.start_guest();
        }
        if tells {
            self.world.asked.ask(Ask::Abort);
        }
        self.name(|| {
            format!("lets the guest run: {resumes}, says so: {tells}, hears {heard:?}, crashes: {crashes}")
        });
        let is_gone = self.mode == Mode::Live && self.world.source.qemu == Qemu::Gone;
        match crashes {
            true => Err(Crash),
            // Its word is for good.
            false if is_gone && heard != Some(SourceInput::Heard(Fate::NeverRan)) => {
                Ok(Some(SourceInput::Gone))
            }
            false => Ok(heard),
        }
    }

    /// The answer may come at once, and be an old one; the offer may come late.
    async fn offer(&mut self, ask: Option<Ask>, _: Source) -> Done<Option<SourceInput>> {
        if self.mode != Mode::Live {
            return Err(Crash);
        }
        let fates = self.world.said.said().map(|fate| Some(SourceInput::Heard(fate)));
        let heard = [None].into_iter().chain(fates);
        let late = [(false, true, false), (false, false, true), (true, false, true)];
        let outcomes = heard.map(|heard| (Kind::Step, (true, true, false, heard)));
        let late = late.map(|(offers, asks, crashes)| (Kind::Fault, (offers, asks, crashes, None)));
        let (offers, asks, crashes, heard) = self.choose(outcomes.chain(late).collect());
        match offers {
            true => drop(self.world.witness.take(Move::Offer)),
            false if !crashes => self.world.witness.is_sent(Move::Offer, self.world.scope),
            false => {}
        }
        if asks || crashes && !offers {
            ask.into_iter().for_each(|ask| self.world.asked.ask(ask));
        }
        self.name(|| format!("offers it: {offers}, asks {ask:?}, hears {heard:?}, crashes: {crashes}"));
        if crashes { Err(Crash) } else { Ok(heard) }
    }

    async fn take_back_at_witness(&mut self) -> Done<Answer> {
        // Nothing could be let run.
        if self.world.source.qemu == Qemu::Gone && self.mutant != Mutant::TakesBackNothing {
            self.name(|| "has nothing to take back".into());
            return Ok(Answer::Unknown);
        }
        self.at_witness(Move::TakeBack)
    }

    async fn release(&mut self) -> Done<()> {
        // On an operator's word alone the old QEMU is not ended.
        if self.does(false)?
            && self.mutant != Mutant::ForgetsToRelease
            && !self.world.declared.there_by_source
        {
            self.world.source.qemu = Qemu::Gone;
        }
        self.name(|| "releases the guest".into());
        Ok(())
    }

    fn answer_operator(&mut self, _: Source) {}

    fn illegal(&mut self, _: Illegal) {
        self.world.illegal = true;
    }
}

impl DestinationWorld for Model {
    type Stop = Crash;

    async fn wait(&mut self, machine: Destination) -> Done<Option<DestinationInput>> {
        if self.mode != Mode::Live {
            return Err(Crash);
        }
        let mut inputs = vec![(Kind::Step, DestinationInput::Again)];
        if let DestinationState::Waiting { loaded } = machine.state() {
            if !loaded && self.world.destination.qemu == Qemu::Paused {
                inputs.push((Kind::Step, DestinationInput::Loaded));
            }
            // Nobody will say more, or nothing can be done: the timer must not help otherwise.
            let gone = self.world.destination.qemu == Qemu::Gone;
            let agreed = self.world.witness.agreed;
            let alone = self.world.source_end().is_some() || self.world.lost == Lost::Source;
            let kind = |is_step| if is_step { Kind::Step } else { Kind::Fault };
            inputs.push((kind(gone || alone && !(agreed && loaded)), DestinationInput::Trouble));
            if agreed && loaded {
                inputs.push((kind(alone), DestinationInput::Alone));
            }
        }
        if matches!(machine.state(), DestinationState::Sealing { .. } | DestinationState::Alone) {
            inputs.push((Kind::Fault, DestinationInput::Trouble));
        }
        let truth = self.world.destination_needs_operator(machine.state());
        for (kind, side) in decisions(self.world.scope, truth.then_some(self.world.source.ran)) {
            match machine.state() {
                DestinationState::Waiting { loaded: true }
                | DestinationState::Claiming
                | DestinationState::Alone
                | DestinationState::Sealing { .. } => {}
                DestinationState::GivingUp { .. } if side == Side::There => {}
                _ => continue,
            }
            inputs.push((kind, DestinationInput::Forced(side)));
        }
        if machine.state() == DestinationState::Claiming && self.world.source.run.is_some() {
            let told = self.world.source.disk.says_ended();
            inputs.extend(told.map(|ended| (Kind::Step, DestinationInput::Told(ended))));
        }
        inputs.extend(self.world.asked.asked().map(|ask| (Kind::Step, DestinationInput::Asked(ask))));
        let input = self.choose(inputs);
        if let DestinationInput::Forced(side) = input {
            self.world.destination_declares(side);
        }
        self.name(|| format!("{input:?}"));
        Ok(Some(input))
    }

    async fn write(&mut self, mark: Mark) -> Done<Written> {
        let early = self.mutant == Mutant::StartsBeforeRecord && mark == Mark::Starting;
        if early && self.world.destination.qemu == Qemu::Paused {
            self.world.destination.start_guest();
        }
        self.record(mark, false)
    }

    async fn say(&mut self, fate: Fate) -> Done<()> {
        if self.does(true)? {
            let proving = self.world.destination.run.map(|run| run.machine().machine.state());
            let said = match (self.mutant, proving) {
                (Mutant::SaysWhatItIsAboutToProve, Some(DestinationState::GivingUp { .. })) => Fate::NeverRan,
                (Mutant::ForgetsToSay, _) if fate != Fate::Loaded => Fate::Open,
                _ => fate,
            };
            self.world.said.say(said);
        }
        self.name(|| format!("says {fate:?}"));
        Ok(())
    }

    /// Every way in which a guest's start can end.
    async fn start(&mut self) -> Done<Ran> {
        if !self.does(false)? {
            return Ok(Ran::Yes);
        }
        let qemu = self.world.destination.qemu;
        let outcomes = match qemu {
            Qemu::Gone | Qemu::Empty => {
                vec![(Kind::Step, (Qemu::Gone, Some(Ran::No), "its QEMU has gone"))]
            }
            Qemu::Paused | Qemu::Refused => vec![
                (Kind::Step, (Qemu::Running, Some(Ran::Yes), "it runs")),
                (Kind::Fault, (Qemu::Refused, Some(Ran::No), "QEMU refuses")),
                (Kind::Fault, (Qemu::Running, Some(Ran::Perhaps), "it runs, and no answer comes")),
                (Kind::Fault, (Qemu::Gone, Some(Ran::Perhaps), "it ran, and QEMU dies")),
                (Kind::Fault, (Qemu::Running, None, "it runs, and the agent crashes")),
            ],
            Qemu::Running => vec![(Kind::Step, (Qemu::Running, Some(Ran::Yes), "it runs already"))],
        };
        let (after, ran, how) = if self.mode == Mode::Live { self.choose(outcomes) } else { outcomes[0].1 };
        if self.mutant != Mutant::ForgetsToStart {
            if after == Qemu::Running || ran == Some(Ran::Perhaps) {
                self.world.destination.start_guest();
            }
            self.world.destination.qemu = after;
        }
        self.name(|| format!("starts the guest: {how}"));
        match (self.mutant, after) {
            (Mutant::StartsTwice, Qemu::Gone) => Ok(Ran::No),
            _ => ran.ok_or(Crash),
        }
    }

    async fn undo(&mut self) -> Done<()> {
        if self.does(false)? && self.mutant != Mutant::ForgetsToUndo {
            self.world.destination.qemu = Qemu::Gone;
        }
        self.name(|| "undoes its part".into());
        Ok(())
    }

    async fn seal(&mut self, by: Move) -> Done<Answer> {
        if self.mutant == Mutant::StartsMeanwhile && self.world.destination.qemu == Qemu::Paused {
            self.world.destination.start_guest();
        }
        self.at_witness(by)
    }

    async fn give_up_at_witness(&mut self) -> Done<()> {
        match self.mutant {
            Mutant::NeverYields => Ok(()),
            _ => self.at_witness(Move::Yield).map(drop),
        }
    }

    fn answer_operator(&mut self, _: Destination) {}

    fn illegal(&mut self, _: Illegal) {
        self.world.illegal = true;
    }
}

/// What an operator may decide. Of a host that is lost for good somebody knows whether the guest has run there, and
/// decides by that in the end.
fn decisions(scope: Scope, ran_there: Option<bool>) -> impl Iterator<Item = (Kind, Side)> {
    let right = ran_there.map(|ran| if ran { Side::There } else { Side::Here });
    let kind = move |side| {
        if Some(side) == right { Kind::Step } else { Kind::Fault }
    };
    let sides = [Side::Here, Side::There].into_iter().map(move |side| (kind(side), side));
    sides.filter(move |(kind, _)| scope.is_decided_wrongly() || *kind == Kind::Step)
}

/// What a model's future gives: it never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("a model waits for nothing"),
    }
}

/// The interpreter's next step on one side, in each of its outcomes.
macro_rules! stepper {
    ($name:ident, $side:ident, $written:path) => {
        pub fn $name(before: &World, mutant: Mutant, out: &mut Successors) {
            let Some(run_before) = before.$side.run else {
                return;
            };
            let (mut choice, mut outcomes) = (0, 1);
            while choice < outcomes {
                let name = out.names.is_some().then(String::new);
                let mut model = Model::new(*before, mutant, choice, name);
                let mut run = run_before;
                if mutant.is_hasty() {
                    let mut ahead = run;
                    model.mode = Mode::Blind;
                    if now(ahead.step(&mut model)).is_ok() {
                        model.mode = Mode::Early;
                        while let Ok(true) = now(ahead.step(&mut model)) {}
                    }
                    model.mode = Mode::Live;
                }
                match now(run.step(&mut model)) {
                    Ok(_) if model.drops => model.world.$side.run = Some(Run::new(run_before.machine())),
                    Ok(_) => model.world.$side.run = Some(run),
                    Err(Crash) => {
                        model.world.$side.crash();
                        // That one takes what it was about to write for written.
                        let mut run = Run::new(run_before.machine());
                        let believes = mutant == Mutant::RemembersOverACrash && model.writes;
                        if believes && run.give($written(Written::Durable)).is_ok() {
                            model.world.$side.run = Some(run);
                        }
                    }
                }
                let Model { world, kind, name, .. } = model;
                (choice, outcomes) = (choice + 1, model.outcomes);
                if world != *before {
                    let side = stringify!($side);
                    out.add(kind, world, || format!("{side}: {}", name.unwrap_or_default()));
                }
            }
        }
    };
}

stepper!(step_source, source, SourceInput::Written);
stepper!(step_destination, destination, DestinationInput::Written);
