//! Every world that can be reached, breadth first, so that what is wrong is shown on the shortest
//! way that leads there.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use vmferry_handover::handover::{DestinationState, Word};

use super::mutants::Mutant;
use super::world::{AtDestination, AtSource, Between, Kind, Lost, Scope, Successors, World};

/// What an exploration found.
#[derive(Debug)]
pub struct Explored {
    pub states: usize,
    pub transitions: usize,
    pub decided: usize,
    /// What is wrong, and how it came about.
    pub wrong: Option<String>,
}

/// Multiplies and rotates: the keys are our own, and there are millions.
#[derive(Default)]
pub struct Fast(u64);

impl Hasher for Fast {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(u64::from(n));
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    fn write_u128(&mut self, n: u128) {
        self.write_u64(n as u64);
        self.write_u64((n >> 64) as u64);
    }

    fn write_isize(&mut self, n: isize) {
        self.write_u64(n as u64);
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

/// Values that are often the same, each kept once.
struct Kept<T> {
    numbers: HashMap<T, u32, BuildHasherDefault<Fast>>,
    values: Vec<T>,
}

impl<T: Copy + Eq + Hash> Kept<T> {
    fn new() -> Self {
        Self { numbers: HashMap::default(), values: Vec::new() }
    }

    /// The value's number, and whether it is a new one.
    fn add(&mut self, value: T) -> (u32, bool) {
        let number = self.values.len() as u32;
        let known = *self.numbers.entry(value).or_insert(number);
        if known == number {
            self.values.push(value);
        }
        (known, known == number)
    }
}

/// The worlds that were reached. Their sides are kept apart: there are thousands of them, and millions of pairs.
struct Worlds {
    sources: Kept<AtSource>,
    destinations: Kept<AtDestination>,
    rests: Kept<Between>,
    all: Kept<[u32; 3]>,
}

impl Worlds {
    fn new() -> Self {
        Self { sources: Kept::new(), destinations: Kept::new(), rests: Kept::new(), all: Kept::new() }
    }

    fn add(&mut self, world: World) -> (u32, bool) {
        let (source, destination, rest) = world.parts();
        let [source, destination, rest] =
            [self.sources.add(source).0, self.destinations.add(destination).0, self.rests.add(rest).0];
        self.all.add([source, destination, rest])
    }

    fn len(&self) -> usize {
        self.all.values.len()
    }

    fn get(&self, number: usize) -> World {
        let [source, destination, rest] = self.all.values[number].map(|part| part as usize);
        let (source, destination) = (self.sources.values[source], self.destinations.values[destination]);
        World::of_parts(source, destination, self.rests.values[rest])
    }
}

struct Graph {
    worlds: Worlds,
    /// From where each world was first reached.
    parents: Vec<u32>,
    /// Of the fair continuation, both ends.
    steps: Vec<(u32, u32)>,
    transitions: usize,
    rescued: Rescued,
}

/// What a witness is there for has come about.
#[derive(Debug, Default)]
struct Rescued {
    /// The source has its guest back from a destination that is lost.
    taken_back: bool,
    /// The same from one that had taken it, and had given it up before.
    yielded: bool,
    /// The destination has taken a guest that it was not told to start, and whose source is lost.
    started: bool,
}

/// Explores what `mutant` can do, until something is wrong.
pub fn explore(mutant: Mutant, scope: Scope) -> Explored {
    let mut graph = Graph {
        worlds: Worlds::new(),
        parents: Vec::new(),
        steps: Vec::new(),
        transitions: 0,
        rescued: Rescued::default(),
    };
    let mut wrong = graph.add(World::begin(mutant, scope), 0).1;
    let mut at = 0;
    while at < graph.worlds.len() && wrong.is_none() {
        wrong = graph.expand(at as u32, mutant);
        at += 1;
    }
    let decided = (0..graph.worlds.len()).filter(|n| graph.worlds.get(*n).is_decided()).count();
    let wrong = match wrong {
        Some((number, what)) => Some(graph.story(number, what, mutant)),
        None => match graph.stuck() {
            Some(number) => Some(graph.story(number, "it can never be decided", mutant)),
            None => graph.rescued.missed(scope),
        },
    };
    Explored { states: graph.worlds.len(), transitions: graph.transitions, decided, wrong }
}

impl Rescued {
    fn see(&mut self, before: &World, after: &World) {
        let is_sealed = |world: &World, word| world.witness.word == Some(word);
        let taken = is_sealed(after, Word::SealedBySource) && after.lost == Lost::Destination;
        self.taken_back |= taken && after.source.ran;
        self.yielded |= taken && is_sealed(before, Word::Yielded);
        let was_offered = is_sealed(before, Word::Offered) && is_sealed(after, Word::SealedByDestination);
        let machine = before.destination.run.map(|run| run.machine().machine.state());
        let by_itself = was_offered && machine == Some(DestinationState::Alone);
        self.started |= by_itself && before.lost == Lost::Source;
    }

    fn missed(&self, scope: Scope) -> Option<String> {
        let all = self.taken_back && self.yielded && self.started;
        (scope == Scope::Witness && !all).then(|| format!("the witness never helps: {self:?}"))
    }
}

type Wrong = Option<(u32, &'static str)>;

impl Graph {
    fn add(&mut self, world: World, parent: u32) -> (u32, Wrong) {
        let (number, is_new) = self.worlds.add(world);
        if !is_new {
            return (number, None);
        }
        self.parents.push(parent);
        (number, world.wrong().map(|what| (number, what)))
    }

    fn expand(&mut self, at: u32, mutant: Mutant) -> Wrong {
        let mut successors = Successors::new(false);
        let before = self.worlds.get(at as usize);
        before.successors(mutant, &mut successors);
        self.transitions += successors.next.len();
        for (kind, world) in successors.next {
            self.rescued.see(&before, &world);
            let takes_nothing = before.takes_back_nothing(&world);
            let (number, wrong) = self.add(world, at);
            let wrong = wrong.or(takes_nothing.map(|what| (number, what)));
            if wrong.is_some() {
                return wrong;
            }
            if kind == Kind::Step && number != at {
                self.steps.push((number, at));
            }
        }
        None
    }

    /// A world from which no fair continuation leads to a decision.
    fn stuck(&mut self) -> Option<u32> {
        self.steps.sort_unstable();
        let mut good: Vec<bool> = (0..self.worlds.len()).map(|n| self.worlds.get(n).is_decided()).collect();
        let mut open: Vec<u32> = (0..good.len() as u32).filter(|n| good[*n as usize]).collect();
        while let Some(to) = open.pop() {
            let from = self.steps.partition_point(|(t, _)| *t < to);
            for (_, before) in self.steps[from..].iter().take_while(|(t, _)| *t == to) {
                if !std::mem::replace(&mut good[*before as usize], true) {
                    open.push(*before);
                }
            }
        }
        good.iter().position(|g| !g).map(|n| n as u32)
    }

    fn story(&self, number: u32, what: &str, mutant: Mutant) -> String {
        let mut way = vec![number];
        while *way.last().unwrap_or(&0) != 0 {
            way.push(self.parents[way[way.len() - 1] as usize]);
        }
        way.reverse();
        let mut story = format!("{what}:\n");
        for pair in way.windows(2) {
            let mut successors = Successors::new(true);
            self.worlds.get(pair[0] as usize).successors(mutant, &mut successors);
            let to = self.worlds.get(pair[1] as usize);
            let at = successors.next.iter().position(|(_, w)| *w == to);
            let names = successors.names.unwrap_or_default();
            let name = at.and_then(|at| names.get(at)).map_or("?", String::as_str);
            story += &format!("  {name}\n");
        }
        story + &format!("  {:?}", self.worlds.get(number as usize))
    }
}
