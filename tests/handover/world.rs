//! Both machines in a world where everything goes wrong: messages are lost, come twice and in any
//! order, disks fail, agents crash between any two steps, hosts lose power, QEMUs die.

use vmferry_handover::handover::Fate;
use vmferry_handover::handover::{Ask, Destination, Ended, Side as Whose, Source, SourceState};
use vmferry_handover::handover_run::{DestinationRun, Run, SourceRun};

use super::disk::{CONFIRMED, Disk, HANDED_OVER, MOVED, RUNS, Records, STAYED, end_bit, known};
use super::model;
use super::mutants::{Mutant, Mutated};
use super::witness::Witness;

const FATES: [Fate; 3] = [Fate::Runs, Fate::NeverRan, Fate::Loaded];
const ASKS: [Ask; 4] = [Ask::Start, Ask::Abort, Ask::Settle, Ask::Confirmed];

/// What goes wrong besides messages, agents, QEMUs and hosts: the product of both is too large to be explored at
/// every change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Nothing: for what is found by exploring everything.
    Nothing,
    /// Disks fail in every way, and operators decide only over a host that is lost for good, and rightly.
    Disks,
    /// Operators decide at any moment, rightly or not, and the other host may come back. Disks lose what was not
    /// synced, and do not fail.
    Decisions,
    /// Both sides have agreed on a witness. Either host may be lost for good; operators decide only what the witness
    /// cannot, and rightly. Disks lose what was not synced, and do not fail.
    Witness,
    /// The same, and what is said to the witness may come to it at any later moment, or again.
    LateWitness,
    /// As `Witness`, and that forgets.
    ForgetfulWitness,
    /// As `Witness`, and disks fail in every way.
    WitnessAndDisks,
    /// As `Decisions`, with a witness, and that forgets.
    WitnessAndDecisions,
}

impl Scope {
    fn has_witness(self) -> bool {
        !matches!(self, Self::Nothing | Self::Disks | Self::Decisions)
    }

    pub fn forgets(self) -> bool {
        matches!(self, Self::ForgetfulWitness | Self::WitnessAndDecisions)
    }

    /// Else what is said to the witness comes to it before the answer is given up, or never.
    pub fn is_late(self) -> bool {
        self == Self::LateWitness
    }

    pub fn disks_fail(self) -> bool {
        matches!(self, Self::Disks | Self::WitnessAndDisks)
    }

    /// Operators decide at any moment, rightly or not.
    pub fn is_decided_wrongly(self) -> bool {
        matches!(self, Self::Decisions | Self::WitnessAndDecisions)
    }

    fn loses_hosts(self) -> bool {
        !matches!(self, Self::Nothing | Self::Decisions | Self::WitnessAndDecisions)
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
    /// The same, after QEMU has refused to run it.
    Refused,
    /// Running.
    Running,
    /// No process.
    Gone,
}

/// One side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Side<R> {
    /// `None`: the agent is down.
    pub run: Option<R>,
    pub disk: Disk,
    pub qemu: Qemu,
    /// The guest has run here since the source's was paused.
    pub ran: bool,
}

impl<R: Copy> Side<R> {
    fn new(run: R, qemu: Qemu) -> Self {
        Self { run: Some(run), disk: Disk::EMPTY, qemu, ran: false }
    }

    pub fn crash(&mut self) {
        self.run = None;
    }

    /// The host is lost for good, and its disk with it.
    fn lose(&mut self) {
        self.crash();
        self.qemu = Qemu::Gone;
        self.disk.durable(0);
    }

    pub fn start_guest(&mut self) {
        self.qemu = Qemu::Running;
        self.ran = true;
    }

    fn stands_still(&self) -> bool {
        matches!(self.qemu, Qemu::Empty | Qemu::Paused)
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

/// Messages, as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Messages(u8);

impl Messages {
    pub fn ask(&mut self, ask: Ask) {
        self.0 |= 1 << ask as u8;
    }

    pub fn asked(self) -> impl Iterator<Item = Ask> {
        ASKS.into_iter().filter(move |ask| self.0 >> *ask as u8 & 1 != 0)
    }

    pub fn say(&mut self, fate: Fate) {
        // `Open` changes nothing in any state of the source, so it is not kept.
        let number = FATES.iter().position(|f| *f == fate);
        self.0 |= number.map_or(0, |number| 1 << number);
    }

    pub fn said(self) -> impl Iterator<Item = Fate> {
        (0..FATES.len()).filter(move |number| self.0 >> number & 1 != 0).map(|number| FATES[number])
    }
}

/// A host that does not come back, with its disk. An operator sees to what it leaves open, and knows whether
/// the guest has run there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lost {
    None,
    Source,
    Destination,
}

/// What operators have declared, at any moment and with the other host dead, out of reach or about to come back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Declared {
    /// "It runs here, and never at the other host", and that was not so: the guest may run twice, as they were told.
    pub falsely_here: bool,
    /// "It runs, or is to be started, at the other host": if that is not so the guest is lost, as they were told, and
    /// never runs twice.
    pub here_by_source: bool,
    pub here_by_destination: bool,
    pub there_by_source: bool,
    pub there_by_destination: bool,
}

