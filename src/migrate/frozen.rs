//! Migrations at rest: what one process of an agent leaves to the next. Plain data, with local
//! sockets beside it in a list of descriptors. Knows no encoding and how nothing is done.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::delta::Tracking;
use super::handover;
use super::inventory::Inventory;
use super::journal::RetryOf;
use super::message::{Export, Notice, Offer, Prepared, Started};
use super::phase::Phase;
use super::plan::CopiedDisk;
use super::progress::{Downtime, Progress};
use super::request::Options;
use super::streams::Label;
use super::witness::Image;
use crate::net::frozen::FrozenStream;
use crate::net::message::StoppedChannel;
use crate::net::pump::{FrozenPump, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;

/// A session's name.
pub type SessionId = [u8; 16];

/// All migrations that an agent leaves.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FrozenMigrations {
    /// Those of which this host is the source.
    pub(super) sources: Vec<FrozenSource>,
    /// Those that come to it.
    pub(super) destinations: Vec<FrozenDestination>,
}

/// A stream of a migration, and in which session.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Place {
    session: SessionId,
    id: u32,
    /// Gone once its session has been thawed with it.
    stream: Option<FrozenStream>,
}

/// A control stream.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenControl {
    place: Place,
    buffer: Bytes,
    /// Of the last request.
    pub(super) number: u64,
    /// Taken from it and not looked at.
    pub(super) notices: Vec<Notice>,
}

/// A data stream with its local socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenData {
    pub(super) label: Label,
    place: Place,
    /// The socket's place in the list of descriptors.
    fd: usize,
    #[serde(flatten)]
    state: PumpState,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenSource {
    pub(super) id: Uuid,
    pub(super) vm: String,
    pub(super) peer: String,
    pub(super) options: Options,
    pub(super) progress: Progress,
    pub(super) phase: Phase,
    /// Always there once the sessions have stopped.
    pub(super) control: Option<FrozenControl>,
    pub(super) data: Vec<FrozenData>,
    /// Streams that had ended and whose end nobody had looked at.
    pub(super) ended: Vec<Label>,
    pub(super) disks: Vec<CopiedDisk>,
    #[serde(default)]
    pub(super) inventory: Option<Inventory>,
    /// Which try it is of several.
    pub(super) retry: Option<RetryOf>,
    pub(super) tracking: Tracking,
    pub(super) grant: Option<Prepared>,
    pub(super) loaded: bool,
    pub(super) downtime: Downtime,
    /// For how long the guest had stood still.
    pub(super) paused_ms: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FrozenDestination {
    pub(super) id: Uuid,
    pub(super) vm: String,
    pub(super) peer: String,
    pub(super) progress: Progress,
    /// None when the source was lost.
    pub(super) control: Option<FrozenControl>,
    pub(super) data: Vec<FrozenData>,
    pub(super) exports: Vec<Export>,
    pub(super) images: Vec<Image>,
    /// The NBD server's socket, in the list of descriptors.
    pub(super) nbd: Option<usize>,
    /// Our end of the RAM stream's socket while its stream has not been opened.
    pub(super) ram: Option<usize>,
    pub(super) incoming: bool,
    pub(super) handover: handover::Destination,
    pub(super) granted: Option<(Offer, Prepared)>,
    pub(super) said_started: Option<Started>,
    /// The unit with which QEMU was started, if we started it.
    pub(super) started: Option<Option<String>>,
}

/// Descriptors by number; each is taken once.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Of an earlier process, in its order; one that was lost on the way is none.
    #[must_use]
    pub fn new(fds: Vec<Option<OwnedFd>>) -> Self {
        Self(fds)
    }

    pub(super) fn add(&mut self, fd: OwnedFd) -> usize {
        self.0.push(Some(fd));
        self.0.len() - 1
    }

    pub(super) fn take(&mut self, number: usize) -> Option<OwnedFd> {
        self.0.get_mut(number)?.take()
    }

    /// All that are left, in their order.
    #[must_use]
    pub fn into_fds(self) -> Vec<Option<OwnedFd>> {
        self.0
    }
}

/// Streams of thawed sessions, by session and number.
pub type ThawedStreams = BTreeMap<(SessionId, u32), (Session, Stream)>;

/// A data stream between its migration's stop and its session's.
pub(super) type StoppedData = (Label, SessionId, FrozenPump);

/// A control stream between its migration's stop and its session's.
#[derive(Debug)]
pub(super) struct StoppedControl {
    pub(super) session: SessionId,
    pub(super) channel: StoppedChannel,
    pub(super) number: u64,
    pub(super) notices: Vec<Notice>,
}

impl StoppedControl {
    pub(super) fn settle(self) -> FrozenControl {
        let (stream, buffer) = self.channel.settle().into_parts();
        let place = Place { session: self.session, id: stream.id(), stream: Some(stream) };
        FrozenControl { place, buffer, number: self.number, notices: self.notices }
    }
}

/// The sessions have stopped as well.
pub(super) fn settle_data(stopped: Vec<StoppedData>, fds: &mut Descriptors) -> Vec<FrozenData> {
    let settle = |(label, session, pump): StoppedData| {
        let FrozenPump { local, halves, state } = pump;
        let stream = halves.settle();
        let place = Place { session, id: stream.id(), stream: Some(stream) };
        FrozenData { label, place, fd: fds.add(local), state }
    };
    stopped.into_iter().map(settle).collect()
}

impl FrozenControl {
    pub(super) fn thaw(&self, streams: &mut ThawedStreams) -> Option<(Session, Stream, Bytes)> {
        let (session, stream) = streams.remove(&(self.place.session, self.place.id))?;
        Some((session, stream, self.buffer.clone()))
    }
}

/// A data stream that can go on.
pub(super) struct ThawedData {
    pub(super) label: Label,
    pub(super) session: Session,
    pub(super) local: OwnedFd,
    pub(super) stream: Stream,
    pub(super) state: PumpState,
}

impl FrozenData {
    pub(super) fn thaw(self, streams: &mut ThawedStreams, fds: &mut Descriptors) -> Option<ThawedData> {
        let local = fds.take(self.fd)?;
        let (session, stream) = streams.remove(&(self.place.session, self.place.id))?;
        Some(ThawedData { label: self.label, session, local, stream, state: self.state })
    }
}

impl FrozenMigrations {
    /// Whether there is nothing to leave.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty() && self.destinations.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sources.len() + self.destinations.len()
    }

    /// The migrations, by their numbers.
    pub fn ids(&self) -> impl Iterator<Item = Uuid> {
        self.sources.iter().map(|s| s.id).chain(self.destinations.iter().map(|d| d.id))
    }

    /// Takes the streams of one session, to thaw it with them.
    #[must_use]
    pub fn take_streams(&mut self, session: SessionId) -> Vec<FrozenStream> {
        let of_sources = self.sources.iter_mut().flat_map(|s| {
            let control = s.control.iter_mut().map(|c| &mut c.place);
            control.chain(s.data.iter_mut().map(|d| &mut d.place))
        });
        let of_destinations = self.destinations.iter_mut().flat_map(|d| {
            let control = d.control.iter_mut().map(|c| &mut c.place);
            control.chain(d.data.iter_mut().map(|d| &mut d.place))
        });
        let places = of_sources.chain(of_destinations).filter(|place| place.session == session);
        places.filter_map(|place| place.stream.take()).collect()
    }
}
