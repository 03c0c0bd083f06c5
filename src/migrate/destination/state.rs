//! A destination at work, and what passes between it and whoever it serves.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, Interval, interval};
use uuid::Uuid;

use super::busy;
use super::error::Error;
use crate::config::VmConfig;
use crate::migrate::guest::last_words::LastWords;
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::guest::process::{self, StartedQemu};
use crate::migrate::handover;
use crate::migrate::host::Host;
use crate::migrate::host::decisions::{Claimed, Order, Orders};
use crate::migrate::host::destinations::{Incoming, Registration};
use crate::migrate::host::reservations::Reservation;
use crate::migrate::journal::{Beginning, Journal, JournalError};
use crate::migrate::model::image::Image;
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::protocol::message::{Export, Offer, Prepared, Request, Started};
use crate::migrate::protocol::server::Control;
use crate::migrate::transfer::streams::Streams;
use crate::migrate::transfer::verify::transcript::Transcripts;
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;
use crate::qemu::{Events, Qmp};

/// Streams that may wait to be attached.
const STREAMS_WAITING_MAX: usize = 64;
/// Between two looks at what has come.
const TICK: Duration = Duration::from_secs(1);

/// A destination at work.
pub(crate) struct Destination {
    pub(crate) host: Arc<Host>,
    pub(crate) vm: String,
    pub(crate) peer: Identity,
    pub(crate) journal: Journal,
    pub(crate) progress: ProgressSink,
    pub(crate) guest: Guest,
    pub(crate) data: Data,
    /// What was hashed of its disks.
    pub(crate) hashed: Transcripts,
    pub(crate) served: Served,
    /// Whose the guest is, while it is not run.
    pub(crate) handover: handover::Destination,
    pub(crate) serving: Serving,
    /// What was granted for which offer, and how the guest started: to be said again.
    pub(crate) granted: Option<(Offer, Prepared)>,
    pub(crate) said_started: Option<Started>,
    pub(crate) _reservation: Reservation,
}

/// The QEMU that takes the guest.
pub(crate) struct Guest {
    pub(crate) qmp: Qmp,
    pub(crate) events: Events,
    pub(crate) started: Option<StartedQemu>,
    pub(crate) last_words: LastWords,
    /// It was told to load a guest.
    pub(crate) incoming: bool,
    /// Nobody has listened to it for a while: what happened is asked for.
    pub(crate) missed_events: bool,
}

impl Guest {
    /// One that was found, or `started` by an agent.
    pub(crate) fn new(
        (qmp, events): (Qmp, Events),
        started: Option<StartedQemu>,
        host: &Host,
        (vm, config): (&str, &VmConfig),
    ) -> Self {
        let start_log = started.as_ref().map(|_| process::start_log(&host.config, vm));
        let last_words = LastWords::of(config, qmp.process(), start_log.as_deref());
        Self { qmp, events, started, last_words, incoming: false, missed_events: false }
    }
}

/// Where the guest's data flow to, and the streams that carry them.
#[derive(Default)]
pub(crate) struct Data {
    pub(crate) nbd: Option<NbdServer>,
    pub(crate) exports: Vec<Export>,
    pub(crate) images: Vec<Image>,
    pub(crate) streams: Streams,
    /// Our end of the RAM's socket, until its stream is there.
    pub(crate) ram: Option<OwnedFd>,
}

impl Destination {
    /// Whether it serves a replica alone: no guest comes, whatever its source asks for.
    pub(crate) fn is_replica(&self) -> bool {
        self.granted.as_ref().is_some_and(|(offer, _)| offer.is_replica())
    }
}

/// What its journal begins with.
pub(super) fn beginning(offer: &Offer) -> Beginning<'_> {
    let accepted = offer.policy.accept.clone();
    let witness = offer.witness.is_some();
    Beginning { vm: &offer.vm, running: offer.running, keep_source: false, retry: None, accepted, witness }
}

/// What others have for a destination.
pub(crate) struct Served {
    pub(crate) offered: mpsc::Receiver<IncomingStream>,
    pub(crate) controls: mpsc::Receiver<(Control, Request)>,
    /// What an operator decides.
    pub(crate) orders: Orders,
    /// The grant's deadline.
    pub(crate) until: Instant,
    _registration: Registration,
    /// Among those of its peer. None where an earlier process had let in more than there are places now.
    _place: Option<OwnedSemaphorePermit>,
}

impl Served {
    /// Of a migration that can be reached from now on, for as long as its grant goes.
    pub(crate) fn new(
        host: &Host,
        migration: Uuid,
        peer: &Identity,
        (within, place): (Duration, Option<OwnedSemaphorePermit>),
    ) -> Self {
        let until = Instant::now() + within;
        let (streams, offered) = mpsc::channel(STREAMS_WAITING_MAX);
        let (control, controls) = mpsc::channel(1);
        let registration =
            host.destinations.register(migration, Incoming { peer: peer.clone(), until, streams, control });
        let orders = host.decisions.take_orders(migration);
        Self { offered, controls, orders, until, _registration: registration, _place: place }
    }
}

/// What passes between a destination and whoever it serves.
pub(crate) struct Serving {
    /// `None`: the source was lost.
    pub(crate) control: Option<Control>,
    /// It has asked, and waits for an answer.
    pub(crate) asked: bool,
    /// It durably knows that the guest runs here.
    pub(crate) confirmed: bool,
    /// Until when a source that was lost is waited for.
    pub(crate) alone_until: Option<Instant>,
    /// Since when the witness has not answered.
    pub(crate) sealing_since: Option<Instant>,
    /// When it is asked again.
    pub(crate) ask_witness_at: Instant,
    pub(crate) tick: Interval,
    pub(crate) rate: (std::time::Instant, u64),
    /// The last look at how busy this side is.
    pub(crate) busy: Option<busy::Look>,
    /// What was lost of what happened before has been asked for.
    pub(crate) begun: bool,
    /// Why it does not go on.
    pub(crate) trouble: Option<Error>,
    /// In QEMU's last words, too.
    pub(crate) explained: bool,
    /// The source was told of it, and nothing more is served.
    pub(crate) told: bool,
    /// The operator whose decision is being written.
    pub(crate) order: Option<Claimed>,
    /// One that came while the witness was asked.
    pub(crate) waiting: Option<Order>,
    /// Why a record was not written.
    pub(crate) unwritten: Option<JournalError>,
    /// What could not be undone.
    pub(crate) leftovers: Vec<Leftover>,
    /// How often the source has said whether its guest runs.
    pub(crate) to_run: u32,
}

impl Serving {
    /// A source that speaks on `control`; what an earlier process has carried is none of this one's rate.
    pub(crate) fn new(control: Option<Control>, carried_bytes: u64) -> Self {
        Self {
            control,
            asked: false,
            confirmed: false,
            alone_until: None,
            sealing_since: None,
            ask_witness_at: Instant::now(),
            tick: interval(TICK),
            rate: (std::time::Instant::now(), carried_bytes),
            busy: None,
            begun: false,
            trouble: None,
            explained: false,
            told: false,
            order: None,
            waiting: None,
            unwritten: None,
            leftovers: Vec::new(),
            to_run: 0,
        }
    }
}
