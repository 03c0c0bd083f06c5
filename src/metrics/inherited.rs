//! What the processes of this agent before this one have counted: counters and histograms go on over a
//! planned restart. Added when the metrics are read, so that whoever counts need not know of it.

use std::collections::BTreeMap;

use prometheus::proto::{Bucket, Counter, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use serde::{Deserialize, Serialize};

use super::register::{Described, Kind, PREFIX};

/// Series that are taken over, at most: more than all labels of a large agent can have.
const SERIES_MAX: usize = 100_000;

/// Counts of one process, to be left to the next.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts(Vec<Series>);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Value {
    Counter(f64),
    /// Upper bounds with cumulative counts.
    Histogram {
        sum: f64,
        count: u64,
        buckets: Vec<(f64, u64)>,
    },
}

impl Counts {
    /// What of these goes on in the next process; what is the process's own does not.
    pub(super) fn of(families: &[MetricFamily]) -> Self {
        let ours = families.iter().filter(|family| family.name().starts_with(PREFIX));
        let series = ours.flat_map(|family| {
            let kind = family.get_field_type();
            family.get_metric().iter().filter_map(move |metric| {
                let value = Value::of(kind, metric)?;
                Some(Series { name: family.name().to_owned(), labels: labels(metric), value })
            })
        });
        Self(series.collect())
    }

    /// Adds them to what this process has counted. Metrics that are not `known` any more, or are of another
    /// kind now, are dropped.
    pub(super) fn add_to(&self, families: &mut Vec<MetricFamily>, known: &[Described]) {
        for series in self.0.iter().take(SERIES_MAX) {
            let Some(described) = known.iter().find(|described| series.fits(described)) else { continue };
            let at = families.iter().position(|family| family.name() == series.name);
            let at = at.unwrap_or_else(|| {
                families.push(family(described));
                families.len() - 1
            });
            add_series(&mut families[at], series);
        }
    }
}

impl Series {
    fn fits(&self, described: &Described) -> bool {
        let kind = match self.value {
            Value::Counter(_) => Kind::Counter,
            Value::Histogram { .. } => Kind::Histogram,
        };
        let has = |label: &String| self.labels.contains_key(label);
        described.name == self.name
            && described.kind == kind
            && described.labels.len() == self.labels.len()
            && described.labels.iter().all(has)
    }
}

impl Value {
    fn of(kind: MetricType, metric: &Metric) -> Option<Self> {
        match kind {
            MetricType::COUNTER => Some(Self::Counter(metric.get_counter().get_value())),
            MetricType::HISTOGRAM => {
                let histogram = metric.get_histogram();
                let buckets = histogram.get_bucket().iter();
                Some(Self::Histogram {
                    sum: histogram.get_sample_sum(),
                    count: histogram.get_sample_count(),
                    buckets: buckets.map(|b| (b.upper_bound(), b.cumulative_count())).collect(),
                })
            }
            _ => None,
        }
    }

    fn add_to(&self, metric: &mut Metric) {
        match self {
            Self::Counter(value) => {
                let mut counter = Counter::default();
                counter.set_value(metric.get_counter().get_value() + value);
                metric.set_counter(counter);
            }
            Self::Histogram { sum, count, buckets } => {
                let now = metric.get_histogram();
                let mut total = Histogram::default();
                total.set_sample_sum(now.get_sample_sum() + sum);
                total.set_sample_count(now.get_sample_count() + count);
                total.set_bucket(added(now.get_bucket(), buckets));
                metric.set_histogram(total);
            }
        }
    }
}

/// A version may have other buckets: a bound that the other does not have gets what is surely below it there.
fn added(now: &[Bucket], before: &[(f64, u64)]) -> Vec<Bucket> {
    let below = |bound: f64| {
        let fitting = before.iter().filter(|(upper, _)| *upper <= bound);
        fitting.map(|(_, count)| *count).max().unwrap_or(0)
    };
    let bounds: Vec<f64> = match now {
        [] => before.iter().map(|(bound, _)| *bound).collect(),
        now => now.iter().map(Bucket::upper_bound).collect(),
    };
    let count = |at: usize| now.get(at).map_or(0, Bucket::cumulative_count);
    let buckets = bounds.iter().enumerate().map(|(at, bound)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(count(at) + below(*bound));
        bucket
    });
    buckets.collect()
}

