//! Metrics of migrations.

use prometheus::{Error, HistogramVec, IntCounterVec, IntGaugeVec};

use super::register::Register;
use crate::migrate::journal::Role;
use crate::migrate::progress::{Outcome, Progress};

/// What is counted and measured of migrations.
#[derive(Debug)]
pub struct MigrationMetrics {
    ended: IntCounterVec,
    active: IntGaugeVec,
    downtime: HistogramVec,
    duration: HistogramVec,
    moved_bytes: IntCounterVec,
    retries: IntCounterVec,
    limit: IntGaugeVec,
}

impl MigrationMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let metrics = Self {
            ended: register.counter("migrations_total", "Ended migrations.", &["role", "result"])?,
            active: register.gauge("migrations_active", "Migrations that are not at their end.", &["role"])?,
            downtime: register.histogram(
                "migration_downtime_seconds",
                "How long moved guests stood still.",
                &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
                &[],
            )?,
            duration: register.histogram(
                "migration_duration_seconds",
                "How long migrations took.",
                &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0],
                &["role"],
            )?,
            moved_bytes: register.counter(
                "migration_stream_bytes_total",
                "Bytes on the streams of ended migrations of which this host was the source, both directions.",
                &[],
            )?,
            retries: register.counter(
                "migration_retries_total",
                "Tries after the first of ended migrations of which this host was the source.",
                &[],
            )?,
            limit: register.gauge(
                "migration_limit_bytes_per_second",
                "What a migration under way may send in a second; absent without a limit.",
                &["vm"],
            )?,
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
            self.duration.with_label_values(&[role]);
        }
        self.moved_bytes.with_label_values::<&str>(&[]);
        self.retries.with_label_values::<&str>(&[]);
        self.downtime.with_label_values::<&str>(&[]);
    }

    pub fn count_end(&self, progress: &Progress) {
        let Some(outcome) = &progress.outcome else { return };
        let role = progress.role.name();
        self.ended.with_label_values(&[role, outcome.label()]).inc();
        // Each byte and each pause once: at the source.
        let at_source = progress.role == Role::Source;
        if at_source {
            self.moved_bytes.with_label_values::<&str>(&[]).inc_by(progress.stream_bytes());
        }
        self.retries.with_label_values::<&str>(&[]).inc_by(progress.retries());
        self.duration.with_label_values(&[role]).observe(progress.elapsed_ms as f64 / 1e3);
        if let (Outcome::Moved { .. }, Some(downtime)) = (outcome, &progress.downtime)
            && at_source
        {
            self.downtime.with_label_values::<&str>(&[]).observe(downtime.total_ms as f64 / 1e3);
        }
    }

    /// How many migrations are under way in each role.
    pub fn set_active(&self, role: &str, count: usize) {
        self.active.with_label_values(&[role]).set(count as i64);
    }

    /// The limits of migrations under way, by VM.
    pub fn set_limits<'a>(&self, limits: impl Iterator<Item = (&'a str, u64)>) {
        self.limit.reset();
        limits.for_each(|(vm, limit)| self.limit.with_label_values(&[vm]).set(limit as i64));
    }
}
