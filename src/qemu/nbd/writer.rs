//! The writing client: [`Writing`] on a socket. Each wait can be cancelled, and nothing is lost by it.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{NbdError, Writing};

/// Read from the socket at once: replies of a few bytes each.
const READ_BYTES: usize = 4096;

/// Writes to an export, several requests at a time.
#[derive(Debug)]
pub struct NbdWriter {
    socket: UnixStream,
    protocol: Writing,
}

/// A writer at rest: what one process leaves of it to the next.
#[derive(Debug)]
pub struct LeftWriter {
    pub socket: OwnedFd,
    pub protocol: Writing,
}

impl NbdWriter {
    /// At the beginning of its handshake.
    pub fn new(socket: OwnedFd, export: &str) -> Result<Self, NbdError> {
        Self::go_on(LeftWriter { socket, protocol: Writing::new(export) })
    }

    /// Goes on where another process has stopped.
    pub fn go_on(left: LeftWriter) -> Result<Self, NbdError> {
        let socket = std::os::unix::net::UnixStream::from(left.socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)?, protocol: left.protocol })
    }

    /// Stops where it is, between any two bytes.
    pub fn leave(self) -> Result<LeftWriter, NbdError> {
        let socket = self.socket.into_std()?.into();
        Ok(LeftWriter { socket, protocol: self.protocol })
    }

    /// Shakes hands for a writable export.
    pub async fn connect(socket: OwnedFd, export: &str) -> Result<Self, NbdError> {
        let mut writer = Self::new(socket, export)?;
        writer.ready().await?;
        Ok(writer)
    }

    /// The export's size in bytes, once the handshake is over.
    pub fn size(&self) -> u64 {
        self.protocol.size()
    }

    /// Waits for the end of the handshake.
    pub async fn ready(&mut self) -> Result<(), NbdError> {
        self.until(Writing::is_ready).await
    }

    /// Waits until a write may be begun.
    pub async fn room(&mut self) -> Result<(), NbdError> {
        self.until(Writing::has_room).await
    }

    /// Begins to write data, or, if it is all zeroes, that. The caller has waited for [`room`](Self::room). Whether
    /// it was written is known after [`flush`](Self::flush).
    pub fn begin_write(&mut self, at: u64, data: &[u8]) -> Result<(), NbdError> {
        self.protocol.write(at, data)
    }

    /// Both, for who will not be cancelled.
    pub async fn write(&mut self, at: u64, data: &[u8]) -> Result<(), NbdError> {
        self.room().await?;
        self.begin_write(at, data)
    }

    /// Waits until everything begun has been written, and is on the disk.
    pub async fn flush(&mut self) -> Result<(), NbdError> {
        // Not before: a flush covers only what has been answered when it is sent.
        self.until(Writing::is_settled).await?;
        self.protocol.flush()?;
        self.until(Writing::is_settled).await
    }

    /// Sends and receives until this is so.
    async fn until(&mut self, is_so: impl Fn(&Writing) -> bool) -> Result<(), NbdError> {
        while !is_so(&self.protocol) {
            if !self.protocol.to_send().is_empty() {
                let sent = self.socket.write(self.protocol.to_send()).await?;
                self.protocol.sent(sent);
            } else if !self.protocol.take()? {
                self.receive().await?;
            }
        }
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), NbdError> {
        let received = self.protocol.received();
        received.reserve(READ_BYTES);
        match self.socket.read_buf(received).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            _ => Ok(()),
        }
    }
}
