//! What others do to a QEMU during a migration: somebody at a second monitor, and somebody at ours.

use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::cut::cut_monitor;
use super::fault::Breaking;
use super::{Side, Stage};
use crate::support::Qmp;

/// Jobs of the flood; each makes about eight events.
const FLOOD_JOBS: usize = 1_500;
/// The migration ends meanwhile, or is judged as it is.
const ENDS_WITHIN: Duration = Duration::from_secs(25);
/// The guest's controller that takes disks while it runs, and the disk.
const BUS: &str = "hotplug.0";
const PLUGGED: &str = "plugged";

// A QEMU that ends meanwhile, or has given its guest away, takes no command: that is no error here.
impl Breaking<'_> {
    /// Cuts the agent's connection to its monitor; QEMU lives on. False: there is none.
    pub(super) fn cut_monitor(&self, side: Side) -> Result<bool> {
        cut_monitor(self.stage.agent(side), self.stage.vm(side))
    }

    /// The same, and somebody else is connected instead for a while.
    pub(super) fn take_monitor(&mut self, side: Side) -> Result<()> {
        if self.cut_monitor(side)? {
            let somebody = UnixStream::connect(self.stage.vm(side).agent_monitor());
            self.pass()?;
            drop(somebody);
        }
        Ok(())
    }

    /// Jobs that nobody's disk has to do with, one after the other.
    pub(super) fn flood(&self, side: Side) -> Result<()> {
        let Some(mut qmp) = monitor(self.stage, side) else { return Ok(()) };
        let node =
            |name: &str| json!({"driver": "null-co", "node-name": name, "size": 65536, "read-zeroes": true});
        let job = json!({"job-id": "flood", "device": "flood-a", "target": "flood-b", "sync": "full"});
        let _ = qmp.execute("blockdev-add", node("flood-a"));
        let _ = qmp.execute("blockdev-add", node("flood-b"));
        for _ in 0..FLOOD_JOBS {
            // The one before may not be over yet.
            if qmp.execute("blockdev-backup", job.clone()).is_err() && !self.stage.vm(side).is_running() {
                return Ok(());
            }
        }
        for name in ["flood-a", "flood-b"] {
            let _ = qmp.execute("blockdev-del", json!({"node-name": name}));
        }
        Ok(())
    }

    /// An operator pauses the guest, and lets it go on where it is when all is over: there it must be
    /// paused.
    pub(super) fn stop_for_good(&self) -> Result<()> {
        let Some(mut qmp) = monitor(self.stage, self.source) else { return Ok(()) };
        let stopped = pauses(&mut qmp);
        drop(qmp);
        self.wait_end();
        if stopped {
            let running = Side::BOTH.into_iter().find(|side| runs(self.stage, *side));
            ensure!(running.is_none(), "an operator had paused the guest, and it runs on {running:?}");
            self.go_on();
        }
        Ok(())
    }

    /// An operator pauses the guest for a while.
    pub(super) fn stop_and_cont(&mut self) -> Result<()> {
        let Some(mut qmp) = monitor(self.stage, self.source) else { return Ok(()) };
        if pauses(&mut qmp) {
            drop(qmp);
            self.pass()?;
            self.go_on();
        }
        Ok(())
    }

    /// Lets a guest go on that is paused, wherever it is by now.
    fn go_on(&self) {
        let until = Instant::now() + ENDS_WITHIN;
        while Instant::now() < until && !Side::BOTH.into_iter().any(|side| runs(self.stage, side)) {
            Side::BOTH.into_iter().for_each(|side| self.try_cont(side));
            sleep(Duration::from_millis(100));
        }
    }

    /// At the source a guest is `paused` only while it is there: one that was given away is
    /// `postmigrate`. At the destination it is there once the source's QEMU has ended.
    fn try_cont(&self, side: Side) {
        let Some(mut qmp) = monitor(self.stage, side) else { return };
        let paused = qmp.status().is_ok_and(|status| status == "paused");
        if paused && (side == self.source || !self.stage.vm(self.source).is_running()) {
            let _ = qmp.query("cont");
        }
    }

    /// An operator ends QEMU, which may close the monitor before it has answered.
    pub(super) fn quit(&self) -> Result<()> {
        if let Some(mut qmp) = monitor(self.stage, self.source) {
            let _ = qmp.query("quit");
        }
        Ok(())
    }

    /// An operator gives the guest one more disk, and takes it away when all is over.
    pub(super) fn hot_plug(&self) -> Result<()> {
        let Some(mut qmp) = monitor(self.stage, self.source) else { return Ok(()) };
        let node = json!({"driver": "null-co", "node-name": PLUGGED, "size": 1 << 20, "read-zeroes": true});
        let device = json!({"driver": "scsi-hd", "bus": BUS, "id": PLUGGED, "drive": PLUGGED});
        let plugged: Result<Value> =
            qmp.execute("blockdev-add", node).and_then(|_| qmp.execute("device_add", device));
        drop(qmp);
        self.wait_end();
        if let (Ok(_), Some(mut qmp)) = (plugged, monitor(self.stage, self.source)) {
            let _ = qmp.execute("device_del", json!({"id": PLUGGED}));
            let _ = qmp.wait_event("DEVICE_DELETED", Duration::from_secs(5));
            let _ = qmp.execute("blockdev-del", json!({"node-name": PLUGGED}));
        }
        Ok(())
    }

    fn wait_end(&self) {
        self.migration.wait_end(self.stage.agent(self.source), ENDS_WITHIN);
    }
}

fn runs(stage: &Stage, side: Side) -> bool {
    monitor(stage, side).is_some_and(|mut qmp| qmp.status().is_ok_and(|status| status == "running"))
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

/// None where no QEMU runs.
fn monitor(stage: &Stage, side: Side) -> Option<Qmp> {
    stage.vm(side).is_running().then(|| stage.vm(side).qmp().ok()).flatten()
}
