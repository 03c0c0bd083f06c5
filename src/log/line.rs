//! A text of an event as one line, of bounded length, that no terminal obeys.

use crate::printable::printable;

/// Longest line in bytes.
pub(super) const LINE_BYTES_MAX: usize = 32 * 1024;

pub(super) fn line(text: &str) -> String {
    bounded(text, LINE_BYTES_MAX)
}

/// … that is not much longer than `max` bytes.
pub(super) fn bounded(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut line = printable(&text[..end]);
    if end < text.len() {
        line.push('…');
    }
    line
}
