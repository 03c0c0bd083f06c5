//! The record layer: plaintext batches in, TLS records out, and back, over no socket of its own.
//!
//! Owns the rustls connection after its handshake. Knows neither sockets nor frames, so that
//! another way of sealing can take its place without the driver noticing.

use std::io::{self, BufRead, IoSlice, Write};

/// A TLS 1.3 connection past its handshake.
pub(crate) struct Record {
    tls: rustls::Connection,
}

impl Record {
    /// Takes over a connection whose handshake is done.
    pub(crate) fn new(mut tls: rustls::Connection) -> Self {
        // The driver seals one bounded batch at a time and only when the one before is gone.
        tls.set_buffer_limit(None);
        Self { tls }
    }

    /// Seals a batch. Slices that add up to 16 KiB become one record without being joined first.
    pub(crate) fn seal(&mut self, batch: &[IoSlice<'_>]) -> io::Result<()> {
        let expected: usize = batch.iter().map(|s| s.len()).sum();
        let sealed = self.tls.writer().write_vectored(batch)?;
        if sealed == expected { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Whether sealed bytes wait for the socket.
    pub(crate) fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Writes sealed bytes with as few calls as the socket allows.
    pub(crate) fn write_to(&mut self, socket: &mut dyn Write) -> io::Result<usize> {
        self.tls.write_tls(socket)
    }

    /// Opens what was received and hands each piece of plaintext to `sink`.
    pub(crate) fn open<E>(
        &mut self,
        mut input: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), OpenError<E>> {
        loop {
            self.drain(&mut sink)?;
            if input.is_empty() {
                return Ok(());
            }
            self.tls.read_tls(&mut input).map_err(OpenError::Io)?;
            self.tls.process_new_packets().map_err(OpenError::Tls)?;
        }
    }

    /// Says that no more plaintext will follow (RFC 8446 §6.1).
    pub(crate) fn close_notify(&mut self) {
        self.tls.send_close_notify();
    }

    fn drain<E>(&mut self, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), OpenError<E>> {
        let mut reader = self.tls.reader();
        loop {
            match reader.fill_buf() {
                Ok([]) => return Err(OpenError::CloseNotify),
                Ok(plain) => {
                    let n = plain.len();
                    sink(plain).map_err(OpenError::Sink)?;
                    reader.consume(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(OpenError::Io(e)),
            }
        }
    }
}

/// Why received bytes could not be opened.
pub(crate) enum OpenError<E> {
    /// The peer ended the TLS connection in order.
    CloseNotify,
    Tls(rustls::Error),
    Io(io::Error),
    /// The consumer of the plaintext refused it.
    Sink(E),
}
