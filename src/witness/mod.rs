//! A client of an existing etcd, by the JSON over HTTP that etcd's gateway speaks (`/v3/kv`, etcd 3.4 and newer). Each
//! question is linearizable: an answer is what a majority of the members had by then. Knows no migrations.

mod answer;
mod connection;
mod error;
#[cfg(test)]
pub(crate) mod fake;
mod files;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::config::{Endpoint, WitnessConfig};
use crate::error_chain::chain;
use answer::{Answer, RangeAnswer, TxnAnswer};
pub use answer::{Kept, Told, told_of_change, told_of_key};
use connection::Connection;
pub use error::ConnectionError;
use files::Files;

/// A connection that was not used for so long is not used again: what lies between may have forgotten it.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// What a connection that was there already may take of an endpoint's time; the rest is for a new one.
const KEPT_PART: u32 = 3;
/// An endpoint that is asked has this much time, however many are left.
const SHARE_MIN: Duration = Duration::from_secs(1);
const RANGE: &str = "/v3/kv/range";
const TXN: &str = "/v3/kv/txn";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// Each endpoint, and why that did not answer.
    #[error("no endpoint of the witness answers: {0}")]
    NoAnswer(String),
    /// The cluster that one endpoint is of, and what became of each.
    #[error("no endpoint is of the etcd that was expected: {each}")]
    Another { cluster: String, each: String },
}

/// What a question is asked under.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// There is an answer by then, or none.
    pub until: Instant,
    /// An endpoint of another cluster is passed over.
    pub cluster: Option<&'a str>,
}

/// One endpoint, as it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub endpoint: String,
    /// The cluster that it is of, or why it does not answer.
    pub cluster: Result<String, String>,
}

/// An etcd.
#[derive(Debug)]
pub struct Etcd {
    endpoints: Vec<Endpoint>,
    files: Files,
    prefix: String,
    answer: Duration,
    idle_max: Duration,
    /// The endpoint that answered last, or the one after another that did not.
    first: AtomicUsize,
    /// To that one.
    connection: Mutex<Option<Connection>>,
    /// The cluster that most endpoints are of.
    usual: StdMutex<Option<String>>,
}

impl Etcd {
    #[must_use]
    pub fn new(config: &WitnessConfig) -> Self {
        Self {
            endpoints: config.endpoints.clone(),
            files: Files::new(config.ca.clone(), config.cert.clone().zip(config.key.clone())),
            prefix: config.prefix.clone(),
            answer: config.answer(),
            idle_max: IDLE_MAX,
            first: AtomicUsize::new(0),
            connection: Mutex::new(None),
            usual: StdMutex::default(),
        }
    }

    /// What `key` has.
    /// Errors: [`EtcdError`].
    pub async fn get(&self, key: &str, asking: Asking<'_>) -> Result<Told, EtcdError> {
        let request = json!({ "key": self.key(key) });
        let answer: RangeAnswer = self.ask(RANGE, &request, asking).await?;
        Ok(answer.told())
    }

    /// Gives `key` a value, if it is as it was at `mod_revision`; 0: if it is not there.
    /// Errors: [`EtcdError`]; it may be changed all the same, now or later.
    pub async fn change(
        &self,
        key: &str,
        mod_revision: i64,
        value: &str,
        asking: Asking<'_>,
    ) -> Result<Told, EtcdError> {
        let name = self.key(key);
        let put = json!({ "request_put": { "key": name, "value": BASE64.encode(value) } });
        self.change_by((&name, mod_revision), &put, Some(value), asking).await
    }

    /// Removes `key`, if it is as it was at `mod_revision`.
    /// Errors: [`EtcdError`].
    pub async fn remove(&self, key: &str, mod_revision: i64, asking: Asking<'_>) -> Result<Told, EtcdError> {
        let name = self.key(key);
        let delete = json!({ "request_delete_range": { "key": name } });
        self.change_by((&name, mod_revision), &delete, None, asking).await
    }

    async fn change_by(
        &self,
        (name, mod_revision): (&str, i64),
        change: &Value,
        value: Option<&str>,
        asking: Asking<'_>,
    ) -> Result<Told, EtcdError> {
        let compare = json!({
            "key": name, "target": "MOD", "result": "EQUAL", "mod_revision": mod_revision.to_string()
        });
        let request = json!({
            "compare": [compare],
            "success": [change],
            "failure": [{ "request_range": { "key": name } }],
        });
        let answer: TxnAnswer = self.ask(TXN, &request, asking).await?;
        Ok(answer.told(value))
    }

    /// The whole name of a key.
    #[must_use]
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// That the certificate files can be used.
    /// Errors: [`ConnectionError`].
    pub fn check_files(&self) -> Result<(), ConnectionError> {
        self.files.settings_anew().map(drop)
    }

    /// Looks at every endpoint, by connections of its own.
    pub async fn each(&self) -> Vec<Seen> {
        let body = json!({ "key": self.key("") }).to_string();
        let looks = self.endpoints.iter().enumerate().map(|(number, endpoint)| {
            let looking = self.ask_anew::<RangeAnswer>((number, endpoint), RANGE, &body);
            async move {
                let cluster = match timeout(self.answer, looking).await {
                    Ok(Ok((answer, _))) => Ok(answer.header.cluster_id),
                    Ok(Err(e)) => Err(chain(&e)),
                    Err(_) => Err(no_answer(self.answer)),
                };
                Seen { endpoint: endpoint.to_string(), cluster }
            }
        });
        let seen = join_all(looks).await;
        if let Some(usual) = usual(&seen) {
            *self.usual.lock().unwrap_or_else(PoisonError::into_inner) = Some(usual.to_owned());
        }
        seen
    }

