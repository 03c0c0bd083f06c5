//! Compressed blocks of a disk's stream, from a peer.

use bytes::BytesMut;
use vmferry::net::compress::{DecodeError, Decoder, Encoder, HEADER_LEN, PLAIN_MAX};

use super::script::pieces;

/// The plain bytes, and how it ended: with so many bytes of a block, or an error.
type Decoded = (Vec<u8>, Result<usize, DecodeError>);

fn decoded<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Decoded {
    let mut decoder = Decoder::new(&[]).expect("a decoder");
    let mut plain = Vec::new();
    for part in parts {
        // As much as a frame brings.
        for some in part.chunks(PLAIN_MAX + HEADER_LEN) {
            decoder.push(some);
            loop {
                match decoder.next_block() {
                    Ok(Some((bytes, taken))) => {
                        assert!((1..=PLAIN_MAX).contains(&bytes.len()), "{} bytes", bytes.len());
                        assert!(taken <= bytes.len() + HEADER_LEN, "no block is longer than without");
                        plain.extend_from_slice(&bytes);
                    }
                    Ok(None) => break,
                    Err(error) => return (plain, Err(error)),
                }
            }
            assert!(decoder.partial().len() < HEADER_LEN + PLAIN_MAX, "a block that is never whole");
        }
    }
    (plain, Ok(decoder.partial().len()))
}

/// In pieces as at once; and what is encoded is decoded.
pub(crate) fn blocks(data: &[u8]) {
    let at_once = decoded(std::iter::once(data));
    assert_eq!(decoded(pieces(data, false)), at_once);
    if data.len() < 4096 {
        assert_eq!(decoded(pieces(data, true)), at_once);
    }
    let mut encoder = Encoder::new().expect("an encoder");
    let mut wire = Vec::new();
    // What is short is not compressed.
    let long = data.repeat(1 + 2048 / data.len().max(1));
    for plain in long.chunks(PLAIN_MAX) {
        let mut buffer = BytesMut::zeroed(HEADER_LEN);
        buffer.extend_from_slice(plain);
        wire.extend_from_slice(&encoder.encode(&mut buffer).0);
    }
    assert_eq!(decoded(std::iter::once(&wire[..])), (long, Ok(0)));
}
