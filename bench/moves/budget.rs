//! A limit on the wire, and two migrations that share one by weight.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::migration::Migration;
use crate::monitor::WITHIN;
use crate::report::Section;
use crate::rounds::Spread;
use crate::stage::Stage;
use crate::support::Agent;
use crate::support::net::{Host, LINK};

const LIMIT: &str = "100MiB/s";
const LIMIT_BYTES: f64 = 100.0 * 1024.0 * 1024.0;
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Not counted: after a phase began, while queues fill, and before it ends.
const BEGINNING_S: f64 = 1.0;
const END_S: f64 = 0.5;
/// A rate is worth something over no less.
const LEAST_S: f64 = 3.0;
const WINDOW_S: f64 = 1.0;
/// Weights of the two.
const WEIGHTS: [&str; 2] = ["100", "300"];

/// A count at a moment, in seconds.
type Count = (f64, f64);

/// What was sent in one phase: over all of it, and in the fullest and the emptiest second of it.
#[derive(Clone, Copy)]
struct Rates {
    whole: f64,
    least: f64,
    greatest: f64,
    seconds: f64,
}

/// Both tables.
pub(crate) fn table(stage: &Stage, rounds: usize) -> Result<Section> {
    let limited = limited(stage, rounds)?;
    let shared = shared(stage, rounds)?;
    let what = format!(
        "A guest of 1 GiB of RAM and two disks of 512 MiB is moved with `--limit {LIMIT}`. What leaves \
         through the source's interface is counted (bytes of Ethernet frames before they are cut to the \
         link's size), in the phase that copies the disks and in the one that copies the RAM, without the \
         first second and the last half. The limit is on the session's frames; a TLS record adds 22 bytes to \
         16 KiB, TCP and IP add 66 to what may be 64 KiB, and acknowledgements of what comes back a \
         little. Asked: within 2 % of the limit.\n\n\
         Then two guests with a disk of 1 GiB each are moved at the same time through one session, with \
         weights 1 and 3 and `vmferry limit --peer bravo --rate {LIMIT}`. The ratio is that of the bytes on their \
         disks' streams in the time in which both copy. Asked: within 5 % of 3."
    );
    let again = format!("--tables budget --rounds {rounds}");
    Ok(Section { title: "Limits and weights".to_owned(), what, again, table: format!("{limited}\n{shared}") })
}

fn limited(stage: &Stage, rounds: usize) -> Result<String> {
    let guest = &stage.both;
    guest.stock(&stage.net, &stage.memory)?;
    let mut found: [Vec<Rates>; 2] = [Vec::new(), Vec::new()];
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}: a limit of {LIMIT}");
        guest.fresh(&stage.net, &stage.memory)?;
        let migration =
            Migration::begin(&stage.alpha, guest.name, "bravo", &["--keep-source", "--limit", LIMIT])?;
        let counts = on_the_wire(stage, &migration)?;
        stage.moved(&migration, &stage.alpha)?;
        guest.is_copied(&stage.net, &stage.memory)?;
        for (of_phase, counts) in found.iter_mut().zip(counts) {
            let rates = rates(&counts)?;
            eprintln!("  {:.4} of the limit over {:.1} s", rates.whole / LIMIT_BYTES, rates.seconds);
            of_phase.push(rates);
        }
    }
    guest.clear(&stage.net, &stage.memory)?;
    let mut table = String::from(
        "| on the wire, to the limit | whole phase | its emptiest second | its fullest second | seconds |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for (phase, found) in ["two disks", "RAM"].iter().zip(&found) {
        let of = |value: fn(&Rates) -> f64| Spread::of(found.iter().map(value));
        let part =
            |value: fn(&Rates) -> f64| Spread::of(found.iter().map(|r| value(r) / LIMIT_BYTES)).shown(3);
        table.push_str(&format!(
            "| {phase} | {} | {} | {} | {:.1} |\n",
            part(|r| r.whole),
            part(|r| r.least),
            part(|r| r.greatest),
            of(|r| r.seconds).median,
        ));
    }
    Ok(table)
}

