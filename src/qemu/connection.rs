//! The one task that owns a monitor's socket: it writes commands one at a time, gives each
//! answer to who asked, and puts events into their queue. Reading never waits for writing.
//!
//! One command is under way at a time. QEMU works through them one by one anyway, and so a
//! command whose caller has given up waiting behind a stuck one is never sent at all. It also
//! keeps two descriptors from being in the socket together: QEMU's character device holds only
//! the ones of its last read.

use super::error::QmpError;
use super::event::EventSink;
use super::wire::{LINE_MAX_BYTES, LineBuffer, Message, Outcome};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

/// So much is read from the socket at once.
const READ_BYTES: usize = 64 << 10;

/// Why a connection is over.
#[derive(Debug, Clone)]
pub(super) enum Lost {
    /// QEMU has closed its end.
    Closed,
    Io(Arc<io::Error>),
    Garbage(Arc<serde_json::Error>),
    LineTooLong,
    EventOverflow,
}

impl Lost {
    fn io(error: io::Error) -> Self {
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
            Self::EventOverflow => QmpError::EventOverflow { name, path },
        }
    }
}

/// Who comes first decides whether a command is sent: the connection that begins to write it,
/// or its caller who gives up. It holds the descriptor, so that giving up closes that at once.
#[derive(Clone)]
pub(super) struct Ticket(Arc<Mutex<Stage>>);

enum Stage {
    Waiting(Option<OwnedFd>),
    Taken,
}

impl Ticket {
    pub(super) fn new(fd: Option<OwnedFd>) -> Self {
        Self(Arc::new(Mutex::new(Stage::Waiting(fd))))
    }

    /// The descriptor, if there is one, for the first caller on any clone; `None` for the rest.
    pub(super) fn take(&self) -> Option<Option<OwnedFd>> {
        let mut stage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *stage, Stage::Taken) {
            Stage::Waiting(fd) => Some(fd),
            Stage::Taken => None,
        }
    }
}

/// What becomes of a command.
pub(super) enum Answer {
    Outcome(Outcome),
    /// The kernel refused to send it.
    Unsent(io::Error),
    Lost(Lost),
}

/// A command on its way to QEMU.
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) line: Vec<u8>,
    pub(super) ticket: Ticket,
    pub(super) reply: oneshot::Sender<Answer>,
}

/// The command under way: first written, then waited for.
struct UnderWay {
    request: Request,
    fd: Option<OwnedFd>,
    written: usize,
}

impl UnderWay {
    fn is_unwritten(&self) -> bool {
        self.written < self.request.line.len()
    }

    /// Writes what the socket takes. The descriptor goes with the first byte and is closed here.
    fn write(&mut self, socket: &UnixStream) -> io::Result<()> {
        let rest = [IoSlice::new(&self.request.line[self.written..])];
        let raw = self.fd.as_ref().map(|fd| [fd.as_raw_fd()]);
        let rights = raw.as_ref().map(|fds| ControlMessage::ScmRights(fds));
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = socket.try_io(Interest::WRITABLE, || {
            sendmsg::<()>(socket.as_raw_fd(), &rest, rights.as_slice(), flags, None).map_err(io::Error::from)
        })?;
        self.written += sent;
        self.fd = None;
        Ok(())
    }
}

/// A socket and the lines that have come from it.
pub(super) struct Link {
    socket: UnixStream,
    lines: LineBuffer,
    chunk: Box<[u8]>,
}

impl Link {
    pub(super) fn new(socket: UnixStream) -> Self {
        let chunk = vec![0; READ_BYTES].into_boxed_slice();
        Self { socket, lines: LineBuffer::default(), chunk }
    }

