//! What is wrong with a configuration's text, for people: the line, the key, what is there, what was expected.

use toml::de::Error;

/// A place in a configuration, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) line: Option<usize>,
    /// In TOML's dotted form; empty where it is the whole file.
    pub(super) key: String,
    pub(super) problem: String,
}

pub(super) fn explain(text: &str, error: &Error) -> Mistake {
    let at = error.span().map(|span| span.start.min(text.len()));
    let before = at.map(|at| text.get(..at).unwrap_or_default());
    let line = before.map(|before| before.matches('\n').count() + 1);
    let key = line.map(|line| key_at(text, line)).unwrap_or_default();
    Mistake { line, key, problem: problem(error.message()) }
}

/// The key of a line, below its table's header.
fn key_at(text: &str, line: usize) -> String {
    let upto: Vec<&str> = text.lines().take(line).map(str::trim).collect();
    let header =
        |line: &&str| Some(line.strip_prefix('[')?.split(']').next()?.trim_matches(['[', ' ']).to_owned());
    let table = upto.iter().rev().find_map(header).unwrap_or_default();
    let own =
        upto.last().and_then(|line| line.split_once('=')).map(|(key, _)| key.trim()).unwrap_or_default();
    match (table.as_str(), own) {
        (table, "") => table.to_owned(),
        ("", own) => own.to_owned(),
        (table, own) => format!("{table}.{own}"),
    }
}

/// serde's words in plain ones. What is not serde's own stays as it is.
fn problem(message: &str) -> String {
    let message = message.trim();
    for kind in ["invalid type: ", "invalid value: "] {
        if let Some((found, expected)) =
            message.strip_prefix(kind).and_then(|rest| rest.rsplit_once(", expected "))
        {
            return format!("{} is expected here, not {}", expectation(expected), finding(found));
        }
    }
    if let Some((what, expected)) =
        message.strip_prefix("unknown field ").and_then(|m| m.split_once(", expected "))
    {
        return format!("there is no key {what} here; there is {}", expected.trim_start_matches("one of "));
    }
    if let Some((what, expected)) =
        message.strip_prefix("unknown variant ").and_then(|m| m.split_once(", expected "))
    {
        return format!("{what} is none of what may be here: {}", expected.trim_start_matches("one of "));
    }
    match message.strip_prefix("missing field ") {
        Some(key) => format!("the key {key} is missing"),
        None => message.to_owned(),
    }
}

fn expectation(expected: &str) -> String {
    let plain = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number that is not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "bool" | "a boolean" => "`true` or `false`",
        "a string" | "a borrowed string" | "path string" => "a text in quotes",
        "a sequence" => "a list in [ ]",
        "a map" => "a table",
        "socket address" => "an address with a port, as in \"10.0.0.2:9907\"",
        other if other.starts_with("struct ") => "a table",
        other if other.starts_with("enum ") || other.contains("enum ") => {
            "one of the ways that the documentation names"
        }
        other => other,
    };
    plain.to_owned()
}

fn finding(found: &str) -> String {
    let (kind, value) = found.split_once(' ').unwrap_or((found, ""));
    match kind {
        "string" => format!("the text {value}"),
        "integer" | "floating" | "float" => {
            format!("the number {}", value.trim_start_matches("point ").trim_matches('`'))
        }
        "boolean" => value.trim_matches('`').to_owned(),
        "sequence" => "a list".into(),
        "map" => "a table".into(),
        _ => found.to_owned(),
    }
}
