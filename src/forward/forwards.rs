//! All forwardings and targets of one agent.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::connections::{Connections, StoppedConnection};
use super::forwarding::{Beginning, Forwarding, StoppedForwarding};
use super::frozen::{
    FrozenConnection, FrozenForwarding, FrozenForwards, FrozenGrant, FrozenTarget, ThawedConnection,
    settle_carried, settle_forwarding, settle_grant,
};
use super::incoming::Incoming;
use super::limits::FORWARDINGS_MAX;
use super::listener::{ListenError, Listener};
use super::peers::Peers;
use super::spec::{ShareChange, Spec};
use super::status::{Figures, ForwardingStatus, TargetStatus};
use super::tally::{DYNAMIC, Labels, Side, Totals};
use super::targets::{Grant, GrantError, Granted, Targets};
use crate::config::{Config, ForwardConfig, LocalSocket, NameError, TargetName};
use crate::error_chain::chain;
use crate::mux::purpose;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::purposes::Purposes;
use crate::net::stream_owner::{Descriptors, ThawedStreams};
use crate::peer_refusals::PeerRefusals;

/// Why a forwarding was not begun.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The configuration has no such peer.
    #[error("this agent knows no peer {0}")]
    UnknownPeer(String),
    /// Another forwarding listens there.
    #[error("a forwarding listens on {0} already")]
    Taken(LocalSocket),
    /// There are too many.
    #[error("there are {FORWARDINGS_MAX} forwardings, and there cannot be more")]
    TooMany,
    /// Its name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The agent is on its way out.
    #[error("the agent is shutting down")]
    Stopping,
    /// Only a unix socket has owner and group.
    #[error("only a unix socket has an owner and a group")]
    NoOwner,
    /// It cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// A forwarding of the configuration that cannot be begun.
#[derive(Debug, thiserror::Error)]
#[error("cannot begin [forward.{name}]")]
pub struct StartError {
    /// Its name.
    name: String,
    source: AddError,
}

/// What is at work.
#[derive(Debug, Default)]
struct Running {
    all: BTreeMap<Uuid, Arc<Forwarding>>,
    /// Nothing is begun any more, or for now.
    is_closed: bool,
}

/// What has stopped for another process.
#[derive(Debug, Default)]
struct Stopped {
    forwardings: Vec<(Arc<Forwarding>, StoppedForwarding)>,
    targets: Vec<(String, Totals, Vec<StoppedConnection>)>,
    grants: Vec<(TargetName, Vec<StoppedConnection>)>,
}

/// All forwardings and targets of one agent.
#[derive(Debug)]
pub struct Forwards {
    configured: BTreeMap<String, ForwardConfig>,
    peers: Arc<Peers>,
    labels: Arc<Labels>,
    incoming: Arc<Incoming>,
    running: Mutex<Running>,
    tasks: TaskTracker,
    stopped: Mutex<Stopped>,
}

impl Forwards {
    /// Those of the configuration, of which nothing has begun.
    pub fn new(config: &Config, pool: Arc<Pool>, refusals: Arc<PeerRefusals>) -> Self {
        let peers = Arc::new(Peers::new(config.peers.clone(), pool));
        let labels = Arc::new(Labels::default());
        config.forwards.keys().for_each(|name| drop(labels.of(Side::Forward, name)));
        let targets = Targets::new(&config.targets, &labels);
        Self {
            configured: config.forwards.clone(),
            incoming: Incoming::new(targets, Arc::clone(&peers), Arc::clone(&labels), refusals),
            peers,
            labels,
            running: Mutex::default(),
            tasks: TaskTracker::new(),
            stopped: Mutex::default(),
        }
    }

    /// Takes the streams that peers open to targets.
    pub fn accept_streams(&self, purposes: &mut Purposes) {
        let incoming = Arc::clone(&self.incoming);
        purposes.register(purpose::FORWARD, move |stream| {
            incoming.take(stream);
            std::future::ready(())
        });
    }

    /// Begins those of the configuration that an earlier process has not left; what cannot be begun. Needs a runtime.
    pub fn start_configured(&self) -> Vec<StartError> {
        let is_there = |name: &str| self.locked().all.values().any(|f| f.name.as_deref() == Some(name));
        let missing = self.configured.iter().filter(|(name, _)| !is_there(name));
        let begun = missing.map(|(name, config)| {
            let spec = Spec::configured(name, config).map_err(AddError::from);
            let begun = spec.and_then(|spec| self.begin(Some(name), spec));
            begun.map_err(|source| StartError { name: name.clone(), source })
        });
        begun.filter_map(Result::err).collect()
    }

