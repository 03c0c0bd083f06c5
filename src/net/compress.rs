//! Compression of one stream's bytes on their way from one local socket to the other: independent
//! blocks, each as it was or compressed, whichever is shorter. Knows no stream and no socket.
//!
//! ```text
//! block := kind u8 (0 as it was, 1 zstd) | length u24 | plain length u32 | length bytes
//! ```
//! Nothing of a block depends on another: no state is shared between streams or with what an
//! attacker may have put elsewhere, and a stream can be left to another process between two bytes.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Bytes before a block.
pub const HEADER_LEN: usize = 8;
/// Most plain bytes in a block. With its header it fills a frame, and it is less than any stream's
/// smallest window: a block that has begun can always arrive.
pub const PLAIN_MAX: usize = crate::mux::frame::PAYLOAD_MAX - HEADER_LEN;

const KIND_PLAIN: u8 = 0;
const KIND_ZSTD: u8 = 1;
/// zstd's fastest ordinary level.
const LEVEL: i32 = 1;
/// Shorter blocks are requests and replies: nothing is to be gained.
const COMPRESS_FROM: usize = 1024;
/// A block that is not an eighth shorter was not worth it.
const WORTH: usize = 8;
/// Most blocks that are left as they are before another is tried.
const SKIP_MAX: u32 = 256;

/// What becomes of bytes on their way between a local socket and a stream. The opener decides, and
/// the other side has agreed; each direction of a stream has its own.
#[derive(Debug, Default, Serialize, Deserialize)]
pub enum Coding {
    #[default]
    Plain,
    /// What is sent is compressed.
    Compress,
    Decompress(Undelivered),
}

/// What a pump has taken from a stream of blocks and not delivered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Undelivered {
    /// Of a block whose credit has been returned.
    pub(super) plain: Vec<Bytes>,
    /// The beginning of the next one, whose credit has not.
    pub(super) partial: Bytes,
}

/// Makes blocks. What does not get shorter is soon not tried any more, only looked at now and
/// then: 1, 2, 4 … 256 blocks are passed over.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    scratch: Box<[u8]>,
    skip: u32,
    skip_next: u32,
}

impl Encoder {
    pub fn new() -> io::Result<Self> {
        let zstd = zstd::bulk::Compressor::new(LEVEL)?;
        Ok(Self { zstd, scratch: vec![0; PLAIN_MAX].into(), skip: 0, skip_next: 1 })
    }

    /// Makes a block of what is in `buffer` after [`HEADER_LEN`] bytes that are kept free for its
    /// header, and empties it: [`PLAIN_MAX`] at most. Returns the block and how many bytes it is shorter than without
    /// compression.
    pub fn encode(&mut self, buffer: &mut BytesMut) -> (Bytes, u64) {
        let plain = buffer.len() - HEADER_LEN;
        debug_assert!(plain <= PLAIN_MAX, "{plain} bytes are no block");
        if let Some(length) = self.compress(&buffer[HEADER_LEN..]) {
            let mut block = BytesMut::with_capacity(HEADER_LEN + length);
            block.put_slice(&header(KIND_ZSTD, length, plain));
            block.put_slice(&self.scratch[..length]);
            buffer.clear();
            return (block.freeze(), (plain - length) as u64);
        }
        buffer[..HEADER_LEN].copy_from_slice(&header(KIND_PLAIN, plain, plain));
        (buffer.split().freeze(), 0)
    }

