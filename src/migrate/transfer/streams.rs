//! The data streams of one migration on one host: their pumps, and the word when one ends.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::mpsc;

use super::frozen::{FrozenData, StoppedData, StreamLost, ThawedData};
use crate::migrate::model::label::Label;
use crate::migrate::model::progress::Reconnecting;
use crate::mux::Code;
use crate::net::pump::{FirstEnd, Pump, PumpEnd, PumpState};
use crate::net::session::{Away, Session};
use crate::net::stream::{Stream, StreamEnded};
use crate::net::stream_owner::{Descriptors, ThawedStreams};
use crate::net::waits::Waited;

/// Owns a migration's pumps. Dropped, all are cut.
#[derive(Debug)]
pub(crate) struct Streams {
    pumps: BTreeMap<Label, (Session, Pump)>,
    sender: mpsc::UnboundedSender<(Label, PumpEnd)>,
    ends: mpsc::UnboundedReceiver<(Label, PumpEnd)>,
}

impl Default for Streams {
    fn default() -> Self {
        let (sender, ends) = mpsc::unbounded_channel();
        Self { pumps: BTreeMap::new(), sender, ends }
    }
}

impl Streams {
    /// Starts pumping between a local socket and a stream of `session`. An earlier pump of the
    /// same label is cut.
    pub(crate) fn start(&mut self, label: Label, session: &Session, local: OwnedFd, stream: Stream) {
        self.start_as(label, session, local, stream, PumpState::default());
    }

    /// As [`Streams::start`], where the bytes of a direction are dealt with in a way of their own.
    pub(crate) fn start_as(
        &mut self,
        label: Label,
        session: &Session,
        local: OwnedFd,
        stream: Stream,
        state: PumpState,
    ) {
        self.resume(ThawedData { label, session: session.clone(), local, stream, state });
    }

    /// Goes on with what an earlier process has left; `each` gets the session of each stream.
    pub(crate) fn thaw(
        left: Vec<FrozenData>,
        streams: &mut ThawedStreams,
        fds: &mut Descriptors,
        mut each: impl FnMut(&Session),
    ) -> Result<Self, StreamLost> {
        let mut all = Self::default();
        for data in left {
            let thawed = data.thaw(streams, fds)?;
            each(&thawed.session);
            all.resume(thawed);
        }
        Ok(all)
    }

    fn resume(&mut self, data: ThawedData) {
        let (sender, name) = (self.sender.clone(), data.label.clone());
        let tell = move |end| drop(sender.send((name, end)));
        let pump = Pump::resume(data.session.runtime(), data.local, data.stream, data.state, tell);
        self.pumps.insert(data.label, (data.session, pump));
    }

    /// A stream of an earlier process had ended there.
    pub(crate) fn has_ended(&self, label: Label) {
        let _ = self.sender.send((label, PumpEnd::Remote(StreamEnded(Code::SessionLost))));
    }

    /// Stops all pumps between two bytes; those that have ended are told apart.
    pub(crate) async fn freeze(&mut self) -> (Vec<StoppedData>, Vec<Label>) {
        let (mut stopped, mut ended) = (Vec::new(), Vec::new());
        for (label, (session, pump)) in std::mem::take(&mut self.pumps) {
            match pump.freeze().await {
                Some(frozen) => stopped.push((label, session.id(), frozen)),
                None => ended.push(label),
            }
        }
        (stopped, ended)
    }

    pub(crate) fn has(&self, label: &Label) -> bool {
        self.pumps.contains_key(label)
    }

    /// Bytes that a stream has carried, both directions.
    pub(crate) fn bytes(&self, label: &Label) -> u64 {
        self.pumps.get(label).map_or(0, |(_, pump)| pump.counters().total())
    }

    /// Bytes that a stream did not have to carry.
    pub(crate) fn saved(&self, label: &Label) -> u64 {
        self.pumps.get(label).map_or(0, |(_, pump)| pump.counters().saved_bytes.load(Relaxed))
    }

    /// What the way of a stream to the peer has waited for, in this process.
    pub(crate) fn waited(&self, label: &Label) -> Option<Waited> {
        self.pumps.get(label).map(|(_, pump)| pump.counters().waited())
    }

    /// The sessions that carry them, each once.
    pub(crate) fn sessions(&self) -> Vec<Session> {
        let mut sessions: Vec<Session> = Vec::new();
        for (session, _) in self.pumps.values() {
            if sessions.iter().all(|known| known.id() != session.id()) {
                sessions.push(session.clone());
            }
        }
        sessions
    }

    /// Which end of a stream ended first; none while both are open.
    pub(crate) fn first_end(&self, label: &Label) -> Option<FirstEnd> {
        self.pumps.get(label)?.1.counters().first_end()
    }

    /// Bytes that all streams have carried, both directions.
    pub(crate) fn total(&self) -> u64 {
        self.pumps.values().map(|(_, pump)| pump.counters().total()).sum()
    }

    /// The next stream that ends. Cancelling loses nothing.
    pub(crate) async fn ended(&mut self) -> (Label, PumpEnd) {
        match self.ends.recv().await {
            Some(end) => end,
            // Not reached: `sender` is ours. Waiting for ever is what "none ends" means.
            None => std::future::pending().await,
        }
    }

    /// Cuts every stream: local sockets close, the peer sees resets. QEMU is not asked.
    pub(crate) fn cut_all(&self) {
        self.pumps.values().for_each(|(_, pump)| pump.cut());
    }
}

/// A connected pair of local sockets: one end for a pump, the other for QEMU.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours.into(), theirs.into()))
}

impl From<&Away> for Reconnecting {
    /// What is to be said now of a session without a connection.
    fn from(away: &Away) -> Self {
        let of = away.until.saturating_duration_since(away.since);
        Self { for_s: away.since.elapsed().as_secs(), of_s: of.as_secs(), cause: away.cause.clone() }
    }
}
