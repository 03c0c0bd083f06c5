//! Bytes read as a script: small numbers and pieces, one after the other. What is missing is zero.

use std::time::Duration;

pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// Mostly small, and now and then any number of 64 bits.
    pub(crate) fn number(&mut self) -> u64 {
        match self.byte() {
            0xff => (0..8).fold(0, |n, _| n << 8 | u64::from(self.byte())),
            0xfe => u64::from(self.u16()),
            small => u64::from(small),
        }
    }

    pub(crate) fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        piece
    }

    pub(crate) fn time(&mut self) -> Duration {
        Duration::from_millis(u64::from(self.u16()))
    }
}

/// The bytes in pieces: of one byte each, or of lengths that depend on what they are.
pub(crate) fn pieces(bytes: &[u8], single: bool) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let most = if single { 1 } else { 1 + usize::from(first) % 61 };
        let (piece, more) = rest.split_at(most.min(rest.len()));
        rest = more;
        Some(piece)
    })
}
