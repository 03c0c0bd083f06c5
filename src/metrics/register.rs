//! Registration, and what a reader is told of each metric. A name gets the prefix `vmferry_`.

use std::sync::{Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Error, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// What every name begins with.
pub(super) const PREFIX: &str = "vmferry_";

/// What kind of metric it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric, as it is told to a reader.
#[derive(Debug, Clone)]
pub(super) struct Described {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) labels: Vec<String>,
    pub(super) help: String,
}

/// Makes metrics and registers them.
#[derive(Debug, Default)]
pub(super) struct Register {
    pub(super) registry: Registry,
    described: Mutex<Vec<Described>>,
}

impl Register {
    pub(super) fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(Kind::Counter, IntCounterVec::new(opts(name, help), labels)?)
    }

    pub(super) fn seconds_counter(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<CounterVec, Error> {
        self.add(Kind::Counter, CounterVec::new(opts(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.add(Kind::Gauge, IntGaugeVec::new(opts(name, help), labels)?)
    }

    pub(super) fn seconds_gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.add(Kind::Gauge, GaugeVec::new(opts(name, help), labels)?)
    }

    pub(super) fn single_gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(Kind::Gauge, IntGauge::with_opts(opts(name, help))?)
    }

    pub(super) fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> Result<HistogramVec, Error> {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        self.add(Kind::Histogram, HistogramVec::new(opts, labels)?)
    }

    /// Registers a metric, with its whole name.
    pub(super) fn add<M: Collector + Clone + 'static>(&self, kind: Kind, metric: M) -> Result<M, Error> {
        self.registry.register(Box::new(metric.clone()))?;
        let mut described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        described.extend(metric.desc().into_iter().map(|desc| Described {
            name: desc.fq_name.clone(),
            kind,
            labels: desc.variable_labels.clone(),
            help: desc.help.clone(),
        }));
        Ok(metric)
    }

    /// All of them, by name.
    pub(super) fn described(&self) -> Vec<Described> {
        let mut all = self.described.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("{PREFIX}{name}"), help)
}
