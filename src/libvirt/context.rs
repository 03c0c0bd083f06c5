//! What both roles use: the configuration, the tunnel, what there is, and questions to other agents.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::LibvirtError;
use super::message::{Answer, Ask};
use super::state::{Channel, Ended};
use super::store::Store;
use crate::access::{Action, Denied, Who, authorize};
use crate::config::{LibvirtConfig, NameError, PeerConfig, TargetName};
use crate::control_streams::ControlStreams;
use crate::forward::Forwards;
use crate::mux::{Class, Name, Open, WEIGHT_DEFAULT, purpose};
use crate::net::identity::Identity;
use crate::net::message;
use crate::net::pool::Pool;
use crate::peer_refusals::PeerRefusals;

/// How long a peer may take for an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to take its part away; then it is told again.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// An end that its destination has not heard of.
#[derive(Debug, Clone)]
pub(super) struct Untold {
    pub(super) id: Uuid,
    /// The peer's name in the configuration.
    pub(super) to: String,
    pub(super) ended: Ended,
    /// It takes its part away by itself by then.
    pub(super) until: Instant,
}

/// What both roles use.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: LibvirtConfig,
    /// Of all migrations' folders.
    pub(super) folder: PathBuf,
    pub(super) peers: BTreeMap<String, PeerConfig>,
    pub(super) identity: Identity,
    pub(super) pool: Arc<Pool>,
    pub(super) forwards: Arc<Forwards>,
    pub(super) refusals: Arc<PeerRefusals>,
    pub(super) control_streams: Arc<ControlStreams>,
    pub(super) store: Store,
    /// Ends that their destinations have not heard of.
    pub(super) untold: Mutex<Vec<Untold>>,
    /// Everything stops for another process: nothing is concluded from what is missing.
    pub(super) freeze: watch::Sender<bool>,
    /// The agent stops: peers are asked nothing further, and who asks nothing is not waited for.
    pub(super) closing: CancellationToken,
}

impl Context {
    pub(super) fn is_frozen(&self) -> bool {
        *self.freeze.borrow()
    }

    /// Waits until everything stops, for another process or for good.
    pub(super) async fn ends(&self) {
        let mut is_frozen = self.freeze.subscribe();
        tokio::select! {
            // The sender is in the same place as we are.
            _ = is_frozen.wait_for(|is_frozen| *is_frozen) => {}
            () = self.closing.cancelled() => {}
        }
    }

    /// The peer's configuration.
    pub(super) fn peer(&self, name: &str) -> Result<&PeerConfig, LibvirtError> {
        self.peers.get(name).ok_or_else(|| LibvirtError::NoPeer(name.to_owned()))
    }

    /// The same, if this domain may go there.
    pub(super) fn peer_for(&self, name: &str, domain: &str) -> Result<&PeerConfig, LibvirtError> {
        let peer = self.peer(name)?;
        let may = authorize(Action::GetVm(domain), Who::Peer(Some(peer)));
        may.map_err(|Denied| LibvirtError::NotSent { peer: name.to_owned(), domain: domain.to_owned() })?;
        Ok(peer)
    }

    /// What the configuration says of the peer of that identity.
    pub(super) fn peer_of(&self, identity: &Identity) -> Option<&PeerConfig> {
        self.peers.values().find(|peer| peer.identity == *identity)
    }

    /// Asks a peer's agent about a migration. An answer that says no is an error.
    pub(super) async fn ask(&self, name: &str, id: Uuid, ask: Ask) -> Result<Answer, LibvirtError> {
        self.exchange(ANSWER_DEADLINE, name, id, (ask, None)).await
    }

    /// Has a peer's agent take its part away, and says how it ended.
    pub(super) async fn ask_to_end(
        &self,
        name: &str,
        id: Uuid,
        ended: Ended,
    ) -> Result<Answer, LibvirtError> {
        self.exchange(END_DEADLINE, name, id, (Ask::End, Some(ended))).await
    }

    async fn exchange(
        &self,
        deadline: Duration,
        name: &str,
        id: Uuid,
        (ask, ended): (Ask, Option<Ended>),
    ) -> Result<Answer, LibvirtError> {
        let peer = || name.to_owned();
        let config = self.peer(name)?;
        let asked = async {
            let session = self.pool.session(&config.identity, config.address.as_deref()).await;
            let session = session.map_err(|source| LibvirtError::Connect { peer: peer(), source })?;
            let open = Open {
                purpose: purpose::LIBVIRT,
                class: Class::Urgent,
                weight: WEIGHT_DEFAULT,
                migration: *id.as_bytes(),
                channel: 0,
                name: Name::NONE,
            };
            let stream = session.open(open).await;
            let stream = stream.map_err(|source| LibvirtError::Open { peer: peer(), source })?;
            let (mut sender, mut receiver) = message::split(stream, &session);
            let lost = |source| LibvirtError::Answer { peer: peer(), source };
            sender.send(&ask).await.map_err(lost)?;
            if let Some(ended) = ended {
                sender.send(&ended).await.map_err(lost)?;
            }
            sender.finish();
            receiver
                .recv::<Answer>()
                .await
                .map_err(lost)?
                .ok_or_else(|| LibvirtError::Unexpected { peer: peer() })
        };
        let answered = timeout(deadline, asked).await;
        let late = LibvirtError::Late { peer: peer(), after_s: deadline.as_secs() };
        match answered.map_err(|_| late)?? {
            Answer::Refused(refused) => {
                Err(LibvirtError::Refused { peer: peer(), text: refused.text, remedy: refused.remedy })
            }
            answer => Ok(answer),
        }
    }
}

/// What a migration's socket is called between agents.
pub(super) fn target(id: Uuid, channel: Channel) -> Result<TargetName, NameError> {
    format!("libvirt-{}-{}", id.simple(), channel.name()).parse()
}
