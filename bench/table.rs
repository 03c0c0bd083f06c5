//! Rounds to tables: ratios to the reference first, absolute figures after. Ratios are taken
//! within a round and their median shown, since the machine's mood changes between rounds.

use std::fmt::Write;

use crate::latency::Latency;
use crate::usage::{Cpu, Used};

/// One contender's throughput in one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// All that was moved for the processor time.
    pub(crate) gib: f64,
    /// In the time that counts.
    pub(crate) gigabits: f64,
    pub(crate) near: Used,
    pub(crate) far: Used,
}

impl Sample {
    fn cpu_per_gib(&self) -> f64 {
        (self.near.cpu.total() + self.far.cpu.total()) / self.gib
    }
}

/// Median, least, greatest.
struct Spread {
    median: f64,
    least: f64,
    greatest: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Self {
            median,
            least: sorted.first().copied().unwrap_or(f64::NAN),
            greatest: sorted.last().copied().unwrap_or(f64::NAN),
        }
    }

    fn ratio(&self) -> String {
        format!("{:.2} [{:.2}–{:.2}]", self.median, self.least, self.greatest)
    }
}

/// All rounds of one measurement: `rounds[r][c]` is contender c in round r. The first contender
/// has ratio 1.
pub(crate) struct Rounds<T> {
    pub(crate) names: Vec<String>,
    pub(crate) rounds: Vec<Vec<Option<T>>>,
    /// Why a contender is out.
    pub(crate) failed: Vec<Option<String>>,
}

impl<T> Rounds<T> {
    fn spread(&self, index: usize, value: impl Fn(&T) -> f64) -> Spread {
        Spread::of(self.rounds.iter().filter_map(|round| round[index].as_ref().map(&value)))
    }

    fn ratio(&self, index: usize, value: impl Fn(&T) -> f64) -> String {
        let ratios = self.rounds.iter().filter_map(|round| {
            let (ours, reference) = (round[index].as_ref()?, round[0].as_ref()?);
            Some(value(ours) / value(reference))
        });
        Spread::of(ratios).ratio()
    }

    fn label(&self, index: usize) -> String {
        let bold = if index == 0 { "**" } else { "" };
        format!("{bold}{}{bold}", self.names[index])
    }

    /// A row for each contender: its figures, or why it has none.
    fn rows(&self, table: &mut String, figures: impl Fn(usize) -> String) {
        for index in 0..self.names.len() {
            let said = match &self.failed[index] {
                // A bar would end the cell.
                Some(why) => format!("did not run: {}", why.replace('|', "/").replace('\n', "; ")),
                None => figures(index),
            };
            // Writing to a String can't fail.
            let _ = writeln!(table, "| {} | {said} |", self.label(index));
        }
    }
}

/// Processor time, speed and memory, as a Markdown table.
pub(crate) fn throughput(all: &Rounds<Sample>) -> String {
    let mut table = String::from(
        "| contender | CPU ratio | speed ratio | CPU s/GiB near | (user+sys) | CPU s/GiB far | (user+sys) | Gbit/s | peak MiB near, far |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    all.rows(&mut table, |index| {
        let cpu = |end: fn(&Sample) -> Cpu| {
            let of = |value: fn(Cpu) -> f64| all.spread(index, |s| value(end(s)) / s.gib).median;
            format!("{:.2} | {:.2}+{:.2}", of(Cpu::total), of(|c| c.user), of(|c| c.system))
        };
        let speed = all.spread(index, |s| s.gigabits);
        format!(
            "{} | {} | {} | {} | {:.1} (best {:.1}) | {:.0}, {:.0}",
            all.ratio(index, Sample::cpu_per_gib),
            all.ratio(index, |s| s.gigabits),
            cpu(|s| s.near.cpu),
            cpu(|s| s.far.cpu),
            speed.median,
            speed.greatest,
            all.spread(index, |s| s.near.peak_mib).greatest,
            all.spread(index, |s| s.far.peak_mib).greatest,
        )
    });
    table
}

/// Microseconds of a request, as a Markdown table.
pub(crate) fn latency(all: &Rounds<Latency>) -> String {
    let mut table = String::from(
        "| contender | p50 ratio, loaded | p99 ratio, loaded | loaded p50, p99 µs | idle p50, p99 µs | bulk Gbit/s |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    all.rows(&mut table, |index| {
        let of = |value: fn(&Latency) -> f64| all.spread(index, value).median;
        format!(
            "{} | {} | {:.0}, {:.0} | {:.0}, {:.0} | {:.2}",
            all.ratio(index, |l| l.loaded.p50),
            all.ratio(index, |l| l.loaded.p99),
            of(|l| l.loaded.p50),
            of(|l| l.loaded.p99),
            of(|l| l.idle.p50),
            of(|l| l.idle.p99),
            of(|l| l.gigabits),
        )
    });
    table
}
