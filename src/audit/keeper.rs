//! The record's one writer: a thread with a bounded queue before it, and what waits for a disk that takes nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::event::Event;
use super::files::{Files, Limits, has_room};
use super::line::Head;
use super::peer_events::{ONE_MIGRATION_IN, ONE_SESSION_IN, PeerEvents};
use super::refusals::Refusals;

/// Events that may wait for the thread, and again as many for the disk.
const WAITING_MAX: usize = 4096;
/// Lines that are written before the disk is asked to keep them.
const BATCH: usize = 256;
/// What is not urgent is on the disk after so long.
const SYNC_WITHIN: Duration = Duration::from_secs(1);
/// Between two tries of a disk that takes nothing.
const RETRY: Duration = Duration::from_secs(1);
/// How long an urgent line is waited for.
const DURABLE_WITHIN: Duration = Duration::from_secs(2);
/// How long the end waits for the last lines.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// VMs that are named of those migrations of a peer that are not recorded one by one.
const DATA_OF_MAX: usize = 32;
/// The head is in the log so often, where it has moved.
const TELL_HEAD_EVERY: Duration = Duration::from_secs(900);

/// What the record is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    pub head: Head,
    /// Events that were never written.
    pub lost: u64,
    /// Writes that failed.
    pub failures: u64,
    /// Why it takes no lines now.
    pub failing: Option<String>,
}

#[derive(Debug)]
struct Entry {
    at: OffsetDateTime,
    event: Event,
    /// Hears the line's number once it is on the disk.
    told: Option<oneshot::Sender<u64>>,
}

#[derive(Debug)]
struct Shared {
    figures: Mutex<Figures>,
    /// Events that found no place before the thread.
    lost: AtomicU64,
    refusals: Mutex<Refusals>,
    peer_sessions: Mutex<PeerEvents>,
    peer_migrations: Mutex<PeerEvents>,
    /// VMs of those that were not recorded and had data, by peer.
    data_of: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn figures(&self) -> MutexGuard<'_, Figures> {
        locked(&self.figures)
    }
}

/// Where everybody records. Clones share it.
#[derive(Debug, Clone)]
pub struct Audit {
    shared: Arc<Shared>,
    queue: SyncSender<Entry>,
    /// Ends with the thread.
    ended: Arc<Mutex<Option<oneshot::Receiver<()>>>>,
}

impl Audit {
    /// Begins to write the record of `host` in `folder`, which is made if need be.
    /// Errors: there is no thread for it. That a disk takes nothing is no error here.
    pub fn start(folder: &Path, host: &str, limits: Limits) -> io::Result<Self> {
        let (queue, inbox) = sync_channel(WAITING_MAX);
        let figures = Figures { head: Head::none(), lost: 0, failures: 0, failing: None };
        let lost = AtomicU64::new(0);
        let figures = Mutex::new(figures);
        let refusals = Mutex::default();
        let [peer_sessions, peer_migrations] =
            [ONE_SESSION_IN, ONE_MIGRATION_IN].map(|long| Mutex::new(PeerEvents::new(long)));
        let data_of = Mutex::default();
        let shared = Arc::new(Shared { figures, lost, refusals, peer_sessions, peer_migrations, data_of });
        let writer = Writer {
            folder: folder.to_owned(),
            host: host.to_owned(),
            limits,
            shared: Arc::clone(&shared),
            files: None,
            waiting: VecDeque::new(),
            to_tell: Vec::new(),
            sync_at: None,
            retry_at: Instant::now(),
            told_head: Head::none(),
            tell_head_at: Instant::now(),
            is_closing: false,
        };
        let (ends, ended) = oneshot::channel();
        let run = move || {
            writer.run(&inbox);
            drop(ends);
        };
        std::thread::Builder::new().name("audit".into()).spawn(run)?;
        Ok(Self { shared, queue, ended: Arc::new(Mutex::new(Some(ended))) })
    }

    /// Records. Never waits; what finds no place is counted, and the count is recorded. Sessions of one peer are
    /// recorded one by one as long as they are not too many.
    pub fn record(&self, event: Event) {
        self.record_of(OffsetDateTime::now_utc(), event);
    }

    /// Records what happened `at` a moment before.
    pub(super) fn record_of(&self, at: OffsetDateTime, event: Event) {
        let is_recorded = match event.session_of() {
            Some(peer) => {
                let mut sessions = locked(&self.shared.peer_sessions);
                let is_recorded = sessions.is_recorded(peer, Instant::now());
                if !is_recorded {
                    sessions.count(peer);
                }
                is_recorded
            }
            None => true,
        };
        if is_recorded {
            self.send(Entry { at, event, told: None });
        }
    }