    /// The cluster that most endpoints were of when each was looked at; none before.
    #[must_use]
    pub fn usual(&self) -> Option<String> {
        self.usual.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn key(&self, key: &str) -> String {
        BASE64.encode(self.name(key))
    }

    /// Asks one endpoint after the other, the one first that has answered last. One that is silent, answers wrongly or
    /// is of another cluster is passed over, and not the first any more.
    async fn ask<T: Answer>(&self, path: &str, request: &Value, asking: Asking<'_>) -> Result<T, EtcdError> {
        let body = request.to_string();
        let (first, count) = (self.first.load(Relaxed), self.endpoints.len());
        let (mut why, mut others) = (Vec::new(), Vec::new());
        for at in 0..count {
            let number = (first + at) % count;
            let Some(endpoint) = self.endpoints.get(number) else { continue };
            let rest = asking.until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                why.push(format!("{endpoint}: no time was left to ask it"));
                continue;
            }
            let share = share(self.answer, rest, count - at);
            let mut then = Then { first: &self.first, number: (number + 1) % count };
            let asked = self.ask_one((number, endpoint), path, &body, (share, asking.cluster));
            match timeout(share, asked).await {
                Ok(Ok(answer)) => {
                    then.number = number;
                    return Ok(answer);
                }
                Ok(Err(e)) => {
                    why.push(format!("{endpoint}: {}", chain(&e)));
                    if let ConnectionError::Another { cluster } = e {
                        others.push(cluster);
                    }
                }
                Err(_) => why.push(format!("{endpoint}: {}", no_answer(share))),
            }
        }
        // One that is silent may be of the right one.
        let all_are_others = others.len() == why.len();
        let each = why.join("; ");
        Err(match others.pop().filter(|_| all_are_others) {
            Some(cluster) => EtcdError::Another { cluster, each },
            None => EtcdError::NoAnswer(each),
        })
    }

    async fn ask_one<T: Answer>(
        &self,
        (number, endpoint): (usize, &Endpoint),
        path: &str,
        body: &str,
        (share, cluster): (Duration, Option<&str>),
    ) -> Result<T, ConnectionError> {
        let asked = match self.ask_on_kept((number, endpoint), path, body, share / KEPT_PART).await {
            Some(asked) => asked,
            None => self.ask_anew((number, endpoint), path, body).await?,
        };
        let (answer, connection): (T, _) = asked;
        let of = &answer.header().cluster_id;
        if cluster.is_some_and(|cluster| cluster != of) {
            return Err(ConnectionError::Another { cluster: of.clone() });
        }
        *self.connection.lock().await = Some(connection);
        Ok(answer)
    }

    /// On the connection that is kept, if it is to that endpoint and of use. It may be one that only this end still
    /// knows: silence on it says nothing of the endpoint.
    async fn ask_on_kept<T: Answer>(
        &self,
        (number, endpoint): (usize, &Endpoint),
        path: &str,
        body: &str,
        within: Duration,
    ) -> Option<(T, Connection)> {
        // Taken: whoever asks meanwhile has a connection of its own.
        let kept = self.connection.lock().await.take_if(|kept| kept.is_to(number));
        let mut kept = kept.filter(|kept| kept.idle() < self.idle_max)?;
        let answer = timeout(within, kept.ask(endpoint, path, body)).await.ok()?.ok()?;
        Some((T::read(&answer).ok()?, kept))
    }

    async fn ask_anew<T: Answer>(
        &self,
        (number, endpoint): (usize, &Endpoint),
        path: &str,
        body: &str,
    ) -> Result<(T, Connection), ConnectionError> {
        let mut connection = Connection::open(number, endpoint, &self.files, self.answer).await?;
        let answer = connection.ask(endpoint, path, body).await?;
        Ok((T::read(&answer)?, connection))
    }
}

/// Which endpoint is asked first by the next question, also where this one is given up.
struct Then<'a> {
    first: &'a AtomicUsize,
    number: usize,
}

impl Drop for Then<'_> {
    fn drop(&mut self) {
        self.first.store(self.number, Relaxed);
    }
}

/// What one endpoint may take of what is left, so that each of those behind it is asked as well.
fn share(answer: Duration, rest: Duration, endpoints_left: usize) -> Duration {
    let left = u32::try_from(endpoints_left).unwrap_or(u32::MAX).max(1);
    answer.min((rest / left).max(SHARE_MIN)).min(rest)
}

fn no_answer(within: Duration) -> String {
    format!("no answer within {:.1} s", within.as_secs_f64())
}

/// The cluster that most endpoints are of; of as many the one that is named first.
fn usual(seen: &[Seen]) -> Option<&str> {
    let clusters = || seen.iter().filter_map(|seen| seen.cluster.as_deref().ok());
    let count = |cluster: &str| clusters().filter(|other| *other == cluster).count();
    clusters().rev().max_by_key(|cluster| count(cluster))
}
