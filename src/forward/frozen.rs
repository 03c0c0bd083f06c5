//! Forwardings at rest: what one process of an agent leaves of them to the next. Plain data, with sockets
//! beside it in a list of descriptors.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::connections::StoppedConnection;
use super::forwarding::{Forwarding, StoppedForwarding, StoppedOpening};
use super::listener::SocketFile;
use super::spec::{ShareChange, Spec};
use super::tally::Totals;
use super::targets::Granted;
use crate::config::{LocalSocket, TargetName};
use crate::net::pump::{FrozenPump, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::net::stream_owner::{Descriptors, OwnedStream, StreamOwner, ThawedStreams};
use crate::rate::Rate;
use crate::weight::Weight;

/// All that an agent leaves of its forwardings and targets.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FrozenForwards {
    pub(super) forwardings: Vec<FrozenForwarding>,
    pub(super) targets: Vec<FrozenTarget>,
    pub(super) grants: Vec<FrozenGrant>,
}

/// A connection with its local socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenConnection {
    place: OwnedStream,
    /// The socket's place in the list of descriptors.
    fd: usize,
    /// None while the peer has not answered.
    state: Option<PumpState>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenForwarding {
    pub(super) id: Uuid,
    /// Of one in the configuration.
    pub(super) name: Option<String>,
    pub(super) spec: Spec,
    pub(super) file: Option<SocketFile>,
    /// In the list of descriptors.
    pub(super) listener: Option<usize>,
    pub(super) connections: Vec<FrozenConnection>,
    /// Accepted and not opened, in the list of descriptors.
    pub(super) unopened: Vec<usize>,
    pub(super) totals: Totals,
    /// What an operator has changed of it. Versions before this one leave nothing.
    #[serde(default)]
    pub(super) changed: FrozenChange,
}

/// [`ShareChange`] in a form in which no limit and no change differ.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct FrozenChange {
    limit: Option<FrozenLimit>,
    weight: Option<Weight>,
}

#[derive(Debug, Serialize, Deserialize)]
enum FrozenLimit {
    None,
    BytesPerS(Rate),
}

impl FrozenChange {
    pub(super) fn thaw(self) -> ShareChange {
        let limit = self.limit.map(|limit| match limit {
            FrozenLimit::None => None,
            FrozenLimit::BytesPerS(rate) => Some(rate),
        });
        ShareChange { limit_bytes_per_s: limit, weight: self.weight }
    }
}

impl From<ShareChange> for FrozenChange {
    fn from(change: ShareChange) -> Self {
        let frozen = |limit: Option<Rate>| limit.map_or(FrozenLimit::None, FrozenLimit::BytesPerS);
        Self { limit: change.limit_bytes_per_s.map(frozen), weight: change.weight }
    }
}

/// A target of the configuration.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenTarget {
    pub(super) name: String,
    pub(super) connections: Vec<FrozenConnection>,
    pub(super) totals: Totals,
}

/// A target that was granted.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenGrant {
    pub(super) name: TargetName,
    pub(super) connect: LocalSocket,
    pub(super) peer: String,
    /// Must be there, too. Versions before this one leave none.
    #[serde(default)]
    pub(super) beside: Option<PathBuf>,
    /// For how long it may still be used.
    pub(super) left_ms: u64,
    pub(super) connections: Vec<FrozenConnection>,
    pub(super) totals: Totals,
}

impl FrozenForwards {
    /// Whether there is nothing to leave.
    pub fn is_empty(&self) -> bool {
        self.forwardings.is_empty() && self.targets.is_empty() && self.grants.is_empty()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        let of_forwardings = self.forwardings.iter().map(|f| f.connections.len() + f.unopened.len());
        let of_targets = self.targets.iter().map(|t| t.connections.len());
        of_forwardings.chain(of_targets).chain(self.grants.iter().map(|g| g.connections.len())).sum()
    }
}

impl StreamOwner for FrozenForwards {
    fn streams(&mut self) -> Box<dyn Iterator<Item = &mut OwnedStream> + '_> {
        let of_forwardings = self.forwardings.iter_mut().map(|f| &mut f.connections);
        let of_targets = self.targets.iter_mut().map(|t| &mut t.connections);
        let all = of_forwardings.chain(of_targets).chain(self.grants.iter_mut().map(|g| &mut g.connections));
        Box::new(all.flatten().map(|connection| &mut connection.place))
    }
}

/// A connection that can go on.
pub(super) struct ThawedConnection {
    pub(super) session: Session,
    pub(super) local: OwnedFd,
    pub(super) stream: Stream,
    /// None while the peer has not answered.
    pub(super) state: Option<PumpState>,
}

impl FrozenConnection {
    /// None if its stream or its socket did not come along: then both are closed.
    pub(super) fn thaw(self, streams: &mut ThawedStreams, fds: &mut Descriptors) -> Option<ThawedConnection> {
        let (local, thawed) = (fds.take(self.fd), streams.take(&self.place));
        let (local, (session, stream)) = (local?, thawed?);
        Some(ThawedConnection { session, local, stream, state: self.state })
    }
}

/// Connections whose sessions have stopped, too.
pub(super) fn settle_carried(
    stopped: Vec<StoppedConnection>,
    fds: &mut Descriptors,
) -> Vec<FrozenConnection> {
    let settle = |StoppedConnection { session, pump }| {
        let FrozenPump { local, stream, state } = pump;
        let place = OwnedStream::new(session, stream.settle());
        FrozenConnection { place, fd: fds.add(local), state: Some(state) }
    };
    stopped.into_iter().map(settle).collect()
}

/// A forwarding whose sessions have stopped, too.
pub(super) fn settle_forwarding(
    of: &Forwarding,
    stopped: StoppedForwarding,
    fds: &mut Descriptors,
) -> FrozenForwarding {
    let StoppedForwarding { listener, carried, openings, unopened } = stopped;
    let mut connections = settle_carried(carried, fds);
    connections.extend(openings.into_iter().map(|StoppedOpening { session, local, stream }| {
        let place = OwnedStream::new(session, stream.settle());
        FrozenConnection { place, fd: fds.add(local), state: None }
    }));
    FrozenForwarding {
        id: of.id,
        name: of.name.clone(),
        spec: of.spec.clone(),
        file: of.file.clone(),
        listener: listener.map(|listener| fds.add(listener)),
        connections,
        unopened: unopened.into_iter().map(|local| fds.add(local)).collect(),
        totals: of.connections.totals(),
        changed: of.changed().into(),
    }
}

/// A grant whose sessions have stopped, too.
pub(super) fn settle_grant(
    name: TargetName,
    granted: &Granted,
    carried: Vec<StoppedConnection>,
    fds: &mut Descriptors,
) -> FrozenGrant {
    let left = granted.until.saturating_duration_since(Instant::now());
    FrozenGrant {
        name,
        connect: granted.connect.clone(),
        peer: granted.peer.to_string(),
        beside: granted.beside.clone(),
        left_ms: left.as_millis() as u64,
        connections: settle_carried(carried, fds),
        totals: granted.connections.totals(),
    }
}
