//! From a configuration file to a running agent and back: everything that can be wrong is
//! found before the first socket opens, and `READY=1` is said only once all of them listen.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::certificate_files::Stamp;
use super::confine::{Confinement, Early, confine_calls};
use super::handoff::{self, Inherited, Kept, Left, PassedSockets, StartMode};
use super::listen::Listeners;
use super::running::Agent;
use super::signals::{Asked, Signals};
use super::{certificates, draining, journals, listen, observe, watchdog};
use crate::access::{Action, Who, authorize};
use crate::audit::{self, Audit, Event};
use crate::config::Config;
use crate::error_chain::chain;
use crate::migrate::{recover, settle};
use crate::mux;
use crate::net::endpoint::Endpoint;
use crate::net::pool::Pool;
use crate::net::session::{IncomingStream, Session};
use crate::net::tls::Tls;
use crate::private_memory;
use crate::witness::Etcd;

/// What unfinished messages of a peer that may send virtual machines here may hold.
const MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// Streams that peers may have opened and nobody has looked at yet.
const INCOMING_MAX: usize = 256;

/// Why an agent does not run, or no longer does.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Configuration or certificates are wrong, and nothing waits for a process that goes on: starting again does not
    /// help.
    #[error(transparent)]
    Configuration(anyhow::Error),
    /// The machine did not give what is needed: an address, a folder, the lock. It may later.
    #[error(transparent)]
    Unable(anyhow::Error),
}

impl AgentError {
    /// The exit code of `vmferry agent`; the unit restarts it on all but configuration errors.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 2,
            Self::Unable(_) => 1,
        }
    }
}

/// Runs an agent until SIGTERM or SIGINT, or until another process takes over.
/// Errors: what keeps it from starting, with the remedy.
pub async fn run(path: &Path, mode: StartMode, early: Early) -> Result<(), AgentError> {
    private_memory::keep_private();
    // Before anything else is started that could inherit them in turn.
    let handoff::Passed { kept, sockets } = handoff::passed();
    let (config, before, tls) = match configured(path) {
        Ok(configured) => configured,
        // Migrations wait for a configuration that is mended: starting again helps them.
        Err(e) if handoff::keep(kept).await => return Err(AgentError::Unable(e)),
        Err(e) => return Err(AgentError::Configuration(e)),
    };
    serve((config, path), (before, tls, early), (kept, sockets), mode).await.map_err(AgentError::Unable)
}

/// Judges a configuration and the files that it names, and starts nothing. In words, what it is for.
/// Errors: what would keep an agent from starting with it.
pub fn check_config(path: &Path) -> anyhow::Result<String> {
    let (config, _, tls) = configured(path)?;
    let (peers, vms) = (config.peers.len(), config.vms.len());
    Ok(format!("{} is right: host {}, peers: {peers}, VMs: {vms}", path.display(), tls.identity))
}

/// What this version can take over, and what it would start as with the configuration at `path`, as a line of JSON.
pub fn handoff_formats(path: &Path) -> anyhow::Result<String> {
    let start = configured(path).map(|(config, _, tls)| (tls.identity.to_string(), config.state_dir));
    handoff::handoff_formats(start)
}

/// The configuration and the files that it names, with what was seen of these before they were read.
fn configured(path: &Path) -> anyhow::Result<(Config, Stamp, Tls)> {
    let config = Config::load(path)?;
    let before = Stamp::of(&config.tls);
    let tls = certificates::load(&config.tls)?;
    config.check_own(&tls.identity, path)?;
    if let Some(witness) = &config.witness {
        Etcd::new(witness).check_files().context("[witness]")?;
    }
    Ok((config, before, tls))
}

