//! A monitor's socket: connecting until QEMU greets, whole messages in, bytes out, and why it was
//! lost. Knows no command.

use super::error::QmpError;
use super::process::Process;
use super::wire::{LINE_MAX_BYTES, LineBuffer, Message};
use nix::sys::socket::{Shutdown, shutdown};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use tokio::net::UnixStream;

/// So much is read from the socket at once.
const READ_BYTES: usize = 64 << 10;

/// Why a connection was lost, or is over.
#[derive(Debug, Clone)]
pub(super) enum Lost {
    /// The other end was closed.
    Closed,
    Io(Arc<io::Error>),
    Garbage(Arc<serde_json::Error>),
    LineTooLong,
    /// Over: the process of this number has ended.
    Ended(i32),
    /// Over: nobody listens, and nothing is known of the process.
    Vanished,
    /// Over: another process listens at the monitor's socket.
    Replaced,
}

impl Lost {
    pub(super) fn io(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }

    /// What the caller of command `name` is told.
    pub(super) fn error(self, name: &'static str, path: &Path) -> QmpError {
        let path = path.to_owned();
        match self {
            Self::Closed => QmpError::Disconnected { name, path, source: None },
            Self::Io(error) => QmpError::Disconnected { name, path, source: Some(error) },
            Self::Garbage(source) => QmpError::Malformed { name, path, source },
            Self::LineTooLong => QmpError::LineTooLong { name, path, limit: LINE_MAX_BYTES },
            Self::Ended(pid) => QmpError::Ended { name, path, pid },
            Self::Vanished => QmpError::Vanished { name, path },
            Self::Replaced => QmpError::Replaced { name, path },
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Closed => "its monitor was closed".into(),
            Self::Io(error) => format!("its monitor was lost: {error}"),
            Self::Garbage(error) => format!("its monitor sent something that is not QMP: {error}"),
            Self::LineTooLong => format!("its monitor sent a line of more than {LINE_MAX_BYTES} bytes"),
            Self::Ended(pid) => format!("its process {pid} has ended"),
            Self::Vanished => "nobody listens at its monitor any more".into(),
            Self::Replaced => "another process listens at its monitor".into(),
        }
    }
}

/// A socket, and what has come from it and is not taken yet.
pub(super) struct MonitorSocket {
    pub(super) socket: UnixStream,
    lines: LineBuffer,
    chunk: Box<[u8]>,
}

impl MonitorSocket {
    /// Connects and waits for the greeting.
    pub(super) async fn connect(path: &Path) -> Result<Self, QmpError> {
        let fail = |source| QmpError::Connect { path: path.to_owned(), source };
        let socket = match UnixStream::connect(path).await {
            // The monitor's backlog is full of clients that wait for their turn, as we would.
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::future::pending().await,
            other => other.map_err(fail)?,
        };
        let mut monitor = Self::new(socket);
        let reason = match monitor.first_message().await {
            Ok(Message::Greeting) => return Ok(monitor),
            Ok(_) => "its first message is another one",
            Err(Lost::Closed) => "it closed the connection",
            Err(Lost::LineTooLong) => "its first line is too long",
            Err(Lost::Garbage(_)) => "its first line is not JSON",
            Err(_) => "reading from it failed",
        };
        Err(QmpError::Greeting { path: path.to_owned(), reason: reason.to_owned() })
    }

    fn new(socket: UnixStream) -> Self {
        let chunk = vec![0; READ_BYTES].into_boxed_slice();
        Self { socket, lines: LineBuffer::default(), chunk }
    }

    /// The first message. Nothing else may be using the socket yet.
    pub(super) async fn first_message(&mut self) -> Result<Message, Lost> {
        loop {
            if let Some((message, _)) = self.next_message()? {
                return Ok(message);
            }
            self.socket.readable().await.map_err(Lost::io)?;
            self.read()?;
        }
    }

    /// The next message that has come whole, with its length in bytes.
    pub(super) fn next_message(&mut self) -> Result<Option<(Message, usize)>, Lost> {
        let Some(line) = self.lines.next_line() else { return Ok(None) };
        Ok(Some((parse(&line)?, line.len())))
    }

    /// Who listens at the other end.
    pub(super) fn process(&self) -> Process {
        Process::behind(&self.socket)
    }

    /// Lets QEMU have another client: its monitor serves one at a time.
    pub(super) fn hang_up(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Sends a line that has no descriptor. Nothing else may be using the socket yet.
    pub(super) async fn send(&mut self, line: &[u8]) -> Result<(), Lost> {
        let mut rest = line;
        while !rest.is_empty() {
            self.socket.writable().await.map_err(Lost::io)?;
            match self.socket.try_write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(Lost::io(error)),
            }
        }
        Ok(())
    }

    /// Reads once. `false`: there was nothing to read.
    pub(super) fn read(&mut self) -> Result<bool, Lost> {
        match self.socket.try_read(&mut self.chunk) {
            Ok(0) => Err(Lost::Closed),
            Ok(count) => {
                let pushed = self.lines.push(&self.chunk[..count]);
                pushed.map_err(|_| Lost::LineTooLong).map(|()| true)
            }
            Err(error) if is_passing(&error) => Ok(false),
            Err(error) => Err(Lost::io(error)),
        }
    }
}

pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn parse(line: &[u8]) -> Result<Message, Lost> {
    Message::parse(line).map_err(|error| {
        tracing::warn!(%error, bytes = line.len(), "a line from the monitor is not QMP");
        Lost::Garbage(Arc::new(error))
    })
}
