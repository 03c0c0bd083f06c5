//! Streams of one migration at rest: what one process of an agent leaves of them to the next, as plain
//! data, with local sockets beside it in a list of descriptors.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::migrate::model::label::Label;
use crate::migrate::protocol::message::Notice;
use crate::net::message::StoppedChannel;
use crate::net::pump::{FrozenPump, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::net::stream_owner::{Descriptors, OwnedStream, SessionId, ThawedStreams};

/// A control stream.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenControl {
    pub(crate) place: OwnedStream,
    buffer: Bytes,
    pub(crate) number: u64,
    /// Taken from it and not looked at.
    pub(crate) notices: Vec<Notice>,
}

/// A data stream with its local socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenData {
    pub(crate) label: Label,
    pub(crate) place: OwnedStream,
    /// The socket's place in the list of descriptors.
    fd: usize,
    #[serde(flatten)]
    state: PumpState,
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

#[derive(Debug, thiserror::Error)]
#[error("the stream of {0} did not come along")]
pub(crate) struct StreamLost(Label);

/// A data stream that can go on.
pub(crate) struct ThawedData {
    pub(crate) label: Label,
    pub(crate) session: Session,
    pub(crate) local: OwnedFd,
    pub(crate) stream: Stream,
    pub(crate) state: PumpState,
}

impl FrozenData {
    pub(crate) fn thaw(
        self,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
    ) -> Result<ThawedData, StreamLost> {
        let local = fds.take(self.fd);
        let thawed = streams.take(&self.place);
        let (Some(local), Some((session, stream))) = (local, thawed) else {
            return Err(StreamLost(self.label));
        };
        Ok(ThawedData { label: self.label, session, local, stream, state: self.state })
    }
}