fn labels(metric: &Metric) -> BTreeMap<String, String> {
    metric.get_label().iter().map(|l| (l.name().to_owned(), l.value().to_owned())).collect()
}

fn family(described: &Described) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(described.name.clone());
    family.set_help(described.help.clone());
    family.set_field_type(match described.kind {
        Kind::Histogram => MetricType::HISTOGRAM,
        _ => MetricType::COUNTER,
    });
    family
}

fn add_series(family: &mut MetricFamily, series: &Series) {
    let metrics = family.mut_metric();
    if let Some(metric) = metrics.iter_mut().find(|metric| labels(metric) == series.labels) {
        return series.value.add_to(metric);
    }
    let pairs = series.labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.clone());
        pair.set_value(value.clone());
        pair
    });
    let mut metric = Metric::from_label(pairs.collect());
    series.value.add_to(&mut metric);
    metrics.push(metric);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::metrics::{Counts, Metrics};
    use crate::migrate::journal::Role;
    use crate::migrate::phase::Phase;
    use crate::migrate::timeline::{Carried, Uncounted};

    fn count(metrics: &Metrics, disk: u64, phases: &[u64]) {
        let phases = phases.iter().map(|ms| (Phase::Mirror, *ms)).collect();
        let bytes = Carried { disk, ram: 0 };
        metrics.migrations.count(Role::Source, &Uncounted { bytes, phases, ..Uncounted::default() });
    }

    fn sample(metrics: &Metrics, series: &str) -> Option<f64> {
        let text = metrics.text().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        Some(line.parse().unwrap())
    }

    const BYTES: &str = "vmferry_migration_stream_bytes_total{role=\"source\",stream=\"disk\"}";
    const BUCKET: &str =
        "vmferry_migration_phase_duration_seconds_bucket{phase=\"mirror\",role=\"source\",le=\"1\"}";
    const SUM: &str = "vmferry_migration_phase_duration_seconds_sum{phase=\"mirror\",role=\"source\"}";

    #[test]
    fn what_is_counted_goes_on_over_two_restarts() {
        let first = Metrics::new().unwrap();
        count(&first, 5, &[500, 2000]);
        first.sessions.count_end("bravo", "closed");
        let travels = |counts: &Counts| -> Counts {
            let mut bytes = Vec::new();
            ciborium::into_writer(counts, &mut bytes).unwrap();
            ciborium::from_reader(&bytes[..]).unwrap()
        };
        let second = Metrics::new().unwrap();
        second.inherit(travels(&first.counts()));
        assert_eq!(sample(&second, BYTES), Some(5.0), "before anything is counted here");
        count(&second, 7, &[100]);
        let third = Metrics::new().unwrap();
        third.inherit(travels(&second.counts()));
        count(&third, 1, &[]);
        assert_eq!(sample(&third, BYTES), Some(13.0));
        assert_eq!((sample(&third, BUCKET), sample(&third, SUM)), (Some(2.0), Some(2.6)));
        // A series that nobody has counted here is not lost, and what is measured is not inherited.
        assert_eq!(sample(&third, "vmferry_session_ends_total{peer=\"bravo\",reason=\"closed\"}"), Some(1.0));
        assert_eq!(third.counts(), travels(&third.counts()));
    }

    #[test]
    fn a_metric_that_is_gone_or_of_another_kind_is_dropped() {
        let wrong = r#"[{"name":"vmferry_gone_total","labels":{},"value":{"Counter":3.0}},
            {"name":"vmferry_vms","labels":{"state":"runs"},"value":{"Counter":3.0}},
            {"name":"vmferry_audit_lost_total","labels":{"more":"x"},"value":{"Counter":3.0}}]"#;
        let counts: Counts = serde_json::from_str(wrong).unwrap();
        let metrics = Metrics::new().unwrap();
        let before = metrics.counts();
        metrics.inherit(counts);
        assert_eq!(metrics.counts(), before);
    }
}
