//! The agent's three listeners: peers, the local API, Prometheus.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::extract::ConnectInfo;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Extension, Router};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::caller::{Caller, warn_of_unknown_groups};
use super::handoff::PassedSockets;
use super::http::{self, HasBusiness, Limits, Visitor, WhenFull};
use super::running::Agent;
use super::{drain_routes, libvirt_routes, replica_routes, routes, unix_listener};
use crate::config::{ApiConfig, Config};
use crate::error_chain::chain;
use crate::net::accept::listen;

/// Each user of the local API. Whoever follows a migration holds a connection for as long.
const API_LIMITS: Limits =
    Limits { connections: 64, when_full: WhenFull::CloseNewest, in_all: 512, lifetime: None };
/// Whoever may reach the metrics, all together: who floods them closes its own connections.
const METRICS_LIMITS: Limits = Limits {
    connections: 32,
    when_full: WhenFull::CloseOldest,
    in_all: 32,
    lifetime: Some(Duration::from_secs(20)),
};
/// The local API's socket: root and the socket's group.
const API_SOCKET_MODE: u32 = 0o660;
/// The same where groups have roles: everybody may connect, and who has no role is told so.
const API_SOCKET_MODE_ROLES: u32 = 0o666;
/// How long a port or socket that is in use is waited for: a process that ends closes its sockets one by one.
const PORT_DEADLINE: Duration = Duration::from_secs(2);
const PORT_POLL: Duration = Duration::from_millis(20);
/// Before the next try when no connection can be accepted, for want of descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// All that an agent listens with, open and not yet served.
pub(super) struct Listeners {
    peers: Vec<TcpListener>,
    local: Local,
    metrics: Option<TcpListener>,
}

/// The local API's socket: whoever can connect to it finds an agent that serves.
enum Local {
    Own(unix_listener::Bound),
    /// The service manager's, at which callers wait.
    Passed(UnixListener),
}

impl Listeners {
    /// Opens what the service manager has not passed.
    /// Errors: an address or a path that cannot be listened on, by its key in the configuration.
    pub(super) async fn open(config: &Config, passed: PassedSockets) -> anyhow::Result<Self> {
        let passed = passed.sort(&config.api_socket())?;
        let peers = match passed.peers.is_empty() {
            true => peers(&config.listen).await?,
            false => passed.peers,
        };
        let local = match passed.local {
            Some(passed) => Local::Passed(passed),
            None => Local::Own(local(&config.api_socket(), &config.api).await?),
        };
        let metrics = config.metrics.as_ref().map(|m| metrics(m.listen)).transpose()?;
        Ok(Self { peers, local, metrics })
    }

    /// Serves all of them until the agent stops.
    /// Errors: the operating system's.
    pub(super) fn serve(self, agent: &Arc<Agent>, servers: &TaskTracker) -> anyhow::Result<()> {
        let local = match self.local {
            Local::Own(bound) => bound.listen().context("cannot listen for the local API")?,
            Local::Passed(passed) => passed,
        };
        for listener in self.peers {
            servers.spawn(accept_peers(Arc::clone(agent), listener));
        }
        servers.spawn(serve_api(Arc::clone(agent), local));
        if let Some(listener) = self.metrics {
            servers.spawn(serve_metrics(Arc::clone(agent), listener));
        }
        Ok(())
    }
}

/// Opens the one port. A process before this one may be about to let go of it.
async fn peers(addresses: &[SocketAddr]) -> anyhow::Result<Vec<TcpListener>> {
    let until = Instant::now() + PORT_DEADLINE;
    let mut open = Vec::new();
    for address in addresses {
        let listener = loop {
            match listen(*address) {
                Err(e) if e.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                    tokio::time::sleep(PORT_POLL).await;
                }
                opened => break opened,
            }
        };
        let what = || format!("cannot listen on {address} (`listen` in the configuration)");
        open.push(listener.with_context(what)?);
    }
    Ok(open)
}

/// Accepts peers until the agent stops.
async fn accept_peers(agent: Arc<Agent>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = agent.stopping.cancelled() => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                let accepting = Arc::clone(&agent);
                agent.tasks.spawn(async move { accept(&accepting, tcp, address).await });
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept(agent: &Agent, tcp: tokio::net::TcpStream, address: SocketAddr) {
    let config = &agent.host.config;
    let known = |peer: &crate::net::identity::Identity| config.peer_by_identity(peer).is_some();
    if let Err(e) = agent.host.pool.accept(tcp, known).await {
        agent.metrics.sessions.count_connect_failure("in", e.label());
        agent.refusals.note(address, &e);
        let source = address.ip().to_canonical().to_string();
        agent.host.audit.refused(&source, e.label(), || chain(&e));
    }
}

/// Makes the folder of the sockets.
pub(super) fn make_folder(folder: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .with_context(|| format!("cannot make {} (`runtime_dir` in the configuration)", folder.display()))
}

/// Makes the local API's socket, unless another agent serves it. A process before this one may be about to
/// let go of it.
async fn local(path: &Path, api: &ApiConfig) -> anyhow::Result<unix_listener::Bound> {
    warn_of_unknown_groups(api);
    path.parent().map_or(Ok(()), make_folder)?;
    let until = Instant::now() + PORT_DEADLINE;
    while std::os::unix::net::UnixStream::connect(path).is_ok() {
        if Instant::now() >= until {
            bail!("another agent serves {}; stop it first", path.display());
        }
        tokio::time::sleep(PORT_POLL).await;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot remove the stale socket {}", path.display()));
        }
        _ => {}
    }
    let mode = if api.has_roles() { API_SOCKET_MODE_ROLES } else { API_SOCKET_MODE };
    unix_listener::bind(path, mode).with_context(|| format!("cannot listen on {}", path.display()))
}

/// Serves the local API until the agent stops.
async fn serve_api(agent: Arc<Agent>, listener: UnixListener) {
    let gates = [routes::router, libvirt_routes::router, drain_routes::router, replica_routes::router];
    let gates = gates.map(|router| router(Arc::clone(&agent)));
    let routes = routes::served(gates);
    let stopping = agent.stopping.clone();
    http::serve(listener, API_LIMITS, stopping, |io| {
        let (caller, has_business) = (Caller::of(io), HasBusiness::default());
        if caller.owns_the_agent() {
            has_business.note();
        }
        // Whose user is not known shares its number with all of these.
        let number = caller.uid.unwrap_or(u32::MAX);
        let routes = routes.clone().layer(Extension(ConnectInfo(caller)));
        Visitor { caller: number, routes: routes.layer(Extension(has_business.clone())), has_business }
    })
    .await;
}

/// Opens the Prometheus listener.
fn metrics(address: SocketAddr) -> anyhow::Result<TcpListener> {
    listen(address)
        .with_context(|| format!("cannot listen on {address} (`metrics.listen` in the configuration)"))
}

/// Serves Prometheus until the agent stops.
async fn serve_metrics(agent: Arc<Agent>, listener: TcpListener) {
    let stopping = agent.stopping.clone();
    let text = move || {
        let agent = Arc::clone(&agent);
        async move {
            match agent.metrics_text().await {
                Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
                    .into_response(),
                Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
            }
        }
    };
    let routes = Router::new().route("/metrics", get(text));
    let visitor = |_: &_| Visitor { caller: 0, has_business: HasBusiness::default(), routes: routes.clone() };
    http::serve(listener, METRICS_LIMITS, stopping, visitor).await;
}
