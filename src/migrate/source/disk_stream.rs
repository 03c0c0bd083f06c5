//! A disk's stream for its mirror: opened, and its NBD handshake led with the destination, while the guest runs.
//!
//! How long that is waited for: while the guest runs there is time. A hand-off to another process of this agent
//! waits for it, because a destination takes only one stream for each disk; not for long.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use super::failure::Failure;
use super::reconnect::ReconnectPolicy;
use super::stall::Waiting;
use super::state::Source;
use crate::migrate::model::label::Label;
use crate::migrate::model::plan::{CopiedDisk, Export};
use crate::migrate::transfer::disk::error::HandshakeError;
use crate::migrate::transfer::disk::handshake;
use crate::mux::purpose;
use crate::net::pump::{PumpEnd, PumpState};
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::qemu::{QueryVersion, Terms};

/// How long a hand-off to another process waits at most, without the time without a connection.
const HAND_OFF_WAIT_MAX: Duration = Duration::from_secs(10);
/// Between two looks at how long it has taken.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The first QEMU whose NBD client asks for extended headers: major, minor.
const EXTENDED_HEADERS_SINCE: (u32, u32) = (8, 2);

/// A disk's stream that ends in its export.
pub(super) struct Agreed {
    pub(super) label: Label,
    pub(super) lane: Session,
    pub(super) stream: Stream,
    /// How its pump is to begin.
    pub(super) state: PumpState,
    /// What QEMU's client is to be offered.
    pub(super) terms: Terms,
}

/// Whether the source's QEMU asks an NBD server for extended headers, with which gigabytes of zeroes are one
/// request. Its schema does not tell.
pub(super) async fn asks_for_extended_headers(source: &Source) -> Result<bool, Failure> {
    let version = source.query(QueryVersion).await?.qemu;
    Ok((version.major, version.minor) >= EXTENDED_HEADERS_SINCE)
}

/// Opens a disk's stream, and agrees with the destination's QEMU on how it is used. QEMU is not asked.
pub(super) async fn agree(
    source: &Source,
    disk: &CopiedDisk,
    export: &Export,
    extended: bool,
) -> Result<Agreed, Failure> {
    let label = Label::Disk(disk.name.clone());
    let begun = source.peer.begin_open(&source.context, &label, purpose::NBD, export.channel);
    let (lane, mut stream) = begun.await?;
    let agreed = handshake::agree(&mut stream, source.peer.disk_coding(), &export.export, extended);
    let agreed = async {
        agreed.await.map_err(|error| match error {
            HandshakeError::Refused(ended) => Failure::refused(&label, &lane, ended),
            HandshakeError::Nbd(source) => Failure::Handshake { disk: disk.name.clone(), source },
            HandshakeError::Stream(ended) => {
                Failure::Stream { stream: label.to_string(), source: PumpEnd::Remote(ended) }
            }
        })
    };
    let (terms, state) = waited_for(source, disk, agreed).await?;
    tracing::debug!(disk = disk.name, ?terms, "the NBD handshake with the destination is over");
    Ok(Agreed { label, lane, stream, state, terms })
}

async fn waited_for<T>(
    source: &Source,
    disk: &CopiedDisk,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let what = format!("the NBD handshake of disk {} with the destination", disk.name);
    let (context, mut work) = (&source.context, pin!(work));
    tokio::select! {
        biased;
        done = source.reconnect_policy().until_done(&mut work) => return done,
        () = context.cancel.cancelled(), if source.clock.phase.may_cancel() => {
            return Err(context.cancelled());
        }
        failure = lasts(source, &what, context.stall()) => return Err(failure),
        () = context.host.freeze.begun() => {}
    }
    let limit = Some(context.host.config.deadlines.resume_paused());
    let policy = ReconnectPolicy::new(&context.host, &source.peer.lanes, &context.progress, limit);
    tokio::select! {
        biased;
        done = policy.until_done(work) => done,
        failure = lasts(source, &what, HAND_OFF_WAIT_MAX) => Err(failure),
    }
}

/// Waits until it has lasted for too long. The time without a connection does not count.
async fn lasts(source: &Source, what: &str, deadline: Duration) -> Failure {
    let mut waiting = Waiting::new(deadline);
    loop {
        sleep(LOOK_EVERY).await;
        if let Err(failure) = waiting.check(what, source.peer.is_away()) {
            return failure;
        }
    }
}
