//! A client of an existing etcd, by the JSON over HTTP that etcd's gateway speaks (`/v3/kv`, etcd 3.4 and newer). Each
//! question is linearizable: an answer is what a majority of the members had by then. Knows no migrations.

mod connection;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::config::{Endpoint, WitnessConfig};
use crate::error_chain::chain;
pub use connection::ConnectionError;
use connection::{Connection, Files};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// Each endpoint, and why that did not answer.
    #[error("no endpoint of the witness answers: {0}")]
    NoAnswer(String),
    #[error("the witness gave an answer that is not understood")]
    NotUnderstood(#[source] serde_json::Error),
}

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

/// An etcd.
#[derive(Debug)]
pub struct Etcd {
    endpoints: Vec<Endpoint>,
    files: Files,
    prefix: String,
    answer: Duration,
    /// The endpoint that answered last.
    first: AtomicUsize,
    /// To that one.
    connection: Mutex<Option<Connection>>,
}

impl Etcd {
    #[must_use]
    pub fn new(config: &WitnessConfig) -> Self {
        let files = Files { ca: config.ca.clone(), own: config.cert.clone().zip(config.key.clone()) };
        Self {
            endpoints: config.endpoints.clone(),
            files,
            prefix: config.prefix.clone(),
            answer: config.answer(),
            first: AtomicUsize::new(0),
            connection: Mutex::new(None),
        }
    }

    /// What `key` has.
    /// Errors: [`EtcdError`].
    pub async fn get(&self, key: &str) -> Result<Told, EtcdError> {
        let request = json!({ "key": self.key(key) });
        let answer: RangeAnswer = self.ask("/v3/kv/range", &request).await?;
        let kept = answer.kvs.into_iter().next().map(Kept::from);
        Ok(Told {
            kept,
            is_changed: false,
            cluster: answer.header.cluster_id,
            revision: answer.header.revision,
        })
    }

    /// Gives `key` a value, if it is as it was at `mod_revision`; 0: if it is not there.
    /// Errors: [`EtcdError`]; it may be changed all the same, now or later.
    pub async fn change(&self, key: &str, mod_revision: i64, value: &str) -> Result<Told, EtcdError> {
        let name = self.key(key);
        let put = json!({ "request_put": { "key": name, "value": BASE64.encode(value) } });
        self.change_by(&name, mod_revision, &put, Some(value)).await
    }

    /// Removes `key`, if it is as it was at `mod_revision`.
    /// Errors: [`EtcdError`].
    pub async fn remove(&self, key: &str, mod_revision: i64) -> Result<Told, EtcdError> {
        let name = self.key(key);
        let delete = json!({ "request_delete_range": { "key": name } });
        self.change_by(&name, mod_revision, &delete, None).await
    }

    async fn change_by(
        &self,
        name: &str,
        mod_revision: i64,
        change: &Value,
        value: Option<&str>,
    ) -> Result<Told, EtcdError> {
        let compare = json!({
            "key": name, "target": "MOD", "result": "EQUAL", "mod_revision": mod_revision.to_string()
        });
        let request = json!({
            "compare": [compare],
            "success": [change],
            "failure": [{ "request_range": { "key": name } }],
        });
        let answer: TxnAnswer = self.ask("/v3/kv/txn", &request).await?;
        let (cluster, revision) = (answer.header.cluster_id, answer.header.revision);
        let kept = if answer.succeeded {
            value.map(|value| Kept { value: value.to_owned(), mod_revision: revision })
        } else {
            let ranges = answer.responses.into_iter().filter_map(|response| response.response_range);
            ranges.flat_map(|range| range.kvs).next().map(Kept::from)
        };
        Ok(Told { kept, is_changed: answer.succeeded, cluster, revision })
    }

    /// The whole name of a key.
    #[must_use]
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// That the certificate files can be used.
    /// Errors: [`ConnectionError`].
    pub fn check_files(&self) -> Result<(), ConnectionError> {
        self.files.settings().map(drop)
    }

    fn key(&self, key: &str) -> String {
        BASE64.encode(self.name(key))
    }

