//! QEMU's events as types. Knows nothing of commands. The queue they wait in is `event_queue.rs`.

use super::states::{JobStatus, MigrationStatus};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

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
    pub timestamp: Timestamp,
}

/// The events vmferry understands. Fields are QEMU's; `device` of a block job is its job id.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are QEMU's own and documented there")]
pub enum EventKind {
    /// The mirror has copied everything once. It says nothing about how far behind it is now.
    BlockJobReady {
        device: String,
    },
    /// The job is over. `error` alone tells whether it went well: `len == offset` does not.
    BlockJobCompleted {
        device: String,
        len: u64,
        offset: u64,
        error: Option<String>,
    },
    /// The job was ended by force or before it was ready; the target is not a copy.
    BlockJobCancelled {
        device: String,
        len: u64,
        offset: u64,
    },
    /// One failed request of a job; comes once per request in flight.
    BlockJobError {
        device: String,
        operation: String,
        action: String,
    },
    /// A job's state; ready and standby alternate freely on QEMU 10.0.
    JobStatusChange {
        id: String,
        status: JobStatus,
    },
    /// A migration's state (only with the capability `events`).
    Migration {
        status: MigrationStatus,
    },
    /// Another pass over the dirty RAM begins.
    MigrationPass {
        pass: u64,
    },
    /// The guest has been paused.
    Stop,
    Resume,
    /// The guest or somebody here asked for the end; `guest` tells which.
    Shutdown {
        guest: bool,
        reason: String,
    },
    /// The guest was reset.
    Reset {
        guest: bool,
    },
    Suspend,
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
    BlockExportDeleted {
        id: String,
    },
    /// Not QEMU's: some events did not arrive here, because the connection was lost for a while or
    /// because nobody took them in time. Whoever needs to know what happened asks QEMU.
    Missed,
    /// Anything else: see the event's name and data.
    Other,
}

impl EventKind {
    /// Nobody acts on it: QEMU is asked instead. QEMU 10 sends `JOB_STATUS_CHANGE` for every job at
    /// every change of the block graph, which grows with the square of the disks.
    pub(super) fn is_for_nobody(&self) -> bool {
        matches!(self, Self::JobStatusChange { .. } | Self::MigrationPass { .. } | Self::Other)
    }
}

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

    /// The word that events are missing.
    pub(super) fn missed() -> Self {
        let timestamp = Timestamp { seconds: -1, microseconds: -1 };
        Self { name: String::new(), kind: EventKind::Missed, data: json!({}), timestamp }
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
}
