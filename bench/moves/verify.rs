//! What `--verify` costs: whole migrations of a guest with a disk, with it and without.

use anyhow::{Context, Result};

use crate::cpu;
use crate::migration::Migration;
use crate::report::Section;
use crate::rounds::Rounds;
use crate::stage::{Stage, Used};
use crate::support::Agent;
use crate::support::proof::field;

const NAMES: [&str; 2] = ["without", "--verify"];
const VERIFY: usize = 1;

/// One migration.
#[derive(Clone, Copy)]
struct Sample {
    seconds: f64,
    pause_ms: f64,
    used: Used,
}

impl Sample {
    fn cpu(&self) -> f64 {
        self.used.agents + self.used.qemus
    }
}

/// The table.
pub(crate) fn table(stage: &Stage, rounds: usize, mib: u64) -> Result<Section> {
    let guest = &stage.disk;
    guest.stock(&stage.net, &stage.memory)?;
    let names = NAMES.map(str::to_owned).to_vec();
    let found = Rounds::take(names, rounds, |contender| {
        guest.fresh(&stage.net, &stage.memory)?;
        let sample = moved(stage, contender == VERIFY)?;
        guest.is_copied(&stage.net, &stage.memory)?;
        eprintln!("  {:.2} s, {:.2} CPU s, {:.0} ms", sample.seconds, sample.cpu(), sample.pause_ms);
        Ok(sample)
    });
    guest.clear(&stage.net, &stage.memory)?;
    Ok(Section {
        title: "What --verify costs".to_owned(),
        what: format!(
            "The same disk of {mib} MiB, all of it data: the whole migration, from its beginning to its end, with \
             both sides' disks compared and without. The guest is paused, so that the pause is that of the \
             switchover alone. Asked of it: no longer pause. Processor time is that of both QEMUs, their \
             start included, and both agents, user and system."
        ),
        again: format!("--tables verify --rounds {rounds} --disk-mib {mib}"),
        table: shown(&found?),
    })
}

#[allow(clippy::cast_precision_loss)]
fn moved(stage: &Stage, verify: bool) -> Result<Sample> {
    let words: &[&str] = if verify { &["--keep-source", "--verify"] } else { &["--keep-source"] };
    let agents: Vec<_> = [&stage.alpha, &stage.bravo].into_iter().filter_map(Agent::pid).collect();
    let before = cpu::seconds(&agents)?;
    let migration = Migration::begin(&stage.alpha, stage.disk.name, "bravo", words)?;
    let report = stage.moved(&migration, &stage.alpha)?;
    // The destination's QEMU is not there before.
    let used = stage.used(&stage.disk)?;
    let used = Used { agents: used.agents - before, ..used };
    let ms = |at: &str| -> Result<f64> {
        let value = field(&report, at)?.as_u64();
        Ok(value.with_context(|| format!("{at} is no number: {report}"))? as f64)
    };
    Ok(Sample { seconds: ms("/elapsed_ms")? / 1e3, pause_ms: ms("/downtime/total_ms")?, used })
}

fn shown(all: &Rounds<Sample>) -> String {
    let mut table = String::from(
        "| | time to without | CPU to without | seconds | CPU s | QEMUs' | agents' | pause ms |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    all.rows(&mut table, |index| {
        let of = |value: fn(&Sample) -> f64| all.spread(index, value);
        format!(
            "{} | {} | {} | {} | {:.2} | {:.2} | {}",
            all.ratio(index, |s| s.seconds),
            all.ratio(index, Sample::cpu),
            of(|s| s.seconds).shown(2),
            of(Sample::cpu).shown(2),
            of(|s| s.used.qemus).median,
            of(|s| s.used.agents).median,
            of(|s| s.pause_ms).shown(0),
        )
    });
    table
}
