//! Sessions and streams at rest: what one process of an agent leaves to the next. Plain data, with
//! local sockets beside it as descriptors. Knows no encoding, no QEMU.
//!
//! ```text
//! 1. pumps stop       Pump::freeze       what they hold goes back into their stream's two ends
//! 2. sessions stop    Session::freeze    the driver ends; core, backlogs and key are left
//! 3. ends are emptied Halves::settle     what had arrived and was not taken
//! ```
//! and the other way round: a session is thawed with its streams, and then their pumps begin.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::connect::{ConnectionInfo, Endpoint};
use super::edge::{Edge, Edges};
use super::identity::Identity;
use super::resume::{Redial, SessionKey};
use super::stream::{Crowd, Inbound, RecvHalf, SendHalf, Shared, Stream};
use crate::mux::{self, Code, Role, Snapshot, StreamId};

/// A session that a driver has left.
#[derive(Debug, Serialize, Deserialize)]
pub struct FrozenSession {
    /// The peer.
    pub peer: Identity,
    pub(super) is_dialer: bool,
    id: [u8; 16],
    secret: [u8; 32],
    peer_instance: [u8; 16],
    version: u16,
    generation: u64,
    /// Where the dialer dials.
    address: Option<String>,
    connection: FrozenConnection,
    age_s: u64,
    core: Snapshot,
    backlogs: Vec<Backlog>,
}

/// What was known of the last connection.
#[derive(Debug, Serialize, Deserialize)]
struct FrozenConnection {
    address: String,
    cipher: String,
    chain: Vec<Bytes>,
}

/// Chunks that had no room in the session yet.
#[derive(Debug, Serialize, Deserialize)]
struct Backlog {
    stream: u32,
    chunks: Vec<Bytes>,
    finish: bool,
}

/// How a stream's incoming direction had ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum FrozenEnd {
    Finished,
    Reset(u32),
}

/// A stream whose owner has let go of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct FrozenStream {
    id: u32,
    /// What had arrived and was not taken.
    pending: Vec<Bytes>,
    end: Option<FrozenEnd>,
    /// The end had been taken, too.
    recv_ended: bool,
    send_finished: bool,
}

impl FrozenStream {
    /// Its number in its session.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
}

/// A stream's two ends between its owner's stop and its session's.
#[derive(Debug)]
pub struct Halves {
    send: SendHalf,
    recv: RecvHalf,
    untaken: Vec<Bytes>,
}

impl Halves {
    /// `untaken` was received and not delivered, in order.
    pub(crate) fn new(send: SendHalf, recv: RecvHalf, untaken: Vec<Bytes>) -> Self {
        Self { send, recv, untaken }
    }

    /// The session that it belongs to has stopped: takes what else has arrived.
    #[must_use]
    pub fn settle(self) -> FrozenStream {
        let Self { send, recv, untaken } = self;
        let (id, send_finished) = send.let_go();
        let (recv_ended, rest) = recv.let_go();
        let (mut pending, mut end) = (untaken, None);
        for inbound in rest {
            match inbound {
                Inbound::Data(data) => pending.push(data),
                Inbound::Finished => end = Some(FrozenEnd::Finished),
                Inbound::Reset(code) => end = Some(FrozenEnd::Reset(code.to_wire())),
            }
        }
        FrozenStream { id: id.0, pending, end, recv_ended, send_finished }
    }
}

/// What a driver leaves.
pub(super) struct Left<'a> {
    pub(super) peer: &'a Identity,
    pub(super) role: Role,
    pub(super) key: &'a SessionKey,
    pub(super) generation: u64,
    pub(super) redial: Option<&'a Redial>,
    pub(super) connection: &'a ConnectionInfo,
    pub(super) since: Instant,
}

