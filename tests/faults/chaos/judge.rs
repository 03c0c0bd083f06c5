//! What must hold after each fault, whatever it was: everybody comes to rest by himself, the guest
//! runs on exactly one host, without a lost write, nothing is left, and it can be moved.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::plan::Injection;
use super::record::{Ending, Record};
use super::run::Run;
use super::world::{Hit, World};
use crate::faults::{Fault, Side, Who};
use crate::support::pair::open_journals;
use crate::support::process::{LONG, wait_for};
use crate::support::proof;
use crate::support::watcher::Life;

/// For everybody to come to rest once all is repaired: longer than any deadline of the agents.
const RESTS_WITHIN: Duration = Duration::from_secs(90);
/// Who takes longer is named.
const SLOW: Duration = Duration::from_secs(8);
/// A guest that runs makes so many blocks more.
const ALIVE_BLOCKS: u64 = 10;
const BOOT_WITHIN: Duration = Duration::from_secs(120);
const ALIVE_WITHIN: Duration = Duration::from_secs(20);

/// Judges what became of a migration that was hit. `before`: the guest's life when it began.
///
/// # Errors
/// Anything is not as it must be.
pub fn after_fault(
    world: &mut World,
    run: Run,
    before: &Life,
    injection: &Injection,
    hit: &Hit,
) -> Result<Record> {
    let (at, waited_for) = rest(world)?;
    let settled = Instant::now();
    if settled - hit.at > SLOW {
        eprintln!("    it took so long because of: {waited_for}");
    }
    let report = run.last();
    let ending = match at {
        Some(at) => lives_on(world, at, &run, before)?,
        None => {
            may_be_gone(world, &run, injection)?;
            stayed_or_moved_once(world, before)?;
            Ending::GuestKilled
        }
    };
    says_the_same(report.as_ref(), ending)?;
    // The guest's silence is judged before it is booted again.
    let silence = world.watcher.longest_silence(run.since, Instant::now());
    if ending == Ending::GuestKilled {
        boot_again(world, run.source, report.as_ref())?;
    }
    is_clean(world)?;
    let cli_was_killed = injection.fault == Fault::Kill(Who::CommandLine);
    let noticed = ending == Ending::Moved && (run.was_undecided() || cli_failed(run)? && !cli_was_killed);
    let ending = if noticed { Ending::MovedAfterSettling } else { ending };
    let fits = !injection.must_move() || ending == Ending::Moved;
    let complaint = (!fits).then(|| format!("it {ending}, and should have moved: {report:?}"));
    Ok(Record {
        fault: injection.fault,
        planned: injection.moment.phase,
        phase: hit.phase.clone(),
        ending,
        settled: settled - hit.at,
        complaint,
        silence: (ending != Ending::GuestKilled).then_some(silence),
    })
}

/// Moves the guest to the other host, undisturbed.
///
/// # Errors
/// It does not move, or a proof fails.
pub fn good_migration(world: &mut World) -> Result<Duration> {
    let since = Instant::now();
    let before = world.watcher.look()?;
    let run = world.begin()?;
    let source = run.source;
    let outcome = run.cli.wait(LONG)?;
    ensure!(outcome.code == 0, "the next migration failed: {outcome:?}");
    world.stage.vm(source).wait_ended()?;
    let destination = source.other();
    let status = status(world, destination);
    ensure!(status == "running", "it is {status} on {}", destination.name());
    has_moved(world, source, &before)?;
    is_clean(world)?;
    Ok(since.elapsed())
}

/// Waits until the agents have nothing open and a guest runs on one host, or on none, and neither
/// changes any more. Gives the host, and who was the last to come to rest.
fn rest(world: &World) -> Result<(Option<Side>, String)> {
    let mut last = String::new();
    let rested = wait_for("everybody to come to rest", RESTS_WITHIN, || {
        world.watcher.check()?;
        let open = open_migrations(world)?;
        if !open.is_empty() {
            last = open.join("; ");
            return Ok(None);
        }
        let states = [status(world, Side::Alpha), status(world, Side::Bravo)];
        let now = match [states[0].as_str(), states[1].as_str()] {
            ["running", "ended"] => Some(Some(Side::Alpha)),
            ["ended", "running"] => Some(Some(Side::Bravo)),
            ["ended", "ended"] => Some(None),
            ["running", "running"] => bail!("TWO RUNNERS: both QEMUs say that their guest runs"),
            _ => {
                last = format!("QEMUs {states:?}");
                None
            }
        };
        Ok(now)
    });
    rested.map(|at| (at, last.clone())).with_context(|| format!("it stands at: {last}"))
}

/// What the agents say, and their journals.
fn open_migrations(world: &World) -> Result<Vec<String>> {
    let mut open = Vec::new();
    for side in Side::BOTH {
        let agent = world.stage.agent(side);
        let list = agent.api("/v1/migrations")?;
        let is_open = |p: &&Value| p["outcome"].is_null() || p["outcome"]["result"] == "undecided";
        let said = list.as_array().into_iter().flatten().filter(is_open);
        open.extend(said.map(|p| format!("{} says {p}", side.name())));
        match open_journals(agent) {
            Ok(all) => {
                open.extend(all.iter().map(|lines| format!("open journal on {}: {lines:?}", side.name())));
            }
            // A line may be half written at this moment, or torn until its agent has restarted.
            Err(error) => open.push(format!("{error:#}")),
        }
    }
    Ok(open)
}

/// QEMU's word, or "ended" where none runs. One that does not answer is about to end, or is asked
/// again; if it stays so nobody comes to rest.
fn status(world: &World, side: Side) -> String {
    let vm = world.stage.vm(side);
    if !vm.is_running() {
        return "ended".to_owned();
    }
    vm.qmp().and_then(|mut qmp| qmp.status()).unwrap_or_else(|error| format!("silent: {error:#}"))
}

