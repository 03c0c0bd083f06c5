//! Faults injected into migrations of one guest that goes there and back between two hosts, drawn
//! from a seed. After each one the judge must be content, and the guest's next migration must succeed:
//! so the two hosts change their parts all the time.
//!
//! `plan` draws, `judge` judges, `record` keeps what was measured; `world` is what all of it happens on,
//! and `run` one migration as it is seen from outside.

pub mod judge;
pub mod plan;
pub mod record;
#[allow(clippy::expect_used, reason = "a setting that is no number ends the run")]
#[path = "../../mux/rng.rs"]
pub mod rng;
pub mod run;
pub mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use crate::support::process::{SHORT, wait_for};
use crate::support::{Lab, with_lab};
use judge::{after_fault, good_migration};
use plan::Injection;
use record::Record;
use rng::number_from_env;
use world::World;

/// Keeps the logs also of a run without a violation.
const KEEP_LOGS: &str = "CHAOS_KEEP_LOGS";

/// How many stages there are.
const STAGES: &str = "CHAOS_STAGES";
/// Plays one injection of the plan alone, by its number.
const ONLY: &str = "CHAOS_ONLY";
/// Plays only the faults whose name contains one of these, with `|` between them.
const ONLY_FAULT: &str = "CHAOS_FAULT";

/// Draws from a seed, plays, and gives the table with its head, in Markdown.
///
/// # Errors
/// Those of `play`.
pub fn drawn(name: &str, seed: u64, count: usize) -> Result<(Vec<Record>, String)> {
    let since = Instant::now();
    let records = play(name, &plan::draw(seed, count))?;
    let minutes = since.elapsed().as_secs_f64() / 60.0;
    let all: Vec<_> = records.iter().collect();
    let late = records.iter().filter(|r| r.complaint.is_some()).count();
    let summary = format!(
        "{} injections in {minutes:.0} min: {}. After each the guest ran on exactly one host, had lost no write, \
         and its next migration succeeded. {late} of the migrations that had to move their guest at the first \
         try did not.\n\n",
        records.len(),
        record::outcomes(&all),
    );
    let table = summary + &record::table(&records);
    Ok((records, table))
}

/// That every migration that had to move its guest did.
///
/// # Errors
/// The first that did not, and how many did not.
pub fn as_promised(records: &[Record]) -> Result<()> {
    let complaints: Vec<_> = records.iter().filter_map(|r| r.complaint.as_ref().map(|c| (r, c))).collect();
    let Some((record, complaint)) = complaints.first() else { return Ok(()) };
    bail!("{} times not as promised, first at {}: {complaint}", complaints.len(), record.fault)
}

/// Plays all of them, on one stage or on several side by side.
///
/// # Errors
/// The first violation, with the number of its injection; all logs are kept, and no further one is
/// begun.
pub fn play(name: &str, plan: &[Injection]) -> Result<Vec<Record>> {
    let queue = Mutex::new(plan.iter().filter(|injection| is_chosen(injection)));
    let stage = || {
        let played = with_lab(name, |lab| play_on(lab, &queue));
        if played.is_err() {
            lock(&queue).by_ref().for_each(drop);
        }
        played
    };
    std::thread::scope(|scope| {
        let stages: Vec<_> = (0..number_from_env(STAGES).unwrap_or(1)).map(|_| scope.spawn(stage)).collect();
        let joined = stages.into_iter().map(|one| one.join().map_err(|_| anyhow!("it panicked"))?);
        Ok(joined.collect::<Result<Vec<_>>>()?.concat())
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn play_on<'p>(lab: &Lab, queue: &Mutex<impl Iterator<Item = &'p Injection>>) -> Result<Vec<Record>> {
    let mut world = World::set_up(lab)?;
    let mut records = Vec::new();
    while let Some(injection) = { lock(queue).next() } {
        let record = one(&mut world, injection).map_err(|violation| {
            let kept = keep_logs(lab, &format!("-{}", injection.number));
            let kept = kept.map_or_else(|e| format!("{e:#}"), |p| p.display().to_string());
            violation.context(format!("injection {injection}; logs kept in {kept}"))
        })?;
        records.push(record);
    }
    if std::env::var_os(KEEP_LOGS).is_some() {
        println!("  logs kept in {}", keep_logs(lab, "")?.display());
    }
    let (boots, blocks) = world.watcher.totals();
    println!("  {blocks} blocks of {boots} boots were watched: each made on one host, none missing");
    Ok(records)
}

fn is_chosen(injection: &Injection) -> bool {
    let name = injection.fault.to_string();
    let is = |name: &str, fits: &dyn Fn(&str) -> bool| std::env::var(name).map_or(true, |only| fits(&only));
    is(ONLY, &|n| n == injection.number.to_string())
        && is(ONLY_FAULT, &|all| all.split('|').any(|words| name.contains(words)))
}

fn one(world: &mut World, injection: &Injection) -> Result<Record> {
    let since = Instant::now();
    let before = wait_for("the guest's first block to be seen", SHORT, || Ok(world.watcher.now()))?;
    let run = world.begin_held(injection)?;
    let hit = world.inflict(&run, injection)?;
    let record = after_fault(world, run, &before, injection, &hit)?;
    let good = good_migration(world).context("the next migration of the same guest")?;
    if let Some(complaint) = &record.complaint {
        eprintln!("    NOT AS PROMISED: {complaint}");
    }
    let silence = record.silence.map_or_else(|| "-".to_owned(), |s| format!("{:.2}", s.as_secs_f64()));
    eprintln!(
        "  {:<70} in {:<11} {:<25} settled {:>5.1} s, still {silence:>5} s, next {:>4.1} s, all {:>5.1} s",
        injection.to_string(),
        record.phase,
        record.ending,
        record.settled.as_secs_f64(),
        good.as_secs_f64(),
        since.elapsed().as_secs_f64(),
    );
    Ok(record)
}

/// Copies everything of the lab but disks to a folder that stays.
fn keep_logs(lab: &Lab, suffix: &str) -> Result<PathBuf> {
    let name = lab.dir().file_name().context("a lab without a name")?.to_string_lossy().into_owned();
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name + suffix);
    fs::create_dir_all(&kept)?;
    let script = "cd \"$1\" && find . -type f -size -20M \\( -name '*.log' -o -name '*.serial' -o -name '*.journal' \
                  -o -name '*.toml' -o -name starts -o -name called \\) -print0 | xargs -0 cp --parents -t \"$2\"";
    Command::new("sh").args(["-c", script, "keep"]).arg(lab.dir()).arg(&kept).status()?;
    Ok(kept)
}
