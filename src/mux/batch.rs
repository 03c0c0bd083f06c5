//! A batch: the frames that leave together in one vectored write. Knows their lengths only.

use std::io::IoSlice;

use bytes::Bytes;

use super::frame::{FRAME_LEN_MAX, HEADER_LEN, Header, RECORD_LEN};

/// One frame, as it goes out.
#[derive(Debug, Clone)]
pub struct Part {
    pub header: [u8; HEADER_LEN],
    /// Its payload, perhaps empty; shared with the replay log.
    pub payload: Bytes,
}

/// Frames for one write. Reused: [`Session::poll_transmit`](super::Session::poll_transmit) clears
/// it, and its memory stays.
#[derive(Debug, Default)]
pub struct Batch {
    parts: Vec<Part>,
    len: usize,
}

impl Batch {
    /// The frames.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Bytes on the wire.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The bytes, in order, for a vectored write.
    pub fn io_slices(&self) -> impl Iterator<Item = IoSlice<'_>> {
        self.parts
            .iter()
            .flat_map(|part| [&part.header[..], &part.payload[..]])
            .filter(|slice| !slice.is_empty())
            .map(IoSlice::new)
    }

    pub(super) fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    pub(super) fn push(&mut self, header: &Header, payload: Bytes) {
        debug_assert_eq!(usize::from(header.len), payload.len());
        self.len += HEADER_LEN + payload.len();
        self.parts.push(Part { header: header.encode(), payload });
    }

    /// Whether no further DATA frame is to be asked for.
    pub(super) fn is_full(&self, limit: usize) -> bool {
        self.data_room(RECORD_LEN, limit).is_none()
    }

    /// Payload bytes of a DATA frame that ends with a record, at most `frame` bytes after the last
    /// one's end and within `limit` bytes of batch; `None` ends the batch.
    pub(super) fn data_room(&self, frame: usize, limit: usize) -> Option<usize> {
        debug_assert!(frame.is_multiple_of(RECORD_LEN) && frame <= FRAME_LEN_MAX);
        let to_record_end = frame - self.len % RECORD_LEN;
        let room = to_record_end.min(limit.saturating_sub(self.len));
        room.checked_sub(HEADER_LEN).filter(|room| *room > 0)
    }

    /// Whether a frame of this payload length still fits, at whatever place.
    pub(super) fn fits(&self, payload_len: usize, limit: usize) -> bool {
        self.len + HEADER_LEN + payload_len <= limit
    }
}