async fn serve(
    (config, path): (Config, &Path),
    (before, tls, early): (Stamp, Tls, Early),
    (kept, sockets): (Kept, PassedSockets),
    mode: StartMode,
) -> anyhow::Result<()> {
    let Inherited { left, predecessor } = Inherited::find(&config, tls.identity.as_str(), kept, mode).await?;
    if let Some(predecessor) = predecessor {
        tokio::task::block_in_place(|| predecessor.release())?;
    }
    // All that the machine may refuse, before anything of what was left is touched.
    let Place { _only_one, signals, listeners } = match Place::take(&config, sockets).await {
        Ok(place) => place,
        Err(e) => {
            // Another agent settles by the journals what is under way.
            if let Some(left) = left.filter(|_| !e.is::<AnotherAgent>()) {
                left.keep().await;
            }
            return Err(e);
        }
    };
    tracing::info!(
        identity = %tls.identity, aead = ?tls.aead, vms = config.vms.len(), peers = config.peers.len(),
        version = env!("CARGO_PKG_VERSION"), "the agent starts"
    );
    let confinement = confine_calls(&config, early);
    let audit = begin_record(&config, tls.identity.as_str(), left.is_some())?;
    let (incoming, streams) = mpsc::channel(INCOMING_MAX);
    let (started, sessions) = mpsc::unbounded_channel();
    let instance = left.as_ref().map(|left| left.state.instance);
    let agent =
        Arc::new(new_agent((config, path), tls, instance, (incoming, started), (audit, confinement))?);
    agent.certificates.set(agent.host.config.tls.clone(), before);
    let is_waited_for = left.as_ref().is_some_and(|left| left.state.is_waited_for());
    let (taken, mut timelines) = match left {
        Some(Left { mut state, mut fds }) => {
            tracing::info!(from = state.version, left = state.summary(), "taking up what was left");
            let (counts, timelines) = (state.counts.take(), std::mem::take(&mut state.timelines));
            counts.into_iter().for_each(|counts| agent.inherit_counts(counts));
            (agent.thaw(state, &mut fds), timelines)
        }
        None => Default::default(),
    };
    taken.iter().for_each(|taken| timelines.restore(&taken.progress));
    // Before anybody can ask for a migration of the same VMs.
    let taken_up = taken.iter().map(|taken| taken.journal).collect();
    let found = tokio::task::block_in_place(|| settle::find(&agent.host, &taken_up))?;
    // Who goes on in another's place has its sessions.
    let unaware = if instance.is_none() { settle::peers_of(&found.0) } else { Default::default() };
    // Before a peer can send anything.
    draining::find(&agent);
    let servers = TaskTracker::new();
    // Who can ask the agent finds its sockets.
    begin_forwardings(&agent, is_waited_for)?;
    agent.libvirt.start();
    listeners.serve(&agent, &servers)?;
    let successors = handoff::listen(&agent.host.config.runtime_dir)?;
    servers.spawn(Arc::clone(&agent).serve_streams(streams));
    servers.spawn(Arc::clone(&agent).serve_sessions(sessions));
    agent.tasks.spawn(settle::announce(Arc::clone(&agent.host), unaware));
    if let Some(config) = &agent.host.config.traces {
        agent.tasks.spawn(agent.traces.begin(config.url.clone()));
    }
    journals::settle_all(&agent, found, timelines);
    taken.into_iter().for_each(|taken| agent.resume(taken));
    draining::go_on(&agent);
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    watchdog::keep(&agent, &servers);
    servers.spawn(journals::end_late(Arc::clone(&agent)));
    servers.spawn(certificates::keep_judging(Arc::clone(&agent)));
    servers.spawn(certificates::keep_watching(Arc::clone(&agent)));
    observe::keep(&agent, &servers);
    agent.tasks.spawn(recover::clean_at_start(Arc::clone(&agent.host)));
    let host = Arc::clone(&agent.host);
    agent.tasks.spawn_blocking(move || journals::prune(&host));
    let left_to_another = run_to_the_end(&agent, signals, successors).await;
    agent.host.audit.close(Event::AgentEnds { left_to_another }).await;
    Ok(())
}

/// A folder of this agent is another one's at the moment.
#[derive(Debug, thiserror::Error)]
#[error("another agent uses {}; stop it first", .0.display())]
struct AnotherAgent(PathBuf);

/// What only one agent of this machine can have.
struct Place {
    _only_one: (Flock<File>, Flock<File>),
    signals: Signals,
    listeners: Listeners,
}

