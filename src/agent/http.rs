//! Serving HTTP to local callers within limits: how many connections each may have, how long a request's head
//! may take, how long a connection may last. Knows no route.

use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long a request's head may take.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Largest head of a request.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// What becomes of a caller's connection beyond its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WhenFull {
    /// The oldest is closed for it: for callers that cannot be told apart, who want one short answer.
    CloseOldest,
    /// It is closed itself.
    CloseNewest,
}

/// What callers are held to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections of one caller.
    pub(super) connections: usize,
    pub(super) when_full: WhenFull,
    /// Of a whole connection; none where answers may go on.
    pub(super) lifetime: Option<Duration>,
}

/// The open connections, oldest first, each with its caller.
#[derive(Debug, Default)]
struct Open(Vec<(u32, AbortHandle)>);

impl Open {
    /// Whether the caller may have one more.
    fn admits(&mut self, caller: u32, limits: &Limits) -> bool {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let is_theirs = |(of, _): &&(u32, AbortHandle)| *of == caller;
        if self.0.iter().filter(is_theirs).count() < limits.connections {
            return true;
        }
        if limits.when_full == WhenFull::CloseNewest {
            return false;
        }
        if let Some(at) = self.0.iter().position(|(of, _)| *of == caller) {
            self.0.remove(at).1.abort();
        }
        true
    }
}

/// Serves until the agent stops, and what is under way by then to its end. `routes` says for each connection
/// who calls and what answers.
pub(super) async fn serve<L>(
    mut listener: L,
    limits: Limits,
    stopping: CancellationToken,
    routes: impl Fn(&L::Io) -> (u32, Router),
) where
    L: Listener<Io: AsyncRead + AsyncWrite + Unpin + Send>,
{
    let (mut tasks, mut open) = (JoinSet::new(), Open::default());
    loop {
        let io = tokio::select! {
            (io, _) = listener.accept() => io,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            () = stopping.cancelled() => break,
        };
        let (caller, router) = routes(&io);
        if open.admits(caller, &limits) {
            let connection = serve_one(io, router, limits, stopping.clone());
            open.0.push((caller, tasks.spawn(connection)));
        }
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

/// One request, and its answer: further ones take a connection of their own.
async fn serve_one<I>(io: I, router: Router, limits: Limits, stopping: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE);
    http.max_buf_size(HEAD_BYTES_MAX).keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let served = async {
        tokio::select! {
            done = connection.as_mut() => return done,
            () = stopping.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    };
    let done = match limits.lifetime {
        Some(lifetime) => timeout(lifetime, served).await.unwrap_or(Ok(())),
        None => served.await,
    };
    if let Err(error) = done {
        tracing::debug!(%error, "a local connection failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open_after(when_full: WhenFull, callers: &[u32]) -> Vec<(u32, bool)> {
        let limits = Limits { connections: 2, when_full, lifetime: None };
        let (mut open, mut tasks, mut all) = (Open::default(), JoinSet::new(), Vec::new());
        for caller in callers {
            if open.admits(*caller, &limits) {
                let task = tasks.spawn(std::future::pending::<()>());
                all.push((*caller, task.clone()));
                open.0.push((*caller, task));
            }
        }
        tokio::task::yield_now().await;
        all.into_iter().map(|(caller, task)| (caller, !task.is_finished())).collect()
    }

    #[tokio::test]
    async fn a_caller_that_has_its_number_takes_nothing_from_others() {
        let kept = open_after(WhenFull::CloseNewest, &[1, 1, 1, 2, 1, 2, 2]).await;
        assert_eq!(kept, [(1, true), (1, true), (2, true), (2, true)]);
        let kept = open_after(WhenFull::CloseOldest, &[1, 2, 1, 1, 2]).await;
        assert_eq!(kept, [(1, false), (2, true), (1, true), (1, true), (2, true)]);
    }
}