    /// The length of what `scratch` has then, if it was worth it.
    fn compress(&mut self, plain: &[u8]) -> Option<usize> {
        if plain.len() < COMPRESS_FROM {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        // No room for more than is worth it: then it is an error, and cheaper.
        let most = plain.len() - plain.len() / WORTH;
        let length = self.zstd.compress_to_buffer(plain, &mut self.scratch[..most]).ok();
        (self.skip, self.skip_next) = match length {
            Some(_) => (0, 1),
            None => (self.skip_next, (self.skip_next * 2).min(SKIP_MAX)),
        };
        length
    }
}

fn header(kind: u8, length: usize, plain: usize) -> [u8; HEADER_LEN] {
    let first = u32::from(kind) << 24 | length as u32;
    let mut out = [0; HEADER_LEN];
    out[..4].copy_from_slice(&first.to_be_bytes());
    out[4..].copy_from_slice(&(plain as u32).to_be_bytes());
    out
}

/// Why blocks could not be read. The peer is not one of ours, or has a mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("a block of unknown kind {0}")]
    Kind(u8),
    #[error("a block with impossible lengths")]
    Length,
    #[error("a compressed block is damaged")]
    Damaged,
    #[error("the stream ended within a block")]
    Truncated,
}

/// Reads blocks, in any split.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
    partial: BytesMut,
}

