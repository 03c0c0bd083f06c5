//! The page: one file that asks nobody for anything. Every text that is not ours is escaped.

use std::fmt::Write;

use indicatif::HumanBytes;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::chart::{Ground, Line, Part, bar, escaped, lines, time};
use crate::api::{Course, Downtime, HeldUp, Migration, Outcome, Role, Waiting};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;\
color:#222;background:#fff}h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}\
th,td{text-align:left;vertical-align:top;padding:.15em 1em .15em 0}th{font-weight:600}svg{width:100%;height:auto}\
svg text{font-size:11px;fill:#555}polyline{fill:none;stroke-width:1.8}.grid{stroke:#ddd}.wait{fill:#f4c20d;\
fill-opacity:.3}.restart{stroke:#888;stroke-dasharray:4 3}.legend span{margin-right:1.2em;white-space:nowrap}\
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}.note{color:#666}\
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}svg text{fill:#aaa}.grid{stroke:#444}\
.note{color:#999}}";

/// The whole page.
pub(super) fn page(course: &Course) -> String {
    let migration = &course.migration;
    let title = format!("Migration of {}", migration.vm);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{0}</title><style>{STYLE}</style></head>\n\
         <body><h1>{0}</h1>\n",
        escaped(&title)
    );
    page += &facts(migration);
    page += &phases(course);
    page += &charts(course);
    page += &downtime(migration.downtime.as_ref());
    page += &held_up(course);
    page += &waits(course);
    page += &list("Notes", migration.notes.iter().map(String::as_str));
    page + &format!("<p class=\"note\">vmferry {}</p></body></html>\n", env!("CARGO_PKG_VERSION"))
}

fn facts(migration: &Migration) -> String {
    let (source, destination) = match migration.role {
        Role::Source => (&migration.host, &migration.peer),
        Role::Destination => (&migration.peer, &migration.host),
    };
    let began = OffsetDateTime::from_unix_timestamp(migration.began_at).ok();
    let began = began.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    let (result, cause) = match &migration.outcome {
        None => (format!("under way, in phase {}", migration.phase.name()), None),
        Some(Outcome::Failed { phase, cause, .. }) => {
            (format!("{} in phase {}", outcome_word(migration), phase.name()), Some(cause.as_str()))
        }
        Some(Outcome::Undecided { cause }) => ("undecided".to_owned(), Some(cause.as_str())),
        Some(done @ (Outcome::Moved { .. } | Outcome::Replicated { .. })) => (done.label().to_owned(), None),
    };
    let mut rows = vec![
        ("From", source.clone()),
        ("To", destination.clone()),
        ("Seen from", format!("the {}", migration.role.name())),
        ("Began", began),
        ("Took", time(migration.elapsed_ms)),
        ("Result", result),
    ];
    rows.extend(cause.map(|cause| ("Cause", cause.to_owned())));
    rows.push(("Bytes on streams", HumanBytes(migration.stream_bytes()).to_string()));
    rows.extend(migration.tries.as_ref().map(|t| ("Tries", format!("{} of {}", t.number, t.of))));
    if let Some(
        Outcome::Moved { leftovers } | Outcome::Replicated { leftovers } | Outcome::Failed { leftovers, .. },
    ) = &migration.outcome
    {
        rows.extend(leftovers.iter().map(|left| ("Left", left.to_string())));
    }
    rows.push(("Id", migration.id.to_string()));
    let rows = rows.iter().map(|(name, text)| format!("<tr><th>{name}</th><td>{}</td></tr>", escaped(text)));
    format!("<table>{}</table>\n", rows.collect::<String>())
}

fn outcome_word(migration: &Migration) -> &'static str {
    migration.outcome.as_ref().map_or("under way", Outcome::label)
}

fn phases(course: &Course) -> String {
    let ends = course.phases.iter().skip(1).map(|next| next.at_ms).chain([course.migration.elapsed_ms]);
    let parts = course.phases.iter().zip(ends).map(|(entered, end)| Part {
        name: entered.phase.name().to_owned(),
        ms: end.saturating_sub(entered.at_ms),
    });
    let parts: Vec<Part> = parts.filter(|part| part.ms > 0).collect();
    let mut text = "<h2>Phases</h2>\n".to_owned();
    if parts.is_empty() {
        return text + "<p class=\"note\">Not known: this agent's process began after it had ended.</p>\n";
    }
    text += &bar(&parts);
    if course.left_out > 0 {
        let _ =
            write!(text, "<p class=\"note\">{} phases and waits more are not shown.</p>", course.left_out);
    }
    text + "\n"
}

