//! What etcd's gateway answers. Its texts are those of a stranger: they are bounded where they are repeated.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};

use super::connection::short;
use super::error::ConnectionError;
use crate::printable::of_peer;

/// Digits of the largest 64-bit number.
const CLUSTER_DIGITS_MAX: usize = 20;

/// What a key has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub value: String,
    /// Changes with every change of the key.
    pub mod_revision: i64,
}

/// An answer, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// What the key has now; none: it is not there.
    pub kept: Option<Kept>,
    /// The change that was asked for was made.
    pub is_changed: bool,
    /// The cluster's id.
    pub cluster: String,
    /// Of the whole cluster; it only rises.
    pub revision: i64,
}

/// An answer that says of which cluster it is.
pub(super) trait Answer: DeserializeOwned {
    fn header(&self) -> &Header;

    /// Reads one.
    fn read(json: &[u8]) -> Result<Self, ConnectionError> {
        of_peer(json).map_err(|e| ConnectionError::NotUnderstood(short(&e.to_string())))
    }
}

impl Answer for RangeAnswer {
    fn header(&self) -> &Header {
        &self.header
    }
}

impl Answer for TxnAnswer {
    fn header(&self) -> &Header {
        &self.header
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    #[serde(deserialize_with = "cluster")]
    pub(super) cluster_id: String,
    /// 64-bit numbers are text in its JSON.
    #[serde(deserialize_with = "number")]
    pub(super) revision: i64,
}

#[derive(Debug, Deserialize)]
pub(super) struct RangeAnswer {
    pub(super) header: Header,
    #[serde(default)]
    kvs: Vec<Pair>,
}

impl RangeAnswer {
    /// With what the key has that was asked for.
    pub(super) fn told(self) -> Told {
        let Header { cluster_id: cluster, revision } = self.header;
        Told { kept: self.kvs.into_iter().next().map(Kept::from), is_changed: false, cluster, revision }
    }
}

/// What an answer to a question for a key says, as [`Etcd::get`](super::Etcd::get) reads it.
/// Errors: it is none.
pub fn told_of_key(json: &[u8]) -> Result<Told, ConnectionError> {
    RangeAnswer::read(json).map(RangeAnswer::told)
}

/// The same of a change to this value, as [`Etcd::change`](super::Etcd::change) reads it.
/// Errors: it is none.
pub fn told_of_change(json: &[u8], value: &str) -> Result<Told, ConnectionError> {
    TxnAnswer::read(json).map(|answer| answer.told(Some(value)))
}

#[derive(Debug, Deserialize)]
pub(super) struct TxnAnswer {
    pub(super) header: Header,
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    responses: Vec<TxnResponse>,
}

impl TxnAnswer {
    /// With what the key has: this value where it was changed to it, and else what was read.
    pub(super) fn told(self, value: Option<&str>) -> Told {
        let Header { cluster_id: cluster, revision } = self.header;
        let ranges = self.responses.into_iter().filter_map(|response| response.response_range);
        let kept = match self.succeeded {
            true => value.map(|value| Kept { value: value.to_owned(), mod_revision: revision }),
            false => ranges.flat_map(|range| range.kvs).next().map(Kept::from),
        };
        Told { kept, is_changed: self.succeeded, cluster, revision }
    }
}

#[derive(Debug, Deserialize)]
struct TxnResponse {
    response_range: Option<TxnRange>,
}

#[derive(Debug, Deserialize)]
struct TxnRange {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
struct Pair {
    #[serde(default)]
    value: String,
    #[serde(deserialize_with = "number")]
    mod_revision: i64,
}

impl From<Pair> for Kept {
    fn from(pair: Pair) -> Self {
        let value = BASE64.decode(&pair.value).unwrap_or_default();
        Self { value: String::from_utf8_lossy(&value).into_owned(), mod_revision: pair.mod_revision }
    }
}

fn number<'a, D: Deserializer<'a>>(text: D) -> Result<i64, D::Error> {
    String::deserialize(text)?.parse().map_err(Error::custom)
}

fn cluster<'a, D: Deserializer<'a>>(text: D) -> Result<String, D::Error> {
    let id = String::deserialize(text)?;
    let is_number = (1..=CLUSTER_DIGITS_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
    if is_number { Ok(id) } else { Err(Error::custom("`cluster_id` is no number")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// As etcd 3.4 has answered.
    #[test]
    fn answers_of_a_real_etcd_are_read() {
        const RANGE: &str = r#"{"header":{"cluster_id":"2037210783374497686","member_id":"13195394291058371180","revision":"3","raft_term":"2"},"kvs":[{"key":"L3ZtZmVycnkv","create_revision":"2","mod_revision":"3","version":"2","value":"b2ZmZXJlZA=="}],"count":"1"}"#;
        let answer = RangeAnswer::read(RANGE.as_bytes()).unwrap();
        assert_eq!((answer.header.cluster_id.as_str(), answer.header.revision), ("2037210783374497686", 3));
        assert_eq!(answer.told().kept, Some(Kept { value: "offered".into(), mod_revision: 3 }));
        const NOTHING: &str = r#"{"header":{"cluster_id":"7","revision":"4"}}"#;
        assert_eq!(RangeAnswer::read(NOTHING.as_bytes()).unwrap().told().kept, None);
        const FAILED: &str = r#"{"header":{"cluster_id":"7","revision":"4"},"responses":[{"response_range":{"header":{"revision":"4"},"kvs":[{"key":"YQ==","mod_revision":"3","value":"b3Blbg=="}],"count":"1"}}]}"#;
        let answer = TxnAnswer::read(FAILED.as_bytes()).unwrap();
        assert!(!answer.succeeded);
        assert_eq!(answer.told(None).kept, Some(Kept { value: "open".into(), mod_revision: 3 }));
        const DONE: &str = r#"{"header":{"cluster_id":"7","revision":"5"},"succeeded":true,"responses":[{"response_put":{"header":{"revision":"5"}}}]}"#;
        let answer = TxnAnswer::read(DONE.as_bytes()).unwrap();
        assert!(answer.succeeded && answer.told(None).kept.is_none());
    }

    #[test]
    fn a_clusters_id_is_a_number_and_what_is_odd_is_repeated_shortly() {
        let id = |id: &str| {
            let header = format!(r#"{{"header":{{"cluster_id":"{id}","revision":"4"}}}}"#);
            RangeAnswer::read(header.as_bytes()).map(drop).map_err(|e| e.to_string())
        };
        assert_eq!(id("18446744073709551615"), Ok(()));
        for odd in ["", "7a", "-7", "184467440737095516150", "\\u001b[31m"] {
            assert!(id(odd).unwrap_err().contains("`cluster_id` is no number"), "{odd}");
        }
        let long = format!(r#"{{"header":"{}"}}"#, "\\u001b[31m".repeat(5000));
        let said = RangeAnswer::read(long.as_bytes()).unwrap_err().to_string();
        assert!(said.chars().count() < 400 && !said.contains('\x1b'), "{said}");
    }
}
