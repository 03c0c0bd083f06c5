//! QEMU's events as types, and the bounded queue they wait in. Knows nothing of commands.

use super::states::{JobStatus, MigrationStatus};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;

/// So many events wait for [`Events::recv`]; one more ends the connection.
pub const EVENT_QUEUE_MAX: usize = 8192;

/// The events that wait together came in so many bytes; more ends the connection.
pub const EVENT_QUEUE_BYTES_MAX: usize = 8 << 20;

/// When QEMU says that something happened: its host's wall clock, for people only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970; -1 when QEMU could not tell.
    pub seconds: i64,
    /// Microseconds within the second; -1 when QEMU could not tell.
    pub microseconds: i64,
}

/// Something QEMU reports by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QEMU's name of it, such as `BLOCK_JOB_READY`.
    pub name: String,
    /// What it means, if this build knows.
    pub kind: EventKind,
    /// Everything that came with it.
    pub data: Value,
    /// When.
    pub timestamp: Timestamp,
}

/// The events vmferry understands. Fields are QEMU's; `device` of a block job is its job id.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are QEMU's own and documented there")]
pub enum EventKind {
    /// The mirror has copied everything once. It says nothing about how far behind it is now.
    BlockJobReady { device: String },
    /// The job is over. `error` alone tells whether it went well: `len == offset` does not.
    BlockJobCompleted { device: String, len: u64, offset: u64, error: Option<String> },
    /// The job was ended by force or before it was ready; the target is not a copy.
    BlockJobCancelled { device: String, len: u64, offset: u64 },
    /// One failed request of a job; comes once per request in flight.
    BlockJobError { device: String, operation: String, action: String },
    /// A job's state; ready and standby alternate freely on QEMU 10.0.
    JobStatusChange { id: String, status: JobStatus },
    /// A migration's state (only with the capability `events`).
    Migration { status: MigrationStatus },
    /// Another pass over the dirty RAM begins.
    MigrationPass { pass: u64 },
    /// The guest has been paused.
    Stop,
    /// The guest runs again.
    Resume,
    /// The guest or somebody here asked for the end; `guest` tells which.
    Shutdown { guest: bool, reason: String },
    /// The guest was reset.
    Reset { guest: bool },
    /// The guest sleeps.
    Suspend,
    /// The guest has woken.
    Wakeup,
    /// The guest's kernel has given up.
    GuestPanicked,
    /// The guest's own disk has an I/O error; `nospace` when its storage is full.
    BlockIoError {
        device: String,
        node_name: Option<String>,
        operation: String,
        action: String,
        nospace: bool,
    },
    /// An export is gone, by `block-export-del` or `nbd-server-stop`.
    BlockExportDeleted { id: String },
    /// Anything else: see the event's name and data.
    Other,
}

/// How a job ended.
#[derive(Deserialize)]
struct JobEnd {
    device: String,
    len: u64,
    offset: u64,
    error: Option<String>,
}

#[derive(Deserialize)]
struct JobFault {
    device: String,
    operation: String,
    action: String,
}

#[derive(Deserialize)]
struct JobChange {
    id: String,
    status: JobStatus,
}

#[derive(Deserialize)]
struct DiskFault {
    device: String,
    #[serde(rename = "node-name")]
    node_name: Option<String>,
    operation: String,
    action: String,
    #[serde(default)]
    nospace: bool,
}

#[derive(Deserialize)]
struct Cause {
    #[serde(default)]
    guest: bool,
    #[serde(default)]
    reason: String,
}

impl Event {
    /// Reads what is known of an event; what does not fit is [`EventKind::Other`].
    pub(super) fn new(name: String, data: Value, timestamp: Timestamp) -> Self {
        let kind = kind(&name, &data).unwrap_or_else(|| {
            tracing::warn!(event = name, %data, "an event of QEMU's lacks what it should have");
            EventKind::Other
        });
        Self { name, kind, data, timestamp }
    }
}

fn kind(name: &str, data: &Value) -> Option<EventKind> {
    Some(match name {
        "BLOCK_JOB_READY" => EventKind::BlockJobReady { device: text(data, "device")? },
        "BLOCK_JOB_COMPLETED" => {
            let JobEnd { device, len, offset, error } = read(data)?;
            EventKind::BlockJobCompleted { device, len, offset, error }
        }
        "BLOCK_JOB_CANCELLED" => {
            let JobEnd { device, len, offset, .. } = read(data)?;
            EventKind::BlockJobCancelled { device, len, offset }
        }
        "BLOCK_JOB_ERROR" => {
            let JobFault { device, operation, action } = read(data)?;
            EventKind::BlockJobError { device, operation, action }
        }
        "JOB_STATUS_CHANGE" => {
            let JobChange { id, status } = read(data)?;
            EventKind::JobStatusChange { id, status }
        }
        "BLOCK_EXPORT_DELETED" => EventKind::BlockExportDeleted { id: text(data, "id")? },
        "MIGRATION" => EventKind::Migration { status: text(data, "status")?.into() },
        "MIGRATION_PASS" => EventKind::MigrationPass { pass: data.get("pass")?.as_u64()? },
        "BLOCK_IO_ERROR" => disk_fault(data)?,
        _ => return guest_kind(name, data),
    })
}

