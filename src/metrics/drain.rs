//! Metrics of drains.

use prometheus::{Error, IntCounterVec, IntGauge, IntGaugeVec};

use super::register::Register;
use crate::drain::{Drain, DrainResult, GuestState};

/// What is counted of drains.
#[derive(Debug)]
pub struct DrainMetrics {
    ended: IntCounterVec,
    under_way: IntGauge,
    guests: IntGaugeVec,
}

const STATES: [&str; 6] = ["waiting", "busy", "moving", "moved", "undecided", "stays"];

fn label(state: &GuestState) -> &'static str {
    match state {
        GuestState::Waiting => "waiting",
        GuestState::Busy { .. } => "busy",
        GuestState::Moving { .. } => "moving",
        GuestState::Moved { .. } => "moved",
        GuestState::Undecided { .. } => "undecided",
        GuestState::Stays { .. } => "stays",
    }
}

impl DrainMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let ended = register.counter("drains_total", "Drains of this host that have ended.", &["result"])?;
        for result in DrainResult::ALL {
            ended.with_label_values(&[result.name()]);
        }
        Ok(Self {
            ended,
            under_way: register
                .single_gauge("draining", "1 while this host is being emptied and receives no VM, else 0.")?,
            guests: register.gauge(
                "drain_vms",
                "VMs of the drain that is under way, or of the last one.",
                &["state"],
            )?,
        })
    }

    /// The drain that there is.
    pub fn set(&self, drain: Option<&Drain>) {
        self.under_way.set(i64::from(drain.is_some_and(|drain| drain.ended_at.is_none())));
        for state in STATES {
            let count = drain.map_or(0, |drain| drain.count(|of| label(of) == state));
            self.guests.with_label_values(&[state]).set(count as i64);
        }
    }

    pub fn count_end(&self, drain: &Drain) {
        if let Some(result) = drain.result() {
            self.ended.with_label_values(&[result.name()]).inc();
        }
    }
}
