//! QMP's wire form: lines of JSON, taken apart and put together. Pure: knows no socket and no
//! clock. Everything read here may be garbage.

use super::event::{Event, Timestamp};
use crate::printable::clean_under;
use serde_json::{Map, Value};
use std::collections::VecDeque;

/// The longest line taken from a monitor. `query-qmp-schema` is the longest honest one, about
/// 0.2 MB on QEMU 7.2 and 10.0.
pub const LINE_MAX_BYTES: usize = 8 << 20;

/// Where QEMU speaks to people; what it repeats there, a guest or an image may have chosen.
const WORDS: [&str; 6] = ["error", "error-desc", "desc", "class", "reason", "blocked-reasons"];

/// More than [`LINE_MAX_BYTES`] came without a line's end.
#[derive(Debug, PartialEq, Eq)]
pub struct LineTooLong;

/// Collects bytes and gives back lines.
#[derive(Default)]
pub struct LineBuffer {
    lines: VecDeque<Vec<u8>>,
    partial: Vec<u8>,
}

impl LineBuffer {
    /// Takes what has been read; each byte is looked at once.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), LineTooLong> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.extend(&bytes[..end])?;
            self.lines.push_back(std::mem::take(&mut self.partial));
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes)
    }

    fn extend(&mut self, bytes: &[u8]) -> Result<(), LineTooLong> {
        if self.partial.len() + bytes.len() > LINE_MAX_BYTES {
            return Err(LineTooLong);
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole line that is not blank, without its end.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let line = self.lines.pop_front()?;
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }
}

/// QEMU's answer to a command.
#[derive(Debug)]
pub enum Outcome {
    Return(Value),
    Error { class: String, desc: String },
}

/// One line from QEMU.
#[derive(Debug)]
pub enum Message {
    Greeting,
    Event(Event),
    Reply {
        id: Option<u64>,
        outcome: Outcome,
    },
    /// An object of a kind this build does not know.
    Unknown,
}

impl Message {
    /// Fails only on what is no JSON object.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        let mut line: Value = serde_json::from_slice(line)?;
        clean_under(&WORDS, &mut line);
        let mut object: Map<String, Value> = serde_json::from_value(line)?;
        if let Some(Value::String(name)) = object.get_mut("event").map(Value::take) {
            return Ok(Self::Event(event(name, object)));
        }
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(value) = object.remove("return") {
            let outcome = Outcome::Return(value);
            return Ok(Self::Reply { id, outcome });
        }
        if let Some(error) = object.remove("error") {
            let outcome = failure(&error);
            return Ok(Self::Reply { id, outcome });
        }
        let greets = object.contains_key("QMP");
        Ok(if greets { Self::Greeting } else { Self::Unknown })
    }
}

fn failure(error: &Value) -> Outcome {
    let text = |key| error.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    Outcome::Error { class: text("class"), desc: text("desc") }
}

fn event(name: String, mut object: Map<String, Value>) -> Event {
    let timestamp = object
        .remove("timestamp")
        .and_then(|stamp| serde_json::from_value(stamp).ok())
        .unwrap_or(Timestamp { seconds: 0, microseconds: 0 });
    let data = object.remove("data").unwrap_or(Value::Null);
    Event::new(name, data, timestamp)
}

/// One command as QEMU reads it. Arguments that are nothing are left out.
pub(super) fn command_line(name: &str, id: u64, arguments: Value) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("execute".into(), name.into());
    object.insert("id".into(), id.into());
    if arguments.as_object().is_some_and(|map| !map.is_empty()) {
        object.insert("arguments".into(), arguments);
    }
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_the_bytes_arrive() {
        let text = b"{\"a\":1}\r\n\n  \n{}\nrest";
        for cut in 0..=text.len() {
            let mut buffer = LineBuffer::default();
            buffer.push(&text[..cut]).unwrap();
            buffer.push(&text[cut..]).unwrap();
            assert_eq!(buffer.next_line().unwrap(), b"{\"a\":1}\r", "cut at {cut}");
            assert_eq!(buffer.next_line().unwrap(), b"{}", "cut at {cut}");
            assert_eq!(buffer.next_line(), None, "cut at {cut}");
        }
    }

    #[test]
    fn a_line_may_be_exactly_as_long_as_the_limit() {
        let mut buffer = LineBuffer::default();
        buffer.push(&vec![b'x'; LINE_MAX_BYTES]).unwrap();
        assert_eq!(buffer.push(b"x"), Err(LineTooLong));
        buffer.push(b"\n").unwrap();
        assert_eq!(buffer.next_line().unwrap().len(), LINE_MAX_BYTES);
    }

    #[test]
    fn commands_without_arguments_have_none_on_the_wire() {
        assert_eq!(command_line("stop", 7, Value::Null), b"{\"execute\":\"stop\",\"id\":7}\n");
        assert!(command_line("x", 1, serde_json::json!({})).ends_with(b"\"id\":1}\n"));
    }

    #[test]
    fn odd_messages_are_not_fatal_and_garbage_is() {
        let parse = |text: &str| Message::parse(text.as_bytes());
        assert!(matches!(parse("{}"), Ok(Message::Unknown)));
        assert!(matches!(parse(r#"{"event":5}"#), Ok(Message::Unknown)));
        let nameless = r#"{"error":{"class":7},"id":"text"}"#;
        assert!(matches!(parse(nameless), Ok(Message::Reply { id: None, .. })));
        for garbage in ["[]", "null", "{\"a\":", "\u{0}", "{\"event\":\"X\"} x"] {
            assert!(parse(garbage).is_err(), "{garbage:?}");
        }
    }
}
