//! What agents say to each other in streams: JSON behind a length.

use bytes::BytesMut;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmferry::libvirt::message::{Answer, Ask};
use vmferry::migrate::message::{Asked, Reply};
use vmferry::net::message::{MESSAGE_BYTES_MAX, take_whole};
use vmferry::printable::{TEXT_BYTES_MAX, of_peer};

use super::script::pieces;
use super::shape::same_shape;

/// Messages of migrations.
pub(crate) fn messages(data: &[u8]) {
    framed(data);
    understood::<Asked>(data);
    understood::<Reply>(data);
}

/// Messages about libvirt's own migrations.
pub(crate) fn libvirt(data: &[u8]) {
    understood::<Ask>(data);
    understood::<Answer>(data);
}

/// The messages in these bytes, and the rest or why there is none.
fn taken<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Vec<u8>>, Result<usize, String>) {
    let (mut buffer, mut whole) = (BytesMut::new(), Vec::new());
    for part in parts {
        buffer.extend_from_slice(part);
        loop {
            match take_whole(&mut buffer) {
                Ok(Some(json)) => whole.push(json.to_vec()),
                Ok(None) => break,
                Err(error) => return (whole, Err(error.to_string())),
            }
        }
        assert!(buffer.len() < 4 + MESSAGE_BYTES_MAX, "a message that is never whole");
    }
    (whole, Ok(buffer.len()))
}

fn framed(data: &[u8]) {
    let at_once = taken(std::iter::once(data));
    assert_eq!(taken(pieces(data, false)), at_once);
    assert_eq!(taken(pieces(data, true)), at_once);
    for json in at_once.0 {
        understood::<Asked>(&json);
        understood::<Reply>(&json);
    }
}

/// What a peer has said is clean, and means the same when it is said again.
pub(super) fn understood<T: Serialize + DeserializeOwned>(json: &[u8]) {
    let Ok(message) = of_peer::<T>(json) else { return };
    let said = serde_json::to_value(&message).expect("a message can be written");
    clean(&said);
    same_shape(&serde_json::from_slice(json).expect("what was understood is JSON"), &said);
    let again: T = of_peer(said.to_string().as_bytes()).expect("what we say is understood");
    assert_eq!(serde_json::to_value(&again).expect("a message can be written"), said);
}

/// No text that is longer than it may be, or that a terminal obeys.
fn clean(value: &Value) {
    match value {
        Value::String(text) => {
            assert!(text.len() <= TEXT_BYTES_MAX * 3 + '…'.len_utf8(), "{} bytes", text.len());
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
        Value::Array(items) => items.iter().for_each(clean),
        Value::Object(fields) => fields.iter().for_each(|(name, field)| {
            assert!(!name.chars().any(char::is_control), "{name:?}");
            clean(field);
        }),
        _ => {}
    }
}
