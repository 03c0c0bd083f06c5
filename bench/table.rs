//! Rounds to tables: ratios to the reference first, absolute figures after. Ratios are taken
//! within a round and their median shown, since the machine's mood changes between rounds.

use crate::latency::Latency;
use crate::rounds::Rounds;
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