    /// Asks one endpoint after the other, the one first that has answered last.
    async fn ask<T: for<'a> Deserialize<'a>>(&self, path: &str, request: &Value) -> Result<T, EtcdError> {
        let body = request.to_string();
        let first = self.first.load(Relaxed);
        let mut why = Vec::new();
        for at in 0..self.endpoints.len() {
            let number = (first + at) % self.endpoints.len();
            let Some(endpoint) = self.endpoints.get(number) else { continue };
            let asked = timeout(self.answer, self.ask_one(number, endpoint, path, &body)).await;
            match asked {
                Ok(Ok(answer)) => {
                    self.first.store(number, Relaxed);
                    return crate::json::read(&answer).map_err(EtcdError::NotUnderstood);
                }
                Ok(Err(e)) => why.push(format!("{endpoint}: {}", chain(&e))),
                Err(_) => {
                    // What was asked on it may still be answered, and is nobody's by then.
                    self.connection.lock().await.take();
                    why.push(format!("{endpoint}: no answer within {} s", self.answer.as_secs()));
                }
            }
        }
        Err(EtcdError::NoAnswer(why.join("; ")))
    }

    async fn ask_one(
        &self,
        number: usize,
        endpoint: &Endpoint,
        path: &str,
        body: &str,
    ) -> Result<Vec<u8>, ConnectionError> {
        // Taken: whoever asks meanwhile has a connection of its own.
        let kept = self.connection.lock().await.take_if(|kept| kept.is_to(number));
        if let Some(mut kept) = kept
            && let Ok(answer) = kept.ask(endpoint, path, body).await
        {
            *self.connection.lock().await = Some(kept);
            return Ok(answer);
        }
        let mut connection = Connection::open(number, endpoint, &self.files).await?;
        let answer = connection.ask(endpoint, path, body).await?;
        *self.connection.lock().await = Some(connection);
        Ok(answer)
    }
}

#[derive(Debug, Deserialize)]
struct Header {
    cluster_id: String,
    /// 64-bit numbers are text in its JSON.
    #[serde(deserialize_with = "number")]
    revision: i64,
}

#[derive(Debug, Deserialize)]
struct RangeAnswer {
    header: Header,
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
struct TxnAnswer {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<TxnResponse>,
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

fn number<'a, D: serde::Deserializer<'a>>(text: D) -> Result<i64, D::Error> {
    String::deserialize(text)?.parse().map_err(serde::de::Error::custom)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// As etcd 3.4 has answered.
    #[test]
    fn answers_of_a_real_etcd_are_read() {
        const RANGE: &str = r#"{"header":{"cluster_id":"2037210783374497686","member_id":"13195394291058371180","revision":"3","raft_term":"2"},"kvs":[{"key":"L3ZtZmVycnkv","create_revision":"2","mod_revision":"3","version":"2","value":"b2ZmZXJlZA=="}],"count":"1"}"#;
        let answer: RangeAnswer = crate::json::read(RANGE.as_bytes()).unwrap();
        assert_eq!((answer.header.cluster_id.as_str(), answer.header.revision), ("2037210783374497686", 3));
        let kept = answer.kvs.into_iter().next().map(Kept::from).unwrap();
        assert_eq!(kept, Kept { value: "offered".into(), mod_revision: 3 });
        const NOTHING: &str = r#"{"header":{"cluster_id":"7","revision":"4"}}"#;
        let answer: RangeAnswer = crate::json::read(NOTHING.as_bytes()).unwrap();
        assert!(answer.kvs.is_empty());
        const FAILED: &str = r#"{"header":{"cluster_id":"7","revision":"4"},"responses":[{"response_range":{"header":{"revision":"4"},"kvs":[{"key":"YQ==","mod_revision":"3","value":"b3Blbg=="}],"count":"1"}}]}"#;
        let answer: TxnAnswer = crate::json::read(FAILED.as_bytes()).unwrap();
        assert!(!answer.succeeded);
        let range = answer.responses.into_iter().next().and_then(|one| one.response_range).unwrap();
        assert_eq!(range.kvs.len(), 1);
        const DONE: &str = r#"{"header":{"cluster_id":"7","revision":"5"},"succeeded":true,"responses":[{"response_put":{"header":{"revision":"5"}}}]}"#;
        let answer: TxnAnswer = crate::json::read(DONE.as_bytes()).unwrap();
        assert!(answer.succeeded && answer.responses[0].response_range.is_none());
    }
}