pub type AtSource = Side<SourceRun<Mutated<Source>>>;
pub type AtDestination = Side<DestinationRun<Mutated<Destination>>>;
/// All that is on neither side.
pub type Between = (Scope, Messages, Messages, bool, Lost, Declared, Witness, bool);

/// Everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub scope: Scope,
    pub source: AtSource,
    pub destination: AtDestination,
    /// Every message ever sent may come now, again, or never.
    pub asked: Messages,
    pub said: Messages,
    /// The destination has thrown its journal away, or its state folder was lost.
    pub forgotten: bool,
    pub lost: Lost,
    pub declared: Declared,
    pub witness: Witness,
    /// A machine was told what it has no step for.
    pub illegal: bool,
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

    pub fn add(&mut self, kind: Kind, world: World, name: impl FnOnce() -> String) {
        self.next.push((kind, world));
        if let Some(names) = &mut self.names {
            names.push(name());
        }
    }
}

impl World {
    /// The whole guest is paused at the source and on its last way to the destination.
    pub fn begin(mutant: Mutant, scope: Scope) -> Self {
        let agreed = scope.has_witness();
        let (mut source, mut destination) = (Source::new(), Destination::new());
        if agreed {
            (source, destination) = (source.with_witness(), destination.with_witness());
        }
        Self {
            scope,
            source: Side::new(Run::new(Mutated::new(source, mutant)), Qemu::Paused),
            destination: Side::new(Run::new(Mutated::new(destination, mutant)), Qemu::Empty),
            asked: Messages::default(),
            said: Messages::default(),
            forgotten: false,
            lost: Lost::None,
            declared: Declared::default(),
            witness: if agreed { Witness::OPEN } else { Witness::NONE },
            illegal: false,
        }
    }

    pub fn parts(self) -> (AtSource, AtDestination, Between) {
        let Self { scope, source, destination, asked, said, forgotten, lost, declared, witness, illegal } =
            self;
        (source, destination, (scope, asked, said, forgotten, lost, declared, witness, illegal))
    }

    pub fn of_parts(source: AtSource, destination: AtDestination, between: Between) -> Self {
        let (scope, asked, said, forgotten, lost, declared, witness, illegal) = between;
        Self { scope, source, destination, asked, said, forgotten, lost, declared, witness, illegal }
    }

