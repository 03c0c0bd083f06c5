//! Succession: this agent leaves everything that it holds to its next process, or takes up what
//! the one before has left. What that is, not how it travels: that is in `inherit`.
//!
//! ```text
//! leave:   migrations stop ─► sessions stop ─► state and descriptors
//! take up: sessions, waiting for a connection ─► migrations go on
//! ```

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::Agent;
use super::limits::LimitsSet;
use super::registry::Entry;
use crate::migrate::frozen::{Descriptors, FrozenMigrations, ThawedStreams};
use crate::migrate::{self, TakenUp};
use crate::net::frozen::FrozenSession;
use crate::net::session::{IncomingStream, Session};

/// The newest format of what is left that this version writes, and the formats that it reads.
/// 2: streams may be compressed.
pub(super) const FORMATS: [u32; 2] = [2, 1];

/// How long migrations may take to stop. One that has not by then is left to its journal.
const STOP_DEADLINE: Duration = Duration::from_secs(20);
/// How long a session may take to stop.
const SESSION_DEADLINE: Duration = Duration::from_secs(3);

/// Everything but the descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Estate {
    format: u32,
    /// The version that wrote it, for people.
    pub(super) version: String,
    /// Whose it is.
    identity: String,
    /// The name of the process to its peers: the successor is the same agent to them.
    pub(super) instance: [u8; 16],
    sessions: Vec<FrozenSession>,
    migrations: FrozenMigrations,
    /// Peers' limits that operators have set.
    #[serde(default)]
    limits: LimitsSet,
}

impl Estate {
    pub(super) fn encode(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        ciborium::into_writer(self, &mut bytes).context("what is left cannot be encoded")?;
        Ok(bytes)
    }

    /// Reads what an earlier process has left.
    ///
    /// # Errors
    /// It is damaged, of a format that this version does not know, or of another host.
    pub(super) fn decode(bytes: &[u8], identity: &str) -> anyhow::Result<Self> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            version: String,
        }
        let head: Head = ciborium::from_reader(bytes).context("what the process before left is damaged")?;
        if !FORMATS.contains(&head.format) {
            let (format, version) = (head.format, head.version);
            bail!("version {version} left it in format {format}, this one reads {FORMATS:?}");
        }
        let estate: Self = ciborium::from_reader(bytes).context("what the process before left is damaged")?;
        ensure!(estate.identity == identity, "it is {}'s, this is {identity}", estate.identity);
        Ok(estate)
    }

    /// In words.
    pub(super) fn summary(&self) -> String {
        format!("{} migrations in {} sessions", self.migrations.len(), self.sessions.len())
    }
}

impl Agent {
    /// Stops everything where it is. The agent does nothing more until it ends, or
    /// [`Agent::take_up`] gives everything back to it.
    pub(super) async fn leave(&self) -> (Estate, Descriptors) {
        self.host.freeze(true);
        self.sources.close();
        self.served.close();
        let stopped = async {
            self.sources.wait().await;
            self.served.wait().await;
        };
        if tokio::time::timeout(STOP_DEADLINE, stopped).await.is_err() {
            tracing::warn!("not every migration could stop in time; the others are left to their journals");
        }
        self.host.pool.leave(true);
        let mut sessions = Vec::new();
        for session in self.host.pool.all() {
            match tokio::time::timeout(SESSION_DEADLINE, session.freeze()).await {
                Ok(Some(frozen)) => sessions.push(frozen),
                _ => tracing::warn!(peer = %session.info().peer, "a session could not be left"),
            }
        }
        let mut fds = Descriptors::default();
        let migrations = migrate::settle_stopped(&self.host, &mut fds);
        let estate = Estate {
            format: FORMATS[0],
            version: env!("CARGO_PKG_VERSION").into(),
            identity: self.host.identity.to_string(),
            instance: self.host.pool.endpoint().instance(),
            sessions,
            migrations,
            limits: self.limits_set(),
        };
        tracing::info!(left = estate.summary(), "everything has stopped for the next process");
        (estate, fds)
    }

    /// Goes on with what a process has left, perhaps this one. Returns its migrations, to be run.
    pub(super) fn take_up(
        &self,
        estate: Estate,
        fds: &mut Descriptors,
        incoming: &mpsc::Sender<IncomingStream>,
    ) -> Vec<TakenUp> {
        let Estate { sessions, mut migrations, limits, .. } = estate;
        // Before there is a session.
        self.set_limits_again(limits);
        self.host.freeze(false);
        self.sources.reopen();
        self.served.reopen();
        let mut streams = ThawedStreams::new();
        for frozen in sessions {
            let (id, peer) = (frozen.id(), frozen.peer.clone());
            let owned = migrations.take_streams(id);
            match Session::thaw(frozen, owned, self.host.pool.endpoint(), incoming.clone()) {
                Ok((session, thawed)) => {
                    self.host.pool.take_up(session.clone());
                    for stream in thawed {
                        streams.insert((id, stream.id().0), (session.clone(), stream));
                    }
                }
                Err(error) => tracing::error!(%peer, %error, "a session cannot be taken up"),
            }
        }
        self.host.pool.leave(false);
        migrate::take_up(&self.host, migrations, &mut streams, fds)
    }

    /// Runs a migration that was taken up.
    pub(super) fn go_on(self: &Arc<Self>, taken: TakenUp) {
        let (progress, cancel) = (taken.progress.clone(), taken.cancel.clone());
        self.registry.insert(Entry { progress, cancel, share: taken.share.clone() });
        let agent = Arc::clone(self);
        self.sources.spawn(async move {
            let progress = taken.progress.clone();
            taken.run().await;
            agent.ended(&progress);
        });
    }
}
