//! Hashes of parts of a disk, as QEMU shows them: SHA-256, in hex.

use aws_lc_rs::digest::{SHA256, digest};

use super::ledger::PIECE_BYTES_MAX;
use crate::migrate::protocol::message::Piece;
use crate::qemu::{NbdError, NbdReader};

/// What one request may ask for: so many pieces, of so many bytes in all.
pub(crate) const PIECES_MAX: usize = 256;
pub(crate) const BATCH_BYTES_MAX: u64 = 16 << 20;

/// What one question for zeroes may ask of: so many parts, each of so many bytes.
pub(crate) const PARTS_MAX: usize = 512;
pub(crate) const PART_BYTES_MAX: u64 = 16 << 20;

/// Whether so much may be asked of at once.
pub(crate) fn are_bounded(parts: &[(u64, u64)]) -> bool {
    let is_short = |(begin, end): &(u64, u64)| begin < end && end - begin <= PART_BYTES_MAX;
    parts.len() <= PARTS_MAX && parts.iter().all(is_short)
}

/// Whether so much may be asked for at once.
pub(crate) fn is_bounded(pieces: &[Piece]) -> bool {
    let is_short = |piece: &Piece| (1..=PIECE_BYTES_MAX).contains(&u64::from(piece.bytes));
    let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.bytes)).sum();
    pieces.len() <= PIECES_MAX && pieces.iter().all(is_short) && bytes <= BATCH_BYTES_MAX
}

/// Whether each is as long as a piece can be at its place in a disk of so many bytes.
pub(crate) fn are_whole(pieces: &[Piece], size: u64) -> bool {
    let is_whole = |piece: &Piece| {
        let left = size.saturating_sub(piece.at);
        piece.at.is_multiple_of(PIECE_BYTES_MAX) && u64::from(piece.bytes) == left.min(PIECE_BYTES_MAX)
    };
    pieces.iter().all(is_whole)
}

/// Reads and hashes pieces of an export. What lies beyond its end counts as zeroes.
pub(crate) async fn of(reader: &mut NbdReader, pieces: &[Piece]) -> Result<Vec<String>, NbdError> {
    let mut buffer = vec![0; PIECE_BYTES_MAX as usize];
    let mut hashes = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let data = &mut buffer[..piece.bytes as usize];
        let there = reader.size().saturating_sub(piece.at).min(data.len() as u64) as usize;
        let (data_there, beyond) = data.split_at_mut(there);
        beyond.fill(0);
        if there > 0 {
            reader.read(piece.at, data_there).await?;
        }
        hashes.push(digest(&SHA256, data).as_ref().iter().map(|byte| format!("{byte:02x}")).collect());
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_may_ask_for_is_bounded() {
        let piece = |bytes| Piece { at: 0, bytes };
        let most = PIECE_BYTES_MAX as u32;
        assert!(is_bounded(&[piece(1), piece(most)]));
        assert!(!is_bounded(&[piece(0)]));
        let at = |at, bytes| Piece { at, bytes };
        let size = 2 * PIECE_BYTES_MAX + 5;
        assert!(are_whole(&[at(0, most), at(PIECE_BYTES_MAX, most), at(2 * PIECE_BYTES_MAX, 5)], size));
        for part in [at(0, 1), at(1, most), at(PIECE_BYTES_MAX, most - 1), at(2 * PIECE_BYTES_MAX, 4)] {
            assert!(!are_whole(&[part], size), "{part:?}");
        }
        assert!(!is_bounded(&[piece(most + 1)]));
        assert!(is_bounded(&vec![piece(most); 16]) && !is_bounded(&vec![piece(most); 17]));
        let part = |bytes| (7, 7 + bytes);
        assert!(
            are_bounded(&vec![part(PART_BYTES_MAX); PARTS_MAX])
                && !are_bounded(&vec![part(1); PARTS_MAX + 1])
        );
        assert!(
            !are_bounded(&[part(0)]) && !are_bounded(&[part(PART_BYTES_MAX + 1)]) && !are_bounded(&[(8, 7)])
        );
        assert!(is_bounded(&vec![piece(1); PIECES_MAX]) && !is_bounded(&vec![piece(1); PIECES_MAX + 1]));
    }
}
