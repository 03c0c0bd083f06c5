//! Tells an OpenTelemetry collector on this host (`[traces]`) of migrations that have ended. Nothing waits for it: what it
//! does not take in time is lost, counted and said.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::CollectorUrl;
use crate::migrate::progress::{Outcome, ProgressSink};
use crate::traces;

/// Migrations that it is still to be told of.
const QUEUE_MAX: usize = 64;
/// How long it may take to be told of one.
const DEADLINE: Duration = Duration::from_secs(5);

/// What has become of them.
#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

/// What is to be told; nothing without a collector.
#[derive(Debug, Default)]
pub(super) struct Traces {
    queue: Mutex<Option<mpsc::Sender<Value>>>,
    counts: Arc<Counts>,
}

impl Traces {
    /// Tells this collector of all that is added from now on, until the end.
    pub(super) fn begin(&self, url: CollectorUrl) -> impl Future<Output = ()> + use<> {
        let (queue, told) = mpsc::channel(QUEUE_MAX);
        *self.locked() = Some(queue);
        tell_all(url, told, Arc::clone(&self.counts))
    }

    /// Nothing is added any more.
    pub(super) fn end(&self) {
        self.locked().take();
    }

    /// A migration of this `host` is at its end. Does nothing without a collector.
    pub(super) fn add(&self, host: &str, progress: &ProgressSink) {
        let queue = self.locked();
        let Some(queue) = queue.as_ref() else { return };
        let now = progress.now();
        if now.outcome.is_none() || matches!(now.outcome, Some(Outcome::Undecided { .. })) {
            return;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        if queue.try_send(traces::request(host, &now, &progress.timeline(), now_ns)).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
            tracing::warn!(migration = %now.id, vm = now.vm, "no trace of it: the collector takes them too slowly");
        }
    }

    /// By result.
    pub(super) fn counts(&self) -> [(&'static str, u64); 3] {
        let Counts { sent, failed, dropped } = &*self.counts;
        [("sent", sent), ("failed", failed), ("dropped", dropped)]
            .map(|(result, count)| (result, count.load(Relaxed)))
    }

    fn locked(&self) -> MutexGuard<'_, Option<mpsc::Sender<Value>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn tell_all(url: CollectorUrl, mut told: mpsc::Receiver<Value>, counts: Arc<Counts>) {
    while let Some(one) = told.recv().await {
        let sent = timeout(DEADLINE, tell(&url, &one)).await;
        let sent =
            sent.unwrap_or_else(|_| Err(anyhow::anyhow!("it took more than {} s", DEADLINE.as_secs())));
        match sent {
            Ok(()) => counts.sent.fetch_add(1, Relaxed),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(%url, error, "the collector of traces was not told of a migration");
                counts.failed.fetch_add(1, Relaxed)
            }
        };
    }
}

async fn tell(url: &CollectorUrl, told: &Value) -> anyhow::Result<()> {
    let stream = TcpStream::connect(url.address).await.context("cannot connect")?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let _ = connection.await;
    });
    let request = Request::post(&url.path)
        .header("host", url.address.to_string())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(told.to_string())))?;
    let answer = sender.send_request(request).await.context("no answer")?;
    ensure!(answer.status().is_success(), "it answered {}", answer.status());
    Ok(())
}
