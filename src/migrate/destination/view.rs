//! What a destination shows of its migration: phases, the bytes that come, and at the end what only the
//! source could measure. What a source says is shown and nothing is decided by it. The source is told how busy this
//! side is.

use std::time::Instant;

use super::busy;
use super::state::Destination;
use crate::migrate::model::label::Label;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::progress::{DiskProgress, Outcome, Progress, RamProgress, Reconnecting};
use crate::migrate::protocol::message::{Offer, Reply, Summary};
use crate::migrate::protocol::server::Control;
use crate::net::cpu_time::CpuTime;

impl Destination {
    /// Where the migration is, by what the source asks and what arrives; it never goes back.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut is_new = false;
        self.progress.update(|p| {
            is_new = phase > p.phase;
            p.phase = p.phase.max(phase);
        });
        if is_new {
            let migration = self.journal.past().header.migration;
            tracing::info!(%migration, vm = self.vm, peer = %self.peer, phase = phase.name(), "phase");
        }
    }

    pub(crate) fn log_end(&self, outcome: &Outcome) {
        let (migration, phase) = (self.journal.past().header.migration, self.progress.now().phase);
        tracing::info!(%migration, vm = self.vm, peer = %self.peer, phase = phase.name(), result = outcome.label(), "migration ends");
    }

    /// The disks that are to come, but for those that come inside QEMU's own stream: of these nothing is known
    /// here.
    pub(crate) fn show_disks(&self, offer: &Offer) {
        let copied = offer.disks.iter().filter(|d| self.data.exports.iter().any(|e| e.disk == d.name));
        let bounded = |bytes: u64| bytes.min(Summary::BYTES_MAX);
        let disks = copied.map(|d| DiskProgress {
            left_bytes: None,
            ..DiskProgress::new(
                &d.name,
                bounded(d.virtual_size),
                d.place.as_ref().and_then(|place| place.allocated).map(bounded),
            )
        });
        let disks = disks.collect();
        self.progress.update(|p| p.disks = disks);
    }

    /// The bytes that have come, and the connection by which they come.
    pub(crate) fn look_at_streams(&mut self) {
        let total = self.data.streams.total();
        let (since, before) = std::mem::replace(&mut self.serving.rate, (Instant::now(), total));
        let per_s = (total.saturating_sub(before)) as f64 / since.elapsed().as_secs_f64().max(0.001);
        let away =
            self.serving.control.as_ref().and_then(Control::away).map(|away| Reconnecting::from(&away));
        self.progress.update(|p| {
            for disk in &mut p.disks {
                let label = Label::Disk(disk.name.clone());
                (disk.stream_bytes, disk.saved_bytes) =
                    (self.data.streams.bytes(&label), self.data.streams.saved(&label));
                disk.done_bytes = disk.stream_bytes.min(disk.total_bytes);
            }
            if self.data.streams.has(&Label::Ram) {
                p.ram.get_or_insert_default().stream_bytes = self.data.streams.bytes(&Label::Ram);
            }
            p.rate_bytes_per_s = per_s as u64;
            p.reconnecting = away;
        });
    }

    /// Says it to a source that wants to know, while there is something to be slow with.
    pub(crate) async fn tell_busy(&mut self) {
        let hears = self.granted.as_ref().is_some_and(|(offer, _)| offer.hears_busy);
        let comes = matches!(self.progress.now().phase, Phase::Mirror | Phase::Precopy);
        // What a source does not read would be kept here.
        let reads = self.serving.control.as_ref().is_some_and(|control| control.away().is_none());
        if !(hears && comes && reads) {
            self.serving.busy = None;
            return;
        }
        let mut agent = Vec::new();
        for session in self.data.streams.sessions() {
            agent.push(session.cpu_time().await);
        }
        let qemu = self.guest.qmp.process().pid().and_then(CpuTime::of_process);
        let now = busy::Look { at: tokio::time::Instant::now(), agent, qemu };
        let Some(before) = &self.serving.busy else {
            self.serving.busy = Some(now);
            return;
        };
        let busy = now.since(before);
        if busy.is_some() || now.agent.len() != before.agent.len() {
            self.serving.busy = Some(now);
        }
        if let (Some(busy), Some(control)) = (busy, &mut self.serving.control) {
            control.say(Reply::Busy(busy)).await;
        }
    }

    /// At the end: what the source says of the whole.
    pub(crate) fn learn(&self, summary: Option<Summary>) {
        let Some(summary) = summary else { return };
        self.progress.update(|p| summary.show(p));
    }
}

