//! What is known of a migration at any moment: for whoever asks, for metrics, and
//! for the next process.
//!
//! The migration writes it, everyone else reads copies. Knows no QEMU and no network.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::bandwidth::Wish;
pub use super::comparison::Comparison;
pub use super::forecast::Whole;
use super::forecast::really_left;
use super::leftover::Leftover;
use super::phase::Phase;
use super::role::Role;
pub use super::slowed::Slowed;
pub use super::slowness::HeldUp;
use super::timeline::{Moment, StreamSample, Timeline, Uncounted, Waiting};
use crate::audit::{Audit, Event, Grant, Hashed, MigrationLines, Step, Subject};

/// One disk's copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Disk")]
pub struct DiskProgress {
    /// Its name on both hosts.
    pub name: String,
    /// Bytes to copy so far known; grows while the guest writes.
    pub total_bytes: u64,
    /// Bytes of these that are copied.
    pub done_bytes: u64,
    /// Bytes that the guest sees; 0 where it is not known.
    #[serde(default)]
    pub virtual_bytes: u64,
    /// Whether the mirror follows the guest's writes.
    pub ready: bool,
    /// Bytes on the disk's stream, both directions.
    pub stream_bytes: u64,
    /// Bytes that compression has kept off it.
    #[serde(default)]
    pub saved_bytes: u64,
    /// What the disk occupied at the source when it began, where that is known.
    #[serde(default)]
    pub allocated_bytes: Option<u64>,
    /// What the guest has written meanwhile where it was copied already.
    #[serde(default)]
    pub grown_bytes: u64,
    /// Bytes that really have to be copied still: no holes. Only the source knows.
    #[serde(default)]
    pub left_bytes: Option<u64>,
    /// How the guest's writes to it were made slower, so that its copy comes to an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowed: Option<Slowed>,
}

impl DiskProgress {
    /// One that nothing has been copied of.
    pub(crate) fn new(name: &str, virtual_size: u64, allocated: Option<u64>) -> Self {
        // Of a block device nothing is known.
        let allocated = allocated.filter(|bytes| *bytes > 0);
        Self {
            name: name.into(),
            total_bytes: virtual_size,
            virtual_bytes: virtual_size,
            allocated_bytes: allocated,
            left_bytes: Some(allocated.unwrap_or(virtual_size)),
            ..Self::default()
        }
    }

    /// What QEMU says of its mirror: `offset` of `len` bytes are done with, holes among them.
    pub(crate) fn learn(&mut self, len: u64, offset: u64, ready: bool) {
        if len == 0 && !ready {
            // It looks for what is allocated.
            return;
        }
        self.grown_bytes += len.saturating_sub(self.total_bytes);
        (self.total_bytes, self.done_bytes, self.ready) = (len, offset, ready);
        let left = len.saturating_sub(offset);
        let expected = self.allocated_bytes.map(|bytes| bytes.saturating_add(self.grown_bytes));
        let really = || really_left(left, offset, self.copied_bytes(), expected);
        self.left_bytes = Some(if ready { left } else { really() });
    }

    /// What QEMU says of one that goes in band: `passed` bytes were gone over once, and `written` bytes have to be
    /// sent again.
    pub(crate) fn passed_in_band(&mut self, passed: u64, written: u64) {
        let left = self.virtual_bytes.saturating_sub(passed);
        // As dense as all of it.
        let dense = |bytes: u64| u128::from(left) * u128::from(bytes) / u128::from(self.virtual_bytes.max(1));
        let left =
            self.allocated_bytes.map_or(left, |bytes| dense(bytes).try_into().unwrap_or(left).min(left));
        (self.done_bytes, self.left_bytes) = (passed, Some(left.saturating_add(written)));
    }

    /// Bytes of it that were copied, those that compression saved included.
    pub(crate) fn copied_bytes(&self) -> u64 {
        self.stream_bytes.saturating_add(self.saved_bytes)
    }
}

/// The RAM's copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Ram")]
pub struct RamProgress {
    /// The guest's RAM in bytes.
    pub total_bytes: u64,
    /// Bytes not yet copied, or dirtied again.
    pub remaining_bytes: u64,
    /// Bytes on the RAM stream, both directions.
    pub stream_bytes: u64,
    /// Passes over the RAM.
    pub passes: u64,
    /// Bytes that really have to be copied still: no pages of zeroes. Only the source knows.
    #[serde(default)]
    pub left_bytes: Option<u64>,
}

