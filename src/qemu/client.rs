//! The handle to a monitor: connect, execute, hand over a descriptor. The socket itself belongs
//! to the task in `connection.rs`, which lives as long as a handle does.

use super::connection::{Answer, Connection, Request, SharedView, Ticket};
use super::error::QmpError;
use super::event_queue::{EventSink, Events, event_queue};
use super::monitor_socket::{Lost, MonitorSocket};
use super::process::Process;
use super::wire::{Outcome, command_line};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// How long [`Qmp::execute`] waits for the reply. QEMU's main loop may stand still for many seconds.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// So many commands wait to be written; further callers wait for a place, under their deadline.
pub const COMMAND_QUEUE_MAX: usize = 64;

/// A QMP command: its arguments are the fields.
pub trait Command: Serialize {
    /// QEMU's name of it.
    const NAME: &'static str;
    /// What QEMU returns. Fields this build does not know are ignored.
    type Return: DeserializeOwned;
}

/// A connection to one monitor of one QEMU. Clones share it; the last one to go closes it.
///
/// A monitor serves one client at a time and keeps the descriptors handed to it, so vmferry
/// needs one for itself. Commands are executed one after the other, in the order of the calls.
///
/// A connection that is lost is made again for as long as the same QEMU may be there: the command
/// under way fails ([`is_interrupted`](QmpError::is_interrupted)), unless it can be repeated: it only asks, or its
/// caller says so ([`execute_until_answered`](Self::execute_until_answered)); later ones wait; the events say that some
/// were missed.
#[derive(Clone, Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    ids: AtomicU64,
    process: Process,
    requests: mpsc::Sender<Request>,
    view: SharedView,
    over: watch::Receiver<Option<Lost>>,
    task: JoinHandle<()>,
}

/// QEMU does not answer at the moment.
#[derive(Debug, Clone)]
pub struct Silence {
    pub since: Instant,
    /// How the connection was lost; none if it is there, and a command waits for its reply.
    pub lost: Option<String>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Qmp {
    /// Connects once, waits for the greeting and enters command mode, all within the deadline.
    /// Must be called in a tokio runtime.
    /// Errors: [`QmpError::Connect`] at once when nobody listens (see
    /// [`is_not_listening`](QmpError::is_not_listening)); [`QmpError::Busy`] when another client holds the
    /// monitor.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<(Self, Events), QmpError> {
        let begun = Instant::now();
        let busy = || QmpError::Busy { path: path.to_owned(), after: deadline };
        let monitor = timeout(deadline, MonitorSocket::connect(path)).await.map_err(|_| busy())??;
        let (sink, events) = event_queue();
        let qmp = Self::start(path, monitor, sink);
        let rest = deadline.saturating_sub(begun.elapsed());
        qmp.round_trip("qmp_capabilities", Value::Null, None, rest).await?;
        Ok((qmp, events))
    }

    fn start(path: &Path, monitor: MonitorSocket, events: EventSink) -> Self {
        let (requests, queue) = mpsc::channel(COMMAND_QUEUE_MAX);
        let (announce, over) = watch::channel(None);
        let (path, view) = (path.to_owned(), SharedView::default());
        let connection = Connection::new(path.clone(), monitor, queue, events, view.clone(), announce);
        let process = connection.process().clone();
        let task = tokio::spawn(connection.run());
        let ids = AtomicU64::new(1);
        Self { shared: Arc::new(Shared { path, ids, process, requests, view, over, task }) }
    }

    /// The socket this is connected to.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Executes a command within [`COMMAND_DEADLINE`].
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Return, QmpError> {
        self.execute_within(command, COMMAND_DEADLINE).await
    }

