//! Rounds to a table: ratios to the reference first, absolute figures after. Ratios are taken
//! within a round and their median shown, since the machine's mood changes between rounds.

use std::fmt::Write;

use crate::contender::Cpu;

/// One contender in one round.
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

/// A Markdown table. `rounds[r][c]` is contender c in round r; `reference` is the contender
/// that has ratio 1.
pub(crate) fn render(names: &[String], rounds: &[Vec<Sample>], reference: usize) -> String {
    let mut table = String::from(
        "| contender | CPU ratio | speed ratio | CPU s/GiB near | (user+sys) | CPU s/GiB far | (user+sys) | Gbit/s |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (index, name) in names.iter().enumerate() {
        let of = |value: &dyn Fn(&Sample) -> f64| Spread::of(rounds.iter().map(|r| value(&r[index])));
        let paired = |value: fn(&Sample) -> f64| {
            Spread::of(rounds.iter().map(|r| value(&r[index]) / value(&r[reference])))
        };
        let near = of(&|s| s.near.total() / s.gib).median;
        let near_user = of(&|s| s.near.user / s.gib).median;
        let near_system = of(&|s| s.near.system / s.gib).median;
        let far = of(&|s| s.far.total() / s.gib).median;
        let far_user = of(&|s| s.far.user / s.gib).median;
        let far_system = of(&|s| s.far.system / s.gib).median;
        let speed = of(&Sample::gigabits);
        let bold = if index == reference { "**" } else { "" };
        // Writing to a String can't fail.
        let _ = writeln!(
            table,
            "| {bold}{name}{bold} | {} | {} | {near:.2} | {near_user:.2}+{near_system:.2} | \
             {far:.2} | {far_user:.2}+{far_system:.2} | {:.1} (best {:.1}) |",
            paired(Sample::cpu_per_gib).ratio(),
            paired(Sample::gigabits).ratio(),
            speed.median,
            speed.greatest,
        );
    }
    table
}
