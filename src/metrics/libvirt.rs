//! Metrics of migrations that libvirt makes itself.

use prometheus::{Error, IntCounterVec, IntGaugeVec};

use super::register::Register;
use crate::libvirt::{Ended, Role};

/// What is counted of them.
#[derive(Debug)]
pub struct LibvirtMetrics {
    ended: IntCounterVec,
    active: IntGaugeVec,
}

impl LibvirtMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        let metrics = Self {
            ended: register.counter(
                "libvirt_migrations_total",
                "Ended migrations of libvirt's own; bypassed: something did not go through the tunnel.",
                &["role", "result"],
            )?,
            active: register.gauge(
                "libvirt_migrations_active",
                "Migrations of libvirt's own that are prepared or under way.",
                &["role"],
            )?,
        };
        for role in [Role::Source, Role::Destination] {
            Ended::ALL
                .iter()
                .for_each(|ended| drop(metrics.ended.with_label_values(&[role.name(), ended.name()])));
        }
        Ok(metrics)
    }

    /// Some have ended.
    pub fn count_ended(&self, role: Role, ended: Ended, count: u64) {
        self.ended.with_label_values(&[role.name(), ended.name()]).inc_by(count);
    }

    /// How many there are in a role.
    pub fn set_active(&self, role: Role, count: usize) {
        self.active.with_label_values(&[role.name()]).set(count as i64);
    }
}
