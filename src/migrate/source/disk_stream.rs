//! A disk's stream for its mirror: opened, and its NBD handshake led with the destination, while the guest runs.
//!
//! How long that is waited for: while the guest runs there is time. A hand-off to another process of this agent
//! waits for it, because a destination takes only one stream for each disk; not for long.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use super::failure::Failure;
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

/// How long a hand-off to another process waits at most, whatever the connection: half of what migrations have to
/// stop in, since one that is given up then is rolled back in the rest.
const HAND_OFF_WAIT_MAX: Duration = Duration::from_secs(10);
/// Between two looks at how long it has taken.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The first QEMU whose NBD client asks for extended headers: major, minor. Nothing else is decided by a version
/// (`qemu/abilities.rs`). Where it is wrong, as for a build with the change of a later one, QEMU's client hears from
/// `offering.rs` that it is not what was agreed on for it: the migration fails, and its guest runs on.
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
    // It is begun by the process that can wait for it.
    if source.context.host.freeze.is_on() {
        return Err(Failure::Frozen);
    }
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
    // The destination has promised to show the guest just this size, on a larger device too: by `size` of its node.
    let (source_bytes, destination_bytes) = (disk.virtual_size, terms.size);
    if source_bytes != destination_bytes {
        return Err(Failure::Size { disk: disk.name.clone(), source_bytes, destination_bytes });
    }
    Ok(Agreed { label, lane, stream, state, terms })
}

/// Runs `work` for as long as it is waited for. A hand-off waits for its end, for [`HAND_OFF_WAIT_MAX`] in all, and
/// without a connection no longer; where it is taken back all is as before.
async fn waited_for<T>(
    source: &Source,
    disk: &CopiedDisk,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let (context, mut work) = (&source.context, pin!(work));
    let freeze = &context.host.freeze;
    let what = format!("the NBD handshake of disk {} with the destination", disk.name);
    let mut waiting = Waiting::new(context.stall());
    loop {
        tokio::select! {
            biased;
            done = source.reconnect_policy().until_done(&mut work) => return done,
            () = context.cancel.cancelled(), if source.clock.phase.may_cancel() => {
                return Err(context.cancelled());
            }
            failure = lasts(source, &what, &mut waiting) => return Err(failure),
            () = freeze.begun() => {}
        }
        match before_hand_off(&mut work, freeze.taken_back(), HAND_OFF_WAIT_MAX).await {
            HandOff::Done(done) => return done,
            HandOff::TakenBack => {}
            HandOff::TooLate => return Err(Failure::HandshakeLeft { disk: disk.name.clone() }),
        }
    }
}

/// What comes first while a hand-off waits.
#[derive(Debug, PartialEq, Eq)]
enum HandOff<T> {
    Done(T),
    TakenBack,
    TooLate,
}

async fn before_hand_off<T>(
    work: impl Future<Output = T>,
    taken_back: impl Future<Output = ()>,
    limit: Duration,
) -> HandOff<T> {
    tokio::select! {
        biased;
        done = work => HandOff::Done(done),
        () = taken_back => HandOff::TakenBack,
        () = sleep(limit) => HandOff::TooLate,
    }
}

/// Waits until it has lasted for too long. The time without a connection does not count.
async fn lasts(source: &Source, what: &str, waiting: &mut Waiting) -> Failure {
    loop {
        sleep(LOOK_EVERY).await;
        if let Err(failure) = waiting.check(what, source.peer.is_away()) {
            return failure;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn a_hand_off_waits_for_a_handshake_and_not_for_long() {
        let (long, none) = (HAND_OFF_WAIT_MAX, Duration::ZERO);
        assert_eq!(before_hand_off(ready(7), ready(()), none).await, HandOff::Done(7));
        assert_eq!(before_hand_off(pending::<u8>(), ready(()), long).await, HandOff::TakenBack);
        assert_eq!(before_hand_off(pending::<u8>(), pending(), none).await, HandOff::TooLate);
    }
}
