//! The byte queues of a stream, one for each direction. What is copied and what is shared is
//! decided here. Knows no offsets, no credit.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::assemble::Payload;

/// Shorter chunks are copied, so that they keep no large buffer alive.
const COPY_BELOW: usize = 2 * 1024;
/// Size of a receive slab.
const SLAB_BYTES: usize = 64 * 1024;
/// A payload of at least this length starts a full slab at once.
const SLAB_FROM: usize = 8 * 1024;

/// Bytes that wait to be framed. Large chunks are shared, small ones are joined.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    chunks: VecDeque<Bytes>,
    /// Small chunks after all `chunks`.
    small: BytesMut,
    len: usize,
}

impl SendQueue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, data: Bytes) {
        self.len += data.len();
        if data.len() < COPY_BELOW {
            self.small.extend_from_slice(&data);
            return;
        }
        if !self.small.is_empty() {
            self.chunks.push_back(self.small.split().freeze());
        }
        self.chunks.push_back(data);
    }

    /// Up to `most` bytes from the front, without joining chunks.
    pub(super) fn take(&mut self, most: usize) -> Bytes {
        let Some(front) = self.chunks.front_mut() else {
            let taken = self.small.split_to(most.min(self.small.len())).freeze();
            self.len -= taken.len();
            return taken;
        };
        let taken = front.split_to(most.min(front.len()));
        if front.is_empty() {
            self.chunks.pop_front();
        }
        self.len -= taken.len();
        taken
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// All of it, in order.
    pub(super) fn into_chunks(self) -> impl Iterator<Item = Bytes> {
        let small = Some(self.small.freeze()).filter(|small| !small.is_empty());
        self.chunks.into_iter().chain(small)
    }
}

/// Bytes that were received and wait for the local side, in slabs, so that it gets large chunks.
#[derive(Debug, Default)]
pub(super) struct RecvQueue {
    full: VecDeque<Bytes>,
    slab: BytesMut,
    len: usize,
}

impl RecvQueue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes a frame's payload. One that was put together keeps its memory, others are copied: so
    /// there is one copy between the record layer and the local socket.
    pub(super) fn push(&mut self, payload: Payload<'_>) {
        self.len += payload.len();
        match payload {
            Payload::Joined(whole) if whole.len() >= SLAB_FROM => {
                self.end_slab();
                self.full.push_back(whole);
            }
            other => self.copy(&other),
        }
    }

    fn copy(&mut self, payload: &[u8]) {
        if self.slab.capacity() - self.slab.len() < payload.len() {
            self.next_slab(payload.len());
        }
        self.slab.extend_from_slice(payload);
    }

    /// What is in the slab comes before what follows.
    fn end_slab(&mut self) {
        if !self.slab.is_empty() {
            self.full.push_back(self.slab.split().freeze());
        }
    }

    /// Slabs begin small and double while a backlog grows, so that a quiet stream holds little.
    fn next_slab(&mut self, least: usize) {
        let before = if self.slab.is_empty() { 0 } else { self.slab.capacity() };
        self.end_slab();
        let wanted = if least >= SLAB_FROM { SLAB_BYTES } else { (2 * before).clamp(COPY_BELOW, SLAB_BYTES) };
        self.slab = BytesMut::with_capacity(wanted.max(least));
    }

    /// The next chunk.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let chunk = match self.full.pop_front() {
            Some(chunk) => chunk,
            None if self.slab.is_empty() => return None,
            None if self.slab.len() < COPY_BELOW => {
                let copy = Bytes::copy_from_slice(&self.slab);
                self.slab.clear();
                copy
            }
            None => self.slab.split().freeze(),
        };
        self.len -= chunk.len();
        Some(chunk)
    }

    /// All of it, in order.
    pub(super) fn into_chunks(self) -> impl Iterator<Item = Bytes> {
        let slab = Some(self.slab.freeze()).filter(|slab| !slab.is_empty());
        self.full.into_iter().chain(slab)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
