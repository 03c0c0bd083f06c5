//! Hashes of what the destination's QEMU has of a granted disk, for the source to compare with its own.
//!
//! The source may read a disk that is copied through its stream anyway: it learns nothing new by a hash. Of one that
//! is only compared it gets hashes of whole pieces, from which a content that it does not know cannot be guessed byte
//! by byte.

use std::time::Duration;

use super::state::Destination;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::{Parts, Pieces, Refusal, Response};
use crate::migrate::transfer::verify::hashes;
use crate::printable::bounded;
use crate::qemu::{NbdError, NbdReader};

/// How long QEMU may take to read what one request asks for.
const READ_DEADLINE: Duration = Duration::from_secs(30);

/// Why there are no hashes.
#[derive(Debug, thiserror::Error)]
enum HashError {
    #[error("disk {0} is not part of the grant")]
    NotGranted(String),
    #[error("more is asked for than one request may")]
    TooMuch,
    #[error("of a disk that is not copied only whole pieces are hashed")]
    NotWhole,
    #[error("the disk has {0} bytes, and more of it is asked for")]
    Outside(u64),
    #[error("the NBD server cannot be reached")]
    Connect(#[from] std::io::Error),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("its QEMU did not read it within {} s", READ_DEADLINE.as_secs())]
    Deadline,
}

fn refused(disk: &str, why: &HashError) -> Response {
    let text = format!("disk {} cannot be compared: {}", bounded(disk), chain(why));
    Response::Refused(Refusal { problems: Vec::new(), text })
}

impl Destination {
    /// The answer to a question for hashes.
    pub(crate) async fn hash(&self, wanted: &Pieces) -> Response {
        let hashed = tokio::time::timeout(READ_DEADLINE, self.hashes(wanted)).await;
        match hashed.unwrap_or(Err(HashError::Deadline)) {
            Ok(hashes) => Response::Hashes(hashes),
            Err(e) => refused(&wanted.disk, &e),
        }
    }

    /// The answer to a question for what reads as zeroes.
    pub(crate) async fn zeroes(&self, wanted: &Parts) -> Response {
        let told = tokio::time::timeout(READ_DEADLINE, self.are_zeroes(wanted)).await;
        match told.unwrap_or(Err(HashError::Deadline)) {
            Ok(zeroes) => Response::AreZeroes(zeroes),
            Err(e) => refused(&wanted.disk, &e),
        }
    }

    async fn are_zeroes(&self, wanted: &Parts) -> Result<Vec<bool>, HashError> {
        if !hashes::are_bounded(&wanted.parts) {
            return Err(HashError::TooMuch);
        }
        if self.compared(&wanted.disk).is_some() {
            return Err(HashError::NotWhole);
        }
        let mut reader = self.reader(&wanted.disk).await?;
        if wanted.parts.iter().any(|(_, end)| *end > reader.size()) {
            return Err(HashError::Outside(reader.size()));
        }
        let mut zeroes = Vec::with_capacity(wanted.parts.len());
        for &(begin, end) in &wanted.parts {
            zeroes.push(reader.is_zero(begin..end).await?);
        }
        Ok(zeroes)
    }

    /// Not kept: QEMU 7.2 hangs when its server is stopped with a client that is shaking hands.
    async fn reader(&self, disk: &str) -> Result<NbdReader, HashError> {
        let granted = self.data.exports.iter().find(|export| export.disk == disk).map(|e| &e.export);
        let export = granted.or_else(|| self.compared(disk));
        let (Some(export), Some(nbd)) = (export, &self.data.nbd) else {
            return Err(HashError::NotGranted(bounded(disk)));
        };
        Ok(NbdReader::plain(nbd.connect()?, export).await?)
    }

    /// The export of a disk that is only compared.
    fn compared(&self, disk: &str) -> Option<&String> {
        let (offer, _) = self.granted.as_ref()?;
        offer.compared().find(|compared| compared.name == disk).map(|compared| &compared.name)
    }

    async fn hashes(&self, wanted: &Pieces) -> Result<Vec<String>, HashError> {
        if !hashes::is_bounded(&wanted.pieces) {
            return Err(HashError::TooMuch);
        }
        let mut reader = self.reader(&wanted.disk).await?;
        let size = reader.size();
        let is_within = |at: u64, bytes: u32| at.checked_add(u64::from(bytes)).is_some_and(|end| end <= size);
        if !wanted.pieces.iter().all(|piece| is_within(piece.at, piece.bytes)) {
            return Err(HashError::Outside(size));
        }
        if self.compared(&wanted.disk).is_some() && !hashes::are_whole(&wanted.pieces, size) {
            return Err(HashError::NotWhole);
        }
        let hashes = hashes::of(&mut reader, &wanted.pieces).await?;
        self.hashed.add(&wanted.disk, &wanted.pieces, &hashes, None);
        Ok(hashes)
    }
}