impl RamProgress {
    /// What QEMU says; `expected_bytes` are what the guest is taken to use.
    pub(crate) fn of(
        (total_bytes, remaining_bytes, passes): (u64, u64, u64),
        stream_bytes: u64,
        expected: Option<u64>,
    ) -> Self {
        let covered = total_bytes.saturating_sub(remaining_bytes);
        let expected = expected.filter(|_| passes <= 1);
        let left_bytes = Some(really_left(remaining_bytes, covered, stream_bytes, expected));
        Self { total_bytes, remaining_bytes, stream_bytes, passes, left_bytes }
    }
}

/// The tries of a migration that may be begun again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Tries {
    /// The try that is under way, or waited for; counted from one.
    pub number: u32,
    /// How many there may be.
    pub of: u32,
    /// What this try is called in journals and at the destination, or the last one was.
    pub migration: Uuid,
    /// Milliseconds until it begins; none when it has begun.
    pub next_in_ms: Option<u64>,
    /// Why the last one failed.
    pub last_failure: Option<String>,
    /// Bytes on the streams of those before this one, both directions.
    pub earlier_stream_bytes: u64,
}

/// How long the guest stood still, and on what. Milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Downtime {
    /// From the source's pause to the word that the guest runs at the destination.
    pub total_ms: u64,
    /// Finishing the mirrors and closing the exports.
    pub disks_ms: u64,
    /// The rest of the RAM and the devices' state.
    pub device_ms: u64,
    /// The journal, the word to the destination and the guest's start there.
    pub start_ms: u64,
    /// Of that, the destination's `before_start` command.
    pub hook_ms: Option<u64>,
    /// What is none of these: between two steps, and with a lost connection or a lost word.
    #[serde(default)]
    pub other_ms: u64,
}

impl Downtime {
    /// It lasted this long in all, so that its parts add up.
    pub(crate) fn lasted(&mut self, total_ms: u64) {
        self.total_ms = total_ms;
        self.other_ms = total_ms.saturating_sub(self.disks_ms + self.device_ms + self.start_ms);
    }
}

/// A connection that was lost and is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reconnecting {
    /// For how long already, in seconds.
    pub for_s: u64,
    /// For how long at most.
    pub of_s: u64,
    /// How it was lost.
    pub cause: String,
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Outcome {
    /// The guest is at the destination.
    Moved {
        /// What is left to clean up by hand; mostly nothing.
        leftovers: Vec<Leftover>,
    },
    /// The guest is where it was.
    Failed {
        phase: Phase,
        /// The cause and its causes.
        cause: String,
        /// What would have to be mended first, each with its remedy.
        #[serde(default)]
        problems: Vec<super::problem::Problem>,
        /// Whether an operator asked for it.
        cancelled: bool,
        /// What is left to clean up by hand; mostly nothing.
        leftovers: Vec<Leftover>,
    },
    /// The guest is where it was, as was wanted: a replica of its disks is in step at the destination.
    Replicated {
        /// What is left to clean up by hand; mostly nothing.
        leftovers: Vec<Leftover>,
    },
    /// Handed over, and the destination's word is missing.
    Undecided {
        /// What is missing and what is done about it.
        cause: String,
    },
}

impl Outcome {
    pub const LABELS: [&str; 5] = ["moved", "replicated", "cancelled", "failed", "undecided"];

    /// A bounded label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Moved { .. } => "moved",
            Self::Replicated { .. } => "replicated",
            Self::Failed { cancelled: true, .. } => "cancelled",
            Self::Failed { .. } => "failed",
            Self::Undecided { .. } => "undecided",
        }
    }
}