    /// The first message. Nothing else may be using the link yet.
    pub(super) async fn first_message(&mut self) -> Result<Message, Lost> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return parse(&line);
            }
            self.socket.readable().await.map_err(Lost::io)?;
            self.read()?;
        }
    }

    /// Reads once. `false`: there was nothing to read.
    fn read(&mut self) -> Result<bool, Lost> {
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

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn parse(line: &[u8]) -> Result<Message, Lost> {
    Message::parse(line).map_err(|error| {
        tracing::warn!(%error, bytes = line.len(), "a line from the monitor is not QMP");
        Lost::Garbage(Arc::new(error))
    })
}

/// The state of the task.
pub(super) struct Connection {
    link: Link,
    requests: mpsc::Receiver<Request>,
    under_way: Option<UnderWay>,
    events: EventSink,
    lost: watch::Sender<Option<Lost>>,
}

impl Connection {
    pub(super) fn new(
        link: Link,
        requests: mpsc::Receiver<Request>,
        events: EventSink,
        lost: watch::Sender<Option<Lost>>,
    ) -> Self {
        Self { link, requests, under_way: None, events, lost }
    }

    /// Runs until the connection is over; then everybody who waits is told why.
    pub(super) async fn run(mut self) {
        let cause = self.serve().await;
        tracing::debug!(?cause, "a monitor's connection is over");
        self.lost.send_replace(Some(cause.clone()));
        self.requests.close();
        if let Some(current) = self.under_way.take() {
            let _ = current.request.reply.send(Answer::Lost(cause.clone()));
        }
        while let Some(request) = self.requests.recv().await {
            let _ = request.reply.send(Answer::Lost(cause.clone()));
        }
    }

    async fn serve(&mut self) -> Lost {
        loop {
            if let Err(cause) = self.step().await {
                return cause;
            }
        }
    }

    /// Waits for the first thing that can be done, and does it.
    async fn step(&mut self) -> Result<(), Lost> {
        self.handle_lines()?;
        let idle = self.under_way.is_none();
        let writing = self.under_way.as_ref().is_some_and(UnderWay::is_unwritten);
        let socket = &self.link.socket;
        tokio::select! {
            ready = socket.readable() => {
                ready.map_err(Lost::io)?;
                self.link.read().map(drop)
            }
            ready = socket.writable(), if writing => {
                ready.map_err(Lost::io)?;
                self.write()
            }
            request = self.requests.recv(), if idle => match request {
                Some(request) => { self.admit(request); Ok(()) }
                None => Err(Lost::Closed),
            },
        }
    }

    fn admit(&mut self, request: Request) {
        if let Some(fd) = request.ticket.take() {
            self.under_way = Some(UnderWay { request, fd, written: 0 });
        }
    }

    fn write(&mut self) -> Result<(), Lost> {
        let Some(mut current) = self.under_way.take() else {
            return Ok(());
        };
        match current.write(&self.link.socket) {
            Err(error) if is_passing(&error) => {}
            Err(error) if current.written > 0 || is_broken(&error) => {
                self.under_way = Some(current);
                return Err(self.last_words(error));
            }
            Err(error) => {
                let _ = current.request.reply.send(Answer::Unsent(error));
                return Ok(());
            }
            Ok(()) => {}
        }
        self.under_way = Some(current);
        Ok(())
    }

    /// QEMU reads no more, but may have said something before it went: that is still taken.
    fn last_words(&mut self, error: io::Error) -> Lost {
        loop {
            match self.link.read().and_then(|more| self.handle_lines().map(|()| more)) {
                Ok(true) => {}
                Ok(false) => return Lost::io(error),
                Err(cause) => return cause,
            }
        }
    }

    fn handle_lines(&mut self) -> Result<(), Lost> {
        while let Some(line) = self.link.lines.next_line() {
            match parse(&line)? {
                Message::Event(event) => {
                    let put = self.events.put(event, line.len());
                    put.map_err(|_| Lost::EventOverflow)?;
                }
                Message::Reply { id, outcome } => self.on_reply(id, outcome),
                Message::Greeting | Message::Unknown => {
                    tracing::warn!("the monitor sent a message of an unknown kind");
                }
            }
        }
        Ok(())
    }

    /// An error without an id is QEMU's way to say that it could not read the command, so it
    /// answers the one under way.
    fn on_reply(&mut self, id: Option<u64>, outcome: Outcome) {
        let nameless_error = id.is_none() && matches!(outcome, Outcome::Error { .. });
        match self.under_way.take() {
            Some(current) if id == Some(current.request.id) || nameless_error => {
                let _ = current.request.reply.send(Answer::Outcome(outcome));
            }
            other => {
                tracing::warn!(?id, "the monitor sent a reply that nobody waits for");
                self.under_way = other;
            }
        }
    }
}

fn is_broken(error: &io::Error) -> bool {
    let codes = [Errno::EPIPE, Errno::ECONNRESET, Errno::ENOTCONN];
    codes.iter().any(|code| error.raw_os_error() == Some(*code as i32))
}
