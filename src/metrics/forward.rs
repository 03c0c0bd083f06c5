//! Metrics of forwarded sockets. A name is one of the configuration, `dynamic` for all others together, or
//! `none` for what was never let in.

use std::sync::{Mutex, PoisonError};

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::register::Register;
use crate::forward::{Figures, Totals};

/// What is counted and measured of forwarded connections.
#[derive(Debug)]
pub struct ForwardMetrics {
    connections: IntGaugeVec,
    opened: IntCounterVec,
    failed: IntCounterVec,
    sent_bytes: IntCounterVec,
    received_bytes: IntCounterVec,
    stalls: IntCounterVec,
    bypassed: IntGauge,
    /// What was counted before this process, and is among its figures.
    before: Mutex<Figures>,
}

impl ForwardMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let labels = &["side", "name"];
        Ok(Self {
            connections: register.gauge("forward_connections", "Forwarded connections now.", labels)?,
            opened: register.counter("forward_opened_total", "Forwarded connections.", labels)?,
            failed: register.counter(
                "forward_failed_total",
                "Connections that came to nothing.",
                &["side", "name", "reason"],
            )?,
            sent_bytes: register.counter(
                "forward_sent_bytes_total",
                "Bytes from programs of this host.",
                labels,
            )?,
            received_bytes: register.counter(
                "forward_received_bytes_total",
                "Bytes to programs of this host.",
                labels,
            )?,
            stalls: register.counter(
                "forward_stalls_total",
                "Times that what was to be sent waited for the other side to take more.",
                labels,
            )?,
            bypassed: register.single_gauge(
                "forward_bypassed",
                "Forwardings whose socket's file is another one now: programs connect past them.",
            )?,
            before: Mutex::default(),
        })
    }

    /// Of these figures an earlier process has counted all.
    pub fn begin_at(&self, figures: Figures) {
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }

    /// As it is now.
    pub fn set(&self, figures: &Figures, bypassed: usize) {
        self.bypassed.set(bypassed as i64);
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        for (key @ (side, name), (open, totals)) in figures {
            let earlier = before.get(key).map(|(_, totals)| totals.clone()).unwrap_or_default();
            let labels = &[side.name(), name];
            let Totals { opened, sent_bytes, received_bytes, stalls, failed } = totals;
            self.connections.with_label_values(labels).set(*open as i64);
            for (counter, total, earlier) in [
                (&self.opened, opened, earlier.opened),
                (&self.sent_bytes, sent_bytes, earlier.sent_bytes),
                (&self.received_bytes, received_bytes, earlier.received_bytes),
                (&self.stalls, stalls, earlier.stalls),
            ] {
                raise_to(&counter.with_label_values(labels), total.saturating_sub(earlier));
            }
            for (reason, total) in failed {
                let counter = self.failed.with_label_values(&[side.name(), name, reason]);
                raise_to(&counter, total.saturating_sub(earlier.failed.get(reason).copied().unwrap_or(0)));
            }
        }
    }
}

fn raise_to(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
