//! One migration as its operator begins it and as it is seen from outside: its source's phases, as
//! they come, also across a restart of that agent.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::faults::migration::{Events, REACH_WITHIN, order};
use crate::faults::{Migration, Side};
use crate::support::process::{Running, wait_for};
use crate::support::{Agent, VmferryRun};

const BEGINS_WITHIN: Duration = Duration::from_secs(20);

/// A migration that was begun.
#[derive(Debug)]
pub struct Run {
    pub migration: Migration,
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
        Ok(Self { migration: Migration { id }, source, since, cli, follower })
    }

    /// Waits until it is in a phase, or past it, or has ended; gives where it is.
    ///
    /// # Errors
    /// It does not get there.
    pub fn reach(&self, phase: &str) -> Result<String> {
        wait_for(&format!("phase {phase}"), REACH_WITHIN, || {
            let now = self.phase();
            Ok((order(&now) >= order(phase)).then_some(now))
        })
        .with_context(|| format!("migration {} stands at {:?}", self.migration.id, self.follower.last()))
    }

    /// The phase that its source said last.
    pub fn phase(&self) -> String {
        let last = self.follower.last();
        last.and_then(|p| Some(p["phase"].as_str()?.to_owned())).unwrap_or_else(|| "begin".to_owned())
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
    let mut events = Events::of(socket, id)?;
    while !stop.load(Ordering::Relaxed) {
        if let Some(progress) = events.next()? {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.undecided |= progress["phase"] == "undecided";
            state.last = Some(progress);
        }
    }
    Ok(())
}
