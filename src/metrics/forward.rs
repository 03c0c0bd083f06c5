//! Metrics of forwarded sockets. A name is one of the configuration, `dynamic` for all others together, or
//! `none` for what was never let in.

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
        })
    }

    /// As it is now. The figures are of this process alone.
    pub fn set(&self, figures: &Figures, bypassed: usize) {
        self.bypassed.set(bypassed as i64);
        for ((side, name), (open, totals)) in figures {
            let labels = &[side.name(), name];
            let Totals { opened, sent_bytes, received_bytes, stalls, failed } = totals;
            self.connections.with_label_values(labels).set(*open as i64);
            for (counter, total) in [
                (&self.opened, opened),
                (&self.sent_bytes, sent_bytes),
                (&self.received_bytes, received_bytes),
                (&self.stalls, stalls),
            ] {
                raise_to(&counter.with_label_values(labels), *total);
            }
            for (reason, total) in failed {
                let counter = self.failed.with_label_values(&[side.name(), name, reason]);
                raise_to(&counter, *total);
            }
        }
    }
}

fn raise_to(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