fn guest_kind(name: &str, data: &Value) -> Option<EventKind> {
    Some(match name {
        "STOP" => EventKind::Stop,
        "RESUME" => EventKind::Resume,
        "SUSPEND" => EventKind::Suspend,
        "WAKEUP" => EventKind::Wakeup,
        "GUEST_PANICKED" => EventKind::GuestPanicked,
        "SHUTDOWN" => {
            let Cause { guest, reason } = read(data)?;
            EventKind::Shutdown { guest, reason }
        }
        "RESET" => EventKind::Reset { guest: read::<Cause>(data)?.guest },
        _ => EventKind::Other,
    })
}

fn disk_fault(data: &Value) -> Option<EventKind> {
    let DiskFault { device, node_name, operation, action, nospace } = read(data)?;
    Some(EventKind::BlockIoError { device, node_name, operation, action, nospace })
}

fn read<T: DeserializeOwned>(data: &Value) -> Option<T> {
    T::deserialize(data).ok()
}

fn text(data: &Value, key: &str) -> Option<String> {
    data.get(key)?.as_str().map(str::to_owned)
}

/// The events of one monitor, in QEMU's order. Dropping it means that nobody wants them.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<(Event, usize)>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// The connection's end of the queue.
pub(super) struct EventSink {
    queue: mpsc::Sender<(Event, usize)>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// The queue of events is at one of its limits.
#[derive(Debug)]
pub(super) struct EventOverflow;

/// A queue within [`EVENT_QUEUE_MAX`] and [`EVENT_QUEUE_BYTES_MAX`].
pub(super) fn event_queue() -> (EventSink, Events) {
    let (sender, receiver) = mpsc::channel(EVENT_QUEUE_MAX);
    let waiting_bytes = Arc::new(AtomicUsize::new(0));
    let sink = EventSink { queue: sender, waiting_bytes: waiting_bytes.clone() };
    (sink, Events { queue: receiver, waiting_bytes })
}

impl EventSink {
    /// Hands over an event that came in a line of so many bytes.
    pub(super) fn put(&self, event: Event, bytes: usize) -> Result<(), EventOverflow> {
        let before = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > EVENT_QUEUE_BYTES_MAX {
            return Err(EventOverflow);
        }
        match self.queue.try_send((event, bytes)) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(EventOverflow),
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

impl Events {
    /// The next event; `None` when the connection is over and all its events have been taken.
    /// May be cancelled without losing one.
    pub async fn recv(&mut self) -> Option<Event> {
        let taken = self.queue.recv().await;
        self.account(taken)
    }

    /// The next event if it has already come.
    pub fn try_recv(&mut self) -> Option<Event> {
        let taken = self.queue.try_recv().ok();
        self.account(taken)
    }

    fn account(&self, taken: Option<(Event, usize)>) -> Option<Event> {
        let (event, bytes) = taken?;
        self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        Some(event)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(name: &str, data: Value) -> Event {
        Event::new(name.into(), data, Timestamp { seconds: 1, microseconds: 2 })
    }

    #[test]
    fn a_failed_mirror_is_told_from_a_good_one_by_its_error_alone() {
        let data = json!({"device": "j", "len": 5, "offset": 5, "speed": 0, "type": "mirror",
                          "error": "Input/output error", "of-tomorrow": {}});
        let kind = event("BLOCK_JOB_COMPLETED", data).kind;
        let EventKind::BlockJobCompleted { error: Some(error), .. } = kind else {
            panic!("{kind:?}");
        };
        assert_eq!(error, "Input/output error");
    }

    #[test]
    fn unknown_or_maimed_events_are_kept_as_they_are() {
        let odd = event("BLOCK_JOB_READY", json!({"device": 5}));
        assert_eq!((odd.kind, odd.data), (EventKind::Other, json!({"device": 5})));
        assert_eq!(event("RTC_CHANGE", json!({"offset": 1})).kind, EventKind::Other);
        assert_eq!(event("STOP", Value::Null).kind, EventKind::Stop);
        assert_eq!(event("SHUTDOWN", Value::Null).kind, EventKind::Other);
    }

    #[test]
    fn bytes_count_as_well_as_events_and_taking_makes_room() {
        let (sink, mut events) = event_queue();
        let half = EVENT_QUEUE_BYTES_MAX / 2;
        for _ in 0..5 {
            sink.put(event("STOP", Value::Null), half).unwrap();
            sink.put(event("RESUME", Value::Null), half).unwrap();
            assert_eq!(events.try_recv().unwrap().kind, EventKind::Stop);
            assert_eq!(events.try_recv().unwrap().kind, EventKind::Resume);
        }
        sink.put(event("STOP", Value::Null), half).unwrap();
        assert!(sink.put(event("STOP", Value::Null), half + 1).is_err());
    }
}
