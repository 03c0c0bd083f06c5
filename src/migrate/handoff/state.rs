//! Migrations at rest: what one process of an agent leaves to the next. Plain data, with local
//! sockets beside it in a list of descriptors. Knows no encoding and how nothing is done.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::migrate::guest::inventory::Inventory;
use crate::migrate::handover;
use crate::migrate::journal::RetryOf;
use crate::migrate::model::image::Image;
use crate::migrate::model::label::Label;
use crate::migrate::model::options::Options;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::plan::CopiedDisk;
use crate::migrate::model::progress::{Downtime, Progress};
use crate::migrate::protocol::message::{Export, Notice, Offer, Prepared, Started};
use crate::migrate::transfer::disk::delta::Tracking;
use crate::net::message::StoppedChannel;
use crate::net::pump::{FrozenPump, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::net::stream_owner::{Descriptors, OwnedStream, SessionId, StreamOwner, ThawedStreams};

/// All migrations that an agent leaves.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct FrozenMigrations {
    /// Those of which this host is the source.
    pub(crate) sources: Vec<FrozenSource>,
    /// Those that come to it.
    pub(crate) destinations: Vec<FrozenDestination>,
}

/// A control stream.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenControl {
    place: OwnedStream,
    buffer: Bytes,
    /// Of the last request.
    pub(crate) number: u64,
    /// Taken from it and not looked at.
    pub(crate) notices: Vec<Notice>,
}

/// A data stream with its local socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenData {
    pub(crate) label: Label,
    place: OwnedStream,
    /// The socket's place in the list of descriptors.
    fd: usize,
    #[serde(flatten)]
    state: PumpState,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenSource {
    pub(crate) id: Uuid,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) options: Options,
    pub(crate) progress: Progress,
    pub(crate) phase: Phase,
    /// Always there once the sessions have stopped.
    pub(crate) control: Option<FrozenControl>,
    pub(crate) data: Vec<FrozenData>,
    /// Streams that had ended and whose end nobody had looked at.
    pub(crate) ended: Vec<Label>,
    pub(crate) disks: Vec<CopiedDisk>,
    #[serde(default)]
    pub(crate) inventory: Option<Inventory>,
    /// Which try it is of several.
    pub(crate) retry: Option<RetryOf>,
    pub(crate) tracking: Tracking,
    pub(crate) grant: Option<Prepared>,
    pub(crate) loaded: bool,
    pub(crate) downtime: Downtime,
    /// For how long the guest had stood still.
    pub(crate) paused_ms: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenDestination {
    pub(crate) id: Uuid,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) progress: Progress,
    /// None when the source was lost.
    pub(crate) control: Option<FrozenControl>,
    pub(crate) data: Vec<FrozenData>,
    pub(crate) exports: Vec<Export>,
    pub(crate) images: Vec<Image>,
    /// The NBD server's socket, in the list of descriptors.
    pub(crate) nbd: Option<usize>,
    /// Our end of the RAM stream's socket while its stream has not been opened.
    pub(crate) ram: Option<usize>,
    pub(crate) incoming: bool,
    pub(crate) handover: handover::Destination,
    pub(crate) granted: Option<(Offer, Prepared)>,
    pub(crate) said_started: Option<Started>,
    /// The unit with which QEMU was started, if we started it.
    pub(crate) started: Option<Option<String>>,
}

/// A data stream between its migration's stop and its session's.
pub(crate) type StoppedData = (Label, SessionId, FrozenPump);

/// A control stream between its migration's stop and its session's.
#[derive(Debug)]
pub(crate) struct StoppedControl {
    pub(crate) session: SessionId,
    pub(crate) channel: StoppedChannel,
    pub(crate) number: u64,
    pub(crate) notices: Vec<Notice>,
}

impl StoppedControl {
    pub(crate) fn settle(self) -> FrozenControl {
        let (stream, buffer) = self.channel.settle().into_parts();
        let place = OwnedStream::new(self.session, stream);
        FrozenControl { place, buffer, number: self.number, notices: self.notices }
    }
}

/// The sessions have stopped as well.
pub(crate) fn settle_data(stopped: Vec<StoppedData>, fds: &mut Descriptors) -> Vec<FrozenData> {
    let settle = |(label, session, pump): StoppedData| {
        let FrozenPump { local, stream, state } = pump;
        let place = OwnedStream::new(session, stream.settle());
        FrozenData { label, place, fd: fds.add(local), state }
    };
    stopped.into_iter().map(settle).collect()
}

impl FrozenControl {
    pub(crate) fn thaw(&self, streams: &mut ThawedStreams) -> Option<(Session, Stream, Bytes)> {
        let (session, stream) = streams.take(&self.place)?;
        Some((session, stream, self.buffer.clone()))
    }
}

/// A data stream that can go on.
pub(crate) struct ThawedData {
    pub(crate) label: Label,
    pub(crate) session: Session,
    pub(crate) local: OwnedFd,
    pub(crate) stream: Stream,
    pub(crate) state: PumpState,
}

impl FrozenData {
    pub(crate) fn thaw(self, streams: &mut ThawedStreams, fds: &mut Descriptors) -> Option<ThawedData> {
        let local = fds.take(self.fd)?;
        let (session, stream) = streams.take(&self.place)?;
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
}

impl StreamOwner for FrozenMigrations {
    fn streams(&mut self) -> Box<dyn Iterator<Item = &mut OwnedStream> + '_> {
        let of_sources = self.sources.iter_mut().flat_map(|s| {
            let control = s.control.iter_mut().map(|c| &mut c.place);
            control.chain(s.data.iter_mut().map(|d| &mut d.place))
        });
        let of_destinations = self.destinations.iter_mut().flat_map(|d| {
            let control = d.control.iter_mut().map(|c| &mut c.place);
            control.chain(d.data.iter_mut().map(|d| &mut d.place))
        });
        Box::new(of_sources.chain(of_destinations))
    }
}
