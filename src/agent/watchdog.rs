//! The service manager's watchdog is told that this agent lives only when those answer who do its work: each session's
//! driver, on a thread of its own, and the local API, by its socket.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::TaskTracker;

use super::running::Agent;

/// Of a shorter interval, for tests.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Keeps the watchdog, if there is one.
pub(super) fn keep(agent: &Arc<Agent>, servers: &TaskTracker) {
    let Some(interval) = sd_notify::watchdog_enabled() else { return };
    let agent = Arc::clone(agent);
    servers.spawn(async move {
        loop {
            match answers(&agent, Instant::now() + interval / 2).await {
                Ok(()) => drop(sd_notify::notify(&[NotifyState::Watchdog])),
                Err(who) => tracing::error!(
                    who,
                    within_ms = (interval / 2).as_millis() as u64,
                    "no answer within the agent; if that lasts, the service manager replaces it"
                ),
            }
            sleep((interval / 3).max(PAUSE_MIN)).await;
        }
    });
}

/// Waits for everybody's answer. Errors: who has not given one.
async fn answers(agent: &Agent, until: Instant) -> Result<(), String> {
    for session in agent.host.pool.all() {
        let answer = timeout_at(until, session.stats()).await;
        answer.map_err(|_| format!("the session with {}", session.info().peer))?;
    }
    let api = timeout_at(until, api_answers(&agent.host.config.api_socket())).await;
    api.map_err(|_| "the local API".to_owned())
}

/// Any answer will do: a connection that is closed, for there are too many, was looked at. A socket that nobody
/// listens at, or whose file is gone, is no standstill.
async fn api_answers(socket: &Path) {
    let Ok(mut stream) = UnixStream::connect(socket).await else { return };
    if stream.write_all(b"GET /v1/names HTTP/1.0\r\nhost: vmferry\r\n\r\n").await.is_ok() {
        let _ = stream.read(&mut [0; 1]).await;
    }
}