/// A migration at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub id: Uuid,
    pub vm: String,
    pub role: Role,
    /// The other host, as its certificate names it.
    pub peer: String,
    pub phase: Phase,
    /// Seconds since the epoch.
    pub began_at: i64,
    /// Milliseconds since the beginning; stands still at the end.
    pub elapsed_ms: u64,
    pub disks: Vec<DiskProgress>,
    /// Its RAM, once that is on its way.
    pub ram: Option<RamProgress>,
    /// Set while the session has no connection: nothing moves, and nothing is lost.
    #[serde(default)]
    pub reconnecting: Option<Reconnecting>,
    /// Set while the source's QEMU does not answer: what is waited for, in words.
    #[serde(default)]
    pub slow: Option<String>,
    /// Bytes per second over all streams, over about the last second.
    pub rate_bytes_per_s: u64,
    /// Why its copying is not faster, by what was measured lately, where this host is its source.
    #[serde(default)]
    pub held_up_by: Option<HeldUp>,
    /// The whole of it, where this host is its source.
    #[serde(default)]
    pub whole: Option<Whole>,
    /// Set when it is begun again after a failure.
    #[serde(default)]
    pub tries: Option<Tries>,
    /// Set when its disks are compared.
    #[serde(default)]
    pub comparison: Option<Comparison>,
    /// What it may send, where this host is its source.
    #[serde(default)]
    pub share: Option<Wish>,
    /// Somebody has paused the guest: it stays so where it ends up.
    #[serde(default)]
    pub paused: bool,
    /// Known at the end.
    pub downtime: Option<Downtime>,
    /// What an operator should know although it did not fail.
    pub notes: Vec<String>,
    /// Set at the end.
    pub outcome: Option<Outcome>,
}

impl Progress {
    /// A migration that begins now.
    pub fn new(id: Uuid, vm: &str, role: Role, peer: &str) -> Self {
        Self {
            id,
            vm: vm.into(),
            role,
            peer: peer.into(),
            phase: Phase::Begin,
            began_at: time::OffsetDateTime::now_utc().unix_timestamp(),
            elapsed_ms: 0,
            disks: Vec::new(),
            ram: None,
            reconnecting: None,
            slow: None,
            rate_bytes_per_s: 0,
            held_up_by: None,
            whole: None,
            tries: None,
            comparison: None,
            share: None,
            paused: false,
            downtime: None,
            notes: Vec::new(),
            outcome: None,
        }
    }

    /// Bytes on all streams of all tries, both directions.
    pub fn stream_bytes(&self) -> u64 {
        let of_this_try = self.disks.iter().map(|d| d.stream_bytes).sum::<u64>()
            + self.ram.as_ref().map_or(0, |r| r.stream_bytes);
        self.tries.as_ref().map_or(0, |t| t.earlier_stream_bytes) + of_this_try
    }

    /// Bytes that all tries have copied, those included that compression saved in this one.
    pub(crate) fn copied_bytes(&self) -> u64 {
        self.stream_bytes() + self.disks.iter().map(|disk| disk.saved_bytes).sum::<u64>()
    }

    /// Bytes that the disks, and all of it, still have to copy; none where that is not known.
    pub(crate) fn left_bytes(&self) -> Option<(u64, u64)> {
        let disks: u64 = self.disks.iter().map(|disk| disk.left_bytes).sum::<Option<u64>>()?;
        let ram = match &self.ram {
            Some(ram) => ram.left_bytes?,
            None => self.whole.as_ref()?.ram_expected_bytes?,
        };
        Some((disks, disks + ram))
    }

    /// Whether some of the guest's writes stand still without a connection.
    pub(crate) fn waits_for_destination(&self) -> bool {
        self.disks.iter().any(|disk| disk.slowed == Some(Slowed::WriteBlocking))
    }

    /// Whether all disks were gone over once, where they go in band.
    pub(crate) fn all_passed(&self) -> bool {
        self.disks.iter().all(|disk| disk.done_bytes >= disk.total_bytes)
    }

    /// What both hosts call it: the try that is under way.
    pub(crate) fn shared_id(&self) -> Uuid {
        self.tries.as_ref().map_or(self.id, |tries| tries.migration)
    }

    /// What it is in the audit record.
    pub fn subject(&self) -> Subject {
        let migration = self.shared_id();
        let first = (migration != self.id).then_some(self.id);
        let (vm, peer) = (self.vm.clone(), self.peer.clone());
        Subject { migration, first, role: self.role.name(), vm, peer }
    }

