//! What a pump has received and not written to its local socket yet: decompressed where that was agreed on,
//! and in pieces that may be written in one call.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes};

use super::compress::{Coding, DecodeError, Decoder, Undelivered};
use super::nbd_requests::NbdRequests;
use super::stream::RecvHalf;

/// Received chunks written to a local socket in one call.
pub(super) const WRITE_CHUNKS: usize = 16;

/// What was received and is not delivered.
pub(super) struct Inbox {
    queue: VecDeque<Bytes>,
    decoder: Option<Decoder>,
    /// Of a client of an NBD server.
    requests: Option<NbdRequests>,
}

impl Inbox {
    pub(super) fn new(coding: &Coding, requests: Option<NbdRequests>) -> io::Result<Self> {
        let (queue, decoder) = match coding {
            Coding::Decompress(undelivered) => {
                let queue = undelivered.plain.iter().cloned().collect();
                (queue, Some(Decoder::new(&undelivered.partial)?))
            }
            Coding::Plain | Coding::Compress => (VecDeque::with_capacity(WRITE_CHUNKS), None),
        };
        Ok(Self { queue, decoder, requests })
    }

    /// Takes what was received.
    pub(super) fn push(&mut self, chunk: Bytes) {
        match &mut self.decoder {
            None => self.queue.push_back(chunk),
            Some(decoder) => decoder.push(&chunk),
        }
    }

    /// Fills the queue from what is there already, until something may be written or nothing is left.
    pub(super) fn fill(&mut self, recv: &mut RecvHalf) -> Result<(), DecodeError> {
        loop {
            let is_waiting = self.writable() == 0;
            if is_waiting && self.queue.len() > 1 {
                // Less than a header.
                self.queue = VecDeque::from([self.queue.iter().flatten().copied().collect()]);
            }
            match &mut self.decoder {
                None => {
                    while self.queue.len() < WRITE_CHUNKS {
                        let Some(next) = recv.try_recv() else { break };
                        self.queue.push_back(next);
                    }
                    return Ok(());
                }
                // One at a time: a short block may become long, and what waits must be bounded.
                Some(decoder) if is_waiting => {
                    let Some((plain, length)) = decoder.next_block()? else { return Ok(()) };
                    recv.consumed(length);
                    self.queue.push_back(plain);
                }
                Some(_) => return Ok(()),
            }
        }
    }

    /// So much of the queue has been delivered.
    pub(super) fn delivered(&mut self, written: usize, recv: &RecvHalf) {
        if self.decoder.is_none() {
            recv.consumed(written);
        }
        if let Some(requests) = &mut self.requests {
            requests.written(&self.queue, written);
        }
        discard(&mut self.queue, written);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many bytes may be written in one call; 0: not before more has come.
    fn writable(&self) -> usize {
        match &self.requests {
            None => self.queue.iter().map(Bytes::len).sum(),
            Some(requests) => requests.writable(&self.queue),
        }
    }

    /// What may be written in one call; nothing: not before more has come.
    pub(super) fn next_write<'a>(&'a self, slices: &mut [IoSlice<'a>; WRITE_CHUNKS]) -> usize {
        let (mut left, mut used) = (self.writable(), 0);
        for (slice, chunk) in slices.iter_mut().zip(&self.queue) {
            if left == 0 {
                break;
            }
            let chunk = &chunk[..chunk.len().min(left)];
            *slice = IoSlice::new(chunk);
            left -= chunk.len();
            used += 1;
        }
        used
    }

    /// Nothing more comes: what waits for the rest of a header is written as it is.
    pub(super) fn release(&mut self) {
        self.requests = None;
    }

    /// The peer has sent all.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        let is_whole = self.decoder.as_ref().is_none_or(|decoder| decoder.partial().is_empty());
        if is_whole { Ok(()) } else { Err(DecodeError::Truncated) }
    }

    /// Of a plain stream what has not been consumed, of blocks what has not been delivered; and where it is
    /// among the requests.
    pub(super) fn into_rest(self) -> (Vec<Bytes>, Undelivered, Option<NbdRequests>) {
        match self.decoder {
            None => (self.queue.into(), Undelivered::default(), self.requests),
            Some(decoder) => {
                let partial = Bytes::copy_from_slice(decoder.partial());
                (Vec::new(), Undelivered { plain: self.queue.into(), partial }, self.requests)
            }
        }
    }
}

fn discard(queue: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(front) = queue.front_mut() {
        if front.len() > written {
            front.advance(written);
            return;
        }
        written -= front.len();
        queue.pop_front();
    }
}
