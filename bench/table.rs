//! Rounds to tables: ratios to the reference first, absolute figures after. Ratios are taken
//! within a round and their median shown, since the machine's mood changes between rounds.

use std::fmt::Write;

use crate::contender::Cpu;
use crate::latency::Latency;

/// One contender's throughput in one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) gib: f64,
    pub(crate) seconds: f64,
    pub(crate) near: Cpu,
    pub(crate) far: Cpu,
}

impl Sample {
    fn cpu_per_gib(&self) -> f64 {
        (self.near.total() + self.far.total()) / self.gib
    }

    fn gigabits(&self) -> f64 {
        self.gib * 8.0 * 1.073_741_824 / self.seconds
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

/// All rounds of one measurement: `rounds[r][c]` is contender c in round r.
pub(crate) struct Rounds<T> {
    pub(crate) names: Vec<String>,
    pub(crate) rounds: Vec<Vec<T>>,
    /// The contender that has ratio 1.
    pub(crate) reference: usize,
}

impl<T> Rounds<T> {
    fn spread(&self, index: usize, value: impl Fn(&T) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(|round| value(&round[index])))
    }

    fn ratio(&self, index: usize, value: impl Fn(&T) -> f64) -> String {
        let reference = self.reference;
        let ratios = self.rounds.iter().map(|round| value(&round[index]) / value(&round[reference]));
        Spread::of(ratios).ratio()
    }

    fn label(&self, index: usize) -> String {
        let bold = if index == self.reference { "**" } else { "" };
        format!("{bold}{}{bold}", self.names[index])
    }
}

/// Processor time and speed, as a Markdown table.
pub(crate) fn throughput(all: &Rounds<Sample>) -> String {
    let mut table = String::from(
        "| contender | CPU ratio | speed ratio | CPU s/GiB near | (user+sys) | CPU s/GiB far | (user+sys) | Gbit/s |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for index in 0..all.names.len() {
        let of = |value: fn(&Sample) -> f64| all.spread(index, |s| value(s) / s.gib).median;
        let speed = all.spread(index, Sample::gigabits);
        // Writing to a String can't fail.
        let _ = writeln!(
            table,
            "| {} | {} | {} | {:.2} | {:.2}+{:.2} | {:.2} | {:.2}+{:.2} | {:.1} (best {:.1}) |",
            all.label(index),
            all.ratio(index, Sample::cpu_per_gib),
            all.ratio(index, Sample::gigabits),
            of(|s| s.near.total()),
            of(|s| s.near.user),
            of(|s| s.near.system),
            of(|s| s.far.total()),
            of(|s| s.far.user),
            of(|s| s.far.system),
            speed.median,
            speed.greatest,
        );
    }
    table
}

/// Microseconds of a request, as a Markdown table.
pub(crate) fn latency(all: &Rounds<Latency>) -> String {
    let mut table = String::from(
        "| contender | p50 ratio, loaded | p99 ratio, loaded | loaded p50, p99 µs | idle p50, p99 µs | bulk Gbit/s |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for index in 0..all.names.len() {
        let of = |value: fn(&Latency) -> f64| all.spread(index, value).median;
        let _ = writeln!(
            table,
            "| {} | {} | {} | {:.0}, {:.0} | {:.0}, {:.0} | {:.1} |",
            all.label(index),
            all.ratio(index, |l| l.loaded.p50),
            all.ratio(index, |l| l.loaded.p99),
            of(|l| l.loaded.p50),
            of(|l| l.loaded.p99),
            of(|l| l.idle.p50),
            of(|l| l.idle.p99),
            of(|l| l.gigabits),
        );
    }
    table
}