    /// Begins a forwarding that lasts until [`Forwards::end`] or the agent's end. Needs a runtime.
    pub fn add(&self, spec: Spec) -> Result<Uuid, AddError> {
        self.begin(None, spec)
    }

    fn begin(&self, name: Option<&str>, spec: Spec) -> Result<Uuid, AddError> {
        let mut running = self.locked();
        if running.is_closed {
            return Err(AddError::Stopping);
        }
        if running.all.len() >= FORWARDINGS_MAX {
            return Err(AddError::TooMany);
        }
        if running.all.values().any(|other| other.spec.listen == spec.listen) {
            return Err(AddError::Taken(spec.listen));
        }
        let peer = self.peers.find(&spec.to).ok_or_else(|| AddError::UnknownPeer(spec.to.clone()))?.clone();
        if spec.listen.path().is_none() && (spec.owner.is_some() || spec.group.is_some()) {
            return Err(AddError::NoOwner);
        }
        let listener = Listener::bind(&spec)?;
        let connections = Connections::new(self.labels.of(Side::Forward, name.unwrap_or(DYNAMIC)));
        let (id, name, file) = (Uuid::new_v4(), name.map(str::to_owned), listener.file.clone());
        tracing::info!(forwarding = %id, name, listen = %spec.listen, peer = spec.to, target = %spec.target, "a forwarding begins");
        let forwarding = Forwarding::new(Beginning { id, name, spec, peer, connections, file }, &self.peers);
        forwarding.start(&self.tasks, listener, Vec::new());
        running.all.insert(id, forwarding);
        Ok(id)
    }

    /// Ends a forwarding: its socket and all its connections are closed. What it was at its end.
    pub async fn end(&self, id: Uuid) -> Option<ForwardingStatus> {
        let forwarding = self.locked().all.remove(&id)?;
        let status = shown(&forwarding).await;
        forwarding.end();
        tracing::info!(
            forwarding = %id, name = forwarding.name, listen = %forwarding.spec.listen,
            opened = status.totals.opened, "a forwarding ends"
        );
        Some(status)
    }

    /// Changes what a forwarding may send, until it ends or the agent stops. What it is then.
    pub async fn change_share(&self, id: Uuid, change: ShareChange) -> Option<ForwardingStatus> {
        let forwarding = self.locked().all.get(&id).cloned()?;
        forwarding.change_share(change);
        Some(shown(&forwarding).await)
    }

    /// One forwarding.
    pub async fn status(&self, id: Uuid) -> Option<ForwardingStatus> {
        let forwarding = self.locked().all.get(&id).cloned()?;
        Some(shown(&forwarding).await)
    }

    /// All forwardings: those of the configuration first, by name.
    pub async fn list(&self) -> Vec<ForwardingStatus> {
        let mut all: Vec<_> = self.locked().all.values().cloned().collect();
        all.sort_by(|a, b| (a.name.is_none(), &a.name, a.id).cmp(&(b.name.is_none(), &b.name, b.id)));
        let mut shown_all = Vec::new();
        for forwarding in all {
            shown_all.push(shown(&forwarding).await);
        }
        shown_all
    }

    /// Lets one peer use a target for a time.
    pub fn grant(&self, grant: Grant) -> Result<(), GrantError> {
        self.incoming.targets.grant(grant, &self.labels)
    }

    /// Prolongs a grant, from now on; false if there is none.
    pub fn prolong(&self, name: &TargetName, within: Duration) -> bool {
        self.incoming.targets.prolong(name, within)
    }

    /// Ends a grant, and cuts its connections. What it had carried; none if there is no such grant.
    pub fn revoke(&self, name: &TargetName) -> Option<Totals> {
        self.incoming.targets.revoke(name)
    }