/// That a guest that is gone was at most at the destination before.
fn stayed_or_moved_once(world: &World, before: &Life) -> Result<()> {
    let life = world.watcher.look()?;
    let more = life.stays.len().checked_sub(before.stays.len());
    ensure!(
        life.generation == before.generation && more.is_some_and(|n| n <= 1),
        "it went to and fro: {:?}, then {:?}",
        before.stays,
        life.stays
    );
    Ok(())
}

/// That the guest goes on there and has not been anywhere else.
fn lives_on(world: &mut World, at: Side, run: &Run, before: &Life) -> Result<Ending> {
    if at == run.source.other() {
        has_moved(world, run.source, before)?;
        return Ok(Ending::Moved);
    }
    let life = goes_on(world, at, before)?;
    ensure!(
        life.stays == before.stays,
        "it is where it was and yet has been elsewhere: {:?}, then {:?}",
        before.stays,
        life.stays
    );
    proof::qemu_is_clean(&mut world.stage.vm(at).qmp()?)?;
    Ok(Ending::RolledBack)
}

/// That the guest went from `source` to the other host once, whole.
fn has_moved(world: &mut World, source: Side, before: &Life) -> Result<()> {
    let at = source.other();
    let life = goes_on(world, at, before)?;
    ensure!(
        before.host() == source.letter() && life.stays.len() == before.stays.len() + 1,
        "one move makes one stay more: {:?}, then {:?}",
        before.stays,
        life.stays
    );
    let (old, new, copies) = (world.stage.vm(source), world.stage.vm(at), &world.stage.copies[at.index()]);
    copies.same_as_source(&world.stage.paths, old, new)?;
    for disk in 0..new.spec.disks.len() {
        let verdict = new.verify(disk, &copies.disk(new, disk)?)?;
        ensure!(verdict.ok, "disk {disk} at the hand-over: {verdict:?}");
    }
    proof::qemu_is_clean(&mut new.qmp()?)?;
    world.stage.at = at;
    Ok(())
}

/// That the same boot of the guest makes new blocks on that host; gives what is known then.
fn goes_on(world: &World, at: Side, before: &Life) -> Result<Life> {
    let from = world.watcher.now().map_or(0, |life| life.last);
    wait_for(&format!("the guest to write on {}", at.name()), ALIVE_WITHIN, || {
        world.watcher.check()?;
        let life = world.watcher.now();
        Ok(life.filter(|l| l.host() == at.letter() && l.last >= from + ALIVE_BLOCKS).map(drop))
    })
    .with_context(|| format!("{:?}", world.watcher.now()))?;
    let life = world.watcher.look()?;
    ensure!(life.generation == before.generation, "the guest booted again");
    ensure!(life.host() == at.letter(), "the guest wrote elsewhere: {:?}", life.stays);
    Ok(life)
}

/// The guest may be nowhere only if the fault ended the QEMU to which it belonged.
fn may_be_gone(world: &World, run: &Run, injection: &Injection) -> Result<()> {
    let last = run.last();
    match injection.fault.ends_qemu() {
        Some(Who::SourceQemu) => Ok(()),
        Some(_) => {
            let handed_over = handed_over(world, run)?;
            ensure!(handed_over, "the guest was the source's and yet is gone: {last:?}");
            Ok(())
        }
        None => bail!("NO RUNNER: the guest is gone, and no QEMU was ended by the fault: {last:?}"),
    }
}

/// By the source's journal: the guest is the destination's.
fn handed_over(world: &World, run: &Run) -> Result<bool> {
    let folder = world.stage.agent(run.source).host().dir.join("state/migrations");
    let text = std::fs::read_to_string(folder.join(format!("{}.source.journal", run.migration.id)))?;
    Ok(text.contains("handed-over"))
}

/// That the source's agent does not say that the guest is elsewhere than it is.
fn says_the_same(report: Option<&Value>, ending: Ending) -> Result<()> {
    let Some(report) = report else { return Ok(()) };
    let result = report["outcome"]["result"].as_str().unwrap_or_default();
    let fits = match ending {
        Ending::Moved | Ending::MovedAfterSettling => result != "failed",
        Ending::RolledBack => result != "moved",
        Ending::GuestKilled => true,
    };
    ensure!(fits, "the guest {ending}, and its source says {report}");
    Ok(())
}

/// After its QEMU was killed the guest boots where it was, with empty disks: `verify` could not tell
/// the blocks of two boots apart.
fn boot_again(world: &mut World, source: Side, report: Option<&Value>) -> Result<()> {
    let moved = report.is_some_and(|r| r["outcome"]["result"] == "moved");
    let life = world.watcher.ended()?;
    let at = if moved || life.host() == source.other().letter() { source.other() } else { source };
    world.empty_disks(at)?;
    world.stage.vm(at).begin_boot()?;
    // Its serial line was long there before, so the new boot is known by its blocks alone.
    wait_for("the guest to boot again", BOOT_WITHIN, || {
        world.watcher.check()?;
        let young = world.watcher.now().filter(|l| l.generation != life.generation);
        Ok(young.filter(|l| l.last >= ALIVE_BLOCKS).map(drop))
    })?;
    world.stage.at = at;
    Ok(())
}

fn is_clean(world: &World) -> Result<()> {
    world.stage.vm(world.stage.at.other()).wait_ended()?;
    world.stage.is_clean()?;
    world.watcher.check()
}

/// Whether `vmferry migrate` ended otherwise than it should for a guest that moved.
fn cli_failed(run: Run) -> Result<bool> {
    Ok(run.cli.wait(LONG)?.code != 0)
}