    /// Executes a command. The deadline covers the wait behind other commands and for the reply.
    /// Dropping the future gives up the reply, not the command, if that has been sent.
    /// Errors: [`QmpError::Command`] when QEMU refuses it; [`QmpError::Deadline`], which tells whether QEMU
    /// may still execute it; the errors of a lost connection; [`QmpError::Reply`].
    pub async fn execute_within<C: Command>(
        &self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Return, QmpError> {
        self.answered(command, deadline, only_asks(C::NAME)).await
    }

    /// The same within [`COMMAND_DEADLINE`], for a command of which a second execution changes nothing: where the
    /// answer was lost with the connection, it is given again. QEMU may refuse the second, because it is done.
    pub async fn execute_until_answered<C: Command>(&self, command: C) -> Result<C::Return, QmpError> {
        self.execute_until_answered_within(command, COMMAND_DEADLINE).await
    }

    /// The same within another deadline.
    pub async fn execute_until_answered_within<C: Command>(
        &self,
        command: C,
        deadline: Duration,
    ) -> Result<C::Return, QmpError> {
        self.answered(command, deadline, true).await
    }

    async fn answered<C: Command>(
        &self,
        command: C,
        deadline: Duration,
        may_repeat: bool,
    ) -> Result<C::Return, QmpError> {
        let name = C::NAME;
        let encoded = serde_json::to_value(&command);
        drop(command);
        let arguments = encoded.map_err(|source| QmpError::Encode { name, source })?;
        let (until, mut was_sent) = (Instant::now() + deadline, false);
        let value = loop {
            let rest = until.saturating_duration_since(Instant::now());
            match self.round_trip(name, arguments.clone(), None, rest).await {
                Err(error) if error.is_interrupted() && may_repeat => was_sent = true,
                Err(QmpError::Deadline { name, sent, .. }) => {
                    return Err(QmpError::Deadline { name, after: deadline, sent: sent || was_sent });
                }
                done => break done?,
            }
        };
        serde_json::from_value(value).map_err(|source| QmpError::Reply { name, source })
    }

    /// Gives QEMU a descriptor under a name, for a later command on this same connection. It
    /// replaces one of the same name. Our side is closed as soon as it is sent, or not sent.
    ///
    /// QEMU makes the open file description non-blocking, which a duplicate kept here shares.
    /// Errors: [`QmpError::FdName`], and those of [`execute_within`](Self::execute_within).
    pub async fn getfd(&self, fdname: &str, fd: OwnedFd) -> Result<(), QmpError> {
        if fdname.starts_with(|first: char| first.is_ascii_digit()) || fdname.is_empty() {
            return Err(QmpError::FdName { fdname: fdname.to_owned() });
        }
        let arguments = json!({ "fdname": fdname });
        self.round_trip("getfd", arguments, Some(fd), COMMAND_DEADLINE).await.map(drop)
    }

    /// The process behind the monitor.
    pub fn process(&self) -> &Process {
        &self.shared.process
    }

    /// For how long QEMU has not answered, if something waits for it.
    pub fn silence(&self) -> Option<Silence> {
        let view = self.shared.view.lock().unwrap_or_else(PoisonError::into_inner);
        match (&view.away, view.asked) {
            (Some((since, lost)), _) => Some(Silence { since: *since, lost: Some(lost.clone()) }),
            (None, Some(since)) => Some(Silence { since, lost: None }),
            (None, None) => None,
        }
    }

    /// Whether the connection is over for good: its process has ended, or cannot be found again.
    pub fn is_closed(&self) -> bool {
        self.shared.over.borrow().is_some() || self.shared.requests.is_closed()
    }

    /// Waits until [`is_closed`](Self::is_closed).
    pub async fn closed(&self) {
        let mut over = self.shared.over.clone();
        // An error means that the task itself is gone, which is the same.
        let _ = over.wait_for(Option::is_some).await;
    }

    /// Why the connection is over, if it is: an error as a command would get it now.
    pub fn failure(&self) -> Option<QmpError> {
        self.is_closed().then(|| self.lost("monitor"))
    }

    async fn round_trip(
        &self,
        name: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let ticket = Ticket::new(fd);
        let _withdrawal = Withdrawal(ticket.clone());
        let exchange = self.exchange(name, arguments, ticket.clone());
        let answer = match timeout(deadline, exchange).await {
            Ok(answer) => answer.ok_or_else(|| self.lost(name))?,
            Err(_) => {
                let sent = ticket.take().is_none();
                return Err(QmpError::Deadline { name, after: deadline, sent });
            }
        };
        match answer {
            Answer::Outcome(Outcome::Return(value)) => Ok(value),
            Answer::Outcome(Outcome::Error { class, desc }) => {
                tracing::debug!(name, class, desc, "QEMU refused a command");
                Err(QmpError::Command { name, class, desc })
            }
            Answer::Unsent(source) => Err(QmpError::Send { name, source }),
            Answer::Lost(cause) => Err(cause.error(name, &self.shared.path)),
        }
    }

    /// `None`: the connection's task ended before it could answer.
    async fn exchange(&self, name: &'static str, arguments: Value, ticket: Ticket) -> Option<Answer> {
        let id = self.shared.ids.fetch_add(1, Ordering::Relaxed);
        tracing::trace!(id, name, %arguments, "to QEMU");
        let line = command_line(name, id, arguments);
        let (reply, answer) = oneshot::channel();
        let request = Request { id, line, ticket, reply };
        self.shared.requests.send(request).await.ok()?;
        answer.await.ok()
    }

    fn lost(&self, name: &'static str) -> QmpError {
        let cause = self.shared.over.borrow().clone();
        cause.unwrap_or(Lost::Closed).error(name, &self.shared.path)
    }
}

/// A caller that is gone takes its command back, if it has not been sent.
struct Withdrawal(Ticket);

impl Drop for Withdrawal {
    fn drop(&mut self) {
        self.0.take();
    }
}

/// Commands that change nothing, and may be repeated, go by QEMU's own custom of naming them.
fn only_asks(name: &str) -> bool {
    name.starts_with("query-")
}
