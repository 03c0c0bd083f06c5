//! Metrics of migrations.

use std::sync::{Mutex, PoisonError};

use prometheus::{CounterVec, Error, HistogramVec, IntCounterVec, IntGaugeVec};

use super::register::Register;
use crate::migrate::journal::Role;
use crate::migrate::phase::Phase;
use crate::migrate::progress::{HeldUp, Outcome, Progress, Slowed};
use crate::migrate::timeline::{Uncounted, Waiting};

/// What becomes known of parts of disks that are compared.
const COMPARED: [&str; 3] = ["equal", "different", "unknown"];

/// What is counted and measured of migrations.
#[derive(Debug)]
pub struct MigrationMetrics {
    ended: IntCounterVec,
    active: IntGaugeVec,
    undecided: IntGaugeVec,
    downtime: HistogramVec,
    duration: HistogramVec,
    phases: HistogramVec,
    moved_bytes: IntCounterVec,
    waited: CounterVec,
    held_up: CounterVec,
    retries: IntCounterVec,
    compared_bytes: IntCounterVec,
    slowed_disks: IntCounterVec,
    under_way: UnderWayMetrics,
}

/// Of each migration under way.
#[derive(Debug)]
struct UnderWayMetrics {
    limit: IntGaugeVec,
    phase: IntGaugeVec,
    idle: IntGaugeVec,
    rate: IntGaugeVec,
    done: IntGaugeVec,
    remaining: IntGaugeVec,
    /// Whoever sets them does so alone: they are emptied first.
    alone: Mutex<()>,
}

/// A migration under way, as it is measured.
#[derive(Debug)]
pub struct UnderWay {
    pub progress: Progress,
    /// For how long neither phase nor bytes have changed.
    pub idle_ms: u64,
    /// For how long it has been in its phase.
    pub phase_ms: u64,
}

impl MigrationMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let metrics = Self {
            ended: register.counter("migrations_total", "Ended migrations.", &["role", "result"])?,
            active: register.gauge(
                "migrations_active",
                "Migrations that are not at their end.",
                &["role"],
            )?,
            undecided: register.gauge(
                "migrations_undecided",
                "Migrations that were handed over and whose destination has not said that the guest runs.",
                &["role"],
            )?,
            downtime: register.histogram(
                "migration_downtime_seconds",
                "How long moved guests stood still, counted at the source.",
                &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
                &[],
            )?,
            duration: register.histogram(
                "migration_duration_seconds",
                "How long migrations took.",
                &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0],
                &["role"],
            )?,
            phases: register.histogram(
                "migration_phase_duration_seconds",
                "How long migrations were in a phase, counted when they have left it.",
                &[0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0],
                &["role", "phase"],
            )?,
            moved_bytes: register.counter(
                "migration_stream_bytes_total",
                "Bytes on the streams of migrations, both directions, while they flow.",
                &["role", "stream"],
            )?,
            waited: register.seconds_counter(
                "migration_wait_seconds_total",
                "Time for which migrations have waited and nothing has moved, by what they have waited for.",
                &["role", "cause"],
            )?,
            held_up: register.seconds_counter(
                "migration_held_up_seconds_total",
                "Time for which migrations of this host have copied, by what was measured to hold them up \
                 (`vmferry watch` says it in words); unknown: the figures do not tell, or nothing does.",
                &["cause"],
            )?,
            retries: register.counter(
                "migration_retries_total",
                "Tries after the first of ended migrations of which this host was the source.",
                &[],
            )?,
            compared_bytes: register.counter(
                "migration_compared_bytes_total",
                "Bytes of disks that ended migrations of this host were to compare, by what became known of them.",
                &["result"],
            )?,
            slowed_disks: register.counter(
                "migration_slowed_disks_total",
                "Disks of ended migrations of this host to which the guest's writes were made slower, so that their \
                 copies came to an end, by how.",
                &["how"],
            )?,
            under_way: UnderWayMetrics::new(register)?,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// What never happened is 0 and not missing, so that the first time is an increase.
    fn begin_at_zero(&self) {
        for role in [Role::Source.name(), Role::Destination.name()] {
            for result in Outcome::LABELS {
                self.ended.with_label_values(&[role, result]);
            }
            for stream in ["disk", "ram"] {
                self.moved_bytes.with_label_values(&[role, stream]);
            }
            for waiting in Waiting::ALL {
                self.waited.with_label_values(&[role, waiting.name()]);
            }
            self.duration.with_label_values(&[role]);
        }
        for result in COMPARED {
            self.compared_bytes.with_label_values(&[result]);
        }
        for cause in HeldUp::ALL {
            self.held_up.with_label_values(&[cause.name()]);
        }
        for how in Slowed::ALL {
            self.slowed_disks.with_label_values(&[how.name()]);
        }
        self.retries.with_label_values::<&str>(&[]);
        self.downtime.with_label_values::<&str>(&[]);
    }

    /// What has moved, waited and passed since the last time.
    pub fn count(&self, role: Role, uncounted: &Uncounted) {
        let role = role.name();
        let Uncounted { bytes, waited, held_up, phases } = uncounted;
        for (stream, bytes) in [("disk", bytes.disk), ("ram", bytes.ram)] {
            self.moved_bytes.with_label_values(&[role, stream]).inc_by(bytes);
        }
        for (cause, ms) in waited {
            self.waited.with_label_values(&[role, cause.name()]).inc_by(*ms as f64 / 1e3);
        }
        for (cause, ms) in held_up {
            self.held_up.with_label_values(&[cause.name()]).inc_by(*ms as f64 / 1e3);
        }
        for (phase, ms) in phases {
            self.phases.with_label_values(&[role, phase.name()]).observe(*ms as f64 / 1e3);
        }
    }

    pub fn count_end(&self, progress: &Progress) {
        let Some(outcome) = &progress.outcome else { return };
        let role = progress.role.name();
        self.ended.with_label_values(&[role, outcome.label()]).inc();
        self.retries.with_label_values::<&str>(&[]).inc_by(progress.retries());
        if let Some(c) = progress.comparison.filter(|_| progress.role == Role::Source) {
            let unknown = c.of_bytes.saturating_sub(c.equal_bytes + c.different_bytes);
            for (result, bytes) in COMPARED.into_iter().zip([c.equal_bytes, c.different_bytes, unknown]) {
                self.compared_bytes.with_label_values(&[result]).inc_by(bytes);
            }
        }
        for how in progress.disks.iter().filter_map(|disk| disk.slowed) {
            self.slowed_disks.with_label_values(&[how.name()]).inc();
        }
        self.duration.with_label_values(&[role]).observe(progress.elapsed_ms as f64 / 1e3);
        // Each pause once: at the source.
        if let (Outcome::Moved { .. }, Some(downtime)) = (outcome, &progress.downtime)
            && progress.role == Role::Source
        {
            self.downtime.with_label_values::<&str>(&[]).observe(downtime.total_ms as f64 / 1e3);
        }
    }

    /// How many migrations are under way in each role, and how many of which nobody knows the end.
    pub fn set_counts(&self, role: Role, active: usize, undecided: usize) {
        self.active.with_label_values(&[role.name()]).set(active as i64);
        self.undecided.with_label_values(&[role.name()]).set(undecided as i64);
    }

    /// Those under way; `vm` tells what the label of a virtual machine is.
    pub fn set_under_way(&self, all: &[UnderWay], vm: impl Fn(&str) -> String) {
        self.under_way.set(all, vm);
    }
}