impl Place {
    /// Takes it. A peer that connects waits until there is an agent.
    async fn take(config: &Config, sockets: PassedSockets) -> anyhow::Result<Self> {
        Ok(Self {
            _only_one: (prepare_state(&config.state_dir)?, prepare_runtime(&config.runtime_dir)?),
            // Before anything listens: who is told to stop must not be half started.
            signals: Signals::new()?,
            listeners: Listeners::open(config, sockets).await?,
        })
    }
}

/// Begins the forwardings of the configuration. One that cannot be begun keeps an agent from starting, unless
/// migrations or connections wait for it to go on.
fn begin_forwardings(agent: &Agent, is_waited_for: bool) -> anyhow::Result<()> {
    for e in agent.forwards.start_configured() {
        if !is_waited_for {
            agent.forwards.stop();
            return Err(e.into());
        }
        tracing::error!(
            error = chain(&e),
            "the agent goes on without it, for what was left; a restart begins it once this is mended"
        );
    }
    Ok(())
}

/// Begins to write the audit record; whoever comes after another process goes on with its record.
fn begin_record(config: &Config, identity: &str, took_over: bool) -> anyhow::Result<Audit> {
    let limits = audit::Limits { files: config.audit.files, ..audit::Limits::default() };
    let audit =
        Audit::start(&config.audit_folder(), identity, limits).context("no thread for the audit record")?;
    let (version, identity, pid) = (env!("CARGO_PKG_VERSION"), identity.to_owned(), std::process::id());
    audit.record(Event::AgentStarts { version, identity, pid, took_over });
    Ok(audit)
}

/// An agent with its peers, of which none is connected. A successor keeps the `instance` of the process
/// before.
fn new_agent(
    (config, path): (Config, &Path),
    tls: Tls,
    instance: Option<[u8; 16]>,
    (incoming, started): (mpsc::Sender<IncomingStream>, mpsc::UnboundedSender<Session>),
    (audit, confinement): (Audit, Confinement),
) -> anyhow::Result<Agent> {
    let identity = tls.identity.clone();
    let limits = mux::Config { dead_after: config.deadlines.dead_peer(), ..mux::Config::default() };
    let mut endpoint =
        Endpoint::new(tls, limits, config.deadlines.dead_peer())?.with_resume(config.deadlines.resume());
    if let Some(instance) = instance {
        endpoint = endpoint.with_instance(instance);
    }
    let pool = Pool::new(endpoint, incoming, started);
    for peer in config.peers.values() {
        pool.set_limit(&peer.identity, peer.limit);
        pool.set_receive_rate(&peer.identity, peer.receive_rate);
        pool.set_lanes(&peer.identity, peer.lanes);
        if authorize(Action::SendVms, Who::Peer(Some(peer))).is_ok() {
            pool.set_message_bytes(&peer.identity, MESSAGE_BYTES);
        }
    }
    let agent = Agent::new((config, path), identity, pool, audit, confinement)?;
    certificates::note_endings(&agent.metrics, &agent.host.pool.endpoint().tls());
    Ok(agent)
}

/// Until a signal ends the agent, or another process takes over. Whether everything was left to one.
async fn run_to_the_end(agent: &Arc<Agent>, mut signals: Signals, successors: UnixListener) -> bool {
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::Reload => certificates::reload(agent),
                Asked::Stop => break,
            },
            successor = successors.accept() => {
                if let Ok((stream, _)) = successor && handoff::give_way(agent, stream).await {
                    return true;
                }
            }
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let left_to_another = handoff::leave_to_systemd(agent).await;
    if !left_to_another {
        agent.stop().await;
    }
    left_to_another
}

/// Makes the state folders and takes the lock that keeps a second agent away from them.
fn prepare_state(folder: &Path) -> anyhow::Result<Flock<File>> {
    let migrations = folder.join("migrations");
    DirBuilder::new().recursive(true).mode(0o700).create(&migrations).with_context(|| {
        format!("cannot make {} (`state_dir` in the configuration)", migrations.display())
    })?;
    let path = folder.join("agent.lock");
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
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
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        // Whatever else keeps it from being locked.
        anyhow::Error::from(e).context(AnotherAgent(folder.to_owned()))
    })
}
