//! Brings a migration to a phase and holds it there: by gates before the destination's commands, by a
//! slow link, and by a pause that QEMU never thinks short enough.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::cut::streams;
use super::migration::order;
use super::stage::VM;
use super::{Migration, Stage};
use crate::support::process::{LONG, wait_for};

const MIB: u64 = 1 << 20;
/// The disks take 8 s or more at this rate, and for ever while the guest writes at its ordinary rate.
const MIRROR_MBIT: u32 = 64;
/// The guest dirties its RAM several times while QEMU sends it once at this rate: a faster link carries it in
/// the rest between two rounds, and then the pause is short enough.
const FAST_MBIT: u32 = 800;
/// The same, for a guest that has little of a busy processor.
const PRECOPY_MBIT: u32 = 200;
/// What is left to copy when the guest is paused takes some seconds at this rate.
const PAUSE_MBIT: u32 = 24;
const PAUSE_LAG_BYTES: u64 = 8 * MIB;
/// The same onto images that the agent has made: there a block makes QEMU copy 4 KiB and no more.
const MADE_PAUSE_MBIT: u32 = 6;
const MADE_PAUSE_LAG_BYTES: u64 = 2 * MIB;
/// An ordinary guest's disks lag so far in a few seconds.
const LAG_WITHIN: Duration = Duration::from_secs(30);
/// QEMU never believes that the rest of the RAM fits into this pause while the guest dirties some.
const NEVER_MS: &str = "1";
/// QEMU pauses the guest as soon as it may.
const AT_ONCE_MS: u64 = 600_000;

/// Where a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The destination makes an image for this disk.
    Image(usize),
    /// The destination starts its QEMU.
    Prepare,
    /// The destination has granted everything, and the source's QEMU does not answer.
    Granted,
    /// One disk's copy is under way and the next has not begun.
    OneDisk,
    /// Every disk's copy is under way.
    Mirror,
    /// The RAM's copy is under way and never gets done.
    Precopy,
    /// The guest is paused and its disks lag seconds behind.
    Switchover,
    /// The guest is paused and the rest of its RAM takes seconds.
    Device,
    /// Handed over; the destination's `before_start` command is at work.
    HandOver,
}