    /// All targets: those of the configuration first.
    pub async fn targets(&self) -> Vec<TargetStatus> {
        let mut all = Vec::new();
        for target in self.incoming.targets.configured() {
            target.connections.look().await;
            all.push(TargetStatus {
                name: target.name.clone(),
                connect: target.config.connect.clone(),
                from: target.config.from.clone(),
                granted_for_s: None,
                open: target.connections.open(),
                totals: target.connections.totals(),
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let now = Instant::now();
        let granted = self.incoming.targets.granted();
        all.extend(granted.iter().map(|(name, granted)| TargetStatus {
            name: name.to_string(),
            connect: granted.connect.to_string(),
            from: vec![granted.peer.to_string()],
            granted_for_s: Some(granted.until.saturating_duration_since(now).as_secs()),
            open: granted.connections.open(),
            totals: granted.connections.totals(),
        }));
        all
    }

    /// Connections now and all that was counted, by side and label.
    pub fn figures(&self) -> Figures {
        let mut figures: Figures =
            self.labels.all().into_iter().map(|(key, totals)| (key, (0, totals))).collect();
        let mut add = |side: Side, label: &str, connections: &Connections| {
            let (open, totals) = figures.entry((side, label.to_owned())).or_default();
            *open += connections.open();
            totals.add(&connections.carried());
        };
        for forwarding in self.locked().all.values() {
            add(Side::Forward, forwarding.name.as_deref().unwrap_or(DYNAMIC), &forwarding.connections);
        }
        for target in self.incoming.targets.configured() {
            add(Side::Target, &target.name, &target.connections);
        }
        for granted in self.incoming.targets.granted().values() {
            add(Side::Target, DYNAMIC, &granted.connections);
        }
        figures
    }

    /// Forwardings whose socket is another one now.
    pub fn bypassed(&self) -> usize {
        let all: Vec<_> = self.locked().all.values().cloned().collect();
        all.iter().filter(|forwarding| !forwarding.is_intact()).count()
    }

    /// Ends everything: the agent ends.
    pub fn stop(&self) {
        let all = {
            let mut running = self.locked();
            running.is_closed = true;
            std::mem::take(&mut running.all)
        };
        all.values().for_each(|forwarding| forwarding.end());
        self.incoming.targets.configured().iter().for_each(|target| target.connections.end());
        self.incoming.targets.granted().values().for_each(|granted| granted.connections.end());
    }

    /// Stops everything, for another process. Sessions are to stop after it.
    pub async fn freeze(&self) {
        let all = {
            let mut running = self.locked();
            running.is_closed = true;
            std::mem::take(&mut running.all)
        };
        let mut stopped = Stopped::default();
        for forwarding in all.into_values() {
            let left = forwarding.freeze().await;
            stopped.forwardings.push((forwarding, left));
        }
        self.incoming.freeze().await;
        for target in self.incoming.targets.configured() {
            let carried = target.connections.freeze().await;
            stopped.targets.push((target.name.clone(), target.connections.totals(), carried));
        }
        let granted: Vec<_> = {
            let granted = self.incoming.targets.granted();
            granted.iter().map(|(name, granted)| (name.clone(), granted.connections.clone())).collect()
        };
        for (name, connections) in granted {
            let carried = connections.freeze().await;
            stopped.grants.push((name, carried));
        }
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = stopped;
    }

    /// What has been left, once sessions have stopped, too.
    pub fn settle(&self, fds: &mut Descriptors) -> FrozenForwards {
        let stopped = std::mem::take(&mut *self.stopped.lock().unwrap_or_else(PoisonError::into_inner));
        let Stopped { forwardings, targets, mut grants } = stopped;
        let forwardings =
            forwardings.into_iter().map(|(of, left)| settle_forwarding(&of, left, fds)).collect();
        let targets = targets.into_iter().map(|(name, totals, carried)| FrozenTarget {
            name,
            totals,
            connections: settle_carried(carried, fds),
        });
        let targets = targets.collect();
        let granted = std::mem::take(&mut *self.incoming.targets.granted());
        let grants = granted.into_iter().map(|(name, granted)| {
            let at = grants.iter().position(|(other, _)| *other == name);
            let carried = at.map(|at| grants.swap_remove(at).1).unwrap_or_default();
            settle_grant(name, &granted, carried, fds)
        });
        FrozenForwards { forwardings, targets, grants: grants.collect() }
    }

    /// Goes on with what a process has left, perhaps this one. What the configuration has no more is ended.
    /// Needs a runtime.
    pub fn take_up(&self, left: FrozenForwards, streams: &mut ThawedStreams, fds: &mut Descriptors) {
        self.incoming.thaw();
        self.locked().is_closed = false;
        for frozen in left.forwardings {
            let listen = frozen.spec.listen.clone();
            if let Err(cause) = self.take_up_forwarding(frozen, streams, fds) {
                tracing::error!(%listen, cause, "a forwarding that was left is not taken up");
            }
        }
        for FrozenTarget { name, connections, totals } in left.targets {
            let all = self.incoming.targets.configured();
            match all.iter().find(|target| target.name == name) {
                Some(target) => self.take_up_target(&target.connections, &totals, connections, streams, fds),
                None => tracing::warn!(
                    target = name,
                    "the target is not configured any more: its connections end"
                ),
            }
        }
        for FrozenGrant { name, connect, peer, beside, left_ms, connections, totals } in left.grants {
            let Ok(peer) = peer.parse::<Identity>() else { continue };
            let of_grant = Connections::new(self.labels.of(Side::Target, DYNAMIC));
            self.take_up_target(&of_grant, &totals, connections, streams, fds);
            let until = Instant::now() + Duration::from_millis(left_ms);
            let granted = Granted { connect, peer, beside, until, connections: of_grant };
            self.incoming.targets.restore(name, granted);
        }
    }

    fn take_up_target(
        &self,
        target: &Connections,
        totals: &Totals,
        connections: Vec<FrozenConnection>,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
    ) {
        if target.totals() == Totals::default() {
            target.restore(totals);
        }
        for connection in connections {
            let Some(thawed) = connection.thaw(streams, fds) else { continue };
            let ThawedConnection { session, local, stream, state } = thawed;
            let bounds = self.peers.bounds(&session.info().peer);
            if let (Ok(place), Some(state)) = (target.enter(&bounds.incoming), state) {
                place.go_on(&session, local, stream, state);
            }
        }
    }

    fn take_up_forwarding(
        &self,
        frozen: FrozenForwarding,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
    ) -> Result<(), String> {
        let FrozenForwarding {
            id,
            name,
            spec: before,
            file,
            listener,
            connections,
            unopened,
            totals,
            changed,
        } = frozen;
        let socket = listener.and_then(|number| fds.take(number));
        let spec = match &name {
            None => before.clone(),
            Some(name) => {
                let configured = self.configured.get(name).and_then(|c| Spec::configured(name, c).ok());
                configured.ok_or_else(|| {
                    file.iter().for_each(|file| file.remove());
                    "it is not configured any more".to_owned()
                })?
            }
        };
        let peer = self.peers.find(&spec.to).ok_or("its peer is not configured any more")?.clone();
        let has_changed = (&spec.listen, &spec.owner, &spec.group, spec.mode)
            != (&before.listen, &before.owner, &before.group, before.mode);
        let listener = match socket {
            Some(socket) if !has_changed => Listener::of_socket(socket, &spec.listen, file)
                .map_err(|e| format!("its socket cannot be used: {e}"))?,
            socket => {
                drop(socket);
                file.iter().for_each(|file| file.remove());
                Listener::bind(&spec).map_err(|e| chain(&e))?
            }
        };
        let all = Connections::new(self.labels.of(Side::Forward, name.as_deref().unwrap_or(DYNAMIC)));
        all.restore(&totals);
        let file = listener.file.clone();
        let beginning = Beginning { id, name, spec, peer, connections: all, file };
        let forwarding = Forwarding::new(beginning, &self.peers);
        forwarding.change_share(changed.thaw());
        for connection in connections {
            let Some(thawed) = connection.thaw(streams, fds) else { continue };
            let ThawedConnection { session, local, stream, state } = thawed;
            forwarding.use_lane(&session);
            match state {
                None => forwarding.go_on(&session, local, stream),
                Some(state) => {
                    if let Some(place) = forwarding.enter() {
                        place.go_on(&session, local, stream, state);
                    }
                }
            }
        }
        let unopened = unopened.into_iter().filter_map(|number| fds.take(number)).collect();
        forwarding.start(&self.tasks, listener, unopened);
        self.locked().all.insert(id, forwarding);
        Ok(())
    }

    /// The sockets that are listened on.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let running = self.locked();
        running.all.values().filter_map(|f| f.spec.listen.path().map(Into::into)).collect()
    }

    fn locked(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn shown(forwarding: &Forwarding) -> ForwardingStatus {
    forwarding.connections.look().await;
    ForwardingStatus {
        id: forwarding.id,
        name: forwarding.name.clone(),
        spec: forwarding.spec_now(),
        is_listening: forwarding.is_listening(),
        is_intact: forwarding.is_intact(),
        open: forwarding.connections.open(),
        totals: forwarding.connections.totals(),
    }
}