impl Summary {
    /// More than any disk has; sums of as many as there may be stay within 64 bits.
    pub(crate) const BYTES_MAX: u64 = 1 << 53;

    /// Of the source's progress.
    pub(crate) fn of(progress: &Progress, downtime: &crate::migrate::model::progress::Downtime) -> Self {
        Self { disks: progress.disks.clone(), ram: progress.ram.clone(), downtime: Some(downtime.clone()) }
    }

    /// Only figures of disks that are known here, and within bounds.
    fn show(self, p: &mut Progress) {
        let bounded = |bytes: u64| bytes.min(Self::BYTES_MAX);
        for said in self.disks {
            if let Some(disk) = p.disks.iter_mut().find(|d| d.name == said.name) {
                disk.total_bytes = bounded(said.total_bytes);
                disk.done_bytes = bounded(said.done_bytes).min(disk.total_bytes);
                disk.ready = said.ready;
            }
        }
        if let (Some(ram), Some(said)) = (&mut p.ram, self.ram) {
            *ram = RamProgress {
                total_bytes: bounded(said.total_bytes),
                remaining_bytes: bounded(said.remaining_bytes).min(bounded(said.total_bytes)),
                stream_bytes: ram.stream_bytes,
                passes: bounded(said.passes),
                left_bytes: None,
            };
        }
        if let Some(mut downtime) = self.downtime {
            for ms in [
                &mut downtime.total_ms,
                &mut downtime.disks_ms,
                &mut downtime.device_ms,
                &mut downtime.start_ms,
                &mut downtime.other_ms,
            ] {
                *ms = bounded(*ms);
            }
            downtime.hook_ms = downtime.hook_ms.map(bounded);
            p.downtime = Some(downtime);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::journal::Role;
    use crate::migrate::model::progress::Downtime;

    #[test]
    fn what_a_source_says_is_bounded_and_only_of_what_is_known() {
        let id = uuid::Uuid::nil();
        let mut shown = Progress::new(id, "web1", Role::Destination, "alpha");
        shown.disks = vec![DiskProgress { name: "vda".into(), stream_bytes: 7, ..DiskProgress::default() }];
        shown.ram = Some(RamProgress { stream_bytes: 9, ..RamProgress::default() });
        let disk = |name: &str| DiskProgress {
            name: name.into(),
            total_bytes: u64::MAX,
            done_bytes: u64::MAX,
            stream_bytes: u64::MAX,
            ready: true,
            ..DiskProgress::default()
        };
        let summary = Summary {
            disks: vec![disk("vda"), disk("other"), disk("vda")],
            ram: Some(RamProgress {
                total_bytes: u64::MAX,
                remaining_bytes: u64::MAX,
                stream_bytes: u64::MAX,
                passes: u64::MAX,
                left_bytes: Some(u64::MAX),
            }),
            downtime: Some(Downtime { total_ms: u64::MAX, start_ms: 5, ..Downtime::default() }),
        };
        summary.show(&mut shown);
        assert_eq!(shown.disks.len(), 1);
        assert!(shown.disks[0].ready && shown.disks[0].done_bytes == Summary::BYTES_MAX);
        assert_eq!(shown.stream_bytes(), 16, "bytes on the wire are counted here");
        let downtime = shown.downtime.unwrap();
        assert_eq!((downtime.total_ms, downtime.start_ms), (Summary::BYTES_MAX, 5));
    }
}
