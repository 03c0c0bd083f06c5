//! What Prometheus would scrape of an agent, in its text format.

use anyhow::{Context, Result};

/// One answer of `/metrics`.
#[derive(Debug, Clone)]
pub struct Metrics(String);

impl Metrics {
    /// From the body of the answer.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The sum over all samples of a metric that have these labels; `None` if there is none.
    pub fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let fits = |sample: &Sample<'_>| {
            sample.name == name && labels.iter().all(|label| sample.labels.contains(label))
        };
        let values: Vec<f64> = self.samples().filter(fits).map(|sample| sample.value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// The same.
    ///
    /// # Errors
    /// There is none: the error shows what there is.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        self.find(name, labels).with_context(|| format!("no {name} with {labels:?} in {}", self.0))
    }

    fn samples(&self) -> impl Iterator<Item = Sample<'_>> {
        self.0.lines().filter(|line| !line.starts_with('#')).filter_map(Sample::parse)
    }
}

/// `name{label="value",...} 1.5`. No value of ours has a quote, a brace or a comma in it.
struct Sample<'t> {
    name: &'t str,
    labels: Vec<(&'t str, &'t str)>,
    value: f64,
}

impl<'t> Sample<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let (left, value) = line.rsplit_once(' ')?;
        let (name, labels) = left.split_once('{').unwrap_or((left, "}"));
        let labels = labels.strip_suffix('}')?.split(',').filter_map(|label| label.split_once('='));
        let labels = labels.map(|(name, value)| (name, value.trim_matches('"'))).collect();
        Some(Self { name, labels, value: value.parse().ok()? })
    }
}

#[test]
fn samples_are_found_by_name_and_labels() {
    let text = "# TYPE a counter\na{x=\"1\",y=\"2\"} 1.5\na{x=\"2\",y=\"2\"} 2\na_more{x=\"1\"} 9\nb 4\n";
    let metrics = Metrics::new(text.to_owned());
    assert_eq!(metrics.find("a", &[("y", "2")]), Some(3.5));
    assert_eq!(metrics.find("a", &[("x", "2"), ("y", "2")]), Some(2.0));
    assert_eq!((metrics.find("b", &[]), metrics.find("a", &[("x", "3")])), (Some(4.0), None));
}