fn charts(course: &Course) -> String {
    if course.samples.is_empty() {
        return "<h2>Over time</h2>\n<p class=\"note\">No samples: nothing was copied while this agent \
                watched, or it was restarted after a crash.</p>\n"
            .to_owned();
    }
    let end_ms = course.migration.elapsed_ms;
    let wait = |wait: &crate::api::Wait| {
        (wait.from_ms, wait.to_ms.unwrap_or(end_ms), cause_words(wait.cause).to_owned())
    };
    let waits: Vec<_> = course.waits.iter().map(wait).collect();
    let ground = Ground { end_ms, waits: &waits, restarts_ms: &course.restarts_ms };
    let rate = course.samples.iter().map(|sample| (sample.at_ms, sample.rate_bytes_per_s)).collect();
    let rate = lines(&[Line { name: "all streams".into(), points: rate }], &ground, |bytes| {
        format!("{}/s", HumanBytes(bytes))
    });
    let of_stream = |at: usize, name: &String| {
        let points = course
            .samples
            .iter()
            .filter_map(|sample| Some((sample.at_ms, sample.streams.get(at)?.remaining_bytes)));
        Line { name: name.clone(), points: points.collect() }
    };
    let streams: Vec<Line> =
        course.streams.iter().enumerate().map(|(at, name)| of_stream(at, name)).collect();
    let remaining = lines(&streams, &ground, |bytes| HumanBytes(bytes).to_string());
    let mut text = format!("<h2>Rate</h2>\n{rate}\n<h2>Left to copy</h2>\n{remaining}\n");
    let _ = write!(text, "<p class=\"note\">A sample every {}", time(course.sample_every_ms));
    if !waits.is_empty() {
        text += "; yellow: it waited";
    }
    if !course.restarts_ms.is_empty() {
        text += "; dashed: the agent was restarted, and the time between its processes is missing";
    }
    text + ".</p>\n"
}

fn downtime(downtime: Option<&Downtime>) -> String {
    let Some(downtime) = downtime else { return String::new() };
    let Downtime { total_ms, disks_ms, device_ms, start_ms, other_ms, .. } = downtime;
    let parts = [
        ("disks: mirrors finished, exports closed", *disks_ms),
        ("the rest of the RAM, devices' state", *device_ms),
        ("journal, word to the destination, start there", *start_ms),
        ("between these", *other_ms),
    ];
    let parts = parts.map(|(name, ms)| Part { name: name.to_owned(), ms });
    let parts: Vec<Part> = parts.into_iter().filter(|part| part.ms > 0).collect();
    format!("<h2>The guest stood still for {}</h2>\n{}\n", time(*total_ms), bar(&parts))
}

/// The longest first.
fn held_up(course: &Course) -> String {
    let mut causes: Vec<_> = course.held_up_ms.iter().filter(|(_, ms)| **ms > 0).collect();
    causes.sort_by_key(|(_, ms)| std::cmp::Reverse(**ms));
    let words = |cause: &HeldUp| cause.words().unwrap_or("not known, or nothing");
    let texts: Vec<_> =
        causes.into_iter().map(|(cause, ms)| format!("for {}: {}", time(*ms), words(cause))).collect();
    list("What held the copying up", texts.iter().map(String::as_str))
}

fn waits(course: &Course) -> String {
    let texts = course.waits.iter().map(|wait| {
        let for_ms = wait.to_ms.map(|to| format!(" for {}", time(to.saturating_sub(wait.from_ms))));
        let for_ms = for_ms.unwrap_or_else(|| ", still".to_owned());
        let why = wait.text.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
        format!("after {}, {}{for_ms}{why}", time(wait.from_ms), cause_words(wait.cause))
    });
    let texts: Vec<String> = texts.collect();
    list("Waits", texts.iter().map(String::as_str))
}