    /// As its timeline notes it.
    fn moment(&self) -> Moment<'_> {
        let disk = |disk: &DiskProgress| StreamSample {
            done_bytes: disk.done_bytes,
            remaining_bytes: disk.total_bytes.saturating_sub(disk.done_bytes),
            stream_bytes: disk.stream_bytes,
        };
        let ram = self.ram.as_ref().map(|ram| StreamSample {
            done_bytes: ram.total_bytes.saturating_sub(ram.remaining_bytes),
            remaining_bytes: ram.remaining_bytes,
            stream_bytes: ram.stream_bytes,
        });
        Moment {
            phase: self.phase,
            waiting: self.waiting(),
            held_up_by: self.held_up_by,
            rate_bytes_per_s: self.rate_bytes_per_s,
            disks: self.disks.iter().map(|d| (d.name.as_str(), disk(d))).collect(),
            ram,
            is_over: self.outcome.is_some(),
        }
    }

    /// Whether it is at copying.
    fn copies(&self) -> bool {
        let waits_for_a_try = self.tries.as_ref().is_some_and(|tries| tries.next_in_ms.is_some());
        matches!(self.phase, Phase::Mirror | Phase::Precopy) && self.outcome.is_none() && !waits_for_a_try
    }

    /// What it waits for while nothing moves, and in words.
    pub fn waiting(&self) -> Option<(Waiting, Option<&str>)> {
        if self.outcome.is_some() {
            return None;
        }
        if let Some(tries) = self.tries.as_ref().filter(|tries| tries.next_in_ms.is_some()) {
            return Some((Waiting::NextTry, tries.last_failure.as_deref()));
        }
        match (&self.reconnecting, &self.slow) {
            (Some(reconnecting), _) => Some((Waiting::Connection, Some(&reconnecting.cause))),
            (None, Some(slow)) => Some((Waiting::Qemu, Some(slow))),
            (None, None) => None,
        }
    }

    /// Tries that were begun after the first.
    pub fn retries(&self) -> u64 {
        let begun = |t: &Tries| u64::from(t.number) - 1 - u64::from(t.next_in_ms.is_some());
        self.tries.as_ref().map_or(0, begun)
    }
}

/// What a further step changes.
fn place(progress: &Progress) -> (Phase, Option<&'static str>, Uuid) {
    (progress.phase, progress.outcome.as_ref().map(Outcome::label), progress.shared_id())
}

fn step(progress: &Progress) -> Step {
    let cause = match &progress.outcome {
        Some(Outcome::Failed { cause, .. } | Outcome::Undecided { cause }) => Some(cause.clone()),
        _ => None,
    };
    let (_, result, _) = place(progress);
    Step { subject: progress.subject(), phase: progress.phase.name(), result, cause }
}

/// Where a migration writes its progress.
#[derive(Debug, Clone)]
pub struct ProgressSink {
    sender: watch::Sender<Progress>,
    began: Instant,
    recorded: Option<Recorded>,
    timeline: Arc<Mutex<Timeline>>,
}

/// Where its steps are recorded.
#[derive(Debug, Clone)]
struct Recorded {
    lines: MigrationLines,
    /// What both hosts call it, where its progress does not say.
    migration: Option<Uuid>,
}

impl Recorded {
    fn record(&self, progress: &Progress) {
        if matches!(progress.phase, Phase::HandOver | Phase::Undecided | Phase::Confirm) {
            self.lines.release();
        }
        if progress.phase == Phase::Mirror {
            self.lines.data_comes(&progress.vm);
        }
        let step = step(progress);
        self.lines.record(Event::Migration(Step { subject: self.subject(progress), ..step }));
        if progress.phase.is_final() && progress.outcome.is_some() {
            self.lines.end();
        }
    }

    fn subject(&self, progress: &Progress) -> Subject {
        let subject = progress.subject();
        match self.migration.filter(|id| *id != progress.id) {
            Some(migration) => Subject { migration, first: Some(progress.id), ..subject },
            None => subject,
        }
    }
}

