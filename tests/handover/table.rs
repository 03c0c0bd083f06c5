//! Every step of both machines, written out: a change of it must be meant.
//! `VMFERRY_BLESS=1 cargo test --test handover` writes the file anew.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use vmferry_handover::handover::Fate;
use vmferry_handover::handover::{
    Answer, Ask, Destination, DestinationInput, Ended, Known, Ran, Side, Source, SourceInput, Written,
};

const WRITTEN: [Written; 3] = [Written::Durable, Written::Failed, Written::InDoubt];
const ANSWERS: [Answer; 5] =
    [Answer::Done, Answer::TheOthers, Answer::NotOffered, Answer::Forgotten, Answer::Unknown];
const SIDES: [Side; 2] = [Side::Here, Side::There];

fn source_inputs() -> Vec<SourceInput> {
    let mut inputs = vec![SourceInput::Fail, SourceInput::Again, SourceInput::Unheard];
    inputs.extend([false, true].map(|witness| SourceInput::Complete { witness }));
    inputs.extend(ANSWERS.map(SourceInput::TakenBack));
    inputs.extend(WRITTEN.map(SourceInput::Written));
    inputs.extend([Fate::Runs, Fate::NeverRan, Fate::Loaded, Fate::Open].map(SourceInput::Heard));
    inputs.extend(SIDES.map(SourceInput::Forced));
    inputs
}

fn destination_inputs() -> Vec<DestinationInput> {
    let mut inputs = vec![
        DestinationInput::Loaded,
        DestinationInput::Trouble,
        DestinationInput::Again,
        DestinationInput::Alone,
    ];
    inputs.extend(ANSWERS.map(DestinationInput::Moved));
    let asks = [Ask::Start, Ask::Abort, Ask::Settle, Ask::Confirmed];
    inputs.extend(asks.map(DestinationInput::Asked));
    inputs.extend(WRITTEN.map(DestinationInput::Written));
    inputs.extend([Ran::Yes, Ran::No, Ran::Perhaps].map(DestinationInput::Ran));
    inputs.extend(SIDES.map(DestinationInput::Forced));
    inputs
}

/// All that a journal can say.
fn all_known() -> Vec<Known> {
    let mut all = Vec::new();
    for forced in [None, Some(Side::Here), Some(Side::There)] {
        for ended in [None, Some(Ended::Moved), Some(Ended::Stayed)] {
            for bits in 0..16 {
                let has = |bit| bits & bit != 0;
                let (handed_over, starting, runs, never_ran) = (has(1), has(2), has(4), has(8));
                all.push(Known { handed_over, starting, runs, never_ran, forced, ended });
            }
        }
    }
    all
}

/// From every state that can be reached, with every input.
fn steps<M, I, E>(begin: Vec<M>, inputs: &[I], step: impl Fn(&mut M, I) -> Option<Vec<E>>) -> Vec<String>
where
    M: Copy + Ord + Debug,
    I: Copy + Debug,
    E: Debug,
{
    let (mut open, mut known, mut lines) = (begin, BTreeSet::new(), Vec::new());
    while let Some(from) = open.pop() {
        if !known.insert(from) {
            continue;
        }
        for input in inputs {
            let mut machine = from;
            let Some(effects) = step(&mut machine, *input) else {
                continue;
            };
            if machine != from || !effects.is_empty() {
                lines.push(format!("{from:?} + {input:?} = {machine:?} {effects:?}"));
            }
            open.push(machine);
        }
    }
    lines.sort();
    lines
}

fn readable(line: &str) -> String {
    line.replace("Source { state: ", "")
        .replace("Destination { state: ", "")
        .replace(", witness: false }", "")
        .replace(", witness: true }", " (with a witness)")
}

/// The whole table.
pub fn table() -> String {
    let mut sources: Vec<Source> = all_known().into_iter().map(|k| Source::restarted(k).0).collect();
    sources.push(Source::new());
    sources.extend(sources.clone().into_iter().map(Source::with_witness));
    let mut destinations: Vec<Destination> =
        all_known().into_iter().map(|k| Destination::restarted(k).0).collect();
    destinations.push(Destination::new());
    destinations.extend(destinations.clone().into_iter().map(Destination::with_witness));
    let source = steps(sources, &source_inputs(), |m, i| m.step(i).ok());
    let destination = steps(destinations, &destination_inputs(), |m, i| m.step(i).ok());
    let list = |lines: Vec<String>| lines.iter().map(|l| readable(l) + "\n").collect::<String>();
    format!("source\n\n{}\ndestination\n\n{}", list(source), list(destination))
}

/// The table against the file that is checked in.
pub fn compare() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("table.txt");
    let now = table();
    if std::env::var_os("VMFERRY_BLESS").is_some() {
        std::fs::write(&path, &now).expect("a writable table");
    }
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let (now, before): (BTreeSet<&str>, BTreeSet<&str>) = (now.lines().collect(), before.lines().collect());
    let (new, gone): (Vec<_>, Vec<_>) =
        (now.difference(&before).collect(), before.difference(&now).collect());
    assert!(new.is_empty() && gone.is_empty(), "the table has changed; new: {new:#?}; gone: {gone:#?}");
}
