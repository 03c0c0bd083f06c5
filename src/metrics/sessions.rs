//! Metrics of sessions and of connections that became none.

use std::collections::BTreeMap;

use prometheus::{CounterVec, Error, GaugeVec, IntCounterVec, IntGaugeVec};

use super::register::Register;
use crate::migrate::refusals::Reason;
use crate::mux::Stats;
use crate::net::identity::Identity;

/// What is counted and measured of sessions, by peer.
#[derive(Debug)]
pub struct SessionMetrics {
    live: IntGaugeVec,
    ended: IntCounterVec,
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
    connect_failures: IntCounterVec,
    refusals: IntCounterVec,
    rtt_seconds: GaugeVec,
}

impl SessionMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            live: register.gauge("sessions", "Live sessions.", &["peer"])?,
            ended: register.counter("session_ends_total", "Ended sessions.", &["peer", "reason"])?,
            sent_bytes: register.counter("session_sent_bytes_total", "Bytes of streams sent.", &["peer"])?,
            received_bytes: register.counter(
                "session_received_bytes_total",
                "Bytes of streams received.",
                &["peer"],
            )?,
            streams: register.gauge("session_streams", "Open streams.", &["peer"])?,
            away: register.gauge(
                "sessions_away",
                "Live sessions that wait for a new connection.",
                &["peer"],
            )?,
            away_seconds: register.seconds_counter(
                "session_away_seconds_total",
                "Time that sessions which went on have spent without a connection.",
                &["peer"],
            )?,
            reconnects: register.counter(
                "session_reconnects_total",
                "Times that a session went on over a new connection.",
                &["peer"],
            )?,
            replayed_bytes: register.counter(
                "session_replayed_bytes_total",
                "Bytes sent again after a connection was lost.",
                &["peer"],
            )?,
            replay_log_bytes: register.gauge(
                "session_replay_log_bytes",
                "Bytes sent and not yet acknowledged.",
                &["peer"],
            )?,
            limit: register.gauge(
                "session_limit_bytes_per_second",
                "What may be sent to the peer in a second; absent without a limit.",
                &["peer"],
            )?,
            limited_seconds: register.seconds_counter(
                "session_limited_seconds_total",
                "Time that what could have been sent has waited for a limit, the peer's or a migration's.",
                &["peer"],
            )?,
            connect_failures: register.counter(
                "connect_failures_total",
                "Connections that became no session.",
                &["direction", "reason"],
            )?,
            refusals: register.counter(
                "peer_refusals_total",
                "Streams and requests of known peers that were refused.",
                &["peer", "reason"],
            )?,
            rtt_seconds: register.seconds_gauge(
                "session_rtt_seconds",
                "Smallest round trip of the session seen lately.",
                &["peer"],
            )?,
        })
    }

    /// A session's figures since the last look at it.
    pub fn count(&self, peer: &str, before: &Stats, now: &Stats) {
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
    pub fn set_of_peer(&self, peer: &str, away: usize, stats: &[Stats]) {
        let label = &[peer];
        self.live.with_label_values(label).set(stats.len() as i64);
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

    pub fn count_end(&self, peer: &str, reason: &str) {
        self.ended.with_label_values(&[peer, reason]).inc();
    }

    /// A connection became no session.
    pub fn count_connect_failure(&self, direction: &str, reason: &str) {
        self.connect_failures.with_label_values(&[direction, reason]).inc();
    }

    /// What was refused to peers since the start.
    pub fn set_refusals(&self, counts: &[(Identity, Reason, u64)]) {
        for (peer, reason, total) in counts {
            let counter = self.refusals.with_label_values(&[peer.as_str(), reason.label()]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// Dials that have become no session since the start, by reason.
    pub fn set_dial_failures(&self, totals: &BTreeMap<&'static str, u64>) {
        for (reason, total) in totals {
            let counter = self.connect_failures.with_label_values(&["out", reason]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }
}
