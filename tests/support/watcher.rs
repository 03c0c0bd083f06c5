//! The judge of where a guest runs. It believes nobody but the guest, which puts into every block,
//! and into every line on its serial line, the letter of the host whose QEMU executes it at that
//! moment (tests/guest/writer.c). A thread reads the raw images and the serial lines of both hosts all
//! the time and holds that
//! - no block was ever made on both hosts,
//! - no block is missing,
//! - nobody writes who should have ended.
//!
//! From the same comes how long the guest stood still. Knows no agent, and no fault.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::block::{self, Head};
use super::process::{SHORT, wait_for};
use super::vm::Vm;

/// How often the next block and the serial lines are looked for: also how exactly a stand-still is
/// measured.
const FOLLOW_EVERY: Duration = Duration::from_millis(20);
/// How often all of both images is read when nobody waits for it. The guest must not go round in its area in that time.
const SCAN_EVERY: Duration = Duration::from_millis(400);
/// The disk that is watched: a raw one, at the same place on both hosts.
const DISK: usize = 0;

/// The life of one boot of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Its own number.
    pub generation: u64,
    /// The highest block seen.
    pub last: u64,
    /// Where it ran: the first block made on a host, and the host's letter. They take turns.
    pub stays: Vec<(u64, u8)>,
}

impl Life {
    /// The host of the last block, by its letter.
    pub fn host(&self) -> u8 {
        self.stays.last().map_or(0, |(_, host)| *host)
    }
}

/// A guest that is watched until this is dropped.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    seen: Mutex<Seen>,
    /// Somebody waits for this scan.
    wanted: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// In the order of their first blocks.
    lives: Vec<Record>,
    /// When something new was seen.
    signs: Vec<Instant>,
    scans: u64,
    violation: Option<String>,
}

#[derive(Debug)]
struct Record {
    generation: u64,
    /// The host's letter of block `n + 1`; 0 where it was not seen yet.
    hosts: Vec<u8>,
    /// Up to here nothing is missing.
    whole_to: u64,
    /// It was ended by force and must not write any more.
    ended: bool,
}

