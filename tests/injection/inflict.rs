//! The faults themselves. Each breaks one thing at its moment, lets it be broken for its time, and
//! then repairs it as far as an operator, a supervisor or the network would.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::Signal;

use super::plan::{Fault, Injection, Who};
use super::run::Run;
use super::world::{World, volume_folder};
use super::{Side, others};
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{SHORT, run, run_any, signal_pid};

/// What is broken "for ever" is repaired after this time even if the migration does not end.
const FOR_EVER: Duration = Duration::from_secs(25);
const SLOW_MBIT: u32 = 4;

/// When it hit.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The moment.
    pub at: Instant,
    /// The phase that the source had said last.
    pub phase: String,
}

/// Waits for the fault's moment, breaks, repairs.
///
/// # Errors
/// The fault itself could not be made.
pub fn inflict(world: &mut World, run: &mut Run, injection: &Injection) -> Result<Hit> {
    let destination = run.source.other();
    if injection.moment.held {
        world.gate(injection, destination).wait_reached()?;
    } else {
        run.reach(injection.moment.phase)?;
    }
    sleep(Duration::from_millis(injection.moment.after_ms));
    let hit = Hit { at: Instant::now(), phase: run.phase() };
    if injection.moment.held {
        // It goes on while the thing is broken.
        let gate = world.gate(injection, destination).clone();
        let after = Duration::from_millis(injection.lasts_ms / 2);
        std::thread::spawn(move || {
            sleep(after);
            gate.open();
        });
    }
    let lasts = Duration::from_millis(injection.lasts_ms);
    break_it(world, run, injection, lasts).with_context(|| format!("the fault itself: {injection}"))?;
    world.calm()?;
    Ok(hit)
}

fn break_it(world: &mut World, run: &mut Run, injection: &Injection, lasts: Duration) -> Result<()> {
    let (source, destination) = (run.source, run.source.other());
    let variant = injection.variant;
    match injection.fault {
        Fault::Reset => reset(world, if variant { source } else { destination }),
        Fault::LinkDown => link_down(world, variant, || sleep(lasts)),
        Fault::LinkDownForEver => link_down(world, variant, || {
            run.wait_end(FOR_EVER);
        }),
        Fault::OneWay => one_way(world, if variant { source } else { destination }, lasts),
        Fault::Kill(Who::CommandLine) => run.cli.signal(Signal::SIGKILL),
        Fault::Kill(who) => kill(world, source, who, lasts),
        Fault::Stop(who) => stop(world, source, who, lasts),
        Fault::Terminate(who) => terminate(world, source, who, lasts),
        Fault::Replace(who) => replace(world, source, who),
        Fault::SourceStateFull => state_full(world, run, source),
        Fault::DestinationStateFull => state_full(world, run, destination),
        Fault::DestinationDiskFull => disk_full(world, run, destination),
        Fault::SlowDisk => slow_disk(world, destination, lasts),
        Fault::MonitorCut(who) => others::monitor_cut(world, qemu_of(source, who), None),
        Fault::MonitorTaken(who) => others::monitor_cut(world, qemu_of(source, who), Some(lasts)),
        Fault::EventFlood(who) => others::flood(world, qemu_of(source, who)),
        Fault::OperatorStops => others::stop_for_good(world, run),
        Fault::OperatorStopsAndContinues => others::stop_and_cont(world, source, lasts),
        Fault::OperatorQuits => others::quit(world, source),
        Fault::HotPlug => others::hot_plug(world, run),
        Fault::SlowLink => {
            world.limit(SLOW_MBIT)?;
            sleep(lasts);
            Ok(())
        }
    }
}

/// Ends the agents' connection as the kernel of one host would.
///
/// # Errors
/// `ss` fails.
pub fn reset(world: &World, side: Side) -> Result<()> {
    let filter = format!("( dport = :{PORT} or sport = :{PORT} )");
    // Its exit code tells nothing: a connection may be gone by itself.
    run_any(world.agent(side).host().command("ss").args(["-K", "-tn", &filter]), SHORT).map(drop)
}

fn link_down(world: &World, cable: bool, wait: impl FnOnce()) -> Result<()> {
    if cable {
        world.net.pull_cable()?
    } else {
        world.net.cut()?
    }
    wait();
    if cable { world.net.plug_cable() } else { world.net.restore() }
}

fn one_way(world: &World, deaf: Side, lasts: Duration) -> Result<()> {
    let way = if deaf == Side::Bravo { Way::ToBravo } else { Way::ToAlpha };
    world.net.drop_way(way)?;
    sleep(lasts);
    world.net.restore()
}