/// What has left the source's interface while the disks and while the RAM were copied.
fn on_the_wire(stage: &Stage, migration: &Migration) -> Result<[Vec<Count>; 2]> {
    let begun = Instant::now();
    let mut counts: [Vec<Count>; 2] = [Vec::new(), Vec::new()];
    loop {
        let progress = migration.now(&stage.alpha)?;
        let count = (begun.elapsed().as_secs_f64(), sent(&stage.net.alpha)?);
        match progress["phase"].as_str() {
            Some("mirror") => counts[0].push(count),
            Some("precopy") => counts[1].push(count),
            _ if !progress["outcome"].is_null() => return Ok(counts),
            _ => {}
        }
        ensure!(begun.elapsed() < WITHIN, "it does not end: {progress}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Bytes that have left a host's interface.
#[allow(clippy::cast_precision_loss)]
fn sent(host: &Host) -> Result<f64> {
    // Of the thread: it is the one that is inside.
    let text = host.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = text.lines().find_map(|l| l.trim().strip_prefix(&format!("{LINK}:")).map(str::to_owned));
    let line = line.context("the interface is not listed")?;
    let bytes = line.split_whitespace().nth(8).context("a short line")?;
    Ok(bytes.parse::<u64>()? as f64)
}

fn rates(counts: &[Count]) -> Result<Rates> {
    let (Some(first), Some(last)) = (counts.first(), counts.last()) else {
        anyhow::bail!("the phase was not seen");
    };
    let counts: Vec<Count> =
        counts.iter().copied().filter(|c| c.0 >= first.0 + BEGINNING_S && c.0 <= last.0 - END_S).collect();
    let (Some(first), Some(last)) = (counts.first(), counts.last()) else {
        anyhow::bail!("the phase was too short");
    };
    let seconds = last.0 - first.0;
    ensure!(seconds >= LEAST_S, "only {seconds:.1} s of the phase can be counted");
    let windows = counts.iter().filter_map(|from| {
        let to = counts.iter().find(|to| to.0 >= from.0 + WINDOW_S)?;
        Some(rate(*from, *to))
    });
    let Spread { least, greatest, .. } = Spread::of(windows);
    Ok(Rates { whole: rate(*first, *last), least, greatest, seconds })
}

fn rate(from: Count, to: Count) -> f64 {
    (to.1 - from.1) / (to.0 - from.0)
}

fn shared(stage: &Stage, rounds: usize) -> Result<String> {
    for guest in &stage.pair {
        guest.stock(&stage.net, &stage.memory)?;
    }
    set_limit(&stage.alpha, LIMIT)?;
    let found = (1..=rounds).map(|round| {
        eprintln!("round {round} of {rounds}: weights 1 and 3");
        two_at_once(stage)
    });
    let found: Result<Vec<[f64; 2]>> = found.collect();
    set_limit(&stage.alpha, "none")?;
    for guest in &stage.pair {
        guest.clear(&stage.net, &stage.memory)?;
    }
    let found = found?;
    let ratio = Spread::of(found.iter().map(|r| r[1] / r[0])).shown(3);
    let sum = Spread::of(found.iter().map(|r| (r[0] + r[1]) / LIMIT_BYTES)).shown(3);
    let mut table =
        String::from("| weights | ratio of the bytes | both, to the limit |\n| --- | --- | --- |\n");
    table.push_str(&format!("| 1 : 3 | {ratio} | {sum} |\n"));
    Ok(table)
}

/// Bytes per second of the light one and of the heavy one, while both copy their disks.
fn two_at_once(stage: &Stage) -> Result<[f64; 2]> {
    let mut migrations = Vec::new();
    for (guest, weight) in stage.pair.iter().zip(WEIGHTS) {
        guest.fresh(&stage.net, &stage.memory)?;
        let words = ["--keep-source", "--weight", weight];
        migrations.push(Migration::begin(&stage.alpha, guest.name, "bravo", &words)?);
    }
    let counts = while_both_copy(&stage.alpha, &migrations)?;
    for migration in &migrations {
        migration.cancel(&stage.alpha)?;
        migration.ended(&stage.alpha)?;
    }
    stage.pair.iter().try_for_each(crate::guest::Guest::end)?;
    let ends = |end: fn(&[Count]) -> Option<&Count>| counts.iter().filter_map(move |c| Some(end(c)?.0));
    let begun = ends(<[Count]>::first).fold(0.0, f64::max) + BEGINNING_S;
    let ended = ends(<[Count]>::last).fold(f64::INFINITY, f64::min) - END_S;
    let of = |counts: &[Count]| -> Result<f64> {
        let mut both = counts.iter().copied().filter(|c| (begun..=ended).contains(&c.0));
        let first = both.next().context("they did not copy at the same time")?;
        let last = both.next_back().context("they hardly copied at the same time")?;
        ensure!(last.0 - first.0 >= LEAST_S, "only {:.1} s can be counted", last.0 - first.0);
        Ok(rate(first, last))
    };
    let rates = [of(&counts[0])?, of(&counts[1])?];
    eprintln!("  1 : {:.3}", rates[1] / rates[0]);
    Ok(rates)
}

/// The agent counts a few times a second: only the moments at which a count is new are kept.
fn while_both_copy(agent: &Agent, migrations: &[Migration]) -> Result<[Vec<Count>; 2]> {
    let begun = Instant::now();
    let mut counts: [Vec<Count>; 2] = [Vec::new(), Vec::new()];
    loop {
        let mut phases = Vec::new();
        for (migration, counts) in migrations.iter().zip(&mut counts) {
            let progress = migration.now(agent)?;
            phases.push(progress["phase"].as_str().unwrap_or_default().to_owned());
            let bytes = stream_bytes(&progress);
            let is_new = bytes > counts.last().map_or(0.0, |c| c.1);
            if is_new && progress["disks"][0]["ready"] == false {
                counts.push((begun.elapsed().as_secs_f64(), bytes));
            }
            ensure!(
                progress["outcome"].is_null() && begun.elapsed() < WITHIN,
                "it ended or does not: {progress}"
            );
        }
        let is_past = |phase: &String| !["begin", "prepare", "mirror"].contains(&phase.as_str());
        if phases.iter().any(is_past) {
            return Ok(counts);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[allow(clippy::cast_precision_loss)]
fn stream_bytes(progress: &Value) -> f64 {
    progress["disks"][0]["stream_bytes"].as_u64().unwrap_or(0) as f64
}

fn set_limit(agent: &Agent, rate: &str) -> Result<()> {
    let outcome = agent.vmferry(&["limit", "--peer", "bravo", "--rate", rate])?;
    ensure!(outcome.code == 0, "vmferry limit gave {outcome:?}");
    Ok(())
}