impl Decoder {
    /// `partial`: the beginning of a block that an earlier process had.
    pub fn new(partial: &[u8]) -> io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()?, partial: BytesMut::from(partial) })
    }

    /// Takes what was received. Call it only when there is no whole block.
    pub fn push(&mut self, received: &[u8]) {
        self.partial.extend_from_slice(received);
    }

    /// The next block's plain bytes, and the length of the block.
    /// Errors: [`DecodeError`]; nothing more is to be read.
    pub fn next_block(&mut self) -> Result<Option<(Bytes, usize)>, DecodeError> {
        let Some(first) = self.partial.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let [kind, l0, l1, l2, plain @ ..] = *first;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        let plain = u32::from_be_bytes(plain) as usize;
        let possible = (1..=PLAIN_MAX).contains(&plain)
            && match kind {
                KIND_PLAIN => length == plain,
                KIND_ZSTD => (1..plain).contains(&length),
                kind => return Err(DecodeError::Kind(kind)),
            };
        if !possible {
            return Err(DecodeError::Length);
        }
        if self.partial.len() < HEADER_LEN + length {
            return Ok(None);
        }
        self.partial.advance(HEADER_LEN);
        let block = self.partial.split_to(length).freeze();
        let bytes = if kind == KIND_PLAIN { block } else { self.decompress(&block, plain)? };
        Ok(Some((bytes, HEADER_LEN + length)))
    }

    fn decompress(&mut self, block: &[u8], plain: usize) -> Result<Bytes, DecodeError> {
        let mut out = vec![0; plain];
        match self.zstd.decompress_to_buffer(block, &mut out[..]) {
            Ok(length) if length == plain => Ok(out.into()),
            _ => Err(DecodeError::Damaged),
        }
    }

    /// The beginning of a block that has not arrived whole.
    pub fn partial(&self) -> &[u8] {
        &self.partial
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(encoder: &mut Encoder, plain: &[u8]) -> (Bytes, u64) {
        let mut buffer = BytesMut::zeroed(HEADER_LEN);
        buffer.extend_from_slice(plain);
        let made = encoder.encode(&mut buffer);
        assert!(buffer.is_empty());
        made
    }

    fn read(decoder: &mut Decoder) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some((plain, _)) = decoder.next_block().unwrap() {
            all.extend_from_slice(&plain);
        }
        all
    }

    /// Bytes that nothing makes shorter.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252_u64;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(next).collect()
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            blocks in prop::collection::vec((any::<u8>(), 1..PLAIN_MAX, any::<bool>()), 1..8),
            split in 1..70_000_usize,
            moves_at in any::<prop::sample::Index>(),
        ) {
            let mut encoder = Encoder::new().unwrap();
            let (mut sent, mut wire, mut lengths) = (Vec::new(), Vec::new(), 0);
            for (byte, len, is_noise) in blocks {
                let plain = if is_noise { noise(len) } else { vec![byte; len] };
                let (made, saved) = block(&mut encoder, &plain);
                prop_assert_eq!(made.len() as u64 + saved, (HEADER_LEN + len) as u64);
                lengths += made.len();
                wire.extend_from_slice(&made);
                sent.extend_from_slice(&plain);
            }
            prop_assert_eq!(lengths, wire.len());
            let (mut decoder, mut got) = (Decoder::new(&[]).unwrap(), Vec::new());
            let pieces: Vec<_> = wire.chunks(split).collect();
            let moves_at = moves_at.index(pieces.len());
            for (at, piece) in pieces.iter().enumerate() {
                decoder.push(piece);
                got.extend(read(&mut decoder));
                if at == moves_at {
                    // Another process goes on.
                    decoder = Decoder::new(decoder.partial()).unwrap();
                }
            }
            prop_assert!(got == sent);
            prop_assert!(decoder.partial().is_empty());
        }

        #[test]
        fn nothing_that_a_peer_sends_is_more_than_an_error(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut decoder = Decoder::new(&[]).unwrap();
            decoder.push(&bytes);
            let mut plain = 0;
            while let Ok(Some((some, _))) = decoder.next_block() {
                plain += some.len();
            }
            prop_assert!(plain <= bytes.len() / HEADER_LEN * PLAIN_MAX);
        }

        #[test]
        fn a_damaged_block_is_an_error(at in HEADER_LEN..200_usize, flip in 1..=255_u8) {
            let (made, _) = block(&mut Encoder::new().unwrap(), &b"a line of a log, again\n".repeat(500));
            let mut bytes = made.to_vec();
            let at = at.min(bytes.len() - 1);
            bytes[at] ^= flip;
            let mut decoder = Decoder::new(&[]).unwrap();
            decoder.push(&bytes);
            // zstd has no checksum here, TLS is what keeps bytes as they were: it must only not be
            // longer than it says.
            if let Ok(Some((plain, _))) = decoder.next_block() {
                prop_assert_eq!(plain.len(), 23 * 500);
            }
        }
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        for (kind, length, plain, error) in [
            (2, 10, 10, DecodeError::Kind(2)),
            (KIND_PLAIN, 10, 11, DecodeError::Length),
            (KIND_PLAIN, 0, 0, DecodeError::Length),
            (KIND_ZSTD, 20, 20, DecodeError::Length),
            (KIND_ZSTD, 0, 20, DecodeError::Length),
            (KIND_ZSTD, 10, PLAIN_MAX + 1, DecodeError::Length),
            (KIND_PLAIN, PLAIN_MAX + 1, PLAIN_MAX + 1, DecodeError::Length),
        ] {
            let mut decoder = Decoder::new(&[]).unwrap();
            decoder.push(&header(kind, length, plain));
            assert_eq!(decoder.next_block(), Err(error), "{kind} {length} {plain}");
        }
        // More comes out than is said: no more is made.
        let bomb = zstd::bulk::compress(&vec![0; 10 << 20], 1).unwrap();
        let mut decoder = Decoder::new(&[]).unwrap();
        decoder.push(&header(KIND_ZSTD, bomb.len(), PLAIN_MAX));
        decoder.push(&bomb);
        assert_eq!(decoder.next_block(), Err(DecodeError::Damaged));
    }

    #[test]
    fn what_does_not_get_shorter_is_soon_left_alone_and_tried_again() {
        let mut encoder = Encoder::new().unwrap();
        let (noise, zeros) = (noise(PLAIN_MAX), vec![0; PLAIN_MAX]);
        let first = block(&mut encoder, &noise);
        assert_eq!((first.0.len(), first.1), (HEADER_LEN + PLAIN_MAX, 0));
        (0..2000).for_each(|_| drop(block(&mut encoder, &noise)));
        let until = (0..).find(|_| block(&mut encoder, &zeros).1 > 0).unwrap();
        assert!(until as u32 <= SKIP_MAX, "{until} blocks later");
        assert!(block(&mut encoder, &zeros).1 > 0, "and from then on at once");
        assert_eq!(block(&mut encoder, &zeros[..100]).1, 0, "a short block is not worth it");
    }
}
