//! What others do to a QEMU during a migration: somebody at a second monitor, and somebody at ours.

use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Side;
use super::run::Run;
use super::world::World;
use crate::faults::cut::cut_monitor;
use crate::support::Qmp;

/// Jobs of the flood; each makes about eight events.
const FLOOD_JOBS: usize = 1_500;
/// The migration ends meanwhile, or is judged as it is.
const ENDS_WITHIN: Duration = Duration::from_secs(25);
/// The guest's controller that takes disks while it runs, and the disk.
const BUS: &str = "hotplug.0";
const PLUGGED: &str = "plugged";

/// Cuts the agent's connection to its monitor; QEMU lives on. `lasts`: so long somebody else is
/// connected instead.
///
/// # Errors
/// `ss` fails.
pub fn monitor_cut(world: &World, side: Side, lasts: Option<Duration>) -> Result<()> {
    let vm = world.vm(side);
    if !cut_monitor(world.agent(side), vm)? {
        return Ok(());
    }
    if let Some(lasts) = lasts {
        let somebody = UnixStream::connect(vm.agent_monitor());
        sleep(lasts);
        drop(somebody);
    }
    Ok(())
}

/// Jobs that nobody's disk has to do with, one after the other.
///
/// # Errors
/// None: a QEMU that ends meanwhile ends the flood.
pub fn flood(world: &World, side: Side) -> Result<()> {
    let Some(mut qmp) = monitor(world, side) else { return Ok(()) };
    let node =
        |name: &str| json!({"driver": "null-co", "node-name": name, "size": 65536, "read-zeroes": true});
    let job = json!({"job-id": "flood", "device": "flood-a", "target": "flood-b", "sync": "full"});
    let _ = qmp.execute("blockdev-add", node("flood-a"));
    let _ = qmp.execute("blockdev-add", node("flood-b"));
    for _ in 0..FLOOD_JOBS {
        // The one before may not be over yet.
        if qmp.execute("blockdev-backup", job.clone()).is_err() && !world.vm(side).is_running() {
            return Ok(());
        }
    }
    for name in ["flood-a", "flood-b"] {
        let _ = qmp.execute("blockdev-del", json!({"node-name": name}));
    }
    Ok(())
}

/// An operator pauses the guest, and lets it go on where it is when all is over: there it must be paused.
///
/// # Errors
/// None: a QEMU that gives its guest away takes no such command.
pub fn stop_for_good(world: &World, run: &Run) -> Result<()> {
    let Some(mut qmp) = monitor(world, run.source) else { return Ok(()) };
    let stopped = pauses(&mut qmp);
    drop(qmp);
    run.wait_end(ENDS_WITHIN);
    if stopped {
        let running = Side::BOTH.into_iter().find(|side| runs(world, *side));
        ensure!(running.is_none(), "an operator had paused the guest, and it runs on {running:?}");
        go_on(world, run.source);
    }
    Ok(())
}

fn runs(world: &World, side: Side) -> bool {
    monitor(world, side).is_some_and(|mut qmp| qmp.status().is_ok_and(|status| status == "running"))
}

/// Whether the guest is paused by this, and not by its migration, which would hide it.
fn pauses(qmp: &mut Qmp) -> bool {
    let early = |qmp: &mut Qmp| {
        let found = qmp.query("query-migrate").map(|found| found["status"].clone());
        // What is over was an earlier try, or the trial before the disks.
        let late = ["pre-switchover", "device", "completed"];
        found.is_ok_and(|status| !late.iter().any(|word| status == *word))
    };
    qmp.status().is_ok_and(|status| status == "running")
        && qmp.query("stop").is_ok()
        && qmp.status().is_ok_and(|status| status == "paused")
        && early(qmp)
}

/// An operator pauses the guest for a while.
///
/// # Errors
/// None, as above.
pub fn stop_and_cont(world: &World, source: Side, lasts: Duration) -> Result<()> {
    let Some(mut qmp) = monitor(world, source) else { return Ok(()) };
    if pauses(&mut qmp) {
        drop(qmp);
        sleep(lasts);
        go_on(world, source);
    }
    Ok(())
}

/// Lets a guest go on that is paused, wherever it is by now.
fn go_on(world: &World, source: Side) {
    let until = Instant::now() + ENDS_WITHIN;
    while Instant::now() < until && !Side::BOTH.into_iter().any(|side| runs(world, side)) {
        Side::BOTH.into_iter().for_each(|side| try_cont(world, source, side));
        sleep(Duration::from_millis(100));
    }
}

/// At the source a guest is `paused` only while it is there: one that was given away is `postmigrate`. At
/// the destination it is there once the source's QEMU has ended.
fn try_cont(world: &World, source: Side, side: Side) {
    let Some(mut qmp) = monitor(world, side) else { return };
    let paused = qmp.status().is_ok_and(|status| status == "paused");
    if paused && (side == source || !world.vm(source).is_running()) {
        let _ = qmp.query("cont");
    }
}

/// An operator ends QEMU.
///
/// # Errors
/// None: it may close the monitor before it has answered.
pub fn quit(world: &World, source: Side) -> Result<()> {
    if let Some(mut qmp) = monitor(world, source) {
        let _ = qmp.query("quit");
    }
    Ok(())
}

/// An operator gives the guest one more disk, and takes it away when all is over.
///
/// # Errors
/// None: a QEMU that has given its guest away takes no disk.
pub fn hot_plug(world: &World, run: &Run) -> Result<()> {
    let Some(mut qmp) = monitor(world, run.source) else { return Ok(()) };
    let node = json!({"driver": "null-co", "node-name": PLUGGED, "size": 1 << 20, "read-zeroes": true});
    let device = json!({"driver": "scsi-hd", "bus": BUS, "id": PLUGGED, "drive": PLUGGED});
    let plugged: Result<Value> =
        qmp.execute("blockdev-add", node).and_then(|_| qmp.execute("device_add", device));
    drop(qmp);
    run.wait_end(ENDS_WITHIN);
    if let (Ok(_), Some(mut qmp)) = (plugged, monitor(world, run.source)) {
        let _ = qmp.execute("device_del", json!({"id": PLUGGED}));
        let _ = qmp.wait_event("DEVICE_DELETED", Duration::from_secs(5));
        let _ = qmp.execute("blockdev-del", json!({"node-name": PLUGGED}));
    }
    Ok(())
}

/// None where no QEMU runs.
fn monitor(world: &World, side: Side) -> Option<Qmp> {
    world.vm(side).is_running().then(|| world.vm(side).qmp().ok()).flatten()
}