fn kill(world: &mut World, source: Side, who: Who, away: Duration) -> Result<()> {
    let (agents, qemus) = victims(source, who);
    // First all are hit, then all are buried: a host that is lost loses them at once.
    for side in &agents {
        world.agent(*side).signal(Signal::SIGKILL)?;
    }
    for side in &qemus {
        signal_qemu(world, *side, Signal::SIGKILL)?;
    }
    for side in &agents {
        world.agent_mut(*side).kill()?;
    }
    for side in &qemus {
        world.vm(*side).wait_ended()?;
    }
    sleep(away);
    agents.iter().try_for_each(|side| world.agent_mut(*side).restart())
}

fn terminate(world: &mut World, source: Side, who: Who, away: Duration) -> Result<()> {
    let (agents, qemus) = victims(source, who);
    for side in &qemus {
        signal_qemu(world, *side, Signal::SIGTERM)?;
    }
    for side in &agents {
        world.agent(*side).signal(Signal::SIGTERM)?;
    }
    for side in &agents {
        world.agent_mut(*side).terminate()?;
    }
    if agents.is_empty() {
        return Ok(());
    }
    sleep(away);
    agents.iter().try_for_each(|side| world.agent_mut(*side).restart())
}

/// One after the other begins, and none waits for the other.
fn replace(world: &mut World, source: Side, who: Who) -> Result<()> {
    let (sides, _) = victims(source, who);
    let agents = world.agents.iter_mut().zip(Side::BOTH).filter(|(_, side)| sides.contains(side));
    std::thread::scope(|scope| {
        let at_work: Vec<_> = agents.map(|(agent, _)| scope.spawn(|| agent.take_over())).collect();
        at_work.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("it panicked"))?)
    })
}

fn stop(world: &World, source: Side, who: Who, lasts: Duration) -> Result<()> {
    let (agents, qemus) = victims(source, who);
    for signal in [Signal::SIGSTOP, Signal::SIGCONT] {
        for side in &agents {
            world.agent(*side).signal(signal)?;
        }
        for side in &qemus {
            signal_qemu(world, *side, signal)?;
        }
        if signal == Signal::SIGSTOP {
            sleep(lasts);
        }
    }
    Ok(())
}

/// Of which sides the agents, and of which the QEMUs.
fn victims(source: Side, who: Who) -> (Vec<Side>, Vec<Side>) {
    let destination = source.other();
    match who {
        Who::SourceAgent => (vec![source], vec![]),
        Who::DestinationAgent => (vec![destination], vec![]),
        Who::BothAgents => (vec![source, destination], vec![]),
        Who::SourceQemu => (vec![], vec![source]),
        Who::DestinationQemu => (vec![], vec![destination]),
        Who::SourceHost => (vec![source], vec![source]),
        Who::DestinationHost => (vec![destination], vec![destination]),
        Who::CommandLine => (vec![], vec![]),
    }
}

/// The side of a QEMU.
fn qemu_of(source: Side, who: Who) -> Side {
    if who == Who::DestinationQemu { source.other() } else { source }
}

/// One that has not been started yet, or has ended by itself, is not hit.
fn signal_qemu(world: &World, side: Side, signal: Signal) -> Result<()> {
    world.vm(side).pid().map_or(Ok(()), |pid| signal_pid(pid, signal))
}

fn state_full(world: &mut World, run: &Run, side: Side) -> Result<()> {
    let volume = &world.state[side.index()];
    volume.fill()?;
    run.wait_end(FOR_EVER);
    volume.empty()
}

fn disk_full(world: &mut World, run: &Run, destination: Side) -> Result<()> {
    let volume = &world.disk[destination.index()];
    volume.fill()?;
    run.wait_end(FOR_EVER);
    volume.empty()
}

/// The file system below the destination's second disk takes nothing, three quarters of the time.
fn slow_disk(world: &World, destination: Side, lasts: Duration) -> Result<()> {
    let folder = volume_folder(world.vm(destination));
    let freeze = |flag: &str| run(Command::new("fsfreeze").arg(flag).arg(&folder), SHORT).map(drop);
    let end = Instant::now() + lasts;
    while Instant::now() < end {
        freeze("--freeze")?;
        sleep(Duration::from_millis(300));
        freeze("--unfreeze")?;
        sleep(Duration::from_millis(100));
    }
    Ok(())
}
