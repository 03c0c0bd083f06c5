//! Cuts frames out of the byte stream, in whatever pieces that comes. Judges headers only.

use std::ops::Deref;

use bytes::{Bytes, BytesMut};

use super::frame::{FrameError, HEADER_LEN, Header};

/// A frame's payload.
#[derive(Debug)]
pub(super) enum Payload<'a> {
    /// It came in one piece.
    Whole(&'a [u8]),
    /// It was put together from several.
    Joined(Bytes),
}

impl Deref for Payload<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Whole(bytes) => bytes,
            Self::Joined(bytes) => bytes,
        }
    }
}

/// Keeps the frame that has begun to arrive: at most one, whose header was found good.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    /// The beginning of a header.
    head: Vec<u8>,
    header: Option<Header>,
    payload: BytesMut,
}

impl Assembler {
    /// Bytes that are kept.
    pub(super) fn len(&self) -> usize {
        let header = if self.header.is_some() { HEADER_LEN } else { self.head.len() };
        header + self.payload.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The next whole frame, taken from the front of `bytes`; `None` when those are used up.
    /// Errors: what a header announces is not allowed; nothing is kept of its payload.
    pub(super) fn next<'a>(
        &mut self,
        bytes: &mut &'a [u8],
    ) -> Result<Option<(Header, Payload<'a>)>, FrameError> {
        let Some(header) = self.take_header(bytes)? else { return Ok(None) };
        let len = usize::from(header.len);
        if self.payload.is_empty()
            && let Some((whole, rest)) = bytes.split_at_checked(len)
        {
            *bytes = rest;
            return Ok(Some((header, Payload::Whole(whole))));
        }
        if self.payload.is_empty() {
            self.payload.reserve(len);
        }
        let (some, rest) = bytes.split_at(bytes.len().min(len - self.payload.len()));
        self.payload.extend_from_slice(some);
        *bytes = rest;
        if self.payload.len() < len {
            self.header = Some(header);
            return Ok(None);
        }
        let joined = std::mem::take(&mut self.payload).freeze();
        Ok(Some((header, Payload::Joined(joined))))
    }

    fn take_header(&mut self, bytes: &mut &[u8]) -> Result<Option<Header>, FrameError> {
        if let Some(header) = self.header.take() {
            return Ok(Some(header));
        }
        let header = if self.head.is_empty()
            && let Some((head, rest)) = bytes.split_first_chunk()
        {
            *bytes = rest;
            Header::decode(head)
        } else {
            let (some, rest) = bytes.split_at(bytes.len().min(HEADER_LEN - self.head.len()));
            self.head.extend_from_slice(some);
            *bytes = rest;
            let Some(head) = self.head.first_chunk() else { return Ok(None) };
            let header = Header::decode(head);
            self.head.clear();
            header
        };
        header.content()?;
        Ok(Some(header))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::frame::{Kind, PAYLOAD_MAX};
    use super::*;

    fn frames() -> Vec<(Header, Vec<u8>)> {
        let data = |len: usize| {
            let payload: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            (Header::new(Kind::Data, 1, 7).with_len(len), payload)
        };
        vec![data(1), (Header::new(Kind::Fin, 1, 9), Vec::new()), data(PAYLOAD_MAX), data(15), data(17)]
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let wire: Vec<u8> =
            frames().iter().flat_map(|(header, payload)| [&header.encode()[..], payload].concat()).collect();
        for piece in [1, 7, 15, 16, 17, 16 * 1024, 64 * 1024, wire.len()] {
            let mut assembler = Assembler::default();
            let mut out = Vec::new();
            for mut bytes in wire.chunks(piece) {
                while let Some((header, payload)) = assembler.next(&mut bytes).unwrap() {
                    out.push((header, payload.to_vec()));
                }
                assert!(bytes.is_empty());
            }
            assert!(out == frames(), "in pieces of {piece}");
            assert_eq!(assembler.len(), 0);
        }
    }

    #[test]
    fn nothing_is_set_aside_for_a_header_that_is_not_allowed() {
        let mut header = Header::new(Kind::Data, 1, 0).with_len(PAYLOAD_MAX);
        header.len = u16::MAX;
        let mut assembler = Assembler::default();
        assert_eq!(assembler.next(&mut &header.encode()[..]).unwrap_err(), FrameError::Length);
        assert_eq!((assembler.len(), assembler.payload.capacity()), (0, 0));
    }
}
