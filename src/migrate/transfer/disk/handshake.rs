//! A disk's handshake with the destination's NBD server, over the disk's stream and before the stream is pumped.
//!
//! `blockdev-add` leads the handshake of its node in QEMU's main loop, and the guest stands still for as long.
//! So this agent leads it first, while the guest runs, and QEMU is then offered what was agreed on by this agent,
//! over a local socket (`qemu/nbd/offering.rs`). From there on the stream's bytes are QEMU's.

use std::io;

use bytes::{Bytes, BytesMut};

use super::error::HandshakeError;
use crate::net::compress::{Coding, Encoder, HEADER_LEN, PLAIN_MAX};
use crate::net::pump::PumpState;
use crate::net::stream::Stream;
use crate::qemu::{Asking, NbdError, Terms};

/// Agrees with the server at the other end of a stream on how QEMU's client will use an export. How the stream is
/// pumped from there on comes with it. `extended`: that client will ask for extended headers.
///
/// The stream need not be accepted yet: what the server is asked then arrives with it, however long the link's
/// queue is. The server gives its client 10 s.
pub(crate) async fn agree(
    stream: &mut Stream,
    coding: Coding,
    export: &str,
    extended: bool,
) -> Result<(Terms, PumpState), HandshakeError> {
    let mut asking = Asking::new(extended);
    let questions = coded(&coding, &asking.questions(export)?).map_err(NbdError::Io)?;
    let (sent, mut received) = (questions.len() as u64, 0);
    let asked = stream.send.send(questions).await;
    stream.accepted().await.map_err(HandshakeError::Refused)?;
    asked.map_err(HandshakeError::Stream)?;
    loop {
        let Some(chunk) = stream.recv.recv().await.map_err(HandshakeError::Stream)? else {
            return Err(NbdError::Io(io::ErrorKind::UnexpectedEof.into()).into());
        };
        stream.recv.consumed(chunk.len());
        received += chunk.len() as u64;
        if let Some(terms) = asking.take(&chunk)? {
            return Ok((terms, PumpState::new(coding).after(sent, received)));
        }
    }
}

/// As a pump would send it, in one block.
fn coded(coding: &Coding, plain: &[u8]) -> io::Result<Bytes> {
    if !matches!(coding, Coding::Compress) {
        return Ok(Bytes::copy_from_slice(plain));
    }
    if plain.len() > PLAIN_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut block = BytesMut::zeroed(HEADER_LEN);
    block.extend_from_slice(plain);
    Ok(Encoder::new()?.encode(&mut block).0)
}
