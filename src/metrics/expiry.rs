//! When certificates and lists end, in seconds since the epoch; 0 for what there is none of.

use prometheus::{Error, IntCounterVec, IntGauge};

use super::register::Register;
use crate::net::expiry::{Ending, Kind};

/// The ends.
#[derive(Debug)]
pub struct ExpiryMetrics {
    certificate: IntGauge,
    authority: IntGauge,
    list: IntGauge,
    reloads: IntCounterVec,
}

/// Why certificates were read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReloadCause {
    Signal,
    Files,
}

impl ReloadCause {
    fn label(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Files => "files",
        }
    }

    /// For the log.
    pub fn words(self) -> &'static str {
        match self {
            Self::Signal => "a reload was asked for",
            Self::Files => "their files have changed",
        }
    }
}

impl ExpiryMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            certificate: register.single_gauge(
                "certificate_expiry_timestamp_seconds",
                "When this host's certificate expires, in seconds since the epoch.",
            )?,
            authority: register.single_gauge(
                "authority_expiry_timestamp_seconds",
                "When the last CA certificate expires that this host trusts, in seconds since the epoch.",
            )?,
            list: register.single_gauge(
                "revocation_list_expiry_timestamp_seconds",
                "When the first of the revocation lists ends, in seconds since the epoch; 0 without a list.",
            )?,
            reloads: register.counter(
                "certificate_reloads_total",
                "Times that certificates and lists were read again, and taken, or refused because something was wrong with them.",
                &["cause", "result"],
            )?,
        })
    }

    /// Certificates were read again.
    pub fn count_reload(&self, cause: ReloadCause, taken: bool) {
        let result = if taken { "taken" } else { "refused" };
        self.reloads.with_label_values(&[cause.label(), result]).inc();
    }

    /// As it is now. A host is known for as long as all of its chain is valid.
    pub fn set(&self, endings: &[Ending]) {
        let first = |kinds: &[Kind]| {
            let of_kinds = endings.iter().filter(|ending| kinds.contains(&ending.kind));
            of_kinds.map(|ending| ending.not_after.unix_timestamp()).min().unwrap_or(0)
        };
        self.certificate.set(first(&[Kind::Certificate, Kind::Intermediate]));
        self.authority.set(first(&[Kind::Authority]));
        self.list.set(first(&[Kind::RevocationList]));
    }
}
