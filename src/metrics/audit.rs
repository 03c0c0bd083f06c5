//! The audit record.

use prometheus::{Error, IntCounterVec, IntGauge};

use super::register::Register;
use crate::audit::Figures;

/// What the audit record is like.
#[derive(Debug)]
pub(super) struct AuditMetrics {
    line: IntGauge,
    failing: IntGauge,
    lost: IntCounterVec,
    failures: IntCounterVec,
}

impl AuditMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            line: register.single_gauge("audit_last_line", "Number of the audit record's last line.")?,
            failing: register
                .single_gauge("audit_failing", "1 while the audit record cannot be written, else 0.")?,
            lost: register.counter("audit_lost_total", "Events that are not in the audit record.", &[])?,
            failures: register.counter(
                "audit_write_failures_total",
                "Writes to the audit record that failed; each was tried again.",
                &[],
            )?,
        })
    }

    pub(super) fn set(&self, figures: &Figures) {
        self.line.set(figures.head.number as i64);
        self.failing.set(i64::from(figures.failing.is_some()));
        for (counter, now) in [(&self.lost, figures.lost), (&self.failures, figures.failures)] {
            let counter = counter.with_label_values::<&str>(&[]);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }
}
