//! The agents that this one knows: their configuration, and sessions with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ask_error::AskError;
use crate::config::PeerConfig;
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::net::connect_error::ConnectError;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::net::session::Session;

/// All peers, by their names in the configuration.
#[derive(Debug)]
pub(crate) struct Peers {
    configured: BTreeMap<String, PeerConfig>,
    identity: Identity,
    pool: Arc<Pool>,
}

impl Peers {
    pub(super) fn new(configured: BTreeMap<String, PeerConfig>, identity: Identity, pool: Arc<Pool>) -> Self {
        Self { configured, identity, pool }
    }

    /// The peer's configuration.
    pub(crate) fn find(&self, name: &str) -> Result<&PeerConfig, Problem> {
        self.configured.get(name).ok_or_else(|| {
            Problem::new(
                ProblemKind::PeerUnknown,
                format!(
                    "{} knows no peer {name}; it knows {}",
                    self.identity,
                    listed(self.configured.keys())
                ),
                format!("add [peer.{name}] with `identity` and `address` to its configuration"),
            )
        })
    }

    /// What the configuration calls the peer that a journal names.
    pub(crate) fn name_of(&self, identity: &str) -> Option<&str> {
        let identity: Identity = identity.parse().ok()?;
        let mut all = self.configured.iter();
        all.find(|(_, peer)| peer.identity == identity).map(|(name, _)| name.as_str())
    }

    pub(crate) async fn session(&self, name: &str) -> Result<Session, AskError> {
        let peer = self.find(name).map_err(AskError::Unknown)?;
        let connected = self.pool.session(&peer.identity, peer.address.as_deref()).await;
        connected.map_err(|source| AskError::Connect { peer: name.into(), source })
    }

    /// Where the next stream to that peer goes: `first`, or another of its lanes.
    pub(crate) async fn lane(&self, first: &Session, name: &str) -> Session {
        let address = self.configured.get(name).and_then(|peer| peer.address.as_deref());
        self.pool.lane(first, address).await
    }

    /// What a failed connection means to an operator.
    pub(crate) fn connect_problem(&self, peer: &str, error: &ConnectError) -> Problem {
        let text = format!("no session with peer {peer}: {}", chain(error));
        if error.is_stranger() {
            let remedy = format!(
                "add a peer with `identity` \"{}\", which is this host, to the configuration of {peer}",
                self.identity
            );
            return Problem::new(ProblemKind::NotPermitted, text, remedy);
        }
        if error.is_distrust() {
            let remedy =
                "compare both sides with `vmferry certs check`, and the peer's `identity` on both sides";
            return Problem::new(ProblemKind::PeerNotTrusted, text, remedy);
        }
        let remedy = "check that its agent runs, its `address`, and that the firewall passes that one port";
        Problem::new(ProblemKind::PeerUnreachable, text, remedy)
    }
}

/// Names of the configuration.
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.map(String::as_str).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
