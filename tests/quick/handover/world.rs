//! Both machines in a world where everything goes wrong: messages are lost, come twice and in any
//! order, disks fail, agents crash between any two steps, hosts lose power, QEMUs die.

use vmferry::migrate::handover::{
    Ask, Destination, DestinationEffect, DestinationInput, DestinationState, Ended, Known, Mark, Ran, Source,
    SourceEffect, SourceInput, SourceState, Written,
};
use vmferry::migrate::message::Fate;

use super::mutants::Mutant;

const ASKS: [Ask; 4] = [Ask::Start, Ask::Abort, Ask::Settle, Ask::Confirmed];
const FATES: [Fate; 3] = [Fate::Runs, Fate::NeverRan, Fate::Loaded];

/// Longest list of effects that a step may leave.
const QUEUE: usize = 4;

/// Records, as a set. Their order does not matter to the machines.
type Records = u8;
const HANDED_OVER: Records = 1;
const STARTING: Records = 2;
const RUNS: Records = 4;
const NEVER_RAN: Records = 8;
const CONFIRMED: Records = 16;
const MOVED: Records = 32;
const STAYED: Records = 64;

fn bit(mark: Mark) -> Records {
    match mark {
        Mark::HandedOver => HANDED_OVER,
        Mark::Starting => STARTING,
        Mark::Runs => RUNS,
        Mark::NeverRan => NEVER_RAN,
        Mark::Confirmed => CONFIRMED,
        Mark::Forced(_) => panic!("nobody forces anything here"),
    }
}

fn end_bit(ended: Ended) -> Records {
    match ended {
        Ended::Moved => MOVED,
        Ended::Stayed => STAYED,
    }
}

fn known(records: Records) -> Known {
    let has = |bit| records & bit != 0;
    let moved = has(MOVED).then_some(Ended::Moved);
    Known {
        handed_over: has(HANDED_OVER),
        starting: has(STARTING),
        runs: has(RUNS),
        never_ran: has(NEVER_RAN),
        forced: None,
        ended: moved.or(has(STAYED).then_some(Ended::Stayed)),
    }
}

/// One journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What the running agent knows to be in the file.
    whole: Records,
    /// What a process would read now.
    cached: Records,
    /// What may be there after a loss of power: one bit for each set of records.
    perhaps: u128,
}

impl Disk {
    const EMPTY: Self = Self { whole: 0, cached: 0, perhaps: 1 };

    fn add_perhaps(&mut self, records: Records) {
        self.perhaps |= 1 << records;
    }

    fn certain(&self) -> Option<Records> {
        self.perhaps.is_power_of_two().then(|| self.perhaps.trailing_zeros() as Records)
    }

    fn durable(&mut self, records: Records) {
        *self = Self { whole: records, cached: records, perhaps: 1 << records };
    }

    /// Every way in which a write can end. `None`: the agent crashes before it knows.
    fn write(self, bit: Records) -> Vec<(Self, Option<Written>, Kind, &'static str)> {
        let (without, with) = (self.whole, self.whole | bit);
        let [mut durable, mut failed, mut absent, mut unsynced] = [self; 4];
        durable.durable(with);
        failed.durable(without);
        absent.cached = without;
        absent.add_perhaps(without);
        absent.add_perhaps(with);
        unsynced.cached = with;
        unsynced.add_perhaps(without);
        unsynced.add_perhaps(with);
        let mut present = unsynced;
        present.whole = without;
        vec![
            (durable, Some(Written::Durable), Kind::Step, "is written"),
            (failed, Some(Written::Failed), Kind::Fault, "fails without a trace"),
            (absent, Some(Written::InDoubt), Kind::Fault, "fails in doubt, not to be read"),
            (present, Some(Written::InDoubt), Kind::Fault, "fails in doubt, to be read"),
            (unsynced, None, Kind::Fault, "is written, and the agent crashes before the sync"),
        ]
    }
}

impl Disk {
    /// The journal's end is written until the disk takes it, and nothing depends on when.
    fn end(self, ended: Ended) -> impl Iterator<Item = (Self, Option<Written>, Kind, &'static str)> {
        let outcomes = self.write(end_bit(ended)).into_iter();
        outcomes.filter(|(_, written, ..)| matches!(written, Some(Written::Durable) | None))
    }
}