impl FrozenSession {
    pub(super) fn new(left: Left<'_>, core: Snapshot, edges: impl Iterator<Item = (StreamId, Edge)>) -> Self {
        let backlogs = edges.filter(|(_, edge)| !edge.backlog.is_empty() || edge.finish_after_backlog);
        Self {
            peer: left.peer.clone(),
            is_dialer: left.role == Role::Dialer,
            id: left.key.id,
            secret: left.key.secret,
            peer_instance: left.key.peer_instance,
            version: left.key.version,
            generation: left.generation,
            address: left.redial.map(|redial| redial.address.clone()),
            connection: FrozenConnection {
                address: left.connection.address.to_string(),
                cipher: left.connection.cipher.clone(),
                chain: left.connection.chain.iter().map(|c| Bytes::copy_from_slice(c)).collect(),
            },
            age_s: left.since.elapsed().as_secs(),
            core,
            backlogs: backlogs
                .map(|(id, edge)| Backlog {
                    stream: id.0,
                    chunks: edge.backlog.into_iter().map(|(chunk, _)| chunk).collect(),
                    finish: edge.finish_after_backlog,
                })
                .collect(),
        }
    }

    /// The session's name.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    pub(super) fn key(&self) -> SessionKey {
        SessionKey {
            id: self.id,
            secret: self.secret,
            peer_instance: self.peer_instance,
            version: self.version,
        }
    }

    pub(super) fn since(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(std::time::Duration::from_secs(self.age_s)).unwrap_or(now)
    }

    pub(super) fn connection(&self) -> ConnectionInfo {
        let unknown = || std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        ConnectionInfo {
            address: self.connection.address.parse().unwrap_or_else(|_| unknown()),
            cipher: self.connection.cipher.clone(),
            chain: self.connection.chain.iter().map(|c| CertificateDer::from(c.to_vec())).collect(),
            since: Instant::now(),
        }
    }

    pub(super) fn redial(&self, endpoint: &Arc<Endpoint>) -> Option<Redial> {
        let address = self.address.clone()?;
        Some(Redial { endpoint: Arc::clone(endpoint), address, peer: self.peer.clone() })
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The core, with every stream that is in use but has no owner ended, and edges with their
    /// streams for those that have one.
    pub(super) fn thaw(
        self,
        config: mux::Config,
        owned: Vec<FrozenStream>,
        commands: &mpsc::UnboundedSender<super::driver::Command>,
    ) -> (mux::Session, Edges, Vec<Stream>) {
        let orphans: Vec<StreamId> =
            self.core.established().filter(|id| !owned.iter().any(|stream| stream.id == id.0)).collect();
        let mut core = mux::Session::from_snapshot(config, self.core, Instant::now());
        for id in orphans {
            core.reset(id, Code::Cancelled);
        }
        let mut backlogs = self.backlogs;
        let crowd = Crowd::default();
        crowd.set_for(owned.len());
        let (mut edges, mut streams) = (Vec::new(), Vec::new());
        for one in owned {
            let id = StreamId(one.id);
            let (inbox, receiver) = mpsc::unbounded_channel();
            let shared = Shared::new(crowd.clone());
            let mut edge = Edge::new(inbox, Arc::clone(&shared), None);
            if let Some(at) = backlogs.iter().position(|b| b.stream == one.id) {
                let backlog = backlogs.swap_remove(at);
                edge.backlog = backlog.chunks.into_iter().map(|chunk| (chunk, None)).collect();
                edge.finish_after_backlog = backlog.finish;
            }
            for chunk in one.pending {
                let _ = edge.inbox.send(Inbound::Data(chunk));
            }
            match one.end {
                Some(FrozenEnd::Finished) => drop(edge.inbox.send(Inbound::Finished)),
                Some(FrozenEnd::Reset(code)) => edge.end(Code::from_wire(code)),
                None => {}
            }
            let stream = Stream::new(id, commands.clone(), receiver, shared, None);
            streams.push(stream.taken_up(one.send_finished, one.recv_ended));
            edges.push((id, edge));
        }
        (core, (edges, crowd), streams)
    }
}
