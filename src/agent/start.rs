//! From a configuration file to a running agent and back: everything that can be wrong is
//! found before the first socket opens, and `READY=1` is said only once all of them listen.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::inherit;
use super::looks::Looks;
use super::passing::{Estates, Inherited, give_way, leave_to_the_store};
use super::registry::Registry;
use super::{Agent, listen, reload, store};
use crate::config::{Config, TlsConfig};
use crate::metrics::Metrics;
use crate::migrate::journal::Role;
use crate::migrate::problem::chain;
use crate::migrate::progress::{Progress, ProgressSink};
use crate::migrate::{Host, journal, recover, settle};
use crate::mux;
use crate::net::connect::Endpoint;
use crate::net::pool::Pool;
use crate::net::tls::{Aead, Tls, TlsPaths};

/// Streams that peers may have opened and nobody has looked at yet.
const INCOMING_MAX: usize = 256;
/// Between two tries to end the journals of ended migrations whose disk was full.
const END_LATE_EVERY: Duration = Duration::from_secs(5);

/// Why an agent does not run, or no longer does.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Configuration or certificates are wrong: starting again does not help.
    #[error(transparent)]
    Configuration(anyhow::Error),
    /// The machine did not give what is needed: an address, a folder, the lock. It may later.
    #[error(transparent)]
    Unable(anyhow::Error),
}

impl AgentError {
    /// The exit code of `vmferry agent`; the unit restarts it on all but configuration errors.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 2,
            Self::Unable(_) => 1,
        }
    }
}

/// How an agent begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// With what the service manager kept of a process before, if that is anything.
    Alone,
    /// With everything that the running agent holds, which ends.
    TakingOver,
}

/// What this version can take over, as a line of JSON.
///
/// # Errors
/// Never: the encoder's.
pub fn succession_formats() -> anyhow::Result<String> {
    Ok(serde_json::to_string(&inherit::Offer::ours())?)
}

/// Runs an agent until SIGTERM or SIGINT, or until another process takes over.
///
/// # Errors
/// What keeps it from starting, with the remedy.
pub async fn run(path: &Path, how: How) -> Result<(), AgentError> {
    // Before anything else is started that could inherit them in turn.
    let kept = store::from_store();
    let (config, tls) = configured(path).map_err(AgentError::Configuration)?;
    serve(config, tls, kept, how).await.map_err(AgentError::Unable)
}

fn configured(path: &Path) -> anyhow::Result<(Config, Tls)> {
    let config = Config::load(path)?;
    let tls = Tls::load(&tls_paths(&config.tls), Aead::Auto)?;
    config.check_own(&tls.identity, path)?;
    Ok((config, tls))
}

/// Where the configuration says that the files are.
pub(super) fn tls_paths(tls: &TlsConfig) -> TlsPaths {
    TlsPaths { ca: tls.ca.clone(), cert: tls.cert.clone(), key: tls.key.clone(), crl: tls.crl.clone() }
}

#[expect(clippy::too_many_lines, reason = "to be split")]
async fn serve(config: Config, tls: Tls, kept: Inherited, how: How) -> anyhow::Result<()> {
    let identity = tls.identity.clone();
    let Estates { estate, before } = Estates::find(&config, identity.as_str(), kept, how)?;
    if let Some(before) = before {
        tokio::task::block_in_place(|| before.release())?;
    }
    let _only_one = (prepare_state(&config.state_dir)?, prepare_runtime(&config.runtime_dir)?);
    tracing::info!(
        %identity, aead = ?tls.aead, vms = config.vms.len(), peers = config.peers.len(),
        version = env!("CARGO_PKG_VERSION"), "the agent starts"
    );
    let limits = mux::Config { dead_after: config.deadlines.dead_peer(), ..mux::Config::default() };
    let (incoming, streams) = mpsc::channel(INCOMING_MAX);
    let (started, sessions) = mpsc::unbounded_channel();
    let metrics = Metrics::new()?;
    metrics.certificate_expires(tls.not_after.unix_timestamp());
    let mut endpoint =
        Endpoint::new(tls, limits, config.deadlines.dead_peer())?.with_resume(config.deadlines.resume());
    if let Some((estate, _)) = &estate {
        endpoint = endpoint.with_instance(estate.instance);
    }
    let stopping = CancellationToken::new();
    let pool = Pool::new(endpoint, incoming.clone(), started);
    for peer in config.peers.values() {
        pool.set_limit(&peer.identity, peer.limit);
        pool.set_lanes(&peer.identity, peer.lanes);
    }
    let host = Arc::new(Host::new(config, identity, pool, stopping.clone()));
    let agent = Arc::new(Agent {
        host,
        registry: Registry::default(),
        metrics,
        sources: TaskTracker::new(),
        served: TaskTracker::new(),
        tasks: TaskTracker::new(),
        stopping,
        limits_set: Mutex::default(),
        looks: Looks::default(),
    });
    let taken = match estate {
        Some((estate, mut fds)) => {
            tracing::info!(from = estate.version, left = estate.summary(), "taking up what was left");
            agent.take_up(estate, &mut fds, &incoming)
        }
        None => Vec::new(),
    };
    // Before anybody can ask for a migration of the same VMs.
    let taken_up = taken.iter().map(|taken| taken.journal).collect();
    let found = tokio::task::block_in_place(|| settle::find(&agent.host, &taken_up))?;
    // Before anything listens: who is told to stop must not be half started.
    let mut signals = Signals::new()?;
    let servers = TaskTracker::new();
    listen_all(&agent, &servers).await?;
    let successors = inherit::listen(&inherit::socket_path(&agent.host.config.runtime_dir))?;
    servers.spawn(Arc::clone(&agent).serve_streams(streams));
    servers.spawn(Arc::clone(&agent).serve_sessions(sessions));
    settle_all(&agent, found)?;
    taken.into_iter().for_each(|taken| agent.go_on(taken));
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    keep_watchdog(&servers);
    servers.spawn(end_late(Arc::clone(&agent)));
    agent.tasks.spawn(recover::clean_at_start(Arc::clone(&agent.host)));
    let host = Arc::clone(&agent.host);
    agent.tasks.spawn_blocking(move || prune(&host));
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::Reload => reload::reload(&agent),
                Asked::Stop => break,
            },
            successor = successors.accept() => {
                if let Ok((stream, _)) = successor && give_way(&agent, stream, &incoming).await {
                    return Ok(());
                }
            }
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    if !leave_to_the_store(&agent, &incoming).await {
        agent.stop().await;
    }
    Ok(())
}

