//! What a migration has been through as OpenTelemetry has it: one request of OTLP over HTTP in JSON, with the migration
//! and its phases and waits as spans. Both hosts make the same trace, for its id is the migration's, and the
//! destination's spans are below the source's. Bounded. From values to a value.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::migrate::journal::Role;
use crate::migrate::progress::{Outcome, Progress};
use crate::migrate::timeline::Timeline;

/// Phases and waits that are told; the first ones.
const SPANS_MAX: usize = 256;
/// Characters of a text that are told.
const TEXT_MAX: usize = 1024;

// OTLP's numbers.
const INTERNAL: u32 = 1;
const SERVER: u32 = 2;
const CLIENT: u32 = 3;
const OK: u32 = 1;
const ERROR: u32 = 2;

/// What a collector is told of a migration that has ended just now, `now_ns` after the epoch, on `host`.
pub fn request(host: &str, ended: &Progress, timeline: &Timeline, now_ns: u64) -> Value {
    let trace = Trace { id: ended.shared_id(), role: ended.role, began_ns: began_ns(ended, now_ns) };
    let end_ms = ended.elapsed_ms;
    let next = timeline.phases.iter().skip(1).map(|next| next.at_ms).chain([end_ms]);
    let phases = timeline.phases.iter().zip(next).filter(|(entered, _)| !entered.phase.is_final());
    let phases = phases.map(|(entered, to_ms)| (entered.phase.name(), (entered.at_ms, to_ms), Vec::new()));
    let waits = timeline.waits.iter().map(|wait| {
        let text = wait.text.as_deref().map(|text| attribute("vmferry.cause", text));
        let attributes = [attribute("vmferry.wait", wait.cause.name())].into_iter().chain(text).collect();
        ("wait", (wait.from_ms, wait.to_ms.unwrap_or(end_ms)), attributes)
    });
    let below = phases.chain(waits).take(SPANS_MAX).zip(1..);
    let below = below.map(|((name, times, attributes), number)| trace.below(number, name, times, attributes));
    let spans: Vec<Value> = [trace.root(ended)].into_iter().chain(below).collect();
    let version = env!("CARGO_PKG_VERSION");
    let resource = [("service.name", "vmferry"), ("service.version", version), ("host.name", host)];
    json!({"resourceSpans": [{
        "resource": {"attributes": resource.map(|(key, value)| attribute(key, value))},
        "scopeSpans": [{"scope": {"name": "vmferry", "version": version}, "spans": spans}],
    }]})
}

/// When it began: by its own clock up to now, in which a clock that was set meanwhile does not show, unless that is not
/// what it is known to have begun at.
fn began_ns(ended: &Progress, now_ns: u64) -> u64 {
    let by_now = now_ns.saturating_sub(ended.elapsed_ms.saturating_mul(1_000_000));
    let known = u64::try_from(ended.began_at).unwrap_or_default().saturating_mul(1_000_000_000);
    if by_now.abs_diff(known) < 2_000_000_000 { by_now } else { known }
}

struct Trace {
    id: Uuid,
    role: Role,
    began_ns: u64,
}

impl Trace {
    /// The migration, as one of its hosts has it. Each host knows the other's.
    fn root_id(&self, role: Role) -> u64 {
        let (first, last) = self.id.as_u64_pair();
        match role {
            Role::Source => last,
            Role::Destination => first,
        }
    }

    fn at(&self, after_ms: u64) -> String {
        self.began_ns.saturating_add(after_ms.saturating_mul(1_000_000)).to_string()
    }

    fn span(
        &self,
        id: u64,
        name: &str,
        kind: u32,
        (from_ms, to_ms): (u64, u64),
        attributes: Vec<Value>,
    ) -> Value {
        json!({
            "traceId": self.id.simple().to_string(),
            "spanId": format!("{id:016x}"),
            "name": name,
            "kind": kind,
            "startTimeUnixNano": self.at(from_ms),
            "endTimeUnixNano": self.at(to_ms.max(from_ms)),
            "attributes": attributes,
        })
    }

    fn root(&self, ended: &Progress) -> Value {
        let result = ended.outcome.as_ref().map_or("none", Outcome::label);
        let mut attributes = vec![
            attribute("vmferry.migration", &ended.id.to_string()),
            attribute("vmferry.vm", &ended.vm),
            attribute("vmferry.role", ended.role.name()),
            attribute("vmferry.peer", &ended.peer),
            attribute("vmferry.result", result),
            number("vmferry.stream_bytes", ended.stream_bytes()),
            number("vmferry.retries", ended.retries()),
        ];
        attributes
            .extend(ended.downtime.as_ref().map(|downtime| number("vmferry.downtime_ms", downtime.total_ms)));
        let kind = if self.role == Role::Source { CLIENT } else { SERVER };
        let mut span =
            self.span(self.root_id(self.role), "migration", kind, (0, ended.elapsed_ms), attributes);
        if self.role == Role::Destination {
            span["parentSpanId"] = format!("{:016x}", self.root_id(Role::Source)).into();
        }
        match &ended.outcome {
            Some(Outcome::Moved { .. } | Outcome::Replicated { .. }) => span["status"] = json!({"code": OK}),
            Some(Outcome::Failed { cause, cancelled: false, .. } | Outcome::Undecided { cause }) => {
                span["status"] = json!({"code": ERROR, "message": short(cause)});
            }
            Some(Outcome::Failed { .. }) | None => {}
        }
        span
    }

