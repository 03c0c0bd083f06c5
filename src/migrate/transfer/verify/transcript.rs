//! What this side has hashed of each disk, for the audit record of both hosts.
//!
//! A digest is the SHA-256 of a line `BEGIN BYTES HASH` for each piece, in the order in which it was hashed; a piece
//! that was hashed again counts again. The source has one of its own hashes and one of those that it was told: the
//! second is the destination's own. It is not where a question was asked again because the connection was lost under
//! it, or an agent was replaced meanwhile: the number of pieces tells. Where a guest writes, hashes of a piece may
//! differ because its copy is under way; such a piece is compared again.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};

use crate::audit::{Compared, Hashed};
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::protocol::message::Piece;

/// The transcripts of one migration on one side, recorded when it is let go.
pub(crate) struct Transcripts {
    progress: ProgressSink,
    disks: Mutex<BTreeMap<String, Transcript>>,
}

#[derive(Default)]
struct Transcript {
    ours: Lines,
    /// At the source: what the destination has said.
    theirs: Option<Lines>,
    pieces: u64,
    bytes: u64,
    different: u64,
}

struct Lines(Context);

impl Default for Lines {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Lines {
    fn add(&mut self, piece: &Piece, hash: &str) {
        self.0.update(format!("{} {} {hash}\n", piece.at, piece.bytes).as_bytes());
    }

    fn digest(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Transcript {
    fn add(&mut self, piece: &Piece, ours: &str, theirs: Option<&str>) {
        self.ours.add(piece, ours);
        self.pieces += 1;
        self.bytes += u64::from(piece.bytes);
        if let Some(theirs) = theirs {
            self.theirs.get_or_insert_default().add(piece, theirs);
            self.different += u64::from(theirs != ours);
        }
    }

    fn of(self, disk: String) -> Hashed {
        let compared =
            self.theirs.map(|theirs| Compared { digest: theirs.digest(), different: self.different });
        Hashed { disk, pieces: self.pieces, bytes: self.bytes, digest: self.ours.digest(), told: compared }
    }
}

impl Transcripts {
    pub(crate) fn new(progress: ProgressSink) -> Self {
        Self { progress, disks: Mutex::default() }
    }

    /// These pieces of a disk of the migration have these hashes; the destination has told `theirs`.
    pub(crate) fn add(&self, disk: &str, pieces: &[Piece], ours: &[String], theirs: Option<&[String]>) {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let transcript = disks.entry(disk.to_owned()).or_default();
        for (at, (piece, hash)) in pieces.iter().zip(ours).enumerate() {
            transcript.add(piece, hash, theirs.and_then(|theirs| theirs.get(at)).map(String::as_str));
        }
    }
}

/// However a migration ends on this side, also for a process that another takes over from.
impl Drop for Transcripts {
    fn drop(&mut self) {
        let disks = std::mem::take(self.disks.get_mut().unwrap_or_else(PoisonError::into_inner));
        disks.into_iter().for_each(|(disk, transcript)| self.progress.record_hashed(transcript.of(disk)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_that_of_the_lines() {
        let mut transcript = Transcript::default();
        transcript.add(&Piece { at: 0, bytes: 4 }, "ab", Some("ab"));
        transcript.add(&Piece { at: 4, bytes: 2 }, "cd", Some("ce"));
        // printf '0 4 ab\n4 2 cd\n' | sha256sum, and the same with "ce".
        let digest = "5fd26196a5c2e7dd24b910307e8bd672034796da7fd0a6219c1bac46a57631e7".to_owned();
        let told = "9b5ae0f3ec2605073310d4fb7c01df9d8ab5785d7a5171566e600f12179de97c".to_owned();
        let told = Some(Compared { digest: told, different: 1 });
        let expected = Hashed { disk: "root".to_owned(), pieces: 2, bytes: 6, digest, told };
        assert_eq!(transcript.of("root".to_owned()), expected);
    }
}
