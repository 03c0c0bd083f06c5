//! Texts of others, made safe for terminals and logs: a peer's, QEMU's, those of an older journal. What
//! could move a cursor, change a colour, begin a line or turn the direction of reading is replaced. Pure.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::json::{Document, Strict};

/// Longest text in bytes that is taken from a peer or from QEMU; the longest honest ones are lists of
/// files with their paths.
pub const TEXT_BYTES_MAX: usize = 8 * 1024;

/// `text` on one line, without anything that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(replaced).collect()
}

/// As [`printable`], and not longer than [`TEXT_BYTES_MAX`].
pub fn bounded(text: &str) -> String {
    if text.len() <= TEXT_BYTES_MAX {
        return printable(text);
    }
    let mut end = TEXT_BYTES_MAX;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    printable(&text[..end]) + "…"
}

fn replaced(c: char) -> char {
    match c {
        '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => ' ',
        // Direction of reading, and what has no width (Unicode Standard Annex #9).
        '\u{ad}'
        | '\u{61c}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}'
        | '\u{e0000}'..='\u{e007f}' => char::REPLACEMENT_CHARACTER,
        // What looks like a space, and is none.
        '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}' => char::REPLACEMENT_CHARACTER,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// What a peer has written, every text in it bounded and printable: also those that an error repeats.
pub fn of_peer<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    let Document(mut value) = serde_json::from_slice(json)?;
    clean(&mut value, bounded);
    T::deserialize(Strict(value))
}

/// Spaces in a row that a text on a terminal may have: more of them would move the rest to where a line of
/// its own is expected.
const SPACES_MAX: usize = 3;

/// As [`printable`], without long gaps.
fn without_gaps(text: &str) -> String {
    let mut spaces = 0;
    let mut kept = printable(text);
    kept.retain(|c| {
        spaces = if c.is_whitespace() { spaces + 1 } else { 0 };
        spaces <= SPACES_MAX
    });
    kept
}

/// What goes to a terminal, every text in it printable and without long gaps.
pub fn to_show<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    let mut value: Value = serde_json::from_slice(json)?;
    clean(&mut value, without_gaps);
    serde_json::from_value(value)
}

/// Cleans the texts under these keys, at whatever depth, and leaves all others as they are: names and
/// paths must stay what they are.
pub fn clean_under(keys: &[&str], value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| clean_under(keys, item)),
        Value::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                if keys.contains(&name.as_str()) {
                    clean(field, bounded);
                } else {
                    clean_under(keys, field);
                }
            }
        }
        _ => {}
    }
}

fn clean(value: &mut Value, text: fn(&str) -> String) {
    match value {
        Value::String(word) => *word = text(word),
        Value::Array(items) => items.iter_mut().for_each(|item| clean(item, text)),
        Value::Object(fields) => {
            let cleaned = std::mem::take(fields).into_iter().map(|(name, mut field)| {
                clean(&mut field, text);
                (text(&name), field)
            });
            *fields = cleaned.collect::<Map<_, _>>();
        }
        _ => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left_and_all_else_is() {
        for c in (0..=0x0011_0000).filter_map(char::from_u32) {
            let shown = printable(&c.to_string());
            assert!(!shown.chars().any(char::is_control), "{c:?}");
        }
        let kept = "/var/lib/vm-1/web1.qcow2: „größer“ als 10 GiB – 你好 🚢";
        assert_eq!(printable(kept), kept);
        assert_eq!(printable("a\x1b[2J\nb\u{202e}c\u{9b}d"), "a\u{fffd}[2J b\u{fffd}c\u{fffd}d");
    }

    #[test]
    fn what_is_shown_has_no_gap_in_which_a_line_could_seem_to_end() {
        let gap = format!("a{}b\u{2800}\u{3164}c  d", " \n\u{3000}\u{a0}".repeat(40));
        let shown: String = to_show(json!(gap).to_string().as_bytes()).unwrap();
        assert_eq!(shown, "a  \u{3000}b\u{fffd}\u{fffd}c  d");
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let long = bounded(&"ü".repeat(TEXT_BYTES_MAX));
        assert!(long.len() <= TEXT_BYTES_MAX + '…'.len_utf8() && long.ends_with("ü…"));
        assert_eq!(bounded("short"), "short");
    }

    #[test]
    fn numbers_and_structure_stay_and_errors_are_clean() {
        let text = json!({"n": u64::MAX, "f": -1.5, "t\x1b": ["\x07", null, true]}).to_string();
        let read: Value = of_peer(text.as_bytes()).unwrap();
        assert_eq!(read, json!({"n": u64::MAX, "f": -1.5, "t\u{fffd}": ["\u{fffd}", null, true]}));
        let error = of_peer::<u64>(b"\"\\u001b[31m\"").unwrap_err().to_string();
        assert!(!error.contains('\x1b') && error.contains("[31m"), "{error}");
        let mut reply = json!([{"file": "a\nb", "error": "c\nd", "in": {"error-desc": {"x": "e\nf"}}}]);
        clean_under(&["error", "error-desc"], &mut reply);
        assert_eq!(reply, json!([{"file": "a\nb", "error": "c d", "in": {"error-desc": {"x": "e f"}}}]));
    }
}
