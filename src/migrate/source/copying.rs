//! The copy of a migration's disks and RAM: what is to be copied how, and the streams that carry it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;

use super::context::Context;
use super::meter::Meter;
use crate::migrate::model::convergence::{Convergence, Written};
use crate::migrate::model::forecast::{Forecast, Passes, Seen};
use crate::migrate::model::label::Label;
use crate::migrate::model::plan::{DiskPlan, Plan, Way};
use crate::migrate::model::progress::{Progress, ProgressSink};
use crate::migrate::transfer::disk::delta::{Delta, LeftCopy};
use crate::migrate::transfer::disk::tracking::Tracking;
use crate::migrate::transfer::streams::Streams;
use crate::qemu::names;

/// The rate is over about the last second.
const RATE_OVER: Duration = Duration::from_millis(900);
const MIB: u64 = 1 << 20;

/// The disks whose guest is slowed down, or may have to be.
#[derive(Debug, Default)]
pub(crate) struct Slowing {
    pub(crate) convergence: Convergence,
    /// Those that have caught up since.
    pub(crate) caught_up: BTreeSet<String>,
    /// What the guest writes to those that are to be limited, and how it began.
    pub(crate) measured: BTreeMap<String, Written>,
    /// How often nothing could be done for a disk.
    pub(crate) vain: BTreeMap<String, u32>,
}

impl Slowing {
    pub(crate) fn in_vain(&mut self, disk: &str, times: u32) {
        *self.vain.entry(disk.to_owned()).or_default() += times;
    }
}

/// The copy of a migration's disks and RAM.
pub(crate) struct Copying {
    pub(crate) plan: Plan,
    /// The jobs of mirrors that do not follow the guest yet.
    pub(crate) unready: Vec<String>,
    /// The same that are to end, with the guest at rest.
    pub(crate) unfinished: Vec<String>,
    /// All have completed well, and nobody but we takes their jobs off QEMU's list.
    pub(crate) completed: bool,
    pub(crate) streams: Streams,
    /// What a further try is to know.
    pub(crate) tracking: Tracking,
    /// Copies what changed since the try before.
    pub(crate) delta: Delta,
    rate: (Instant, u64),
    forecast: Forecast,
    pub(crate) meter: Meter,
    pub(crate) slowing: Slowing,
}

impl Copying {
    pub(crate) fn new(plan: Plan, streams: Streams, tracking: Tracking) -> Self {
        let delta = Delta::new();
        // What an earlier process has carried is none of this one's rate.
        let rate = (Instant::now(), streams.total());
        let (forecast, meter, slowing) = (Forecast::default(), Meter::default(), Slowing::default());
        let (unready, unfinished, completed) = (Vec::new(), Vec::new(), false);
        Self {
            plan,
            unready,
            unfinished,
            completed,
            streams,
            tracking,
            delta,
            rate,
            forecast,
            meter,
            slowing,
        }
    }

    /// What an earlier process of this agent has left of the disks of which only changes are copied. Before the first
    /// disk has begun each disk's way is chosen anew.
    pub(crate) fn take_up(&mut self, mut changes: BTreeMap<String, Option<LeftCopy>>) {
        if !self.has_begun() {
            return;
        }
        for plan in &mut self.plan.disks {
            let Some(left) = changes.remove(&plan.disk.name) else { continue };
            plan.way = Way::Changes;
            if let (Some(left), Some(followed)) = (left, self.tracking.disks.get(&plan.disk.name)) {
                self.delta.take_up(&plan.disk.name, followed.bitmaps.clone(), left);
            }
        }
    }

    /// The same for the next process, by disk; none of one whose copy has not begun.
    pub(crate) async fn leave_changes(&mut self) -> BTreeMap<String, Option<LeftCopy>> {
        let mut left = self.delta.leave().await;
        self.changes().map(|plan| (plan.disk.name.clone(), left.remove(&plan.disk.name))).collect()
    }

    /// The first disk of which only changes are copied and both sides are not known to be equal.
    pub(crate) fn first_open_change(&self) -> Option<String> {
        self.changes().find(|plan| !self.delta.is_equal(&plan.disk.name)).map(|plan| plan.disk.name.clone())
    }

    /// A disk whose stream is there and of whose copy nothing is known.
    pub(crate) fn lost_change(&self) -> Option<String> {
        let is_lost =
            |plan: &&DiskPlan| self.is_under_way(plan) && !self.delta.disks.contains_key(&plan.disk.name);
        self.changes().find(is_lost).map(|plan| plan.disk.name.clone())
    }

    fn changes(&self) -> impl Iterator<Item = &DiskPlan> {
        self.plan.disks.iter().filter(|plan| plan.way == Way::Changes)
    }

    /// The jobs of all mirrors.
    pub(crate) fn mirrors(&self) -> impl Iterator<Item = String> {
        let mirrored = self.plan.disks.iter().filter(|plan| plan.way.is_mirror());
        mirrored.map(|plan| names::job_id(&plan.disk.name))
    }

    /// The disk of one of our mirrors; others have jobs of their own.
    pub(crate) fn disk_of(&self, job: &str) -> Option<String> {
        let mut names = self.plan.disks.iter().map(|plan| &plan.disk.name);
        names.find(|name| names::job_id(name) == job).cloned()
    }

    /// A mirror follows the guest: what is at the destination is worth keeping from now on.
    pub(crate) fn mirror_is_ready(&mut self, job: &str) {
        self.tracking.in_step(job);
        self.unready.retain(|open| open != job);
    }

