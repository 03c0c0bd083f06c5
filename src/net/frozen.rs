//! Sessions and streams at rest: what one process of an agent leaves to the next. Plain data. Knows no
//! encoding, no QEMU.
//!
//! ```text
//! 1. pumps stop       Pump::freeze           what they hold goes back into their stream's two ends
//! 2. sessions stop    Session::freeze        the driver ends; core, backlogs and key are left
//! 3. ends are emptied StoppedStream::settle  what had arrived and was not taken
//! ```
//! and the other way round: a session is thawed with its streams, and then their pumps begin.

use std::time::Instant;

use bytes::Bytes;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::connection::ConnectionInfo;
use super::identity::Identity;
use super::session_key::SessionKey;
use super::stream_inbox::Inbound;
use super::stream_port::{Port, Ports};
use crate::mux::{Code, Snapshot, StreamId};

/// A session that a driver has left.
#[derive(Debug, Serialize, Deserialize)]
pub struct FrozenSession {
    pub peer: Identity,
    pub(super) is_dialer: bool,
    pub(super) id: [u8; 16],
    pub(super) secret: [u8; 32],
    pub(super) peer_instance: [u8; 16],
    pub(super) version: u16,
    pub(super) generation: u64,
    pub(super) address: Option<String>,
    pub(super) connection: FrozenConnection,
    pub(super) age_s: u64,
    pub(super) core: Snapshot,
    pub(super) backlogs: Vec<Backlog>,
}

/// What was known of the last connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenConnection {
    address: String,
    cipher: String,
    chain: Vec<Bytes>,
}

/// Chunks that had no room in the session yet.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Backlog {
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

/// Which directions of a stream have ended, and were known to have ended by the stream's owner.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ended {
    pub(super) recv: bool,
    pub(super) send: bool,
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

impl FrozenSession {
    /// The session's name.
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
}

impl FrozenConnection {
    pub(super) fn new(connection: &ConnectionInfo) -> Self {
        Self {
            address: connection.address.to_string(),
            cipher: connection.cipher.clone(),
            chain: connection.chain.iter().map(|c| Bytes::copy_from_slice(c)).collect(),
        }
    }

    pub(super) fn thaw(&self) -> ConnectionInfo {
        let unknown = || std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        ConnectionInfo {
            segment_bytes: None,
            address: self.address.parse().unwrap_or_else(|_| unknown()),
            cipher: self.cipher.clone(),
            group: None,
            chain: self.chain.iter().map(|c| CertificateDer::from(c.to_vec())).collect(),
            since: Instant::now(),
        }
    }
}

impl Backlog {
    /// What waits at a port; none if nothing does.
    pub(super) fn of(id: StreamId, port: Port) -> Option<Self> {
        let chunks: Vec<Bytes> = port.backlog.into_iter().map(|(chunk, _)| chunk).collect();
        let finish = port.finish_after_backlog;
        (finish || !chunks.is_empty()).then_some(Self { stream: id.0, chunks, finish })
    }

    /// Puts it into the new port of its stream.
    pub(super) fn thaw(self, ports: &mut Ports) {
        // A stream without an owner has no port.
        if let Some(port) = ports.get_mut(StreamId(self.stream)) {
            port.backlog = self.chunks.into_iter().map(|chunk| (chunk, None)).collect();
            port.finish_after_backlog = self.finish;
        }
    }
}

impl FrozenStream {
    /// `untaken` had been taken and not delivered, `rest` was still on its way to the owner.
    pub(super) fn new(id: StreamId, untaken: Vec<Bytes>, rest: Vec<Inbound>, ended: Ended) -> Self {
        let (mut pending, mut end) = (untaken, None);
        for inbound in rest {
            match inbound {
                Inbound::Data(data) => pending.push(data),
                Inbound::Finished => end = Some(FrozenEnd::Finished),
                Inbound::Reset(code) => end = Some(FrozenEnd::Reset(code.to_wire())),
            }
        }
        Self { id: id.0, pending, end, recv_ended: ended.recv, send_finished: ended.send }
    }

    /// Its number in its session.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Puts what was not taken into the stream's new port. Which directions had ended.
    pub(super) fn thaw(self, ports: &mut Ports) -> Ended {
        if let Some(port) = ports.get_mut(StreamId(self.id)) {
            for chunk in self.pending {
                let _ = port.inbox.send(Inbound::Data(chunk));
            }
            match self.end {
                Some(FrozenEnd::Finished) => drop(port.inbox.send(Inbound::Finished)),
                Some(FrozenEnd::Reset(code)) => port.end(Code::from_wire(code)),
                None => {}
            }
        }
        Ended { recv: self.recv_ended, send: self.send_finished }
    }
}
