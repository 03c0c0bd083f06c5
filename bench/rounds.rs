//! Interleaved rounds of several contenders, and what they come to: ratios within a round, their
//! medians and how far they scatter. Must not know what is measured.

use std::fmt::Write;

/// Median, least, greatest.
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) greatest: f64,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Self {
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

    /// To so many decimals.
    pub(crate) fn shown(&self, decimals: usize) -> String {
        format!("{:.decimals$} [{:.decimals$}–{:.decimals$}]", self.median, self.least, self.greatest)
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

impl<T: Clone> Rounds<T> {
    /// Every contender once in each round, in turning order. Who fails is out and is named in the
    /// table; the first, the reference, must not fail.
    pub(crate) fn take(
        names: Vec<String>,
        count: usize,
        mut measure: impl FnMut(usize) -> anyhow::Result<T>,
    ) -> anyhow::Result<Self> {
        let mut failed: Vec<Option<String>> = vec![None; names.len()];
        let mut rounds = Vec::new();
        for round in 0..count {
            let mut samples = vec![None; names.len()];
            for turn in 0..names.len() {
                let index = (turn + round) % names.len();
                let name = &names[index];
                if failed[index].is_some() {
                    continue;
                }
                eprintln!("round {} of {count}: {name}", round + 1);
                match measure(index) {
                    Ok(sample) => samples[index] = Some(sample),
                    Err(e) if index == 0 => return Err(e.context(format!("{name}, the reference"))),
                    Err(e) => {
                        eprintln!("{name} failed: {e:#}");
                        failed[index] = Some(format!("{e:#}"));
                    }
                }
            }
            rounds.push(samples);
        }
        Ok(Self { names, rounds, failed })
    }
}

impl<T> Rounds<T> {
    pub(crate) fn spread(&self, index: usize, value: impl Fn(&T) -> f64) -> Spread {
        Spread::of(self.rounds.iter().filter_map(|round| round[index].as_ref().map(&value)))
    }

    /// To another contender in the same round.
    pub(crate) fn ratio_to(&self, reference: usize, index: usize, value: impl Fn(&T) -> f64) -> String {
        let ratios = self.rounds.iter().filter_map(|round| {
            let (ours, reference) = (round[index].as_ref()?, round[reference].as_ref()?);
            Some(value(ours) / value(reference))
        });
        Spread::of(ratios).shown(2)
    }

    /// To the first.
    pub(crate) fn ratio(&self, index: usize, value: impl Fn(&T) -> f64) -> String {
        self.ratio_to(0, index, value)
    }

    fn label(&self, index: usize) -> String {
        let bold = if index == 0 { "**" } else { "" };
        format!("{bold}{}{bold}", self.names[index])
    }

    /// A row for each contender: its figures, or why it has none.
    pub(crate) fn rows(&self, table: &mut String, figures: impl Fn(usize) -> String) {
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