/// Makes the state folders and takes the lock that keeps a second agent away from them.
fn prepare_state(folder: &Path) -> anyhow::Result<Flock<File>> {
    let migrations = folder.join("migrations");
    DirBuilder::new().recursive(true).mode(0o700).create(&migrations).with_context(|| {
        format!("cannot make {} (`state_dir` in the configuration)", migrations.display())
    })?;
    let path = folder.join("agent.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    lock(file, folder)
}

/// Makes the folder of the sockets and takes its lock: an agent with a state folder of its own would
/// put its sockets in the place of the running one's.
fn prepare_runtime(folder: &Path) -> anyhow::Result<Flock<File>> {
    listen::make_folder(folder)?;
    let file = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    lock(file, folder)
}

fn lock(file: File, folder: &Path) -> anyhow::Result<Flock<File>> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| e)
        .with_context(|| format!("another agent uses {}; stop it first", folder.display()))
}

/// Throws old journals away, once the agent listens: nobody waits for it.
fn prune(host: &Host) {
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    if let Err(e) = journal::prune(&host.journals(), host.identity.as_str(), now) {
        tracing::warn!(error = chain(&e), "old journals are kept");
    }
}

async fn listen_all(agent: &Arc<Agent>, servers: &TaskTracker) -> anyhow::Result<()> {
    let config = &agent.host.config;
    let peers = listen::peers(&config.listen).await?;
    let local = listen::local(&config.api_socket())?;
    let metrics = config.metrics.as_ref().map(|m| listen::metrics(m.listen)).transpose()?;
    for listener in peers {
        servers.spawn(listen::accept_peers(Arc::clone(agent), listener));
    }
    servers.spawn(listen::serve_api(Arc::clone(agent), local));
    if let Some(listener) = metrics {
        servers.spawn(listen::serve_metrics(Arc::clone(agent), listener));
    }
    Ok(())
}

/// Takes up what an earlier life of this agent left open.
fn settle_all(agent: &Arc<Agent>, found: (Vec<settle::Open>, Vec<Progress>)) -> anyhow::Result<()> {
    let (open, history) = found;
    for progress in history {
        agent.registry.add(ProgressSink::new(progress));
    }
    for one in open {
        agent.registry.add(one.progress.clone());
        settle_one(agent, one);
    }
    Ok(())
}

/// Takes up what was left to its journal when a process that was to take over did not: whoever
/// follows it goes on to see it.
pub(super) fn settle_abandoned(agent: &Arc<Agent>, taken: &BTreeSet<(Uuid, Role)>) {
    let found = tokio::task::block_in_place(|| settle::abandoned(&agent.host, taken));
    match found {
        Ok(open) => {
            for mut one in open {
                let now = one.progress.now();
                match agent.registry.followed(now.id, now.role) {
                    Some(progress) => {
                        progress.update(|p| (p.phase, p.outcome) = (now.phase, None));
                        one.progress = progress;
                    }
                    None => agent.registry.add(one.progress.clone()),
                }
                settle_one(agent, one);
            }
        }
        Err(e) => tracing::error!(error = chain(&e), "open journals cannot be read; a restart settles them"),
    }
}

fn settle_one(agent: &Arc<Agent>, one: settle::Open) {
    let settling = Arc::clone(agent);
    agent.sources.spawn(async move {
        let progress = one.progress.clone();
        let frozen = settling.host.frozen();
        tokio::select! {
            () = settle::settle(Arc::clone(&settling.host), one) => settling.ended(&progress),
            // Its journal is open, for whoever comes next.
            () = frozen => {}
        }
    });
}

/// Ends journals once their disk has room again.
async fn end_late(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(END_LATE_EVERY).await;
        if let Err(e) = agent.host.end_late() {
            tracing::debug!(error = chain(&e), "a journal still cannot be ended");
        }
    }
}

fn keep_watchdog(servers: &TaskTracker) {
    let Some(interval) = sd_notify::watchdog_enabled() else { return };
    servers.spawn(async move {
        loop {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            tokio::time::sleep(interval.div_f64(3.0).max(Duration::from_millis(100))).await;
        }
    });
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Stop,
    Reload,
}

/// The signals that an agent obeys.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> Asked {
        let (name, asked) = tokio::select! {
            _ = self.hangup.recv() => ("SIGHUP", Asked::Reload),
            _ = self.terminate.recv() => ("SIGTERM", Asked::Stop),
            _ = self.interrupt.recv() => ("SIGINT", Asked::Stop),
        };
        tracing::info!("{name}");
        asked
    }
}
