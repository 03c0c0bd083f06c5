//! The data streams of one migration on one host: their pumps, and the word when one ends.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tokio::sync::mpsc;

use crate::net::pump::{Pump, PumpEnd};
use crate::net::stream::Stream;

/// What a stream carries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Label {
    /// A disk's NBD traffic.
    Disk(String),
    /// The RAM stream.
    Ram,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(name) => write!(f, "disk {name}"),
            Self::Ram => f.write_str("RAM"),
        }
    }
}

/// Owns a migration's pumps. Dropped, all are cut.
#[derive(Debug)]
pub(crate) struct Streams {
    pumps: BTreeMap<Label, Pump>,
    sender: mpsc::UnboundedSender<(Label, PumpEnd)>,
    ends: mpsc::UnboundedReceiver<(Label, PumpEnd)>,
}

impl Streams {
    pub(crate) fn new() -> Self {
        let (sender, ends) = mpsc::unbounded_channel();
        Self { pumps: BTreeMap::new(), sender, ends }
    }

    /// Starts pumping between a local socket and a stream. An earlier pump of the same label
    /// is cut.
    pub(crate) fn start(
        &mut self,
        label: Label,
        runtime: &tokio::runtime::Handle,
        local: OwnedFd,
        stream: Stream,
    ) {
        let (sender, name) = (self.sender.clone(), label.clone());
        let pump = Pump::start(runtime, local, stream, move |end| drop(sender.send((name, end))));
        self.pumps.insert(label, pump);
    }

    pub(crate) fn has(&self, label: &Label) -> bool {
        self.pumps.contains_key(label)
    }

    /// Bytes that a stream has carried, both directions.
    pub(crate) fn bytes(&self, label: &Label) -> u64 {
        self.pumps.get(label).map_or(0, |p| p.counters().total())
    }

    /// Bytes that all streams have carried, both directions.
    pub(crate) fn total(&self) -> u64 {
        self.pumps.values().map(|p| p.counters().total()).sum()
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
        self.pumps.values().for_each(Pump::cut);
    }
}

/// A connected pair of local sockets: one end for a pump, the other for QEMU.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours.into(), theirs.into()))
}
