//! What watches the agent uses only what the agent has: every metric and label in the rules and the dashboard
//! is one that is registered, or a rule's own. `make observe` has a real Prometheus look at the same.

use std::collections::BTreeSet;

use serde_json::Value;
use vmferry::metrics::Metrics;

const RULES: &str = include_str!("../../deploy/prometheus/vmferry.rules.yml");
const DASHBOARD: &str = include_str!("../../deploy/prometheus/dashboard.json");
/// What Prometheus itself adds.
const ADDED: [&str; 3] = ["instance", "job", "le"];

/// Names of metrics in an expression, each with the labels of its matchers.
fn used(expression: &str) -> Vec<(String, Vec<String>)> {
    let is_of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c);
    let mut found = Vec::new();
    for start in ["vmferry_", "vmferry:", "process_"] {
        for (at, _) in expression.match_indices(start) {
            let before = expression[..at].chars().next_back();
            if before.is_some_and(|c| is_of_name(c) || c.is_alphanumeric() || "/.-".contains(c)) {
                continue;
            }
            let rest = &expression[at..];
            let end = rest.find(|c| !is_of_name(c)).unwrap_or(rest.len());
            let matchers = rest[end..].strip_prefix('{').and_then(|inner| inner.split_once('}'));
            let matchers = matchers.map_or("", |(inner, _)| inner);
            let label = |m: &str| m.split(['=', '!']).next().unwrap_or("").trim().to_owned();
            let labels = matchers.split("\",").map(label).filter(|label| !label.is_empty()).collect();
            found.push((rest[..end].trim_end_matches(':').to_owned(), labels));
        }
    }
    found
}

/// What is used and not there.
fn unknown(text: &str) -> Vec<String> {
    let metrics = Metrics::new().unwrap();
    let names: BTreeSet<String> = metrics.series_names().into_iter().collect();
    let recorded = |name: &str| RULES.contains(&format!("record: {name}\n"));
    let mut unknown = Vec::new();
    for (name, labels) in used(text) {
        if recorded(&name) {
            continue;
        }
        if !names.contains(&name) {
            unknown.push(name.clone());
        }
        let its = metrics.labels_of(&name).unwrap_or_default();
        let missing = labels.iter().filter(|label| !its.contains(label) && !ADDED.contains(&label.as_str()));
        unknown.extend(missing.map(|label| format!("{name}{{{label}}}")));
    }
    unknown
}

fn expressions() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn rules_and_dashboard_use_only_metrics_that_there_are() {
    let expressions = expressions();
    assert!(expressions.len() >= 25 && used(RULES).len() >= 25);
    assert_eq!(unknown(RULES), Vec::<String>::new());
    for expression in expressions {
        assert!(!used(&expression).is_empty() || expression.contains("up{"), "{expression}");
        assert_eq!(unknown(&expression), Vec::<String>::new(), "{expression}");
    }
    let wrong = "rate(vmferry_session_bytes_total{peer=\"x\"}[5m]) + vmferry_sessions{vm=\"a\",peer=\"b\"}";
    assert_eq!(
        unknown(wrong),
        ["vmferry_session_bytes_total", "vmferry_session_bytes_total{peer}", "vmferry_sessions{vm}"]
    );
}

#[test]
fn every_alert_tells_what_to_do_and_has_a_test() {
    let tests = include_str!("../../deploy/prometheus/vmferry.rules.test.yml");
    let alerts: Vec<&str> = RULES.split("- alert: ").skip(1).collect();
    assert!(alerts.len() >= 12);
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        assert!(tests.contains(name), "{name} has no test");
        for part in ["severity:", "summary:", "description:"] {
            assert!(alert.contains(part), "{name} has no {part}");
        }
    }
}
