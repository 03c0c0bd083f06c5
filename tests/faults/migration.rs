//! A migration as its operator sees it: begun by the command line, followed through the local API,
//! judged by what it reports at its end.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::support::Agent;
use crate::support::process::{LONG, tell_wait, wait_for};
use crate::support::proof::field;

/// For a phase to be reached, on a busy machine.
pub const REACH_WITHIN: Duration = Duration::from_secs(120);
/// So that who follows can be told to stop.
const LOOK_AWAY_AFTER: Duration = Duration::from_millis(200);

/// The source's phases in the order in which they can come, those of failure last.
const PHASES: [&str; 12] = [
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

/// Where a phase is among them.
pub fn order(phase: &str) -> Option<usize> {
    PHASES.iter().position(|p| *p == phase)
}

/// One migration, by its id.
#[derive(Debug, Clone)]
pub struct Migration {
    /// As the command line printed it.
    pub id: String,
}

impl Migration {
    /// Begins one with `vmferry migrate --detach`.
    ///
    /// # Errors
    /// The command line's.
    pub fn begin(agent: &Agent, vm: &str, peer: &str, options: &[&str]) -> Result<Self> {
        Self::begin_as(agent, "migrate", (vm, peer), options)
    }

    /// The same with another command of that form.
    ///
    /// # Errors
    /// The command line's.
    pub fn begin_as(
        agent: &Agent,
        command: &str,
        (vm, peer): (&str, &str),
        options: &[&str],
    ) -> Result<Self> {
        let words = [&[command, vm, "--to", peer, "--detach"], options].concat();
        let outcome = agent.vmferry(&words)?;
        ensure!(outcome.code == 0, "vmferry {} gave {outcome:?}", words.join(" "));
        Ok(Self { id: outcome.stdout.trim().to_owned() })
    }

    /// As it is now.
    ///
    /// # Errors
    /// The agent does not answer or does not know it.
    pub fn now(&self, agent: &Agent) -> Result<Value> {
        agent.api(&format!("/v1/migrations/{}", self.id))
    }

    /// Waits, on its source's API, until it is in `phase` and `enough` says so of its progress.
    ///
    /// # Errors
    /// It is past that phase, or has ended: the error shows its last progress.
    pub fn reach(&self, socket: &Path, phase: &str, enough: impl Fn(&Value) -> bool) -> Result<Value> {
        let reached = self.reach_within(REACH_WITHIN, socket, phase, enough)?;
        reached.with_context(|| format!("waited {} s in vain for phase {phase}", REACH_WITHIN.as_secs()))
    }

    /// The same, or nothing where it was not so within that time.
    ///
    /// # Errors
    /// It is past that phase, or has ended.
    pub fn reach_within(
        &self,
        within: Duration,
        socket: &Path,
        phase: &str,
        enough: impl Fn(&Value) -> bool,
    ) -> Result<Option<Value>> {
        let (since, mut events) = (Instant::now(), Events::of(socket, &self.id)?);
        while since.elapsed() < within {
            let Some(progress) = events.next()? else { continue };
            let now = progress["phase"].as_str().unwrap_or_default();
            if now == phase && enough(&progress) {
                tell_wait(&format!("phase {phase}"), since);
                return Ok(Some(progress));
            }
            ensure!(order(now) <= order(phase), "it never was in phase {phase}: {progress}");
        }
        Ok(None)
    }

    /// Waits until its source has said its end, decided or not, for so long at most. An agent that is
    /// dead or restarts is asked again.
    pub fn wait_end(&self, agent: &Agent, within: Duration) -> bool {
        let ended = || self.now(agent).is_ok_and(|progress| !progress["outcome"].is_null());
        wait_for("the migration's end", within, || Ok(ended().then_some(()))).is_ok()
    }

    /// Waits for its end, decided or not, and gives its last progress.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&self, agent: &Agent) -> Result<Value> {
        ensure!(self.wait_end(agent, LONG), "it does not end: {:?}", self.now(agent));
        self.now(agent)
    }

    /// Asks `vmferry cancel` for it.
    ///
    /// # Errors
    /// It is refused.
    pub fn cancel(&self, agent: &Agent) -> Result<()> {
        let outcome = agent.vmferry(&["cancel", &self.id])?;
        ensure!(outcome.code == 0, "cancel gave {outcome:?}");
        Ok(())
    }
}

/// The API's stream of a migration's changes.
pub struct Events {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Events {
    /// Follows one migration at its source or its destination.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn of(socket: &Path, id: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LOOK_AWAY_AFTER))?;
        write!(stream, "GET /v1/migrations/{id}/events HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        Ok(Self { stream: BufReader::new(stream), line: Vec::new() })
    }

    /// What it has become; nothing if there is no news for a moment.
    ///
    /// # Errors
    /// The stream has ended.
    pub fn next(&mut self) -> Result<Option<Value>> {
        loop {
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {}
                Ok(_) => bail!("the events ended"),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
            let line = std::mem::take(&mut self.line);
            // What is no progress belongs to the answer's head.
            let progress = serde_json::from_slice::<Value>(&line).ok().filter(|p| p["phase"].is_string());
            if progress.is_some() {
                return Ok(progress);
            }
        }
    }
}

/// How a migration must end.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// In which phases it may have failed.
    pub phases: &'static [&'static str],
    /// What its cause must name: the object and the reason. One of the words between `|` is enough.
    pub words: &'static [&'static str],
    /// Whether an operator asked for it.
    pub cancelled: bool,
    /// What the source may say is left, by a word; mostly nothing.
    pub left: Option<&'static str>,
}

impl End {
    /// It fails in one of these phases, for this reason, and leaves nothing.
    pub const fn failed(phases: &'static [&'static str], words: &'static [&'static str]) -> Self {
        Self { phases, words, cancelled: false, left: None }
    }

    /// An operator cancels it.
    pub const fn cancelled(phases: &'static [&'static str]) -> Self {
        Self { phases, words: &["cancelled"], cancelled: true, left: None }
    }

    /// The same, but that the source may say that this is left.
    pub const fn leaves(self, word: &'static str) -> Self {
        Self { left: Some(word), ..self }
    }

    /// That a source's last progress says so.
    ///
    /// # Errors
    /// It does not, or it says that something was left.
    pub fn fits(&self, progress: &Value) -> Result<()> {
        let outcome = field(progress, "/outcome")?;
        let text = |name: &str| outcome[name].as_str().unwrap_or_default();
        ensure!(text("result") == "failed", "it was to fail: {progress}");
        ensure!(self.phases.contains(&text("phase")), "it was to fail in {:?}: {progress}", self.phases);
        for words in self.words {
            let named = words.split('|').any(|word| text("cause").contains(word));
            ensure!(named, "its cause does not name {words:?}: {outcome}");
        }
        ensure!(outcome["cancelled"] == self.cancelled, "cancelled is not {}: {outcome}", self.cancelled);
        let left = field(outcome, "/leftovers")?.as_array().context("leftovers are a list")?;
        let allowed =
            |one: &Value| self.left.is_some_and(|word| one.as_str().is_some_and(|s| s.contains(word)));
        ensure!(left.iter().all(allowed), "it says that something is left: {outcome}");
        Ok(())
    }
}