/// Whether a transition belongs to the fair continuation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What happens when nothing more goes wrong.
    Step,
    /// What goes wrong, and what an operator does.
    Fault,
}

/// A QEMU and its guest, since the source's guest was paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// The destination's, before it has all of the guest.
    Empty,
    /// The whole guest, paused.
    Paused,
    /// Running.
    Running,
    /// No process.
    Gone,
}

/// One side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Side<M, E> {
    /// `None`: the agent is down.
    pub machine: Option<M>,
    queue: [Option<E>; QUEUE],
    pub disk: Disk,
    pub qemu: Qemu,
    /// The guest has run here since the source's was paused.
    pub ran: bool,
}

impl<M: Copy, E: Copy> Side<M, E> {
    fn pop(&mut self) -> Option<E> {
        let first = self.queue[0].take();
        self.queue.rotate_left(1);
        first
    }

    fn push(&mut self, effects: Vec<E>) {
        for effect in effects {
            let free = self.queue.iter().position(Option::is_none).expect("a short list of effects");
            self.queue[free] = Some(effect);
        }
    }

    fn crash(&mut self) {
        self.machine = None;
        self.queue = [None; QUEUE];
    }

    fn is_idle(&self) -> bool {
        self.machine.is_some() && self.queue[0].is_none()
    }

    fn run(&mut self) {
        self.qemu = Qemu::Running;
        self.ran = true;
    }

    /// Every state in which this side may be after a loss of power.
    fn lose_power(self) -> impl Iterator<Item = Self> {
        let perhaps = (0..128).filter(move |records| self.disk.perhaps >> records & 1 != 0);
        perhaps.map(move |records: Records| {
            let mut after = self;
            after.crash();
            after.qemu = Qemu::Gone;
            after.disk.durable(records);
            after
        })
    }
}

/// Everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub source: Side<Source, SourceEffect>,
    pub destination: Side<Destination, DestinationEffect>,
    /// Every message ever sent may come now, again, or never.
    asked: u8,
    said: u8,
    /// The destination has thrown its journal away.
    forgotten: bool,
}

/// Collects what may come next. `names` costs most of the time, so that it is left out.
pub struct Successors {
    pub next: Vec<(Kind, World)>,
    pub names: Option<Vec<String>>,
}

impl Successors {
    pub fn new(named: bool) -> Self {
        Self { next: Vec::new(), names: named.then(Vec::new) }
    }

    fn add(&mut self, kind: Kind, world: World, name: impl FnOnce() -> String) {
        self.next.push((kind, world));
        if let Some(names) = &mut self.names {
            names.push(name());
        }
    }
}

impl World {
    /// The whole guest is paused at the source and on its last way to the destination.
    pub fn begin() -> Self {
        let side = |qemu| (Disk::EMPTY, qemu);
        let (disk, qemu) = side(Qemu::Paused);
        let source = Side { machine: Some(Source::new()), queue: [None; QUEUE], disk, qemu, ran: false };
        let (disk, qemu) = side(Qemu::Empty);
        let destination =
            Side { machine: Some(Destination::new()), queue: [None; QUEUE], disk, qemu, ran: false };
        Self { source, destination, asked: 0, said: 0, forgotten: false }
    }

