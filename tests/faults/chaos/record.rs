//! What was measured at each fault, and the table of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use super::plan::{KINDS, PHASES};
use crate::faults::Fault;

/// What became of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// It is at the destination, and `vmferry migrate` said so and nothing else.
    Moved,
    /// It is at the destination; the command line was told something else first, or was gone.
    MovedAfterSettling,
    /// It runs where it was.
    RolledBack,
    /// It was ended by the fault itself, which killed the QEMU that it belonged to.
    GuestKilled,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Moved => "moved",
            Self::MovedAfterSettling => "moved after settling",
            Self::RolledBack => "rolled back",
            Self::GuestKilled => "guest killed by the fault",
        })
    }
}

/// One fault and what came of it.
#[derive(Debug, Clone)]
pub struct Record {
    pub fault: Fault,
    /// The phase in which it was to hit.
    pub planned: &'static str,
    /// The phase in which it hit.
    pub phase: String,
    pub ending: Ending,
    /// From the fault until nobody had anything open any more.
    pub settled: Duration,
    /// What is safe and yet not as promised: the run goes on, and fails at its end.
    pub complaint: Option<String>,
    /// The longest time since the migration began in which the guest wrote nothing, as seen from outside.
    pub silence: Option<Duration>,
}

/// The table, grouped by fault and phase, in Markdown.
pub fn table(records: &[Record]) -> String {
    let mut groups: BTreeMap<(usize, usize), Vec<&Record>> = BTreeMap::new();
    for record in records {
        let fault = KINDS.iter().position(|f| *f == record.fault).unwrap_or(usize::MAX);
        let phase = PHASES.iter().position(|p| *p == record.phase).unwrap_or(usize::MAX);
        groups.entry((fault, phase)).or_default().push(record);
    }
    let mut text = String::from(
        "| fault | phase | n | outcome | settled, median (max) | guest still, median (max) |\n|---|---|---:|---|---:|---:|\n",
    );
    let mut before = None;
    for group in groups.values() {
        let first = group[0];
        let name = if before == Some(first.fault) { String::new() } else { first.fault.to_string() };
        before = Some(first.fault);
        let settled = spread(group.iter().map(|r| r.settled));
        let silence = spread(group.iter().filter_map(|r| r.silence));
        let outcomes = outcomes(group);
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {outcomes} | {settled} | {silence} |",
            first.phase,
            group.len()
        );
    }
    text
}

/// How often each ending came.
pub fn outcomes(records: &[&Record]) -> String {
    let mut counts: BTreeMap<Ending, usize> = BTreeMap::new();
    records.iter().for_each(|r| *counts.entry(r.ending).or_default() += 1);
    let words: Vec<_> = counts.iter().map(|(ending, n)| format!("{n} {ending}")).collect();
    words.join(", ")
}

fn spread(times: impl Iterator<Item = Duration>) -> String {
    let mut all: Vec<f64> = times.map(|t| t.as_secs_f64()).collect();
    all.sort_by(f64::total_cmp);
    match all.last() {
        Some(max) => format!("{:.1} s ({max:.1})", all[all.len() / 2]),
        None => "–".to_owned(),
    }
}
