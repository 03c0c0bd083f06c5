//! One line of the record: its number, when, what, and the hash of the line before. Pure but for the clock that
//! its caller gives.

use aws_lc_rs::digest::{SHA256, digest};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::event::Event;
use crate::printable::printable;

/// Longest line in bytes.
pub(super) const LINE_BYTES_MAX: usize = 16 * 1024;
/// Longest text in a line, in characters.
const TEXT_MAX: usize = 1024;

/// The last line of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// 0 when there is no line.
    pub number: u64,
    /// SHA-256 of the line, in hex.
    pub hash: String,
}

impl Head {
    /// Before the first line.
    pub(super) fn none() -> Self {
        Self { number: 0, hash: "0".repeat(64) }
    }

    pub(super) fn of(number: u64, line: &[u8]) -> Self {
        Self { number, hash: hash(line) }
    }
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.number, self.hash)
    }
}

/// SHA-256 in hex.
pub(super) fn hash(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

#[derive(Serialize)]
struct Line<'a> {
    n: u64,
    at: String,
    before: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

/// The line after `head`, without its end.
pub(super) fn line(head: &Head, at: OffsetDateTime, event: &Event) -> Vec<u8> {
    let n = head.number + 1;
    let at = at.replace_nanosecond(at.nanosecond() / 1_000_000 * 1_000_000).unwrap_or(at);
    let at = at.format(&Rfc3339).unwrap_or_default();
    let whole = Line { n, at: at.clone(), before: &head.hash, event };
    let text = serde_json::to_value(&whole).map(|mut value| {
        shorten(&mut value, TEXT_MAX);
        value.to_string()
    });
    match text {
        Ok(text) if text.len() < LINE_BYTES_MAX => text.into_bytes(),
        // Long lists of short texts, or what is no JSON: said, with what it was.
        _ => {
            let lost = serde_json::json!({"n": n, "at": at, "before": head.hash, "event": "too-long"});
            lost.to_string().into_bytes()
        }
    }
}

/// Texts of others are cut where they are longer than anybody reads.
fn shorten(value: &mut Value, max: usize) {
    match value {
        Value::String(text) if text.chars().nth(max).is_some() => {
            *text = text.chars().take(max).chain(['…']).collect();
        }
        Value::Array(all) => all.iter_mut().for_each(|v| shorten(v, max)),
        Value::Object(all) => all.values_mut().for_each(|v| shorten(v, max)),
        _ => {}
    }
}

/// A line that was read.
#[derive(Debug, Clone)]
pub struct Kept {
    pub n: u64,
    pub at: OffsetDateTime,
    pub before: String,
    /// All of it.
    pub whole: Value,
}

impl Kept {
    /// `None` when it is no line of a record.
    pub fn read(line: &[u8]) -> Option<Self> {
        let whole: Value = serde_json::from_slice(line).ok()?;
        let n = whole.get("n")?.as_u64()?;
        let at = OffsetDateTime::parse(whole.get("at")?.as_str()?, &Rfc3339).ok()?;
        let before = whole.get("before")?.as_str()?.to_owned();
        whole.get("event")?.as_str()?;
        Some(Self { n, at, before, whole })
    }

    pub fn event(&self) -> &str {
        self.field("event").and_then(Value::as_str).unwrap_or_default()
    }

    pub fn field(&self, name: &str) -> Option<&Value> {
        self.whole.get(name)
    }
}

/// A line for people: when, what, and everything else as `name=value`.
pub fn text_of(line: &Kept) -> String {
    let mut text = format!("{:>6} ", line.n);
    text += line.field("at").and_then(Value::as_str).unwrap_or_default();
    text += &format!(" {:<15}", line.event());
    for (name, value) in line.whole.as_object().into_iter().flatten() {
        if ["n", "at", "before", "event"].contains(&name.as_str()) || value.is_null() {
            continue;
        }
        match value {
            Value::String(word) if !word.is_empty() && !word.contains([' ', '"', '=']) => {
                text += &format!(" {name}={word}");
            }
            other => text += &format!(" {name}={other}"),
        }
    }
    printable(&text)
}