impl Stage {
    /// Begins a migration and brings it to where a fault is to hit.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach(&mut self, reach: Reach) -> Result<Migration> {
        self.reach_with(reach, &[])
    }

    /// The same, with further options of `vmferry migrate`.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach_with(&mut self, reach: Reach, more: &[&str]) -> Result<Migration> {
        match reach {
            Reach::Image(disk) => self.images[disk].close()?,
            Reach::Prepare | Reach::Granted => self.start().close()?,
            Reach::Mirror | Reach::OneDisk => self.limit(MIRROR_MBIT)?,
            Reach::HandOver => self.hook().close()?,
            Reach::Precopy | Reach::Switchover | Reach::Device => {}
        }
        let options: &[&str] = match reach {
            Reach::Precopy | Reach::Switchover | Reach::Device => &["--downtime-limit", NEVER_MS],
            Reach::OneDisk => &["--disks-at-once", "1"],
            _ => &[],
        };
        // That its disk is too small is found beforehand.
        let accept: &[&str] = if self.disks[1].is_some() { &["--accept", "no-room"] } else { &[] };
        let migration = Migration::begin(&self.alpha, VM, "bravo", &[options, accept, more].concat())?;
        self.advance(reach, &migration).with_context(|| format!("reaching {reach:?}"))?;
        Ok(migration)
    }

    /// Begins a migration that is slow and does not pause the guest by itself.
    ///
    /// # Errors
    /// The command line's.
    pub fn begin(&mut self) -> Result<Migration> {
        self.limit_to_mirror()?;
        Migration::begin(&self.alpha, VM, "bravo", &["--downtime-limit", NEVER_MS, "--keep-source"])
    }

    /// Makes the link so slow that the disks of a guest that writes never catch up.
    ///
    /// # Errors
    /// The network's.
    pub fn limit_to_mirror(&mut self) -> Result<()> {
        self.limit(MIRROR_MBIT)
    }

    /// Brings a migration that was begun with [`Stage::begin`] from one phase to the next.
    ///
    /// # Errors
    /// It does not get there.
    pub fn bring_to(&mut self, reach: Reach, migration: &Migration) -> Result<()> {
        self.step(reach, migration).with_context(|| format!("reaching {reach:?}"))
    }

    fn step(&mut self, reach: Reach, migration: &Migration) -> Result<()> {
        match reach {
            Reach::Image(disk) => self.images[disk].wait_reached(),
            Reach::Prepare => self.start().wait_reached(),
            Reach::Granted => self.hold_granted(migration),
            Reach::OneDisk => {
                let alone = |p: &Value| {
                    let done: Vec<u64> = disks(p).map(|d| number(d, "done_bytes")).collect();
                    matches!(done[..], [first, 0] if first > MIB)
                };
                migration.reach(&self.alpha.socket(), "mirror", alone).map(drop)
            }
            Reach::Mirror => {
                let flows = |p: &Value| disks(p).all(|d| number(d, "done_bytes") > MIB);
                migration.reach(&self.alpha.socket(), "mirror", flows).map(drop)
            }
            Reach::Precopy => {
                self.limit(FAST_MBIT)?;
                let flows = |p: &Value| number(&p["ram"], "stream_bytes") > MIB;
                migration.reach(&self.alpha.socket(), "precopy", flows)?;
                self.limit(PRECOPY_MBIT)
            }
            Reach::Switchover => self.pause(migration, "switchover"),
            Reach::Device => migration.reach(&self.alpha.socket(), "device", |_| true).map(drop),
            Reach::HandOver => self.hook().wait_reached(),
        }
    }

    fn advance(&mut self, reach: Reach, migration: &Migration) -> Result<()> {
        if !matches!(reach, Reach::Mirror | Reach::Precopy | Reach::Switchover | Reach::Device) {
            return self.step(reach, migration);
        }
        self.step(Reach::Mirror, migration)?;
        self.note_disk_streams()?;
        if reach != Reach::Mirror {
            self.step(Reach::Precopy, migration)?;
        }
        match reach {
            Reach::Switchover => self.pause(migration, "switchover"),
            Reach::Device => self.pause(migration, "device"),
            _ => Ok(()),
        }
    }

    /// The source's QEMU stands still from before the grant until all is calmed.
    fn hold_granted(&mut self, migration: &Migration) -> Result<()> {
        self.start().wait_reached()?;
        self.stop_source()?;
        self.start().open();
        wait_for("the grant", LONG, || {
            let now = migration.now(&self.bravo).unwrap_or_default();
            Ok((now["phase"] == "prepare" && disks(&now).count() > 0).then_some(()))
        })
    }

    /// While only disks are copied.
    fn note_disk_streams(&mut self) -> Result<()> {
        for (seen, (agent, vm)) in
            self.disk_streams.iter_mut().zip([(&self.alpha, &self.source), (&self.bravo, &self.destination)])
        {
            *seen = streams(agent, vm)?.into_iter().map(|(inode, _)| inode).collect();
            ensure!(seen.len() == vm.spec.disks.len(), "{seen:?} on {}", vm.host_name());
        }
        Ok(())
    }

    /// Pauses the guest: for the switchover's sake when its disks lag far behind, for that of the device
    /// phase at once.
    fn pause(&mut self, migration: &Migration, phase: &str) -> Result<()> {
        let alpha = self.alpha.socket();
        let (mbit, lag_bytes) = match (phase, self.created) {
            ("switchover", 1..) => (MADE_PAUSE_MBIT, MADE_PAUSE_LAG_BYTES),
            _ => (PAUSE_MBIT, PAUSE_LAG_BYTES),
        };
        if phase == "device" {
            self.limit(mbit)?;
        } else {
            self.have_disks_lag(migration, mbit, lag_bytes)?;
        }
        self.pause_at_once();
        migration.reach(&alpha, phase, |_| true).map(drop)
    }

    /// A guest that has little of a busy processor writes less: the link is made slower then.
    fn have_disks_lag(&mut self, migration: &Migration, mbit: u32, lag_bytes: u64) -> Result<()> {
        for slower in [1, 2, 4] {
            self.limit(mbit / slower)?;
            let lags = |p: &Value| lag(p) > lag_bytes;
            if migration.reach_within(LAG_WITHIN, &self.alpha.socket(), "precopy", lags)?.is_some() {
                return Ok(());
            }
        }
        bail!("the disks never lagged by {lag_bytes} bytes: {}", migration.now(&self.alpha)?)
    }

    /// Has the source's QEMU pause its guest for the rest of the RAM, however much that is.
    /// Does not wait for QEMU's answer: its main loop may be busy with the pause before it answers.
    pub fn pause_at_once(&self) {
        let source = self.source.clone();
        std::thread::spawn(move || {
            let now = json!({"downtime-limit": AT_ONCE_MS});
            source.qmp().and_then(|mut qmp| qmp.execute("migrate-set-parameters", now))
        });
    }

    /// The same in a further try. Each try gives QEMU its own limit before the RAM flows, and an earlier one is gone.
    ///
    /// # Errors
    /// That try does not come.
    pub fn pause_at_once_in_try(&self, migration: &Migration, number: u64) -> Result<()> {
        wait_for(&format!("the RAM to flow in try {number}"), LONG, || {
            let now = migration.now(&self.alpha)?;
            ensure!(now["outcome"].is_null() || now["tries"]["number"] == number, "it ended before: {now}");
            let phase = order(now["phase"].as_str().unwrap_or_default());
            let flows = phase == order("precopy") && self::number(&now["ram"], "stream_bytes") > MIB;
            Ok((now["tries"]["number"] == number && (flows || phase > order("precopy"))).then_some(()))
        })?;
        self.pause_at_once();
        Ok(())
    }
}

fn disks(progress: &Value) -> impl Iterator<Item = &Value> {
    progress["disks"].as_array().into_iter().flatten()
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

/// Bytes that the mirrors are behind.
fn lag(progress: &Value) -> u64 {
    disks(progress).map(|d| number(d, "total_bytes").saturating_sub(number(d, "done_bytes"))).sum()
}
