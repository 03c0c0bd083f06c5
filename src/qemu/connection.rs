//! The one task that owns a monitor's socket: it writes commands one at a time, gives each
//! answer to who asked, and puts events into their queue. Reading never waits for writing.
//!
//! ```text
//! connected ── closed, error, garbage, a line too long ──► away ── greeted again ──► connected
//!                                                          │ the process has ended
//!                                                          │ another process listens there
//!                                                          ▼ nobody listens, nothing is known of the process
//!                                                         over
//! ```
//! A lost connection is a lost view and no more, so it is made again (`reconnect.rs`) for as long as
//! somebody holds a handle. The command under way fails, those behind it wait, and the events say
//! that some may be missing. QEMU keeps the descriptors it was given with the monitor, not with the
//! connection.
//!
//! One command is under way at a time. QEMU works through them one by one anyway, and so a
//! command whose caller has given up waiting behind a stuck one is never sent at all. It also
//! keeps two descriptors from being in the socket together: QEMU's character device holds only
//! the ones of its last read.

use super::event_queue::EventSink;
use super::monitor_socket::{Lost, MonitorSocket, is_passing};
use super::process::Process;
use super::reconnect;
use super::wire::{Message, Outcome};
use backon::BackoffBuilder;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

/// A process that ends closes its sockets a moment before its end can be seen.
const END_SHOWS_WITHIN: Duration = Duration::from_millis(500);

/// Since when QEMU has not answered, for who waits for it.
#[derive(Debug, Default)]
pub(super) struct View {
    /// When the command under way was sent.
    pub(super) asked: Option<Instant>,
    /// Since when there has been no connection, and how it was lost.
    pub(super) away: Option<(Instant, String)>,
}

/// A [`View`] that is shared with the handles.
pub(super) type SharedView = Arc<Mutex<View>>;

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

/// The state of the task.
pub(super) struct Connection {
    path: PathBuf,
    process: Process,
    monitor: MonitorSocket,
    requests: mpsc::Receiver<Request>,
    under_way: Option<UnderWay>,
    events: EventSink,
    view: SharedView,
    over: watch::Sender<Option<Lost>>,
}

impl Connection {
    pub(super) fn new(
        path: PathBuf,
        monitor: MonitorSocket,
        requests: mpsc::Receiver<Request>,
        events: EventSink,
        view: SharedView,
        over: watch::Sender<Option<Lost>>,
    ) -> Self {
        let process = monitor.process();
        Self { path, process, monitor, requests, under_way: None, events, view, over }
    }

    /// Who is at the other end.
    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// Runs until the connection is over; then everybody who waits is told why. A handle that is
    /// dropped as the last one ends it before.
    pub(super) async fn run(mut self) {
        let cause = self.serve().await;
        tracing::debug!(?cause, monitor = %self.path.display(), "a monitor's connection is over");
        self.over.send_replace(Some(cause.clone()));
        self.requests.close();
        self.fail_under_way(&cause);
        while let Some(request) = self.requests.recv().await {
            let _ = request.reply.send(Answer::Lost(cause.clone()));
        }
    }

    /// Serves one connection after the other; why there can be no further one.
    async fn serve(&mut self) -> Lost {
        let mut waits = reconnect::WAITS.build();
        loop {
            let connected = Instant::now();
            let cause = self.serve_one().await;
            self.monitor.hang_up();
            if self.requests.is_closed() {
                return cause;
            }
            if let Some(over) = self.has_ended().await {
                return over;
            }
            self.fail_under_way(&cause);
            let since = Instant::now();
            self.look(|view| view.away = Some((since, cause.text())));
            tracing::warn!(
                monitor = %self.path.display(), process = ?self.process.pid(), cause = cause.text(),
                "the connection to QEMU's monitor was lost: connecting again"
            );
            if connected.elapsed() >= reconnect::GOOD_AFTER {
                waits = reconnect::WAITS.build();
            }
            match reconnect::reconnect(&self.path, &self.process, &mut waits).await {
                Ok(monitor) => self.monitor = monitor,
                Err(over) => return over,
            }
            let seconds = since.elapsed().as_secs();
            tracing::warn!(monitor = %self.path.display(), seconds, "QEMU's monitor answers again");
            self.events.missed();
            self.look(|view| view.away = None);
        }
    }

    /// The proof that QEMU is gone, where there is one.
    async fn has_ended(&self) -> Option<Lost> {
        let pid = self.process.pid()?;
        let ended = timeout(END_SHOWS_WITHIN, self.process.ended()).await;
        ended.ok().map(|()| Lost::Ended(pid))
    }

    fn fail_under_way(&mut self, cause: &Lost) {
        self.look(|view| view.asked = None);
        if let Some(current) = self.under_way.take() {
            let _ = current.request.reply.send(Answer::Lost(cause.clone()));
        }
    }

    fn look(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
    }

    async fn serve_one(&mut self) -> Lost {
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
        let socket = &self.monitor.socket;
        tokio::select! {
            ready = socket.readable() => {
                ready.map_err(Lost::io)?;
                self.monitor.read().map(drop)
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
            self.look(|view| view.asked = Some(Instant::now()));
        }
    }

    fn write(&mut self) -> Result<(), Lost> {
        let Some(mut current) = self.under_way.take() else {
            return Ok(());
        };
        match current.write(&self.monitor.socket) {
            Err(error) if is_passing(&error) => {}
            Err(error) if current.written > 0 || is_broken(&error) => {
                self.under_way = Some(current);
                return Err(self.last_words(error));
            }
            Err(error) => {
                self.look(|view| view.asked = None);
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
            match self.monitor.read().and_then(|more| self.handle_lines().map(|()| more)) {
                Ok(true) => {}
                Ok(false) => return Lost::io(error),
                Err(cause) => return cause,
            }
        }
    }

    fn handle_lines(&mut self) -> Result<(), Lost> {
        while let Some((message, bytes)) = self.monitor.next_message()? {
            match message {
                Message::Event(event) => self.events.put(event, bytes),
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
                self.look(|view| view.asked = None);
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
