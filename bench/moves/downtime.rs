//! How long a guest with a disk stands still: moved by vmferry, and by hand in clear, to and fro.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::by_hand::ByHand;
use crate::guest::Writer;
use crate::migration::Migration;
use crate::monitor::{Monitor, Sign};
use crate::report::Section;
use crate::rounds::{Rounds, Spread};
use crate::stage::Stage;
use crate::support::proof::field;
use crate::support::{Agent, Host, Vm};

const NAMES: [&str; 2] = ["by hand, in clear", "vmferry"];
const VMFERRY: usize = 1;
/// The pause in parts, each up to an event.
const PARTS: [&str; 6] =
    ["to pre-switchover", "mirror ended", "export closed", "told to go on", "all arrived", "guest runs"];
/// Those in which QEMU waits for whoever drives it, and finishes what it is told to.
const DRIVEN: [usize; 4] = [1, 2, 3, 5];
/// What vmferry says of itself.
const OWN: [&str; 4] = ["total_ms", "disks_ms", "device_ms", "start_ms"];
/// How often a sync of the agents' disk is timed.
const SYNCS: u32 = 20;

/// One move; milliseconds.
#[derive(Clone, Copy)]
struct Sample {
    parts: [f64; PARTS.len()],
    own: Option<[f64; OWN.len()]>,
}

impl Sample {
    fn total(&self) -> f64 {
        self.parts.iter().sum()
    }

    /// Without the guest's stop and the rest of its RAM, which take what they take.
    fn driven(&self) -> f64 {
        DRIVEN.iter().map(|part| self.parts[*part]).sum()
    }
}

/// The table.
pub(crate) fn table(stage: &Stage, rounds: usize, limit_ms: u64) -> Result<Section> {
    let writer = &stage.writer;
    let names = NAMES.map(str::to_owned).to_vec();
    let found = Rounds::take(names, rounds, |contender| {
        let is_on_alpha = writer.settle()?;
        let (source, destination) = writer.way(is_on_alpha);
        let (agent, host) =
            if is_on_alpha { (&stage.alpha, &stage.net.bravo) } else { (&stage.bravo, &stage.net.alpha) };
        let sample = match contender {
            VMFERRY => through_vmferry(stage, source, destination, agent, host, limit_ms),
            _ => by_hand(source, destination, host, limit_ms),
        }?;
        writer.goes_on(destination)?;
        eprintln!("  {:.1} ms: {:.1?}", sample.total(), sample.parts);
        Ok(sample)
    });
    let round_trip = stage.round_trip_ms();
    writer.end()?;
    let (found, sync) = (found?, sync_ms(&stage.alpha.host().dir)?);
    let text = format!("{}\n{}", totals(&found), parts(&found));
    Ok(Section {
        title: "How long the guest stands still".to_owned(),
        what: what(writer.in_memory, limit_ms, round_trip?, sync),
        again: format!("--tables downtime --moves {rounds} --downtime-limit {limit_ms}"),
        table: format!("{text}\n{}", own(&found)),
    })
}

fn what(in_memory: bool, limit_ms: u64, round_trip: f64, sync: f64) -> String {
    let place =
        if in_memory { "on the tmpfs" } else { "on the machine's disk (its tmpfs takes no direct I/O)" };
    format!(
        "A guest (TCG, {} MiB disk {place}) that writes {} blocks of 4 KiB a second is moved to and fro. From \
         the event `STOP` at the source to `RESUME` at the destination. By hand means QEMU over TCP in clear, \
         driven by events and without a pause of the driver's own: guest paused before the switchover, \
         mirror finished, NBD server stopped, RAM finished, `cont` when both QEMUs say `completed`; nothing \
         is written down. Asked of vmferry: at most 10 ms and a round trip more. The session's round trip \
         was {round_trip:.2} ms, a synced write of a line where the journals lie takes {sync:.1} ms \
         (median), and vmferry waits for two of them in the pause. How much RAM is left for the pause is QEMU's \
         choice (`downtime-limit` {limit_ms} ms for both) and differs from move to move; *driven* is the pause \
         without that and without the guest's stop, the parts in which QEMU waits for its driver.",
        Writer::DISK_MIB,
        Writer::RATE,
    )
}

fn through_vmferry(
    stage: &Stage,
    source: &Vm,
    destination: &Vm,
    agent: &Agent,
    host: &Host,
    limit_ms: u64,
) -> Result<Sample> {
    let mut from = Monitor::of(source)?;
    let migration =
        Migration::begin(agent, Writer::NAME, &host.name, &["--downtime-limit", &limit_ms.to_string()])?;
    let watched = Monitor::of(destination).and_then(|mut to| pause(&mut from, &mut to));
    let parts = watched.with_context(|| format!("{:?}", migration.now(agent)));
    let report = stage.moved(&migration, agent)?;
    source.wait_ended()?;
    Ok(Sample { parts: parts?, own: Some(own_parts(&report)?) })
}

