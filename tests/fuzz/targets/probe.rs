//! What a peer answers to a probe: lines of JSON.

use bytes::BytesMut;
use vmferry::net::probe::{Answerer, LINE_BYTES_MAX, Swallowed, take_line};

use super::messages::understood;
use super::script::pieces;

/// The lines in these bytes, and the rest or that it is too long.
fn taken<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Vec<u8>>, Option<usize>) {
    let (mut buffer, mut lines) = (BytesMut::new(), Vec::new());
    for part in parts {
        buffer.extend_from_slice(part);
        loop {
            match take_line(&mut buffer) {
                Ok(Some(line)) => lines.push(line.to_vec()),
                Ok(None) => break,
                Err(_) => return (lines, None),
            }
        }
        assert!(buffer.len() < LINE_BYTES_MAX, "a line that never ends");
    }
    (lines, Some(buffer.len()))
}

/// Lines, however they come.
pub(crate) fn lines(data: &[u8]) {
    let at_once = taken(std::iter::once(data));
    assert_eq!(taken(pieces(data, false)), at_once);
    assert_eq!(taken(pieces(data, true)), at_once);
    for line in at_once.0 {
        assert!(line.len() <= LINE_BYTES_MAX && line.ends_with(b"\n"));
        understood::<Answerer>(&line);
        understood::<Swallowed>(&line);
    }
}