    /// Whether one more migration that `peer` has begun here is to be recorded line by line.
    pub(super) fn takes_migration(&self, peer: &str) -> bool {
        locked(&self.shared.peer_migrations).is_recorded(peer, Instant::now())
    }

    /// One that is not came to nothing; of which VM, if it had data.
    pub(super) fn count_migration(&self, peer: &str, data_of: Option<String>) {
        locked(&self.shared.peer_migrations).count(peer);
        if let Some(vm) = data_of {
            let mut all = locked(&self.shared.data_of);
            let of_peer = all.entry(peer.to_owned()).or_default();
            if of_peer.len() < DATA_OF_MAX {
                of_peer.insert(vm);
            }
        }
    }

    /// Records that `source` was refused something. Of each reason and source the first is recorded, until the
    /// rest is summed up.
    pub fn refused(&self, source: &str, reason: &str, text: impl FnOnce() -> String) {
        if locked(&self.shared.refusals).is_first(source, reason) {
            let (source, reason) = (source.to_owned(), reason.to_owned());
            self.record(Event::Refused { source, reason, text: text() });
        }
    }

    /// Records how often something was refused, sessions began and ended, and migrations came to nothing, that was
    /// not recorded one by one.
    pub fn sum_up(&self) {
        let further = locked(&self.shared.refusals).take();
        further.into_iter().for_each(|(reason, count)| self.record(Event::FurtherRefused { reason, count }));
        let further = locked(&self.shared.peer_sessions).take();
        further.into_iter().for_each(|(peer, events)| self.record(Event::FurtherSessions { peer, events }));
        let further = locked(&self.shared.peer_migrations).take();
        for (peer, migrations) in further {
            let data_of = locked(&self.shared.data_of).remove(&peer).unwrap_or_default();
            let data_of = data_of.into_iter().collect();
            self.record(Event::FurtherMigrations { peer, migrations, data_of });
        }
    }

    /// Records, and waits a little until it is on the disk: its number. `None` when the disk did not take it in
    /// time, which is no reason not to go on.
    pub async fn record_durably(&self, event: Event) -> Option<u64> {
        let (told, hears) = oneshot::channel();
        self.send(Entry { at: OffsetDateTime::now_utc(), event, told: Some(told) });
        if self.figures().failing.is_some() {
            return None;
        }
        timeout(DURABLE_WITHIN, hears).await.ok()?.ok()
    }

    fn send(&self, entry: Entry) {
        match self.queue.try_send(entry) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.shared.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub fn figures(&self) -> Figures {
        self.shared.figures().clone()
    }

    /// Records the last event and waits until everything is on the disk, but not for a disk that takes nothing.
    pub async fn close(&self, last: Event) {
        self.sum_up();
        self.record(last);
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended
            && timeout(CLOSE_WITHIN, ended).await.is_err()
        {
            tracing::error!("the last lines of the audit record may be missing: its disk does not answer");
        }
    }
}

/// What the thread has.
struct Writer {
    folder: PathBuf,
    host: String,
    limits: Limits,
    shared: Arc<Shared>,
    /// None until they could be opened.
    files: Option<Files>,
    waiting: VecDeque<Entry>,
    /// Written, and not yet surely on the disk.
    to_tell: Vec<(u64, oneshot::Sender<u64>)>,
    sync_at: Option<Instant>,
    retry_at: Instant,
    told_head: Head,
    tell_head_at: Instant,
    /// The last event has come.
    is_closing: bool,
}

impl Writer {
    fn run(mut self, inbox: &Receiver<Entry>) {
        loop {
            self.take(inbox);
            let now = Instant::now();
            if now >= self.retry_at {
                let written = self.write();
                self.note(written);
            }
            if self.is_closing {
                self.write_rest(inbox);
                return self.tell_head("the audit record ends");
            }
            if now >= self.tell_head_at && self.files.is_some() {
                self.tell_head("the audit record's head");
            }
        }
    }

    /// Writes what is left, if it can be written.
    fn write_rest(&mut self, inbox: &Receiver<Entry>) {
        while let Ok(entry) = inbox.try_recv() {
            self.keep(entry);
        }
        let written = self.write_all();
        self.note(written);
    }

