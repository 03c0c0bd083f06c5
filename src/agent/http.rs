//! Serving HTTP to local callers within limits: how many connections each may have, how long a request's head
//! may take, how long a connection may last. Knows no route.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Connections of all of them. Beyond that the oldest one makes room whose caller is not known to have business
    /// here: a user of this host may have thousands of numbers in its namespaces (subuid(5)).
    pub(super) in_all: usize,
    /// Of a whole connection; none where answers may go on.
    pub(super) lifetime: Option<Duration>,
}

/// Whether the caller of a connection is known to have business here.
#[derive(Debug, Clone, Default)]
pub(super) struct HasBusiness(Arc<AtomicBool>);

impl HasBusiness {
    /// From now on it has.
    pub(super) fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Who is at the other end of a connection, and what answers it.
pub(super) struct Visitor {
    /// The same for all connections of a caller.
    pub(super) caller: u32,
    pub(super) has_business: HasBusiness,
    pub(super) routes: Router,
}

#[derive(Debug)]
struct Connection {
    caller: u32,
    has_business: HasBusiness,
    task: AbortHandle,
}

/// The open connections, oldest first.
#[derive(Debug, Default)]
struct Open(Vec<Connection>);

impl Open {
    /// Whether the caller may have one more.
    fn admits(&mut self, caller: u32, has_business: &HasBusiness, limits: &Limits) -> bool {
        self.0.retain(|connection| !connection.task.is_finished());
        if self.0.iter().filter(|connection| connection.caller == caller).count() >= limits.connections {
            return limits.when_full == WhenFull::CloseOldest && self.close(|one| one.caller == caller);
        }
        self.0.len() < limits.in_all || self.close(|one| !one.has_business.get()) || has_business.get()
    }

    /// Closes the oldest that is so; whether there was one.
    fn close(&mut self, is: impl Fn(&Connection) -> bool) -> bool {
        let found = self.0.iter().position(is);
        found.is_some_and(|at| {
            self.0.remove(at).task.abort();
            true
        })
    }
}

/// Serves until the agent stops, and what is under way by then to its end. `visitor` says for each connection
/// who calls and what answers.
pub(super) async fn serve<L>(
    mut listener: L,
    limits: Limits,
    stopping: CancellationToken,
    visitor: impl Fn(&L::Io) -> Visitor,
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
        let Visitor { caller, has_business, routes } = visitor(&io);
        if open.admits(caller, &has_business, &limits) {
            let task = tasks.spawn(serve_one(io, routes, limits, stopping.clone()));
            open.0.push(Connection { caller, has_business, task });
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

    /// Those of these callers that are open afterwards, by their number; from 100 on they have business.
    async fn open_after(when_full: WhenFull, in_all: usize, callers: &[u32]) -> Vec<(u32, bool)> {
        let limits = Limits { connections: 2, when_full, in_all, lifetime: None };
        let (mut open, mut tasks, mut all) = (Open::default(), JoinSet::new(), Vec::new());
        for caller in callers {
            let has_business = HasBusiness::default();
            if *caller >= 100 {
                has_business.note();
            }
            if open.admits(*caller, &has_business, &limits) {
                let task = tasks.spawn(std::future::pending::<()>());
                all.push((*caller, task.clone()));
                open.0.push(Connection { caller: *caller, has_business, task });
            }
        }
        tokio::task::yield_now().await;
        all.into_iter().map(|(caller, task)| (caller, !task.is_finished())).collect()
    }

    #[tokio::test]
    async fn a_caller_that_has_its_number_takes_nothing_from_others() {
        let kept = open_after(WhenFull::CloseNewest, 9, &[1, 1, 1, 2, 1, 2, 2]).await;
        assert_eq!(kept, [(1, true), (1, true), (2, true), (2, true)]);
        let kept = open_after(WhenFull::CloseOldest, 9, &[1, 2, 1, 1, 2]).await;
        assert_eq!(kept, [(1, false), (2, true), (1, true), (1, true), (2, true)]);
    }

    #[tokio::test]
    async fn callers_of_any_number_take_nothing_from_those_that_have_business() {
        let kept = open_after(WhenFull::CloseNewest, 3, &[100, 1, 2, 3, 4, 101]).await;
        assert_eq!(kept, [(100, true), (1, false), (2, false), (3, false), (4, true), (101, true)]);
        let kept = open_after(WhenFull::CloseNewest, 2, &[100, 101, 1, 102]).await;
        assert_eq!(kept, [(100, true), (101, true), (102, true)]);
    }
}
