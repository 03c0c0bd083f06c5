//! Metrics of sessions and of connections that became none.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::{CounterVec, Error, GaugeVec, IntCounterVec, IntGaugeVec};
use serde::{Deserialize, Serialize};

use super::register::Register;
use crate::mux::Stats;
use crate::net::identity::Identity;
use crate::peer_refusals::Reason;

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
    flow: FlowMetrics,
    counted: Mutex<Counted>,
}

/// What keeps bytes from flowing, and what waits for it.
#[derive(Debug)]
struct FlowMetrics {
    stalls: IntCounterVec,
    queued: IntGaugeVec,
    credit: IntGaugeVec,
    receive_limit: IntGaugeVec,
}

impl FlowMetrics {
    fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            stalls: register.counter(
                "session_stalls_total",
                "Times that something was to be sent and could not.",
                &["peer", "cause"],
            )?,
            queued: register.gauge(
                "session_queued_bytes",
                "Bytes that wait to be sent, and that have come and are not asked for yet.",
                &["peer", "direction"],
            )?,
            credit: register.gauge(
                "session_credit_bytes",
                "What the peer may make this host hold: credit that it has and has not used.",
                &["peer"],
            )?,
            receive_limit: register.gauge(
                "session_receive_limit_bytes_per_second",
                "What the peer may send to this host in a second (`receive_rate`); absent without a limit.",
                &["peer"],
            )?,
        })
    }

    fn set(&self, peer: &str, stats: &[Stats]) {
        let sum = |figure: fn(&Stats) -> u64| stats.iter().map(|s| figure(s) as i64).sum::<i64>();
        self.queued.with_label_values(&[peer, "out"]).set(sum(|s| s.send_queued_bytes as u64));
        self.queued.with_label_values(&[peer, "in"]).set(sum(|s| s.recv_queued_bytes as u64));
        self.credit.with_label_values(&[peer]).set(sum(|s| s.credit_outstanding_bytes));
        match stats.iter().find_map(|s| s.receive_limit) {
            Some(limit) => self.receive_limit.with_label_values(&[peer]).set(limit.get() as i64),
            None => drop(self.receive_limit.remove_label_values(&[peer])),
        }
    }
}

/// What of each live session has been counted, by its id: its figures go on in the next process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Counted(BTreeMap<[u8; 16], Figures>);

/// Figures of a session that only grow.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Figures {
    sent_bytes: u64,
    received_bytes: u64,
    reconnects: u64,
    replayed_bytes: u64,
    away_ms: u64,
    /// Of this process alone, as all below.
    #[serde(skip)]
    held_ms: u64,
    #[serde(skip)]
    credit_stalls: u64,
    #[serde(skip)]
    log_stalls: u64,
}

impl Figures {
    fn of(stats: &Stats) -> Self {
        Self {
            sent_bytes: stats.sent_data_bytes,
            received_bytes: stats.received_data_bytes,
            reconnects: stats.reconnects,
            replayed_bytes: stats.replayed_bytes,
            away_ms: stats.away.as_millis() as u64,
            held_ms: stats.held.as_millis() as u64,
            credit_stalls: stats.credit_stalls,
            log_stalls: stats.log_stalls,
        }
    }
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
            flow: FlowMetrics::new(register)?,
            counted: Mutex::default(),
        })
    }

    /// A session's figures since the last look at it.
    pub fn count(&self, peer: &str, session: [u8; 16], stats: &Stats) {
        let now = Figures::of(stats);
        let mut counted = self.locked();
        let before = counted.0.insert(session, now.clone()).unwrap_or_default();
        let by_peer = &[peer];
        for (counter, now, before) in [
            (&self.sent_bytes, now.sent_bytes, before.sent_bytes),
            (&self.received_bytes, now.received_bytes, before.received_bytes),
            (&self.reconnects, now.reconnects, before.reconnects),
            (&self.replayed_bytes, now.replayed_bytes, before.replayed_bytes),
        ] {
            counter.with_label_values(by_peer).inc_by(now.saturating_sub(before));
        }
        for (cause, now, before) in [
            ("credit", now.credit_stalls, before.credit_stalls),
            ("replay_log", now.log_stalls, before.log_stalls),
        ] {
            self.flow.stalls.with_label_values(&[peer, cause]).inc_by(now.saturating_sub(before));
        }
        let seconds = |now: u64, before: u64| now.saturating_sub(before) as f64 / 1e3;
        self.limited_seconds.with_label_values(by_peer).inc_by(seconds(now.held_ms, before.held_ms));
        self.away_seconds.with_label_values(by_peer).inc_by(seconds(now.away_ms, before.away_ms));
    }

    /// Has a look at what has been counted of live sessions while nothing more is.
    pub(super) fn while_still<T>(&self, look: impl FnOnce(&Counted) -> T) -> T {
        look(&self.locked())
    }

    /// An earlier process has counted so much of the sessions that go on here.
    pub fn restore_counted(&self, counted: Counted) {
        *self.locked() = counted;
    }

    fn locked(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a peer's sessions, `away` of which have no connection; all of them added up.
    pub fn set_of_peer(&self, peer: &str, away: usize, stats: &[Stats]) {
        let label = &[peer];
        self.live.with_label_values(label).set(stats.len() as i64);
        self.away.with_label_values(label).set(away as i64);
        self.streams.with_label_values(label).set(stats.iter().map(|s| s.streams as i64).sum());
        self.replay_log_bytes.with_label_values(label).set(stats.iter().map(|s| s.log_bytes as i64).sum());
        self.flow.set(peer, stats);
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

    /// Nothing more is counted of a session.
    pub fn forget(&self, session: [u8; 16]) {
        self.locked().0.remove(&session);
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