impl Watcher {
    /// Begins to watch the guest on both its hosts.
    ///
    /// # Errors
    /// The watched disk is not raw.
    pub fn start(vms: [&Vm; 2]) -> Result<Self> {
        for vm in vms {
            ensure!(vm.spec.disks[DISK] == super::DiskFormat::Raw, "only a raw disk can be watched");
        }
        let shared = Arc::new(Shared {
            seen: Mutex::default(),
            wanted: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let hosts = vms.map(Looked::new);
        let eye = Eye { blocks: vms[0].spec.blocks, hosts, scanned: Instant::now(), before: HashMap::new() };
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || eye.watch(&shared))
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// That nothing forbidden was seen so far.
    ///
    /// # Errors
    /// It was: the error says what.
    pub fn check(&self) -> Result<()> {
        match &self.shared.seen().violation {
            Some(violation) => bail!("THE GUEST SAYS: {violation}"),
            None => Ok(()),
        }
    }

    /// What is known once both images have been read from end to end, twice, after this call.
    ///
    /// # Errors
    /// Something forbidden was seen, or the guest never wrote.
    pub fn look(&self) -> Result<Life> {
        // The one that is being made may have begun before.
        let wanted = self.shared.seen().scans + 3;
        self.shared.wanted.fetch_max(wanted, Ordering::Relaxed);
        wait_for("two scans of the images", SHORT, || {
            self.check()?;
            Ok((self.shared.seen().scans >= wanted).then_some(()))
        })?;
        self.now().context("the guest never wrote")
    }

    /// The youngest life as known now.
    pub fn now(&self) -> Option<Life> {
        self.shared.seen().lives.last().map(Record::life)
    }

    /// From now on this life must not go on: all its QEMUs are known to be dead.
    ///
    /// # Errors
    /// Something forbidden was seen before that.
    pub fn ended(&self) -> Result<Life> {
        let life = self.look()?;
        if let Some(record) = self.shared.seen().lives.last_mut() {
            record.ended = true;
        }
        Ok(life)
    }

    /// The longest time within a span in which the guest gave no sign of life.
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        let seen = self.shared.seen();
        let inside = seen.signs.iter().copied().filter(|at| (from..=to).contains(at));
        let mut longest = Duration::ZERO;
        let mut before = from;
        for at in inside.chain([to]) {
            longest = longest.max(at - before);
            before = at;
        }
        longest
    }

    /// How many blocks of how many boots have been seen.
    pub fn totals(&self) -> (usize, u64) {
        let seen = self.shared.seen();
        (seen.lives.len(), seen.lives.iter().map(|r| r.hosts.len() as u64).sum())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Record {
    fn life(&self) -> Life {
        let mut stays: Vec<(u64, u8)> = Vec::new();
        for (at, host) in self.hosts.iter().enumerate().filter(|(_, host)| **host != 0) {
            if stays.last().is_none_or(|(_, last)| last != host) {
                stays.push((at as u64 + 1, *host));
            }
        }
        Life { generation: self.generation, last: self.hosts.len() as u64, stays }
    }
}

impl Seen {
    /// Takes note of a block, and says whether it was new.
    fn take(&mut self, head: Head, place: &str) -> Result<bool> {
        let Head { seq, generation, host } = head;
        ensure!(host.is_ascii_lowercase(), "block {seq} on {place} names no host: {host}");
        let at = match self.lives.iter().position(|r| r.generation == generation) {
            Some(at) => at,
            None => {
                let others = self.lives.iter().all(|r| r.ended);
                ensure!(others, "a second guest {generation:016x} writes on {place}: {:?}", self.lives());
                self.lives.push(Record { generation, hosts: Vec::new(), whole_to: 0, ended: false });
                self.lives.len() - 1
            }
        };
        let record = &mut self.lives[at];
        let index = usize::try_from(seq - 1)?;
        if index >= record.hosts.len() {
            ensure!(!record.ended, "guest {generation:016x} was ended and yet wrote block {seq} on {place}");
            record.hosts.resize(index + 1, 0);
        }
        let known = record.hosts[index];
        ensure!(
            known == 0 || known == host,
            "TWO RUNNERS: block {seq} was made on host {:?} and, as {place} shows, on host {:?}",
            char::from(known),
            char::from(host)
        );
        record.hosts[index] = host;
        Ok(known == 0)
    }

    fn lives(&self) -> Vec<Life> {
        self.lives.iter().map(Record::life).collect()
    }

    fn note(&mut self, taken: Result<bool>, now: Instant) {
        match taken {
            Ok(true) => self.signs.push(now),
            Ok(false) => {}
            Err(violation) => {
                self.violation.get_or_insert(format!("{violation:#}"));
            }
        }
    }
}

/// One host's image and serial line.
#[derive(Debug)]
struct Looked {
    name: &'static str,
    letter: u8,
    image: PathBuf,
    serial: PathBuf,
    read_to: u64,
    rest: Vec<u8>,
    foreign_lines: u32,
    /// What was found at each place the last time it was whole.
    known: Vec<Head>,
}

impl Looked {
    fn new(vm: &Vm) -> Self {
        let is_alpha = vm.host_name() == "alpha";
        Self {
            name: if is_alpha { "alpha" } else { "bravo" },
            letter: if is_alpha { b'a' } else { b'b' },
            image: vm.disk(DISK),
            serial: vm.serial(),
            read_to: 0,
            rest: Vec::new(),
            foreign_lines: 0,
            known: vec![Head::default(); usize::try_from(vm.spec.blocks).unwrap_or(0)],
        }
    }

    /// The whole lines that are new.
    fn lines(&mut self) -> Vec<String> {
        let Ok(mut file) = File::open(&self.serial) else { return Vec::new() };
        let mut new = Vec::new();
        if file.seek(SeekFrom::Start(self.read_to)).and_then(|_| file.read_to_end(&mut new)).is_err() {
            return Vec::new();
        }
        self.read_to += new.len() as u64;
        self.rest.extend(new);
        let Some(end) = self.rest.iter().rposition(|b| *b == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        String::from_utf8_lossy(&whole).lines().map(|l| l.trim_end().to_owned()).collect()
    }

    /// A line that the guest wrote here: its letter is this host's. Only one that was begun before a
    /// move and ended after it may differ, and such a one has no second behind it.
    fn judge_line(&mut self, line: &str) -> Result<()> {
        let bad = ["BAD", "Kernel panic", "BUG:"].iter().any(|word| line.contains(word));
        ensure!(!bad, "on {} the guest complains: {line}", self.name);
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["C", _, _, host] = words[..] {
            let is_own = host.as_bytes() == [self.letter];
            self.foreign_lines = if is_own { 0 } else { self.foreign_lines + 1 };
            ensure!(self.foreign_lines < 2, "on {} the guest says again and again: {line}", self.name);
        }
        Ok(())
    }
}

/// The thread that looks.
struct Eye {
    blocks: u64,
    hosts: [Looked; 2],
    scanned: Instant,
    /// Of each life, its highest block at the end of the last scan.
    before: HashMap<u64, u64>,
}

impl Eye {
    fn watch(mut self, shared: &Shared) {
        while !shared.stop.load(Ordering::Relaxed) {
            self.follow(shared);
            let wanted = shared.seen().scans < shared.wanted.load(Ordering::Relaxed);
            if wanted || self.scanned.elapsed() >= SCAN_EVERY {
                self.scan(shared);
                self.scanned = Instant::now();
            }
            std::thread::sleep(FOLLOW_EVERY);
        }
    }

    /// Only what is likely to be new: the blocks after the last, and the serial lines.
    fn follow(&mut self, shared: &Shared) {
        for host in &mut self.hosts {
            for line in host.lines() {
                let judged = host.judge_line(&line);
                shared.seen().note(judged.map(|()| false), Instant::now());
            }
            let Some(life) = shared.seen().lives.last().map(|r| (r.generation, r.hosts.len() as u64)) else {
                continue;
            };
            let Ok(image) = File::open(&host.image) else { continue };
            let (generation, mut last) = life;
            while let Some(head) = block::whole(&image, block::place(last + 1, self.blocks), self.blocks) {
                if head.generation != generation || head.seq != last + 1 {
                    break;
                }
                last = head.seq;
                let mut seen = shared.seen();
                let taken = seen.take(head, host.name);
                seen.note(taken, Instant::now());
            }
        }
    }

    /// Both images from end to end; then nothing may be missing below what the last scan had seen.
    fn scan(&mut self, shared: &Shared) {
        for host in &mut self.hosts {
            let Ok(image) = File::open(&host.image) else { continue };
            for at in 0..self.blocks {
                let Some(head) = block::head(&image, at, self.blocks) else { continue };
                let known = &mut host.known[at as usize];
                if head == *known {
                    continue;
                }
                let Some(head) = block::whole(&image, at, self.blocks) else { continue };
                *known = head;
                let mut seen = shared.seen();
                let taken = seen.take(head, host.name);
                seen.note(taken, Instant::now());
            }
        }
        let mut seen = shared.seen();
        let complete = self.nothing_missing(&mut seen);
        seen.note(complete.map(|()| false), Instant::now());
        seen.scans += 1;
    }

    fn nothing_missing(&mut self, seen: &mut Seen) -> Result<()> {
        for record in &mut seen.lives {
            let last = record.hosts.len() as u64;
            let settled = self.before.insert(record.generation, last).unwrap_or(0);
            // What was written while the images were read may lie behind where the reader was.
            let (from, to) = (record.whole_to as usize, settled as usize);
            let hole = record.hosts[from.min(to)..to].iter().position(|host| *host == 0);
            if let Some(hole) = hole {
                let seq = from + hole + 1;
                let blind = last.saturating_sub(settled) >= self.blocks;
                let why = if blind { " (this watcher was too slow to tell)" } else { "" };
                bail!("LOST WRITE: block {seq} is on neither disk, {last} were written{why}");
            }
            record.whole_to = settled;
        }
        Ok(())
    }
}
