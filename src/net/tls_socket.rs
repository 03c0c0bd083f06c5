//! One connection's socket with its record layer, as the driver uses them. Batches in, plaintext out;
//! never waits but where it says so. Knows no session.

use std::io::{self, IoSlice};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::connection::{Connection, ConnectionInfo};
use super::link::EndCause;
use super::record::{OpenError, Record};
use crate::mux::{Batch, SessionError};

/// A connection at work, on the runtime that it was adopted on.
pub(super) struct TlsSocket {
    tcp: TcpStream,
    record: Record,
    /// A read filled the buffer: there is probably more.
    read_more: bool,
}

/// What a wait came back with.
pub(super) enum Ready {
    /// So many bytes were received.
    Received(usize),
    Writable,
}

impl TlsSocket {
    pub(super) fn adopt(connection: Connection) -> io::Result<(Self, ConnectionInfo)> {
        let Connection { tcp, record, info } = connection;
        Ok((Self { tcp: TcpStream::from_std(tcp)?, record, read_more: false }, info))
    }

    /// Whether a further read would probably not wait.
    pub(super) fn has_more(&self) -> bool {
        self.read_more
    }

    /// Reads into `input`, or waits until what is sealed can be written, whichever is first.
    /// Cancelling loses nothing.
    pub(super) async fn ready(&mut self, input: &mut [u8]) -> Result<Ready, EndCause> {
        let wants_write = self.record.wants_write();
        let (mut reader, writer) = self.tcp.split();
        tokio::select! {
            biased;
            read = reader.read(input) => match read.map_err(EndCause::Io)? {
                0 => Err(EndCause::PeerClosed),
                n => {
                    self.read_more = n == input.len();
                    Ok(Ready::Received(n))
                }
            },
            ready = writer.writable(), if wants_write => {
                ready.map_err(EndCause::Io)?;
                Ok(Ready::Writable)
            }
        }
    }

    /// Forgets that there was probably more to read.
    pub(super) fn rested(&mut self) {
        self.read_more = false;
    }

    /// Opens what was received; each piece of plaintext goes to `sink`.
    pub(super) fn open(
        &mut self,
        input: &[u8],
        sink: impl FnMut(&[u8]) -> Result<(), SessionError>,
    ) -> Result<(), EndCause> {
        self.record.open(input, sink).map_err(|e| match e {
            OpenError::CloseNotify => EndCause::PeerClosed,
            OpenError::Tls(e) => EndCause::Tls(e),
            OpenError::Io(e) => EndCause::Io(e),
            OpenError::Sink(e) => EndCause::Session(e),
        })
    }

    /// Seals a batch; the one before must have left.
    pub(super) fn seal(&mut self, batch: &Batch) -> Result<(), EndCause> {
        let slices: Vec<IoSlice<'_>> = batch.io_slices().collect();
        self.record.seal(&slices).map_err(EndCause::Io)
    }

    /// Writes what is sealed; whether nothing of it is left.
    pub(super) fn flush(&mut self) -> Result<bool, EndCause> {
        while self.record.wants_write() {
            match self.record.write_to(&mut Unwaiting(&self.tcp)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(EndCause::Io(e)),
            }
        }
        Ok(true)
    }

    /// Sends what `fill` still has to say, lets the peer read it and waits for its end, so that
    /// nothing that was sent is lost to a reset by the kernel (WIRE R13).
    pub(super) async fn close(mut self, within: Duration, fill: impl FnMut(&mut Batch) -> bool) {
        let _ = tokio::time::timeout(within, self.say_goodbye(fill)).await;
    }

    async fn say_goodbye(&mut self, mut fill: impl FnMut(&mut Batch) -> bool) -> Result<(), EndCause> {
        let mut batch = Batch::default();
        while self.flushed().await? && fill(&mut batch) {
            self.seal(&batch)?;
        }
        self.record.close_notify();
        self.flushed().await?;
        socket2::SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Write).map_err(EndCause::Io)?;
        let mut rest = [0; 4096];
        while self.tcp.read(&mut rest).await.map_err(EndCause::Io)? > 0 {}
        Ok(())
    }

    /// Waits until all that is sealed has left; always true.
    async fn flushed(&mut self) -> Result<bool, EndCause> {
        while !self.flush()? {
            self.tcp.writable().await.map_err(EndCause::Io)?;
        }
        Ok(true)
    }
}

/// The socket as rustls wants to write to it: vectored, never waiting.
struct Unwaiting<'a>(&'a TcpStream);

impl io::Write for Unwaiting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