fn cause_words(cause: Waiting) -> &'static str {
    match cause {
        Waiting::Connection => "the connection to the other host was missed",
        Waiting::Qemu => "QEMU did not answer",
        Waiting::NextTry => "the next try was waited for",
    }
}

fn list<'a>(title: &str, items: impl Iterator<Item = &'a str>) -> String {
    let items: String = items.map(|item| format!("<li>{}</li>\n", escaped(item))).collect();
    if items.is_empty() { items } else { format!("<h2>{title}</h2>\n<ul>{items}</ul>\n") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::redact::redacted;
    use super::*;
    use crate::api::{Disk, Entered, Phase, Ram, Sample, StreamSample, Wait};

    /// Every text that comes from elsewhere wants to be markup.
    fn hostile() -> Course {
        let evil = |name: &str| format!("{name}\"><script>alert('{name}')</script>&\u{1b}[31m");
        let cause = evil("cause");
        let outcome = Outcome::Failed {
            phase: Phase::Mirror,
            cause: cause.clone(),
            problems: Vec::new(),
            cancelled: false,
            leftovers: vec![evil("left").into()],
        };
        let json = serde_json::json!({
            "id": uuid::Uuid::nil(), "vm": evil("vm"), "role": "source", "peer": evil("peer"), "host": evil("host"),
            "phase": "failed", "began_at": 1_700_000_000, "elapsed_ms": 70_000,
            "disks": [Disk { name: evil("disk"), total_bytes: 9, stream_bytes: 5, ..Disk::default() }],
            "ram": Ram::default(), "rate_bytes_per_s": 0, "paused": false,
            "downtime": Downtime { total_ms: 111, disks_ms: 23, device_ms: 15, start_ms: 5, other_ms: 68, hook_ms: None },
            "notes": [evil("note")], "outcome": outcome,
        });
        let stream = StreamSample { done_bytes: 1, remaining_bytes: 8, stream_bytes: 1 };
        let sample = |at_ms| Sample { at_ms, rate_bytes_per_s: 7, streams: vec![stream; 2] };
        Course {
            migration: serde_json::from_value(json).unwrap(),
            phases: vec![
                Entered { phase: Phase::Begin, at_ms: 0 },
                Entered { phase: Phase::Mirror, at_ms: 9 },
            ],
            waits: vec![Wait {
                cause: Waiting::Connection,
                from_ms: 10,
                to_ms: Some(5000),
                text: Some(evil("wait")),
            }],
            restarts_ms: vec![4000],
            left_out: 0,
            streams: vec![evil("disk"), "RAM".into()],
            samples: vec![sample(0), sample(70_000)],
            sample_every_ms: 250,
            held_up_ms: [(HeldUp::DestinationCpu, 12_000), (HeldUp::Limit, 30_000), (HeldUp::Network, 0)]
                .into(),
        }
    }

    #[test]
    fn no_text_of_others_is_markup() {
        let page = page(&hostile());
        for what in ["vm", "peer", "host", "disk", "note", "cause", "left", "wait"] {
            assert!(
                page.contains(&format!("{what}&quot;&gt;&lt;script&gt;alert(&#39;{what}&#39;)")),
                "{what}"
            );
        }
        assert!(!page.contains("<script") && !page.contains('\u{1b}'));
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src=\""));
        let (limit, processors) =
            (page.find("for 30.0 s: a limit"), page.find("for 12.0 s: the destination&#39;s processors"));
        assert!(limit.is_some() && limit < processors, "{page}");
        assert!(!page.contains("the network"), "what did not happen");
        for shown in ["111 ms", "23 ms", "1:10 min", "for 4.9 s", "between these 68 ms", "<polyline"] {
            assert!(page.contains(shown), "{shown}");
        }
    }

    #[test]
    fn a_redacted_report_has_no_name_in_it() {
        let mut course = hostile();
        // The name of a VM may be a word of ours.
        (course.migration.vm, course.migration.held_up_by) = ("limit".into(), Some(HeldUp::Limit));
        let page = page(&redacted(&course).unwrap());
        for what in ["peer", "host", "disk"] {
            assert!(!page.contains(&format!("{what}&quot;")), "{what}");
        }
        assert!(page.contains("Migration of vm-1") && page.contains("host-2") && page.contains("disk-1"));
    }
}
