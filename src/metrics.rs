//! Metric names and registration. Labels are bounded: peers and results, never ids or addresses.

use prometheus::{
    CounterVec, Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::migrate::journal::Role;
use crate::migrate::progress::{Outcome, Progress};
use crate::mux::Stats;

/// All metrics of an agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    migrations: IntCounterVec,
    active: IntGaugeVec,
    downtime: HistogramVec,
    duration: HistogramVec,
    moved_bytes: IntCounterVec,
    retries: IntCounterVec,
    sessions: IntGaugeVec,
    session_ends: IntCounterVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    streams: IntGaugeVec,
    away: IntGaugeVec,
    away_seconds: CounterVec,
    reconnects: IntCounterVec,
    replayed_bytes: IntCounterVec,
    replay_log_bytes: IntGaugeVec,
    limit: IntGaugeVec,
    limited_seconds: CounterVec,
    migration_limit: IntGaugeVec,
    rtt_seconds: GaugeVec,
    connect_failures: IntCounterVec,
    certificate_expiry: IntGauge,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// A name is used twice: a mistake of this build.
    #[expect(clippy::too_many_lines, reason = "to be split")]
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let build = gauge(&r, "build_info", "Version of the agent; always 1.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let certificate_expiry = IntGauge::new(
            "vmferry_certificate_expiry_timestamp_seconds",
            "When this host's certificate expires, in seconds since the epoch.",
        )?;
        r.register(Box::new(certificate_expiry.clone()))?;
        let metrics = Self {
            migrations: counter(&r, "migrations_total", "Ended migrations.", &["role", "result"])?,
            active: gauge(&r, "migrations_active", "Migrations that are not at their end.", &["role"])?,
            downtime: histogram(
                &r,
                "migration_downtime_seconds",
                "How long moved guests stood still.",
                &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
                &[],
            )?,
            duration: histogram(
                &r,
                "migration_duration_seconds",
                "How long migrations took.",
                &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0],
                &["role"],
            )?,
            moved_bytes: counter(
                &r,
                "migration_stream_bytes_total",
                "Bytes on the streams of ended migrations of which this host was the source, both directions.",
                &[],
            )?,
            retries: counter(
                &r,
                "migration_retries_total",
                "Tries after the first of ended migrations of which this host was the source.",
                &[],
            )?,
            sessions: gauge(&r, "sessions", "Live sessions.", &["peer"])?,
            session_ends: counter(&r, "session_ends_total", "Ended sessions.", &["peer", "reason"])?,
            sent_bytes: counter(&r, "session_sent_bytes_total", "Bytes of streams sent.", &["peer"])?,
            received_bytes: counter(
                &r,
                "session_received_bytes_total",
                "Bytes of streams received.",
                &["peer"],
            )?,
            streams: gauge(&r, "session_streams", "Open streams.", &["peer"])?,
            away: gauge(&r, "sessions_away", "Live sessions that wait for a new connection.", &["peer"])?,
            away_seconds: seconds_counter(
                &r,
                "session_away_seconds_total",
                "Time that sessions which went on have spent without a connection.",
                &["peer"],
            )?,
            reconnects: counter(
                &r,
                "session_reconnects_total",
                "Times that a session went on over a new connection.",
                &["peer"],
            )?,
            replayed_bytes: counter(
                &r,
                "session_replayed_bytes_total",
                "Bytes sent again after a connection was lost.",
                &["peer"],
            )?,
            replay_log_bytes: gauge(
                &r,
                "session_replay_log_bytes",
                "Bytes sent and not yet acknowledged.",
                &["peer"],
            )?,
            limit: gauge(
                &r,
                "session_limit_bytes_per_second",
                "What may be sent to the peer in a second; absent without a limit.",
                &["peer"],
            )?,
            limited_seconds: seconds_counter(
                &r,
                "session_limited_seconds_total",
                "Time that what could have been sent has waited for a limit, the peer's or a migration's.",
                &["peer"],
            )?,
            migration_limit: gauge(
                &r,
                "migration_limit_bytes_per_second",
                "What a migration under way may send in a second; absent without a limit.",
                &["vm"],
            )?,
            rtt_seconds: {
                let opts = Opts::new(
                    "vmferry_session_rtt_seconds",
                    "Smallest round trip of the session seen lately.",
                );
                let rtt = GaugeVec::new(opts, &["peer"])?;
                r.register(Box::new(rtt.clone()))?;
                rtt
            },
            connect_failures: counter(
                &r,
                "connect_failures_total",
                "Connections that became no session.",
                &["direction", "reason"],
            )?,
            certificate_expiry,
            registry: r,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// What never happened is 0 and not missing, so that the first time is an increase.
    fn begin_at_zero(&self) {
        for role in [Role::Source.name(), Role::Destination.name()] {
            for result in Outcome::LABELS {
                self.migrations.with_label_values(&[role, result]);
            }
            self.duration.with_label_values(&[role]);
        }
        self.moved_bytes.with_label_values::<&str>(&[]);
        self.retries.with_label_values::<&str>(&[]);
        self.downtime.with_label_values::<&str>(&[]);
    }

    /// The text that Prometheus scrapes.
    ///
    /// # Errors
    /// As the encoder's.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// A migration has ended.
    pub fn migration_ended(&self, progress: &Progress) {
        let Some(outcome) = &progress.outcome else { return };
        let role = progress.role.name();
        self.migrations.with_label_values(&[role, outcome.label()]).inc();
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
    pub fn active(&self, role: &str, count: usize) {
        self.active.with_label_values(&[role]).set(count as i64);
    }

    /// The limits of migrations under way, by VM.
    pub fn migration_limits<'a>(&self, limits: impl Iterator<Item = (&'a str, u64)>) {
        self.migration_limit.reset();
        limits.for_each(|(vm, limit)| self.migration_limit.with_label_values(&[vm]).set(limit as i64));
    }

    /// A session's figures since the last look at it.
    pub fn session_moved(&self, peer: &str, before: &Stats, now: &Stats) {
        let label = &[peer];
        self.sent_bytes
            .with_label_values(label)
            .inc_by(now.sent_data_bytes.saturating_sub(before.sent_data_bytes));
        self.received_bytes
            .with_label_values(label)
            .inc_by(now.received_data_bytes.saturating_sub(before.received_data_bytes));
        self.reconnects.with_label_values(label).inc_by(now.reconnects.saturating_sub(before.reconnects));
        self.replayed_bytes
            .with_label_values(label)
            .inc_by(now.replayed_bytes.saturating_sub(before.replayed_bytes));
        let held = now.held.saturating_sub(before.held);
        self.limited_seconds.with_label_values(label).inc_by(held.as_secs_f64());
        let away = now.away.saturating_sub(before.away);
        self.away_seconds.with_label_values(label).inc_by(away.as_secs_f64());
    }

    /// The state of a peer's sessions, `away` of which have no connection; all of them added up.
    pub fn peer_sessions(&self, peer: &str, away: usize, stats: &[Stats]) {
        let label = &[peer];
        self.sessions.with_label_values(label).set(stats.len() as i64);
        self.away.with_label_values(label).set(away as i64);
        self.streams.with_label_values(label).set(stats.iter().map(|s| s.streams as i64).sum());
        self.replay_log_bytes.with_label_values(label).set(stats.iter().map(|s| s.log_bytes as i64).sum());
        match stats.iter().find_map(|s| s.limit) {
            Some(limit) => self.limit.with_label_values(label).set(limit.get() as i64),
            None => drop(self.limit.remove_label_values(label)),
        }
        match stats.iter().filter_map(|s| s.rtt_min).min() {
            Some(rtt) => self.rtt_seconds.with_label_values(label).set(rtt.as_secs_f64()),
            // Nothing is measured: no figure rather than a false one.
            None => drop(self.rtt_seconds.remove_label_values(label)),
        }
    }

    /// A session has ended.
    pub fn session_ended(&self, peer: &str, reason: &str) {
        self.session_ends.with_label_values(&[peer, reason]).inc();
    }

    /// A connection became no session.
    pub fn connect_failed(&self, direction: &str, reason: &str) {
        self.connect_failures.with_label_values(&[direction, reason]).inc();
    }

    /// Dials that have become no session since the start, by reason.
    pub fn dials_failed(&self, totals: &std::collections::BTreeMap<&'static str, u64>) {
        for (reason, total) in totals {
            let counter = self.connect_failures.with_label_values(&["out", reason]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// When this host's certificate expires.
    pub fn certificate_expires(&self, at: i64) {
        self.certificate_expiry.set(at);
    }
}

fn counter(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let metric = IntCounterVec::new(Opts::new(format!("vmferry_{name}"), help), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn seconds_counter(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<CounterVec, prometheus::Error> {
    let metric = CounterVec::new(Opts::new(format!("vmferry_{name}"), help), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(r: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    let metric = IntGaugeVec::new(Opts::new(format!("vmferry_{name}"), help), labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histogram(
    r: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
    labels: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(format!("vmferry_{name}"), help).buckets(buckets.to_vec());
    let metric = HistogramVec::new(opts, labels)?;
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}
