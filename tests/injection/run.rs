//! One migration as its operator begins it and as it is seen from outside: its source's phases, as
//! they come, also across a restart of that agent.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Side;
use crate::support::process::{Running, wait_for};
use crate::support::{Agent, VmferryRun};

/// All phases of a source, in the order in which they can come.
const ORDER: [&str; 12] = [
    "begin",
    "prepare",
    "mirror",
    "precopy",
    "switchover",
    "device",
    "hand-over",
    "undecided",
    "confirm",
    "done",
    "roll-back",
    "failed",
];
const BEGINS_WITHIN: Duration = Duration::from_secs(20);
const PHASE_WITHIN: Duration = Duration::from_secs(60);

/// A migration that was begun.
#[derive(Debug)]
pub struct Run {
    /// Its id.
    pub id: String,
    /// Where the guest was when it began.
    pub source: Side,
    /// When it began.
    pub since: Instant,
    /// `vmferry migrate`, which waits for its end.
    pub cli: VmferryRun,
    follower: Follower,
}

impl Run {
    /// Begins one with `vmferry migrate --json` on the guest's host.
    ///
    /// # Errors
    /// The command line ends at once, or says no id.
    pub fn begin(agent: &Agent, vm: &str, source: Side) -> Result<Self> {
        let since = Instant::now();
        let mut cli = agent.vmferry_start(&["migrate", vm, "--to", source.other().name(), "--json"])?;
        let id = wait_for("the migration's id", BEGINS_WITHIN, || first_id(&mut cli))?;
        let follower = Follower::start(agent.socket(), &id);
        Ok(Self { id, source, since, cli, follower })
    }

    /// Waits until it is in a phase, or past it, or has ended; gives where it is.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach(&self, phase: &str) -> Result<String> {
        wait_for(&format!("phase {phase}"), PHASE_WITHIN, || {
            let now = self.phase();
            Ok((order(&now) >= order(phase)).then_some(now))
        })
        .with_context(|| format!("migration {} stands at {:?}", self.id, self.follower.last()))
    }

    /// The phase that its source said last.
    pub fn phase(&self) -> String {
        let last = self.follower.last();
        last.and_then(|p| Some(p["phase"].as_str()?.to_owned())).unwrap_or_else(|| "begin".to_owned())
    }

    /// Waits until its source has said its end, decided or not, for so long at most.
    pub fn wait_end(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        while Instant::now() < end {
            if self.follower.last().is_some_and(|p| !p["outcome"].is_null()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// The last progress that its source gave.
    pub fn last(&self) -> Option<Value> {
        self.follower.last()
    }

    /// Whether its source ever said "undecided".
    pub fn was_undecided(&self) -> bool {
        self.follower.state.lock().unwrap_or_else(PoisonError::into_inner).undecided
    }
}

fn order(phase: &str) -> usize {
    ORDER.iter().position(|p| *p == phase).unwrap_or(0)
}

fn first_id(cli: &mut Running) -> Result<Option<String>> {
    let text = cli.stdout()?;
    let Some((line, _)) = text.split_once('\n') else {
        let ended = cli.ended()?;
        ensure!(ended.is_none(), "vmferry migrate ended at once: {ended:?} {text} {}", cli.stderr()?);
        return Ok(None);
    };
    let progress: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
    Ok(Some(progress["id"].as_str().context("no id")?.to_owned()))
}

/// Follows the events of a migration in a thread of its own.
#[derive(Debug)]
struct Follower {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Value>,
    undecided: bool,
}

impl Follower {
    fn start(socket: PathBuf, id: &str) -> Self {
        let (state, stop) = (Arc::<Mutex<State>>::default(), Arc::<AtomicBool>::default());
        let thread = {
            let (state, stop, id) = (Arc::clone(&state), Arc::clone(&stop), id.to_owned());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // An agent that is dead or restarts is asked again.
                    let _ = follow(&socket, &id, &state, &stop);
                    std::thread::sleep(Duration::from_millis(50));
                }
            })
        };
        Self { state, stop, thread: Some(thread) }
    }

    fn last(&self) -> Option<Value> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).last.clone()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(socket: &Path, id: &str, state: &Mutex<State>, stop: &AtomicBool) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    write!(stream, "GET /v1/migrations/{id}/events HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) if line.ends_with(b"\n") => {
                take(&line, state);
                line.clear();
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Anything that is no progress belongs to the answer's head.
fn take(line: &[u8], state: &Mutex<State>) {
    let Ok(progress) = serde_json::from_slice::<Value>(line) else { return };
    if progress["phase"].is_string() {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.undecided |= progress["phase"] == "undecided";
        state.last = Some(progress);
    }
}
