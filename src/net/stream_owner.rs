//! The owners of streams, from one process of an agent to the next. An owner registers the purposes of its
//! streams (`purposes`), and leaves them with plain data of its own.
//!
//! ```text
//! every owner stops      its streams stop       ─► StoppedStream, StoppedChannel, FrozenPump
//! Pool::freeze           sessions stop          ─► FrozenSession
//! every owner settles    what was on its way    ─► OwnedStream, sockets in Descriptors
//! ──────────────────────────── the next process ────────────────────────────
//! Pool::thaw             sessions begin with the streams of all owners ─► ThawedStreams
//! every owner takes its streams, and goes on
//! ```
//! A stream that no owner has is ended. Knows no owner.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::frozen::FrozenStream;
use super::session::Session;
use super::stream::Stream;

/// A session's name.
pub type SessionId = [u8; 16];

/// What one owner of streams leaves.
pub trait StreamOwner {
    /// Its streams, of all sessions.
    fn streams(&mut self) -> Box<dyn Iterator<Item = &mut OwnedStream> + '_>;
}

/// A stream that its owner leaves, and in which session.
#[derive(Debug, Serialize, Deserialize)]
pub struct OwnedStream {
    session: SessionId,
    id: u32,
    /// Gone once its session has been thawed with it.
    stream: Option<FrozenStream>,
}

impl OwnedStream {
    /// A stream of `session`.
    pub fn new(session: SessionId, stream: FrozenStream) -> Self {
        Self { session, id: stream.id(), stream: Some(stream) }
    }
}

/// Takes the streams of one session from all owners.
pub(super) fn take_streams(owners: &mut [&mut dyn StreamOwner], session: SessionId) -> Vec<FrozenStream> {
    let all = owners.iter_mut().flat_map(|owner| owner.streams());
    all.filter(|owned| owned.session == session).filter_map(|owned| owned.stream.take()).collect()
}

/// Streams of thawed sessions, for their owners to take.
#[derive(Debug, Default)]
pub struct ThawedStreams(BTreeMap<(SessionId, u32), (Session, Stream)>);

impl ThawedStreams {
    pub(super) fn add(&mut self, session: &Session, stream: Stream) {
        self.0.insert((session.id(), stream.id().0), (session.clone(), stream));
    }

    /// Takes a stream with its session; none if the session could not be thawed.
    pub fn take(&mut self, owned: &OwnedStream) -> Option<(Session, Stream)> {
        self.0.remove(&(owned.session, owned.id))
    }
}

/// Descriptors by number; each is taken once.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Of an earlier process, in its order; one that was lost on the way is none.
    pub fn new(fds: Vec<Option<OwnedFd>>) -> Self {
        Self(fds)
    }

    /// Adds one; its number.
    pub fn add(&mut self, fd: OwnedFd) -> usize {
        self.0.push(Some(fd));
        self.0.len() - 1
    }

    /// Takes the one of this number.
    pub fn take(&mut self, number: usize) -> Option<OwnedFd> {
        self.0.get_mut(number)?.take()
    }

    /// All that are left, in their order.
    pub fn into_fds(self) -> Vec<Option<OwnedFd>> {
        self.0
    }
}
