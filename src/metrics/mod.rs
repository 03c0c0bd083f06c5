//! Metrics for Prometheus. Labels are bounded: names of the configuration and words of ours, never ids,
//! addresses or a peer's words. What is counted goes on over a planned restart.

mod audit;
mod drain;
mod expiry;
mod forward;
mod host;
mod inherited;
mod libvirt;
mod migrations;
mod page;
mod process;
mod register;
mod sessions;
mod witness;

use std::sync::OnceLock;

use prometheus::proto::MetricFamily;
use prometheus::{Encoder, Error, IntCounterVec, IntGaugeVec, TextEncoder};

use crate::audit::Figures;
use audit::AuditMetrics;
pub use drain::DrainMetrics;
pub use expiry::{ExpiryMetrics, ReloadCause};
pub use forward::ForwardMetrics;
pub use host::HostMetrics;
pub use inherited::Counts;
pub use libvirt::LibvirtMetrics;
pub use migrations::{MigrationMetrics, UnderWay};
use process::ProcessMetrics;
use register::Register;
pub use sessions::{Counted, SessionMetrics};
pub use witness::WitnessMetrics;

/// All metrics of an agent.
#[derive(Debug)]
pub struct Metrics {
    register: Register,
    pub migrations: MigrationMetrics,
    pub libvirt: LibvirtMetrics,
    pub sessions: SessionMetrics,
    pub forward: ForwardMetrics,
    pub drain: DrainMetrics,
    pub witness: WitnessMetrics,
    audit: AuditMetrics,
    api_refusals: IntCounterVec,
    sandbox: IntGaugeVec,
    traces: IntCounterVec,
    pub expiry: ExpiryMetrics,
    pub host: HostMetrics,
    process: ProcessMetrics,
    /// Of the processes before this one.
    inherited: OnceLock<Counts>,
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
            drain: DrainMetrics::new(&register)?,
            witness: WitnessMetrics::new(&register)?,
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
            traces: register.counter(
                "traces_total",
                "Ended migrations of which the collector of traces was told, or should have been.",
                &["result"],
            )?,
            host: HostMetrics::new(&register)?,
            process: ProcessMetrics::new(&register)?,
            inherited: OnceLock::new(),
            register,
        })
    }

    /// The text that Prometheus scrapes.
    pub fn text(&self) -> Result<String, Error> {
        self.process.set();
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// What has been counted, by the processes before this one as well.
    pub fn counts(&self) -> Counts {
        Counts::of(&self.gather())
    }

    /// What is left to the next process: the same, with what of it is of live sessions. Nothing of them is counted
    /// between the two.
    pub fn left(&self) -> (Counts, Counted) {
        self.sessions.while_still(|counted| (self.counts(), counted.clone()))
    }

    /// The processes before this one have counted so much. Only the first call counts.
    pub fn inherit(&self, counts: Counts) {
        let _ = self.inherited.set(counts);
    }

    fn gather(&self) -> Vec<MetricFamily> {
        let mut families = self.register.registry.gather();
        if let Some(counts) = self.inherited.get() {
            counts.add_to(&mut families, &self.register.described());
        }
        families
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

    /// Of how many migrations the collector was told, by result.
    pub fn set_traces<const N: usize>(&self, counts: [(&str, u64); N]) {
        for (result, now) in counts {
            let counter = self.traces.with_label_values(&[result]);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    /// A caller of the local API had not the role for this.
    pub fn count_api_refusal(&self, action: &str) {
        self.api_refusals.with_label_values(&[action]).inc();
    }
}
