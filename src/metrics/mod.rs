//! Metrics for Prometheus. Labels are bounded: peers and results, never ids or addresses.

mod audit;
mod expiry;
mod forward;
mod libvirt;
mod migrations;
mod register;
mod sessions;

use prometheus::{Encoder, Error, IntCounterVec, IntGaugeVec, TextEncoder};

use crate::audit::Figures;
use audit::AuditMetrics;
pub use expiry::ExpiryMetrics;
pub use forward::ForwardMetrics;
pub use libvirt::LibvirtMetrics;
pub use migrations::MigrationMetrics;
use register::Register;
pub use sessions::SessionMetrics;

/// All metrics of an agent.
#[derive(Debug)]
pub struct Metrics {
    register: Register,
    pub migrations: MigrationMetrics,
    pub libvirt: LibvirtMetrics,
    pub sessions: SessionMetrics,
    pub forward: ForwardMetrics,
    audit: AuditMetrics,
    api_refusals: IntCounterVec,
    sandbox: IntGaugeVec,
    pub expiry: ExpiryMetrics,
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Result<Self, Error> {
        let register = Register::default();
        let build = register.gauge("build_info", "Version of the agent; always 1.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            migrations: MigrationMetrics::new(&register)?,
            libvirt: LibvirtMetrics::new(&register)?,
            sessions: SessionMetrics::new(&register)?,
            forward: ForwardMetrics::new(&register)?,
            audit: AuditMetrics::new(&register)?,
            api_refusals: register.counter(
                "api_refusals_total",
                "Requests to the local API by callers without the role for them.",
                &["action"],
            )?,
            expiry: ExpiryMetrics::new(&register)?,
            sandbox: register.gauge(
                "sandbox",
                "1 where the agent has confined itself by this, else 0.",
                &["by"],
            )?,
            register,
        })
    }

    /// The text that Prometheus scrapes.
    pub fn text(&self) -> Result<String, Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.register.0.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// What the audit record is like now.
    pub fn set_audit(&self, figures: &Figures) {
        self.audit.set(figures);
    }

    /// What the agent has confined itself by.
    pub fn set_sandbox(&self, confined: [(&str, bool); 2]) {
        for (by, is_on) in confined {
            self.sandbox.with_label_values(&[by]).set(i64::from(is_on));
        }
    }

    /// A caller of the local API had not the role for this.
    pub fn count_api_refusal(&self, action: &str) {
        self.api_refusals.with_label_values(&[action]).inc();
    }
}
