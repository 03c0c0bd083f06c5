//! Every world that can be reached, breadth first, so that what is wrong is shown on the shortest
//! way that leads there.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::mutants::Mutant;
use super::world::{Kind, Scope, Successors, World};

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

struct Graph {
    numbers: HashMap<World, u32, BuildHasherDefault<Fast>>,
    worlds: Vec<World>,
    /// From where each world was first reached.
    parents: Vec<u32>,
    /// Of the fair continuation, both ends.
    steps: Vec<(u32, u32)>,
    transitions: usize,
}

/// Explores what `mutant` can do, until something is wrong.
pub fn explore(mutant: Mutant, scope: Scope) -> Explored {
    let mut graph = Graph {
        numbers: HashMap::default(),
        worlds: Vec::new(),
        parents: Vec::new(),
        steps: Vec::new(),
        transitions: 0,
    };
    let mut wrong = graph.add(World::begin(mutant, scope), 0).1;
    let mut at = 0;
    while at < graph.worlds.len() && wrong.is_none() {
        wrong = graph.expand(at as u32, mutant);
        at += 1;
    }
    let decided = graph.worlds.iter().filter(|w| w.is_decided()).count();
    let wrong = match wrong {
        Some((number, what)) => Some(graph.story(number, what, mutant)),
        None => graph.stuck().map(|number| graph.story(number, "it can never be decided", mutant)),
    };
    Explored { states: graph.worlds.len(), transitions: graph.transitions, decided, wrong }
}

type Wrong = Option<(u32, &'static str)>;

impl Graph {
    fn add(&mut self, world: World, parent: u32) -> (u32, Wrong) {
        let number = self.worlds.len() as u32;
        let known = *self.numbers.entry(world).or_insert(number);
        if known != number {
            return (known, None);
        }
        self.worlds.push(world);
        self.parents.push(parent);
        (number, world.wrong().map(|what| (number, what)))
    }

    fn expand(&mut self, at: u32, mutant: Mutant) -> Wrong {
        let mut successors = Successors::new(false);
        self.worlds[at as usize].successors(mutant, &mut successors);
        self.transitions += successors.next.len();
        for (kind, world) in successors.next {
            let (number, wrong) = self.add(world, at);
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
        let mut good: Vec<bool> = self.worlds.iter().map(World::is_decided).collect();
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
            self.worlds[pair[0] as usize].successors(mutant, &mut successors);
            let to = self.worlds[pair[1] as usize];
            let at = successors.next.iter().position(|(_, w)| *w == to);
            let names = successors.names.unwrap_or_default();
            let name = at.and_then(|at| names.get(at)).map_or("?", String::as_str);
            story += &format!("  {name}\n");
        }
        story + &format!("  {:?}", self.worlds[number as usize])
    }
}
