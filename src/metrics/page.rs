//! `docs/metrics.md`: what a reader is told of each metric, made from what is registered.

use std::fmt::Write;

use super::Metrics;
use super::register::{Described, Kind};

/// What the values of a label are. A label that is not here has no place in a metric.
const LABELS: &[(&str, &str)] = &[
    ("action", "a call of the local API, as the audit record names it"),
    ("by", "`landlock`, `seccomp`"),
    (
        "cause",
        "what is waited for. Of migrations: `connection` (to the other host), `qemu` (it does not answer), \
         `next_try`, `none`. Of sessions: `credit` (the peer takes no more of a stream), `replay_log` (too much is not \
         acknowledged). Of certificates read again: `signal`, `files`",
    ),
    ("direction", "`in`, `out`"),
    ("how", "`write-blocking` (they wait for the destination), `throttled` (so many bytes in a second)"),
    (
        "name",
        "of a forwarding or target in the configuration, `dynamic` for all others, `none` for what was never let in",
    ),
    ("peer", "a peer's identity, as its certificate and the configuration name it"),
    (
        "phase",
        "`begin`, `prepare`, `mirror`, `precopy`, `switchover`, `device`, `hand-over`, `confirm`, `done`, `roll-back`, \
         `failed`, `undecided`",
    ),
    ("reason", "a word of ours for what went wrong; each metric has its own, and few"),
    (
        "result",
        "`moved`, `failed`, `cancelled`, `undecided`; of libvirt's own migrations `moved`, `failed`, `bypassed`, \
         `unknown`. Of drains `moved`, `left`, `incomplete`, `cancelled`, `undecided`. Of certificates read again \
         `taken`, `refused`. Of traces `sent`, `failed`, `dropped` (too many waited). Of questions to the witness \
         `answered`, `unanswered`",
    ),
    ("role", "of this host: `source`, `destination`"),
    ("side", "`forward` where programs of this host connect, `target` where peers are connected"),
    (
        "state",
        "`runs`, `holds` (a guest that does not run), `not_begun`, `waits` (for a migration), `receives`, `spent`, \
         `given_away`, `no_qemu`, `in_migration`, `unknown`. Of a drain's VMs: `waiting`, `busy`, `moving`, `moved`, \
         `undecided`, `stays`",
    ),
    ("stream", "`disk` (all disks together), `ram`"),
    ("version", "of the agent"),
    ("vm", "a name of the configuration, `other` for every other"),
];

const HEAD: &str = "\
# Metrics

The agent serves these on `[metrics] listen`, at `/metrics`, for Prometheus: 32 connections at once, of which the
oldest makes room, one scrape for each. `deploy/prometheus/` has a scrape configuration, recording rules, alerts
with their tests, and a dashboard; `make observe` has a real Prometheus try them on real agents.

What is counted (counters and histograms) goes on over a planned restart of the agent, `process_*` aside; after a
crash it begins at 0. What is measured (gauges) is as it is at the scrape.

<!-- This page is made from the agent's registry: `cargo test the_page_of_metrics`. -->
";

impl Metrics {
    /// The page.
    pub fn page(&self) -> String {
        let described = self.register.described();
        let mut page = HEAD.to_owned();
        page += "\n| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n";
        for metric in &described {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let Described { name, kind, help, .. } = metric;
            let (kind_name, unit, labels) = (kind.name(), unit(name, *kind), labels.join(", "));
            let _ = writeln!(page, "| `{name}` | {kind_name} | {unit} | {labels} | {help} |");
        }
        page += "\n## Labels\n\nEach has few values, whatever peers do.\n\n| label | values |\n|---|---|\n";
        for (label, values) in LABELS {
            if described.iter().any(|metric| metric.labels.iter().any(|l| l == label)) {
                let _ = writeln!(page, "| `{label}` | {values} |");
            }
        }
        page
    }

    /// The names of all metrics, as Prometheus stores them.
    pub fn series_names(&self) -> Vec<String> {
        let names = self.register.described().into_iter().flat_map(|metric| match metric.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].map(|end| metric.name.clone() + end).to_vec(),
            _ => vec![metric.name],
        });
        names.collect()
    }

    /// The labels of a metric, by a name that Prometheus stores.
    pub fn labels_of(&self, series: &str) -> Option<Vec<String>> {
        let described = self.register.described();
        let ends = ["", "_bucket", "_sum", "_count"];
        let is_it = |metric: &&Described| ends.iter().any(|end| series == format!("{}{end}", metric.name));
        described.iter().find(is_it).map(|metric| metric.labels.clone())
    }
}

/// By the end of its name, as Prometheus wants it to be.
fn unit(name: &str, kind: Kind) -> &'static str {
    let name = name.strip_suffix("_total").unwrap_or(name);
    let units = [
        ("_bytes_per_second", "bytes per second"),
        ("_timestamp_seconds", "seconds since the epoch"),
        ("_time_seconds", "seconds since the epoch"),
        ("_seconds", "seconds"),
        ("_bytes", "bytes"),
    ];
    let found = units.iter().find(|(end, _)| name.ends_with(end)).map(|(_, unit)| *unit);
    found.unwrap_or(if kind == Kind::Counter { "times" } else { "" })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// `VMFERRY_WRITE_DOCS=1` writes it anew.
    #[test]
    fn the_page_of_metrics_tells_of_each_that_is_registered() {
        let metrics = Metrics::new().unwrap();
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        if std::env::var_os("VMFERRY_WRITE_DOCS").is_some() {
            std::fs::write(&path, metrics.page()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(written == metrics.page(), "docs/metrics.md is stale: run this with VMFERRY_WRITE_DOCS=1");
    }

    #[test]
    fn each_label_and_each_name_is_as_the_house_has_it() {
        for metric in Metrics::new().unwrap().register.described() {
            let Described { name, kind, labels, help } = &metric;
            let known = |label: &String| LABELS.iter().any(|(known, _)| known == label);
            assert!(labels.iter().all(known), "a label of {name} is not told: {labels:?}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(help.ends_with('.') && !help.contains('|'), "{name}: {help}");
            assert!(name.starts_with("vmferry_") || name.starts_with("process_"), "{name}");
        }
    }
}