impl UnderWayMetrics {
    fn new(register: &Register) -> Result<Self, Error> {
        let streams = &["vm", "role", "stream"];
        Ok(Self {
            limit: register.gauge(
                "migration_limit_bytes_per_second",
                "What a migration under way may send in a second; absent without a limit.",
                &["vm"],
            )?,
            phase: register.gauge(
                "migration_phase_age_seconds",
                "For how long a migration under way has been in its phase.",
                &["vm", "role", "phase"],
            )?,
            idle: register.gauge(
                "migration_idle_seconds",
                "For how long nothing of a migration under way has changed, neither phase nor bytes.",
                &["vm", "role", "phase", "cause"],
            )?,
            rate: register.gauge(
                "migration_rate_bytes_per_second",
                "Bytes per second over all streams of a migration under way, over about the last second.",
                &["vm", "role"],
            )?,
            done: register.gauge(
                "migration_done_bytes",
                "What a migration under way has copied of disks and RAM; at the destination, bytes that came.",
                streams,
            )?,
            remaining: register.gauge(
                "migration_remaining_bytes",
                "What a migration under way still has to copy, as far as it is known by now.",
                streams,
            )?,
            alone: Mutex::default(),
        })
    }

    fn set(&self, all: &[UnderWay], vm: impl Fn(&str) -> String) {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in [&self.limit, &self.phase, &self.idle, &self.rate, &self.done, &self.remaining] {
            gauge.reset();
        }
        for UnderWay { progress, idle_ms, phase_ms } in all {
            let (vm, role, phase) = (vm(&progress.vm), progress.role.name(), progress.phase.name());
            let cause = progress.waiting().map_or("none", |(waiting, _)| waiting.name());
            let labels = &[vm.as_str(), role];
            self.phase.with_label_values(&[&vm, role, phase]).set((phase_ms / 1000) as i64);
            // A phase that is waited for with patience has no end that is near.
            if progress.phase != Phase::Undecided {
                self.idle.with_label_values(&[&vm, role, phase, cause]).set((idle_ms / 1000) as i64);
            }
            self.rate.with_label_values(labels).set(progress.rate_bytes_per_s as i64);
            if let Some(limit) = progress.share.and_then(|share| share.limit_bytes_per_s) {
                self.limit.with_label_values(&[&vm]).set(u64::from(limit) as i64);
            }
            self.set_streams(labels, progress);
        }
    }

    fn set_streams(&self, labels: &[&str; 2], progress: &Progress) {
        let [vm, role] = *labels;
        let done: u64 = progress.disks.iter().map(|disk| disk.done_bytes).sum();
        let total: u64 = progress.disks.iter().map(|disk| disk.total_bytes).sum();
        let disks = (done, total.saturating_sub(done));
        let ram = progress.ram.as_ref();
        let ram = ram.map(|r| (r.total_bytes.saturating_sub(r.remaining_bytes), r.remaining_bytes));
        for (stream, figures) in [("disk", Some(disks)), ("ram", ram)] {
            let Some((done, remaining)) = figures else { continue };
            self.done.with_label_values(&[vm, role, stream]).set(done as i64);
            self.remaining.with_label_values(&[vm, role, stream]).set(remaining as i64);
        }
    }
}