    /// What must never be, in words.
    pub fn wrong(&self) -> Option<&'static str> {
        if self.source.ran && self.destination.ran {
            return Some("the guest ran at the source after its pause, and at the destination");
        }
        let (source, destination) = (self.source_end(), self.destination_end());
        let durable = |disk: &Disk| known(disk.certain().unwrap_or(0));
        let (at_source, at_destination) = (durable(&self.source.disk), durable(&self.destination.disk));
        let moved = at_source.runs || at_source.ended == Some(Ended::Moved);
        let never = at_destination.never_ran || at_destination.ended == Some(Ended::Stayed);
        if (source == Some(Ended::Moved) && destination == Some(Ended::Stayed)) || (moved && never) {
            return Some("both sides believe that the guest is the other's");
        }
        if source == Some(Ended::Stayed) && destination == Some(Ended::Moved) {
            return Some("both sides believe that the guest is theirs");
        }
        None
    }

    /// Both sides know, and know the same.
    pub fn is_decided(&self) -> bool {
        let source = self.source_end();
        let agreed = source.is_some() && (self.forgotten || source == self.destination_end());
        agreed && self.source.is_idle() && (self.forgotten || self.destination.is_idle())
    }

    fn source_end(&self) -> Option<Ended> {
        self.source.machine.and_then(|m| m.ended())
    }

    fn destination_end(&self) -> Option<Ended> {
        self.destination.machine.and_then(|m| m.ended())
    }

    /// Everything that may happen now.
    pub fn successors(&self, mutant: Mutant, out: &mut Successors) {
        self.source_effect(mutant, out);
        self.destination_effect(mutant, out);
        if self.source.is_idle() {
            self.source_inputs(mutant, out);
        }
        if self.destination.is_idle() {
            self.destination_inputs(mutant, out);
        }
        self.crashes(out);
        self.restarts(mutant, out);
    }

    fn source_effect(&self, mutant: Mutant, out: &mut Successors) {
        let mut after = *self;
        let Some(effect) = after.source.pop() else { return };
        match effect {
            SourceEffect::Write(mark) => {
                for (disk, written, kind, how) in self.source.disk.write(bit(mark)) {
                    let mut after = after;
                    after.source.disk = disk;
                    match written {
                        Some(written) => after.tell_source(SourceInput::Written(written), mutant),
                        None => after.source.crash(),
                    }
                    out.add(kind, after, || format!("source: record {mark:?} {how}"));
                }
                return;
            }
            SourceEffect::Ask(ask) => after.asked |= 1 << ask as u8,
            SourceEffect::Resume if after.source.qemu != Qemu::Gone => after.source.run(),
            SourceEffect::Resume => {}
            SourceEffect::Release => after.source.qemu = Qemu::Gone,
        }
        out.add(Kind::Step, after, || format!("source: {effect:?}"));
    }

    fn destination_effect(&self, mutant: Mutant, out: &mut Successors) {
        let mut after = *self;
        let Some(effect) = after.destination.pop() else { return };
        match effect {
            DestinationEffect::Write(mark) => {
                let early = mutant == Mutant::StartsBeforeRecord && mark == Mark::Starting;
                if early && self.destination.qemu == Qemu::Paused {
                    after.destination.run();
                }
                for (disk, written, kind, how) in self.destination.disk.write(bit(mark)) {
                    let mut after = after;
                    after.destination.disk = disk;
                    match written {
                        Some(written) => after.tell_destination(DestinationInput::Written(written), mutant),
                        None => after.destination.crash(),
                    }
                    out.add(kind, after, || format!("destination: record {mark:?} {how}"));
                }
                return;
            }
            DestinationEffect::Start => return after.start(mutant, out),
            // It changes nothing in any state of the source, so it is not kept.
            DestinationEffect::Say(Fate::Open) => {}
            DestinationEffect::Say(fate) => after.said |= 1 << fate_number(fate),
            DestinationEffect::Undo => after.destination.qemu = Qemu::Gone,
        }
        out.add(Kind::Step, after, || format!("destination: {effect:?}"));
    }

    /// Every way in which a guest's start can end.
    fn start(self, mutant: Mutant, out: &mut Successors) {
        let mut end = |kind, qemu, ran: Option<Ran>, how: &str| {
            let mut after = self;
            match qemu {
                Qemu::Running => after.destination.run(),
                Qemu::Gone if ran == Some(Ran::Perhaps) => {
                    after.destination.run();
                    after.destination.qemu = Qemu::Gone;
                }
                _ => {}
            }
            match ran {
                Some(ran) => after.tell_destination(DestinationInput::Ran(ran), mutant),
                None => after.destination.crash(),
            }
            out.add(kind, after, || format!("destination: starts the guest: {how}"));
        };
        match self.destination.qemu {
            Qemu::Gone | Qemu::Empty => end(Kind::Step, Qemu::Gone, Some(Ran::No), "its QEMU has gone"),
            Qemu::Paused => {
                end(Kind::Step, Qemu::Running, Some(Ran::Yes), "it runs");
                end(Kind::Fault, Qemu::Paused, Some(Ran::No), "QEMU refuses");
                end(Kind::Fault, Qemu::Running, Some(Ran::Perhaps), "it runs, and no answer comes");
                end(Kind::Fault, Qemu::Gone, Some(Ran::Perhaps), "it ran, and QEMU dies");
                end(Kind::Fault, Qemu::Running, None, "it runs, and the agent crashes");
            }
            Qemu::Running => end(Kind::Step, Qemu::Running, Some(Ran::Yes), "it runs already"),
        }
    }

    fn source_inputs(&self, mutant: Mutant, out: &mut Successors) {
        let Some(machine) = self.source.machine else { return };
        let mut tell = |kind, input| {
            let mut after = *self;
            after.tell_source(input, mutant);
            if after != *self {
                out.add(kind, after, || format!("source: {input:?}"));
            }
        };
        if machine.state() == SourceState::Ours {
            // At the latest by a deadline; or somebody cancels it, or something fails.
            tell(Kind::Step, SourceInput::Fail);
            if self.said & (1 << fate_number(Fate::Loaded)) != 0 {
                tell(Kind::Step, SourceInput::Complete);
            }
        }
        for fate in FATES {
            if self.said & (1 << fate_number(fate)) != 0 {
                tell(Kind::Step, SourceInput::Heard(fate));
            }
        }
        if machine.ended().is_none() && machine.state() != SourceState::Ours {
            tell(Kind::Step, SourceInput::Again);
        }
        if let Some(ended) = machine.ended()
            && self.source.disk.whole & end_bit(ended) == 0
        {
            for (disk, written, kind, how) in self.source.disk.end(ended) {
                let mut after = *self;
                after.source.disk = disk;
                if written.is_none() {
                    after.source.crash();
                }
                out.add(kind, after, || format!("source: the end {how}"));
            }
        }
        if self.source.qemu == Qemu::Gone && machine.ended() == Some(Ended::Stayed) {
            let mut after = *self;
            after.source.run();
            out.add(Kind::Fault, after, || {
                "source: an operator boots the VM, which is said to be here".into()
            });
        }
    }

    fn destination_inputs(&self, mutant: Mutant, out: &mut Successors) {
        let Some(machine) = self.destination.machine else { return };
        let mut tell = |kind, input| {
            let mut after = *self;
            after.tell_destination(input, mutant);
            if after != *self {
                out.add(kind, after, || format!("destination: {input:?}"));
            }
        };
        if let DestinationState::Waiting { loaded } = machine.state() {
            if !loaded && self.destination.qemu == Qemu::Paused {
                tell(Kind::Step, DestinationInput::Loaded);
            }
            // Nobody will say more, or nothing can be done: the timer must not help otherwise.
            let alone = self.source_end() == Some(Ended::Stayed) || self.destination.qemu == Qemu::Gone;
            tell(if alone { Kind::Step } else { Kind::Fault }, DestinationInput::Trouble);
        }
        for ask in ASKS {
            if self.asked & (1 << ask as u8) != 0 {
                tell(Kind::Step, DestinationInput::Asked(ask));
            }
        }
        tell(Kind::Step, DestinationInput::Again);
        self.destination_ends(machine, mutant, out);
        if self.destination.qemu == Qemu::Gone && machine.ended() == Some(Ended::Moved) {
            let mut after = *self;
            after.destination.run();
            let name = || "destination: an operator boots the VM, which is said to be here".into();
            out.add(Kind::Fault, after, name);
        }
    }

    /// The journal's end, and the end of the journal.
    fn destination_ends(&self, machine: Destination, mutant: Mutant, out: &mut Successors) {
        let Some(ended) = machine.ended() else { return };
        let disk = self.destination.disk;
        if disk.whole & end_bit(ended) == 0 {
            for (disk, written, kind, how) in disk.end(ended) {
                let mut after = *self;
                after.destination.disk = disk;
                if written.is_none() {
                    after.destination.crash();
                }
                out.add(kind, after, || format!("destination: the end {how}"));
            }
        } else if disk.whole & CONFIRMED != 0 || mutant == Mutant::ForgetsUnconfirmed {
            let mut after = *self;
            after.forgotten = true;
            after.destination.crash();
            after.destination.disk.durable(0);
            out.add(Kind::Fault, after, || "destination: forgets it".into());
        }
    }

    fn crashes(&self, out: &mut Successors) {
        let mut add = |after: Self, name: &'static str| out.add(Kind::Fault, after, || name.into());
        if self.source.machine.is_some() {
            let mut after = *self;
            after.source.crash();
            add(after, "source: the agent crashes");
        }
        if self.destination.machine.is_some() {
            let mut after = *self;
            after.destination.crash();
            add(after, "destination: the agent crashes");
        }
        if self.source.qemu != Qemu::Gone {
            let mut after = *self;
            after.source.qemu = Qemu::Gone;
            add(after, "source: QEMU dies");
        }
        if self.destination.qemu != Qemu::Gone {
            let mut after = *self;
            after.destination.qemu = Qemu::Gone;
            add(after, "destination: QEMU dies");
        }
        // What is under way may be lost for good: a decision must not need it.
        if self.asked != 0 || self.said != 0 {
            add(Self { asked: 0, said: 0, ..*self }, "every message is lost");
        }
        for source in self.source.lose_power() {
            add(Self { source, ..*self }, "source: the host loses power");
        }
        for destination in self.destination.lose_power() {
            add(Self { destination, ..*self }, "destination: the host loses power");
        }
    }

    /// An agent reads what is there, which need not be on the disk. And the RAM arrives.
    fn restarts(&self, mutant: Mutant, out: &mut Successors) {
        if self.source.machine.is_none() {
            let mut after = *self;
            after.source.disk.whole = after.source.disk.cached;
            let (machine, effects) = Source::restarted(known(after.source.disk.cached));
            after.source.machine = Some(machine);
            after.queue_source(effects, mutant);
            if mutant == Mutant::BelievesWhatItReads {
                after.believe_source(mutant);
            }
            out.add(Kind::Step, after, || "source: the agent starts again".into());
        }
        if self.destination.machine.is_none() && !self.forgotten {
            let mut after = *self;
            after.destination.disk.whole = after.destination.disk.cached;
            let (machine, effects) = Destination::restarted(known(after.destination.disk.cached));
            after.destination.machine = Some(machine);
            after.queue_destination(effects, mutant);
            if mutant == Mutant::BelievesWhatItReads {
                after.believe_destination(mutant);
            }
            out.add(Kind::Step, after, || "destination: the agent starts again".into());
        }
        if self.destination.qemu == Qemu::Empty && self.source.qemu == Qemu::Paused {
            let mut after = *self;
            after.destination.qemu = Qemu::Paused;
            out.add(Kind::Step, after, || "the rest of the guest crosses".into());
        }
    }

    /// A restart that takes its first write for done.
    fn believe_source(&mut self, mutant: Mutant) {
        if let Some(SourceEffect::Write(_)) = self.source.queue[0] {
            self.source.pop();
            self.tell_source(SourceInput::Written(Written::Durable), mutant);
        }
    }

    fn believe_destination(&mut self, mutant: Mutant) {
        if let Some(DestinationEffect::Write(_)) = self.destination.queue[0] {
            self.destination.pop();
            self.tell_destination(DestinationInput::Written(Written::Durable), mutant);
        }
    }

    fn tell_source(&mut self, input: SourceInput, mutant: Mutant) {
        let input = mutant.source_input(input);
        let Some(machine) = &mut self.source.machine else { return };
        let effects = machine.step(input).unwrap_or_else(|e| panic!("{e}; {self:?}"));
        self.queue_source(effects, mutant);
    }

    fn tell_destination(&mut self, input: DestinationInput, mutant: Mutant) {
        let input = mutant.destination_input(input);
        let Some(machine) = &mut self.destination.machine else { return };
        let effects = machine.step(input).unwrap_or_else(|e| panic!("{e}; {self:?}"));
        self.queue_destination(effects, mutant);
    }

    fn queue_source(&mut self, effects: Vec<SourceEffect>, mutant: Mutant) {
        let state = self.source.machine.map(|m| m.state());
        self.source.push(mutant.source_effects(state, effects));
    }

    fn queue_destination(&mut self, effects: Vec<DestinationEffect>, mutant: Mutant) {
        self.destination.push(mutant.destination_effects(effects));
    }
}

fn fate_number(fate: Fate) -> usize {
    FATES.iter().position(|f| *f == fate).expect("all of them")
}