impl ProgressSink {
    /// A sink that goes on from `progress`.
    pub fn new(progress: Progress) -> Self {
        let (now, before) = (Instant::now(), Duration::from_millis(progress.elapsed_ms));
        let began = now.checked_sub(before).unwrap_or(now);
        let timeline = Timeline::begin(progress.elapsed_ms, &progress.moment());
        let timeline = Arc::new(Mutex::new(timeline));
        Self { sender: watch::Sender::new(progress), began, recorded: None, timeline }
    }

    /// From here on each step is recorded, that which it is at included.
    pub fn recorded(self, audit: &Audit) -> Self {
        self.recorded_as(audit, None)
    }

    /// The same, of one that both hosts call `migration`.
    pub(crate) fn recorded_as(self, audit: &Audit, migration: Option<Uuid>) -> Self {
        self.recorded_in(MigrationLines::all(audit), migration)
    }

    /// The same, of one that its peer has begun here.
    pub(crate) fn recorded_of_peer(self, audit: &Audit) -> Self {
        let lines = MigrationLines::of_peer(audit, &self.sender.borrow().peer);
        self.recorded_in(lines, None)
    }

    fn recorded_in(self, lines: MigrationLines, migration: Option<Uuid>) -> Self {
        let recorded = Recorded { lines, migration };
        recorded.record(&self.sender.borrow());
        Self { recorded: Some(recorded), ..self }
    }

    /// What this side has hashed of a disk.
    pub(crate) fn record_hashed(&self, hashed: Hashed) {
        let Some(recorded) = &self.recorded else { return };
        let subject = recorded.subject(&self.sender.borrow());
        recorded.lines.record(Event::Hashed { subject, hashed });
    }

    /// What this destination lets its source do.
    pub(crate) fn record_granted(&self, granted: Grant) {
        if let Some(recorded) = &self.recorded {
            recorded.lines.record(Event::Granted(granted));
        }
    }

    /// Nobody else will record what was kept back of it.
    pub(crate) fn record_all(&self) {
        if let Some(recorded) = &self.recorded {
            recorded.lines.release();
        }
    }

    /// Changes it and tells all who watch.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        let elapsed_ms = self.elapsed_ms();
        self.sender.send_modify(|progress| {
            if progress.outcome.is_none() || matches!(progress.outcome, Some(Outcome::Undecided { .. })) {
                progress.elapsed_ms = elapsed_ms;
            }
            let before = self.recorded.as_ref().map(|recorded| (recorded, place(progress)));
            change(progress);
            progress.held_up_by = progress.held_up_by.filter(|_| progress.copies());
            self.locked_timeline().note(elapsed_ms, &progress.moment());
            if let Some((recorded, before)) = before
                && before != place(progress)
            {
                recorded.record(progress);
            }
        });
    }

    /// It has ended, or shows as undecided.
    pub(crate) fn end(&self, phase: Phase, outcome: Outcome) {
        self.update(|p| {
            p.phase = phase;
            p.slow = None;
            if let Some(whole) = &mut p.whole {
                whole.end(matches!(outcome, Outcome::Moved { .. } | Outcome::Replicated { .. }));
            }
            p.outcome = Some(outcome);
        });
    }

    pub fn now(&self) -> Progress {
        self.sender.borrow().clone()
    }

    /// What it has been through.
    pub fn timeline(&self) -> Timeline {
        self.locked_timeline().clone()
    }

    /// An earlier process had this one; it goes on here.
    pub fn restore_timeline(&self, timeline: Timeline) {
        // Whoever writes has this lock first and then that of the timeline.
        let is_over = self.sender.borrow().outcome.is_some();
        let mut now = self.locked_timeline();
        *now = timeline;
        if !is_over {
            now.note_restart(self.elapsed_ms());
        }
    }

    /// What nobody has counted yet, and from now on somebody has.
    pub fn take_uncounted(&self) -> Uncounted {
        self.locked_timeline().take_uncounted(self.elapsed_ms())
    }

    /// Milliseconds in which nothing has moved, and in the phase that it is in.
    pub fn idle_and_phase_ms(&self) -> (u64, u64) {
        let (timeline, now_ms) = (self.locked_timeline(), self.elapsed_ms());
        (timeline.idle_ms(now_ms), timeline.phase_ms(now_ms))
    }

    fn elapsed_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn locked_timeline(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.sender.subscribe()
    }
}