    pub(crate) fn mirror_finished(&mut self, job: &str) {
        self.unfinished.retain(|open| open != job);
    }

    /// Whether the copy of a disk has begun.
    pub(crate) fn is_under_way(&self, plan: &DiskPlan) -> bool {
        self.streams.has(&Label::Disk(plan.disk.name.clone()))
    }

    /// Whether the copy of any disk has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.plan.disks.iter().any(|plan| self.is_under_way(plan))
    }

    /// The disk whose copy begins next, if not so many are copied whole already. What changed since an earlier
    /// try is little and does not count.
    pub(crate) fn next_to_begin(&self, at_once: usize) -> Option<&DiskPlan> {
        let is_full = self.unready.len() >= at_once;
        let may_begin = |plan: &&DiskPlan| match plan.way {
            Way::Whole | Way::Top => !is_full && !self.is_under_way(plan),
            Way::Changes => !self.is_under_way(plan),
            Way::InBand(_) => false,
        };
        self.plan.disks.iter().find(may_begin)
    }

    /// Whether every disk was copied once.
    pub(crate) fn has_caught_up(&self) -> bool {
        let is_begun = self.plan.disks.iter().all(|plan| self.is_under_way(plan));
        is_begun
            && self.unready.is_empty()
            && self.changes().all(|plan| self.delta.copied_once(&plan.disk.name))
    }

    /// Whether nothing need move at this moment.
    pub(crate) fn is_idle(&self) -> bool {
        self.unready.is_empty() && self.delta.is_idle()
    }

    /// Whether both sides' disks are equal, with the guest at rest.
    pub(crate) fn is_finished(&self) -> bool {
        self.unfinished.is_empty() && self.first_open_change().is_none()
    }

    /// Ends all copying at once: the streams are cut, what this agent copies is dropped.
    pub(crate) async fn abort(&mut self) {
        self.streams.cut_all();
        self.delta.abort().await;
    }

    /// Brings the streams' bytes into the progress.
    pub(crate) fn count_bytes(&mut self, progress: &ProgressSink) {
        let total = self.streams.total();
        let (since, before) = self.rate;
        let elapsed = since.elapsed();
        let rate = (elapsed >= RATE_OVER).then(|| {
            self.rate = (Instant::now(), total);
            ((total - before) as f64 / elapsed.as_secs_f64()) as u64
        });
        let (streams, is_in_band) = (&self.streams, self.plan.in_band().is_some());
        progress.update(|p| {
            for disk in p.disks.iter_mut().filter(|_| !is_in_band) {
                let label = Label::Disk(disk.name.clone());
                (disk.stream_bytes, disk.saved_bytes) = (streams.bytes(&label), streams.saved(&label));
            }
            let of_ram = ram_stream_bytes(p, streams, is_in_band);
            if let Some(ram) = &mut p.ram {
                ram.stream_bytes = of_ram;
            }
            p.rate_bytes_per_s = rate.unwrap_or(p.rate_bytes_per_s);
        });
    }

    /// Bytes on the RAM's stream, without those that are known to be disks'.
    pub(crate) fn ram_stream_bytes(&self, progress: &ProgressSink) -> u64 {
        ram_stream_bytes(&progress.now(), &self.streams, self.plan.in_band().is_some())
    }

    /// Brings the copies of changes into the progress; what they still have to copy.
    pub(crate) fn count_changes(&self, progress: &ProgressSink) -> u64 {
        let mut remaining = 0;
        progress.update(|p| {
            for (name, copied) in &self.delta.disks {
                let (done, left) = (copied.bytes.load(Relaxed), copied.left());
                remaining += left;
                if let Some(disk) = p.disks.iter_mut().find(|d| d.name == *name) {
                    disk.total_bytes = done.saturating_add(left);
                    (disk.done_bytes, disk.ready) = (done, copied.once.load(Relaxed));
                    disk.left_bytes = Some(left);
                }
            }
        });
        remaining
    }

    /// Foretells the rest from what the progress has of disks and RAM.
    pub(crate) fn foresee(&mut self, progress: &ProgressSink, passes: Option<Passes>, is_away: bool) {
        let forecast = &mut self.forecast;
        if is_away {
            forecast.forget();
        }
        progress.update(|p| {
            let (copied_bytes, left) = (p.copied_bytes(), p.left_bytes());
            let Some(whole) = &mut p.whole else { return };
            match left {
                Some((disks_left_bytes, left_bytes)) if !is_away => {
                    let seen = Seen { copied_bytes, left_bytes, disks_left_bytes, passes };
                    forecast.look(Instant::now().into_std(), &seen, whole);
                }
                _ => whole.stand_still(),
            }
        });
    }

    /// Whether the guest makes more to copy than is copied.
    pub(crate) fn is_outrun(&self) -> bool {
        self.forecast.is_outrun()
    }

    /// Says how much was copied again.
    pub(crate) fn note_changes(&self, context: &Context) {
        for (name, copied) in &self.delta.disks {
            let size =
                self.plan.disks.iter().find(|p| p.disk.name == *name).map_or(0, |p| p.disk.virtual_size);
            let bytes = copied.bytes.load(Relaxed);
            context.note(format!("{name}: {} MiB of {} MiB copied again", bytes.div_ceil(MIB), size / MIB));
        }
    }
}

fn ram_stream_bytes(p: &Progress, streams: &Streams, is_in_band: bool) -> u64 {
    let of_disks = if is_in_band { p.disks.iter().map(|disk| disk.stream_bytes).sum() } else { 0 };
    streams.bytes(&Label::Ram).saturating_sub(of_disks)
}