    /// What must never be, in words.
    pub fn wrong(&self) -> Option<&'static str> {
        if self.declared.falsely_here {
            return None;
        }
        if self.source.ran && self.destination.ran {
            return Some("the guest ran at the source after its pause, and at the destination");
        }
        let source = self.source_end().filter(|_| self.source_is_idle());
        let destination = self.destination_end().filter(|_| self.destination_is_idle());
        let durable = |disk: &Disk, at_source| known(disk.certain().unwrap_or(0), at_source);
        let (at_source, at_destination) =
            (durable(&self.source.disk, true), durable(&self.destination.disk, false));
        let moved = at_source.runs || at_source.ended == Some(Ended::Moved);
        let never = at_destination.never_ran || at_destination.ended == Some(Ended::Stayed);
        let there = self.declared.there_by_source || self.declared.there_by_destination;
        if !there
            && ((source == Some(Ended::Moved) && destination == Some(Ended::Stayed)) || (moved && never))
        {
            return Some("both sides believe that the guest is the other's");
        }
        if source == Some(Ended::Stayed) && destination == Some(Ended::Moved) {
            return Some("both sides believe that the guest is theirs");
        }
        self.not_done()
    }

    /// What is to be done at an end, and was not.
    fn not_done(&self) -> Option<&'static str> {
        if self.illegal {
            return Some("a machine has no step for what it was told");
        }
        let source = self.source.run.filter(Run::is_idle).map(|run| run.machine().machine.state());
        match source {
            Some(SourceState::Back { .. }) if self.source.stands_still() => {
                return Some("the guest stands still at the source, whose it is");
            }
            Some(SourceState::Moved) if self.source.stands_still() && !self.declared.there_by_source => {
                return Some("the guest has moved, and could still be continued at the source");
            }
            _ => {}
        }
        let destination =
            self.destination.run.filter(Run::is_idle).and_then(|run| run.machine().machine.ended());
        if self.said.said().any(|fate| fate == Fate::NeverRan) && self.destination.stands_still() {
            return Some(
                "the guest never ran at the destination, as that said, and could still be continued there",
            );
        }
        match destination {
            Some(Ended::Moved) if self.destination.stands_still() => {
                Some("the guest stands still at the destination, whose it is")
            }
            Some(Ended::Stayed) if self.destination.stands_still() => {
                Some("the guest never ran at the destination, and could still be continued there")
            }
            _ => None,
        }
    }

    /// Both sides know, and know the same.
    pub fn is_decided(&self) -> bool {
        if self.declared.falsely_here {
            return true;
        }
        match self.lost {
            Lost::None => {}
            Lost::Source => {
                return self.forgotten || self.destination_end().is_some() && self.destination_is_idle();
            }
            Lost::Destination => return self.source_end().is_some() && self.source_is_idle(),
        }
        let source = self.source_end();
        let there = self.declared.there_by_source || self.declared.there_by_destination;
        let destination = self.destination_end();
        let agreed =
            source.is_some() && (self.forgotten || source == destination || there && destination.is_some());
        agreed && self.source_is_idle() && (self.forgotten || self.destination_is_idle())
    }

    pub fn source_end(&self) -> Option<Ended> {
        self.source.run.and_then(|run| run.machine().machine.ended())
    }

    fn destination_end(&self) -> Option<Ended> {
        self.destination.run.and_then(|run| run.machine().machine.ended())
    }

    fn source_is_idle(&self) -> bool {
        self.source.run.is_some_and(|run| run.is_idle())
    }

    fn destination_is_idle(&self) -> bool {
        self.destination.run.is_some_and(|run| run.is_idle())
    }

    /// An operator at the source decides. `Here` is true where the guest has not run at the other host, can no longer,
    /// and is not said to be that host's.
    pub fn source_declares(&mut self, side: Whose) {
        let other = &self.destination;
        let ended = self.destination_end().filter(|_| self.destination_is_idle());
        let is_claimed = ended == Some(Ended::Moved) || other.disk.may_have(RUNS | MOVED);
        let is_true = !other.ran && other.qemu == Qemu::Gone && !is_claimed;
        match side {
            Whose::Here => self.declared.falsely_here |= !is_true || self.declared.here_by_destination,
            Whose::There => self.declared.there_by_source = true,
        }
        self.declared.here_by_source |= side == Whose::Here;
    }

    /// The same at the destination.
    pub fn destination_declares(&mut self, side: Whose) {
        let other = &self.source;
        let ended = self.source_end().filter(|_| self.source_is_idle());
        let is_claimed = ended == Some(Ended::Stayed) || other.disk.may_have(STAYED);
        let is_true = !other.ran && other.qemu == Qemu::Gone && !is_claimed;
        match side {
            Whose::Here => self.declared.falsely_here |= !is_true || self.declared.here_by_source,
            // Said where an earlier life may have run it.
            Whose::There => {
                self.declared.falsely_here |= self.destination.ran;
                self.declared.there_by_destination = true;
            }
        }
        self.declared.here_by_destination |= side == Whose::Here;
    }

    /// Everything that may happen now.
    pub fn successors(&self, mutant: Mutant, out: &mut Successors) {
        if self.declared.falsely_here {
            return;
        }
        model::step_source(self, mutant, out);
        model::step_destination(self, mutant, out);
        if self.source_is_idle() {
            self.source_ends(out);
        }
        if self.destination_is_idle() {
            self.destination_ends(mutant, out);
        }
        self.crashes(mutant, out);
        self.restarts(mutant, out);
        self.witness_changes(out);
    }

    /// The journal's end, and what an operator does then.
    fn source_ends(&self, out: &mut Successors) {
        let Some(ended) = self.source_end() else {
            return;
        };
        if self.source.disk.whole & end_bit(ended) == 0 {
            for (disk, written, kind, how) in self.source.disk.end(ended, self.scope) {
                let mut after = *self;
                after.source.disk = disk;
                if written.is_none() {
                    after.source.crash();
                }
                out.add(kind, after, || format!("source: the end {how}"));
            }
        }
        // Nor was it written in doubt.
        let never_offered = !self.source.disk.may_have(HANDED_OVER);
        if self.witness.word.is_some() && ended == Ended::Stayed && never_offered {
            let mut after = *self;
            after.witness.word = None;
            out.add(Kind::Fault, after, || "source: removes the witness's word".into());
        }
        if self.source.qemu == Qemu::Gone && ended == Ended::Stayed {
            let mut after = *self;
            after.source.start_guest();
            out.add(Kind::Fault, after, || {
                "source: an operator boots the VM, which is said to be here".into()
            });
        }
    }

    /// The same, and the end of the journal.
    fn destination_ends(&self, mutant: Mutant, out: &mut Successors) {
        let Some(ended) = self.destination_end() else {
            return;
        };
        let disk = self.destination.disk;
        if disk.whole & end_bit(ended) == 0 {
            for (disk, written, kind, how) in disk.end(ended, self.scope) {
                let mut after = *self;
                after.destination.disk = disk;
                if written.is_none() {
                    after.destination.crash();
                }
                out.add(kind, after, || format!("destination: the end {how}"));
            }
        } else if disk.whole & CONFIRMED != 0 || mutant == Mutant::ForgetsUnconfirmed {
            if self.witness.word.is_some() && disk.certain().is_some_and(|records| records & CONFIRMED != 0) {
                let mut after = *self;
                after.witness.word = None;
                out.add(Kind::Fault, after, || "destination: removes the witness's word".into());
            }
            let mut after = *self;
            after.forgotten = true;
            after.destination.crash();
            after.destination.disk.durable(0);
            out.add(Kind::Fault, after, || "destination: forgets it".into());
        }
        if self.destination.qemu == Qemu::Gone && ended == Ended::Moved {
            let mut after = *self;
            after.destination.start_guest();
            let name = || "destination: an operator boots the VM, which is said to be here".into();
            out.add(Kind::Fault, after, name);
        }
    }

    fn crashes(&self, mutant: Mutant, out: &mut Successors) {
        let mut add = |after: Self, name: &'static str| out.add(Kind::Fault, after, || name.into());
        // Between two steps that one notices nothing.
        let notices = mutant != Mutant::RemembersOverACrash;
        if self.source.run.is_some() && notices {
            let mut after = *self;
            after.source.crash();
            add(after, "source: the agent crashes");
        }
        if self.destination.run.is_some() && notices {
            let mut after = *self;
            after.destination.crash();
            add(after, "destination: the agent crashes");
        }
        let may_lose = self.lost == Lost::None && self.scope.loses_hosts();
        if may_lose && self.source.run.is_some() && self.source_end().is_none() {
            let mut after = Self { lost: Lost::Destination, asked: Messages::default(), ..*self };
            after.destination.lose();
            add(after, "the destination's host is lost for good");
        }
        if may_lose && self.destination.run.is_some() && self.destination_end().is_none() {
            let mut after = Self { lost: Lost::Source, said: Messages::default(), ..*self };
            after.source.lose();
            add(after, "the source's host is lost for good");
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
        let none = Messages::default();
        if !self.scope.is_decided_wrongly() && (self.asked != none || self.said != none) {
            add(Self { asked: none, said: none, ..*self }, "every message is lost");
        }
        // After a decision there, which nothing else tells of. Its QEMU may live.
        if self.scope.is_decided_wrongly() && self.declared.here_by_destination && !self.forgotten {
            let mut after = Self { forgotten: true, ..*self };
            after.destination.crash();
            after.destination.disk.durable(0);
            add(after, "the destination's state folder is lost");
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
        if self.source.run.is_none() && self.lost != Lost::Source {
            let mut after = *self;
            after.source.disk.whole = after.source.disk.cached;
            let mut known = known(after.source.disk.cached, true);
            if mutant == Mutant::ForgetsADecision {
                known.forced = None;
            }
            let (mut machine, effects) = Source::restarted(known);
            if self.witness.agreed && mutant != Mutant::ForgetsTheWitness {
                machine = machine.with_witness();
            }
            let restarted = (machine, effects);
            after.source.run = Some(Run::restarted(Mutated::source(restarted, mutant)));
            out.add(Kind::Step, after, || "source: the agent starts again".into());
        }
        if self.destination.run.is_none() && !self.forgotten && self.lost != Lost::Destination {
            let mut after = *self;
            after.destination.disk.whole = after.destination.disk.cached;
            let (mut machine, effects) = Destination::restarted(known(after.destination.disk.cached, false));
            if self.witness.agreed && mutant != Mutant::ForgetsTheWitness {
                machine = machine.with_witness();
            }
            let restarted = (machine, effects);
            after.destination.run = Some(Run::restarted(Mutated::destination(restarted, mutant)));
            out.add(Kind::Step, after, || "destination: the agent starts again".into());
        }
        if self.destination.qemu == Qemu::Empty && self.source.qemu == Qemu::Paused {
            let mut after = *self;
            after.destination.qemu = Qemu::Paused;
            out.add(Kind::Step, after, || "the rest of the guest crosses".into());
        }
    }
}
