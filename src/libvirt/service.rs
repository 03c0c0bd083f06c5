//! All migrations of libvirt's of one agent: what its local API and its peers can ask for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::context::Context;
use super::destination;
use super::error::LibvirtError;
use super::source::{self, UNFOLLOWED};
use super::state::{Ended, Request, Role, Stage, State, Told};
use super::store::Store;
use crate::config::Config;
use crate::control_streams::ControlStreams;
use crate::forward::Forwards;
use crate::mux::purpose;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::purposes::Purposes;
use crate::peer_refusals::PeerRefusals;

/// All of one agent.
#[derive(Debug)]
pub struct Libvirt {
    context: Arc<Context>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// Follows a migration: while there is one, it is kept.
#[derive(Debug)]
pub struct Follower {
    context: Arc<Context>,
    id: Uuid,
    /// Its state, each change.
    pub states: watch::Receiver<State>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.context.store.change(self.id, |entry| {
            entry.followers = entry.followers.saturating_sub(1);
            entry.kept_until = entry.kept_until.max(Instant::now() + UNFOLLOWED);
        });
    }
}

impl Libvirt {
    /// Of an agent that has not begun to do anything.
    #[must_use]
    pub fn new(
        config: &Config,
        identity: Identity,
        (pool, forwards): (Arc<Pool>, Arc<Forwards>),
        (refusals, control_streams): (Arc<PeerRefusals>, Arc<ControlStreams>),
    ) -> Self {
        let context = Context {
            folder: config.libvirt_folder(),
            config: config.libvirt.clone(),
            peers: config.peers.clone(),
            identity,
            pool,
            forwards,
            refusals,
            control_streams,
            store: Store::new(&config.state_dir),
            untold: Mutex::default(),
            freeze: watch::Sender::new(false),
            closing: CancellationToken::new(),
        };
        Self { context: Arc::new(context), tasks: TaskTracker::new(), stopping: CancellationToken::new() }
    }

    /// Takes the questions of peers.
    pub fn accept_streams(&self, purposes: &mut Purposes) {
        let context = Arc::clone(&self.context);
        purposes.register(purpose::LIBVIRT, move |stream| destination::serve(Arc::clone(&context), stream));
    }

    /// Goes on with what an earlier process has left, and begins to look after what peers prepare. Forwardings
    /// and grants have been taken up before. Needs a runtime.
    pub fn start(self: &Arc<Self>) {
        let libvirt = Arc::clone(self);
        self.tasks.spawn(async move {
            let stopping = libvirt.stopping.clone();
            let taken_up = async {
                for record in libvirt.context.store.left() {
                    let id = record.state.id;
                    match record.state.role {
                        Role::Destination => destination::take_up(&libvirt.context, record).await,
                        Role::Source if source::take_up(&libvirt.context, record).await => libvirt.watch(id),
                        Role::Source => {}
                    }
                }
                tokio::join!(destination::watch(&libvirt.context), source::tell_ends(&libvirt.context));
            };
            tokio::select! {
                () = stopping.cancelled() => {}
                () = taken_up => {}
            }
        });
    }

    fn watch(&self, id: Uuid) {
        let (context, stopping) = (Arc::clone(&self.context), self.stopping.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                () = source::watch(context, id) => {}
            }
        });
    }

    /// Makes folder and sockets on both hosts.
    ///
    /// # Errors
    /// [`LibvirtError`]; then nothing is left of it.
    pub async fn prepare(&self, request: &Request) -> Result<State, LibvirtError> {
        let state = source::prepare(&self.context, request).await?;
        self.watch(state.id);
        Ok(state)
    }

    /// Whether the destination would permit it, libvirt's own connection as well, and what its host lacks.
    ///
    /// # Errors
    /// [`LibvirtError`], its refusal included.
    pub async fn look(&self, request: &Request) -> Result<(bool, Vec<String>), LibvirtError> {
        source::look(&self.context, request).await
    }

    /// All of them, in both roles, the oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<State> {
        self.context.store.all()
    }

    /// Follows one.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn follow(&self, id: Uuid) -> Result<Follower, LibvirtError> {
        let states = self.context.store.change(id, |entry| {
            entry.followers += 1;
            entry.shown.subscribe()
        });
        let states = states.ok_or(LibvirtError::Unknown(id))?;
        Ok(Follower { context: Arc::clone(&self.context), id, states })
    }

    /// Ends one, and takes everything away on both hosts.
    ///
    /// # Errors
    /// There is none of that id of which this host is the source.
    pub async fn end(&self, id: Uuid, told: Told) -> Result<State, LibvirtError> {
        source::end(&self.context, id, told).await
    }

    /// How many have ended in which way since the last call.
    #[must_use]
    pub fn take_ends(&self) -> BTreeMap<(Role, Ended), u64> {
        self.context.store.take_ends()
    }

    /// How many are under way in a role.
    #[must_use]
    pub fn active(&self, role: Role) -> usize {
        self.all().iter().filter(|s| s.role == role && s.stage != Stage::Ended).count()
    }

    /// The agent ends for good: who asks nothing is not waited for any more.
    pub fn close(&self) {
        self.context.closing.cancel();
    }

    /// Everything stops for another process, or goes on.
    pub fn set_frozen(&self, is_frozen: bool) {
        self.context.freeze.send_replace(is_frozen);
    }

    /// Takes everything away: the agent ends for good.
    pub async fn stop(&self) {
        self.stopping.cancel();
        for state in self.all().into_iter().filter(|state| state.stage != Stage::Ended) {
            match state.role {
                Role::Source => drop(source::end(&self.context, state.id, Told::Unknown).await),
                Role::Destination => drop(destination::take_away(&self.context, state.id, Ended::Unknown)),
            }
        }
        self.tasks.close();
        self.tasks.wait().await;
    }
}