    /// Waits for events, or for something that is to be done without one.
    fn take(&mut self, inbox: &Receiver<Entry>) {
        let retry = (!self.waiting.is_empty() || self.files.is_none()).then_some(self.retry_at);
        let until = [retry, self.sync_at.map(|at| at.max(self.retry_at)), Some(self.tell_head_at)];
        let until = until.into_iter().flatten().min().unwrap_or(self.tell_head_at);
        match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(entry) => self.keep(entry),
            Err(RecvTimeoutError::Timeout) => {}
            // Nobody is left who could record: the end, without a word.
            Err(RecvTimeoutError::Disconnected) => self.is_closing = true,
        }
        while self.waiting.len() < BATCH
            && let Ok(entry) = inbox.try_recv()
        {
            self.keep(entry);
        }
    }

    fn keep(&mut self, entry: Entry) {
        self.is_closing |= matches!(entry.event, Event::AgentEnds { .. });
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back(entry);
        } else {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write_all(&mut self) -> io::Result<()> {
        loop {
            self.write()?;
            if self.waiting.is_empty() {
                return self.sync();
            }
        }
    }

    /// Writes what waits, up to a batch, and syncs where that is due.
    fn write(&mut self) -> io::Result<()> {
        if self.files.is_none() {
            let opened = Files::open(&self.folder, &self.host, self.limits)?;
            self.sync_at = Some(Instant::now());
            self.told_head = Head::none();
            self.files = Some(opened);
            self.tell_head("the audit record is open");
        }
        if !self.waiting.is_empty() {
            has_room(&self.folder)?;
        }
        let mut is_urgent = self.sync_at.is_some_and(|at| Instant::now() >= at);
        for _ in 0..BATCH {
            self.write_lost()?;
            let (Some(files), Some(entry)) = (&mut self.files, self.waiting.front()) else { break };
            let begun = files.append(entry.at, &entry.event)?;
            let Some(entry) = self.waiting.pop_front() else { break };
            is_urgent |= entry.told.is_some() || entry.event.is_urgent();
            if let Some(told) = entry.told {
                self.to_tell.push((files.head().number, told));
            }
            if begun || entry.event.is_end() {
                self.tell_head("the audit record's head");
            }
        }
        if is_urgent {
            self.sync()?;
        } else if self.files.as_ref().is_some_and(|files| !files.is_synced()) && self.sync_at.is_none() {
            self.sync_at = Some(Instant::now() + SYNC_WITHIN);
        }
        Ok(())
    }

    /// What never found a place is told before what comes after it.
    fn write_lost(&mut self) -> io::Result<()> {
        let lost = self.shared.lost.load(Ordering::Relaxed);
        if let Some(files) = &mut self.files
            && lost > 0
        {
            files.append(OffsetDateTime::now_utc(), &Event::Lost { events: lost })?;
            self.shared.lost.fetch_sub(lost, Ordering::Relaxed);
            self.shared.figures().lost += lost;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(files) = &mut self.files {
            files.sync()?;
        }
        self.sync_at = None;
        for (number, told) in self.to_tell.drain(..) {
            let _ = told.send(number);
        }
        Ok(())
    }

    /// Says when writing begins to fail, and when it no longer does.
    fn note(&mut self, written: io::Result<()>) {
        let mut figures = self.shared.figures();
        if let Some(files) = &self.files {
            figures.head = files.head().clone();
        }
        match written {
            Ok(()) => {
                if figures.failing.take().is_some() {
                    tracing::info!(lost = figures.lost, "the audit record is written again");
                }
            }
            Err(error) => {
                self.retry_at = Instant::now() + RETRY;
                figures.failures += 1;
                let cause = format!("{}: {error}", self.folder.display());
                if figures.failing.replace(cause.clone()).is_none() {
                    tracing::error!(
                        cause,
                        "the audit record cannot be written; up to {WAITING_MAX} events wait, \
                         migrations go on, and it is tried again each second"
                    );
                }
            }
        }
        if figures.failing.is_some() {
            // Who waits for the disk goes on without it.
            self.to_tell.clear();
            self.waiting.iter_mut().for_each(|entry| entry.told = None);
        }
    }

    fn tell_head(&mut self, what: &str) {
        self.tell_head_at = Instant::now() + TELL_HEAD_EVERY;
        let Some(files) = &self.files else { return };
        if *files.head() != self.told_head {
            self.told_head = files.head().clone();
            tracing::info!(anchor = %self.told_head, "{what}");
        }
    }
}