#[allow(clippy::cast_precision_loss)]
fn own_parts(report: &Value) -> Result<[f64; OWN.len()]> {
    let mut parts = [0.0; OWN.len()];
    for (part, name) in parts.iter_mut().zip(OWN) {
        let value = field(report, &format!("/downtime/{name}"))?;
        *part = value.as_u64().with_context(|| format!("{name} is no number"))? as f64;
    }
    Ok(parts)
}

fn by_hand(source: &Vm, destination: &Vm, host: &Host, limit_ms: u64) -> Result<Sample> {
    let mut hand = ByHand::begin(source, destination, &host.v4, None)?;
    hand.prepare_disk()?;
    hand.mirror()?;
    hand.source.wait(Sign::new("BLOCK_JOB_READY"))?;
    hand.prepare_ram(limit_ms)?;
    hand.migrate()?;
    hand.finish_disk()?;
    hand.go_on()?;
    hand.start()?;
    let parts = pause(&mut hand.source, &mut hand.destination)?;
    hand.quit();
    source.wait_ended()?;
    Ok(Sample { parts, own: None })
}

/// The pause in parts, in milliseconds.
fn pause(from: &mut Monitor, to: &mut Monitor) -> Result<[f64; PARTS.len()]> {
    let stopped = from.wait(Sign::new("STOP"))?;
    let at_rest = from.wait(Sign::migration("pre-switchover"))?;
    let mirrored = from.completed()?;
    let closed = to.wait(Sign::new("BLOCK_EXPORT_DELETED"))?;
    let told = from.wait(Sign::migration("device"))?;
    let completed = Sign::migration("completed");
    let arrived = from.wait(completed)?.max(to.wait(completed)?);
    let runs = to.wait(Sign::new("RESUME"))?;
    let moments = [stopped, at_rest, mirrored, closed, told, arrived, runs];
    let mut parts = [0.0; PARTS.len()];
    for (part, ends) in parts.iter_mut().zip(moments.windows(2)) {
        *part = (ends[1] - ends[0]) * 1e3;
    }
    Ok(parts)
}

fn totals(all: &Rounds<Sample>) -> String {
    let mut table = String::from(
        "| contender | ms more than by hand | of that driven | ms stood still | driven |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    let more = |index: usize, value: fn(&Sample) -> f64| {
        let each = all.rounds.iter().filter_map(|r| Some(value(r[index].as_ref()?) - value(r[0].as_ref()?)));
        Spread::of(each).shown(1)
    };
    all.rows(&mut table, |index| {
        format!(
            "{} | {} | {} | {}",
            more(index, Sample::total),
            more(index, Sample::driven),
            all.spread(index, Sample::total).shown(1),
            all.spread(index, Sample::driven).shown(1),
        )
    });
    table
}

fn parts(all: &Rounds<Sample>) -> String {
    let mut table = format!("| ms, by QEMU's events | {} |\n| --- |", PARTS.join(" | "));
    table.push_str(&" --- |".repeat(PARTS.len()));
    table.push('\n');
    all.rows(&mut table, |index| {
        let cells = (0..PARTS.len()).map(|part| all.spread(index, |s| s.parts[part]).shown(1));
        cells.collect::<Vec<_>>().join(" | ")
    });
    table
}

/// What vmferry says, in whole milliseconds.
fn own(all: &Rounds<Sample>) -> String {
    let mut table = String::from("| ms, by vmferry's report | total | disks | device | start |\n");
    table.push_str("| --- | --- | --- | --- | --- |\n| vmferry |");
    for part in 0..OWN.len() {
        let values = all.rounds.iter().filter_map(|round| Some(round[VMFERRY].as_ref()?.own?[part]));
        // Writing to a String can't fail.
        let _ = write!(table, " {} |", Spread::of(values).shown(0));
    }
    table.push('\n');
    table
}

/// The median time of a line that is written and synced, in a file of its own.
fn sync_ms(dir: &Path) -> Result<f64> {
    let path = dir.join("sync");
    let mut file = std::fs::File::options().create(true).append(true).open(&path)?;
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.write_all(&[b'x'; 200])?;
        file.sync_data()?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    std::fs::remove_file(path)?;
    Ok(Spread::of(times.into_iter()).median)
}