    fn below(&self, number: u64, name: &str, times: (u64, u64), attributes: Vec<Value>) -> Value {
        let root = self.root_id(self.role);
        let mut span = self.span(root.wrapping_add(number), name, INTERNAL, times, attributes);
        span["parentSpanId"] = format!("{root:016x}").into();
        span
    }
}

fn attribute(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": short(value)}})
}

fn number(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": i64::try_from(value).unwrap_or(i64::MAX).to_string()}})
}

fn short(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use crate::migrate::phase::Phase;
    use crate::migrate::timeline::{Entered, Wait, Waiting};

    const NOW_NS: u64 = 1_800_000_010_123_000_000;

    fn ended(id: Uuid, role: Role, outcome: Outcome) -> Progress {
        let mut ended = Progress::new(id, "web1", role, "bravo");
        (ended.began_at, ended.elapsed_ms, ended.outcome) = (1_800_000_000, 10_000, Some(outcome));
        ended
    }

    fn timeline(phases: &[(Phase, u64)]) -> Timeline {
        let phases = phases.iter().map(|(phase, at_ms)| Entered { phase: *phase, at_ms: *at_ms }).collect();
        let mut timeline = Timeline::default();
        timeline.phases = phases;
        timeline
    }

    fn spans(request: &Value) -> Vec<Value> {
        request["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone()
    }

    #[test]
    fn both_hosts_make_one_trace() {
        let id = Uuid::new_v4();
        let moved = || Outcome::Moved { leftovers: Vec::new() };
        let course = timeline(&[(Phase::Begin, 0), (Phase::Mirror, 200), (Phase::Done, 10_000)]);
        let source = spans(&request("alpha", &ended(id, Role::Source, moved()), &course, NOW_NS));
        let destination = spans(&request("bravo", &ended(id, Role::Destination, moved()), &course, NOW_NS));
        for span in source.iter().chain(&destination) {
            assert_eq!(span["traceId"], id.simple().to_string());
        }
        assert!(source[0]["parentSpanId"].is_null());
        assert_eq!(destination[0]["parentSpanId"], source[0]["spanId"]);
        let names: Vec<_> = source.iter().map(|span| span["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["migration", "begin", "mirror"], "an end is no time");
        assert_eq!(source[0]["startTimeUnixNano"], "1800000000123000000", "to the millisecond");
        assert_eq!(source[1]["endTimeUnixNano"], source[2]["startTimeUnixNano"]);
        assert_eq!(source[2]["endTimeUnixNano"], source[0]["endTimeUnixNano"]);
        assert!(source[1..].iter().all(|span| span["parentSpanId"] == source[0]["spanId"]));
        let mut ids: Vec<_> =
            source.iter().chain(&destination).map(|span| span["spanId"].to_string()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 6);
    }

    /// The try's, where it is not the first: the destination knows no other.
    #[test]
    fn the_id_is_the_one_that_both_hosts_know() {
        let mut again = ended(Uuid::new_v4(), Role::Source, Outcome::Moved { leftovers: Vec::new() });
        let (migration, first) = (Uuid::new_v4(), again.id.to_string());
        again.tries = Some(crate::migrate::progress::Tries {
            number: 2,
            of: 3,
            migration,
            next_in_ms: None,
            last_failure: None,
            earlier_stream_bytes: 0,
        });
        let root = spans(&request("alpha", &again, &Timeline::default(), NOW_NS))[0].clone();
        assert_eq!(root["traceId"], migration.simple().to_string());
        assert!(root["attributes"].to_string().contains(&first), "{root}");
    }

    #[test]
    fn what_is_told_is_bounded_and_says_how_it_ended() {
        let failed = |cancelled| Outcome::Failed {
            phase: Phase::Mirror,
            cause: "x".repeat(100_000),
            problems: Vec::new(),
            cancelled,
            leftovers: Vec::new(),
        };
        let mut course = timeline(&[(Phase::Mirror, 5); 200]);
        let wait = Wait { cause: Waiting::Qemu, from_ms: 7, to_ms: None, text: Some("y".repeat(100_000)) };
        course.waits = vec![wait; 200];
        let told = request("alpha", &ended(Uuid::new_v4(), Role::Source, failed(false)), &course, 0);
        let all = spans(&told);
        assert_eq!(all.len(), SPANS_MAX + 1);
        assert!(told.to_string().len() < 512 * 1024);
        assert_eq!(all[0]["status"]["code"], ERROR);
        assert_eq!(all[0]["startTimeUnixNano"], "1800000000000000000", "of one that is told of later");
        assert_eq!(all[250]["name"], "wait");
        let cancelled = request("alpha", &ended(Uuid::new_v4(), Role::Source, failed(true)), &course, NOW_NS);
        assert!(spans(&cancelled)[0]["status"].is_null(), "somebody wanted that");
    }
}
