//! A migration as its operator sees it: begun by the command line, followed through the local API,
//! judged by what it reports at its end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::support::Agent;
use crate::support::process::{LONG, wait_for};
use crate::support::proof::field;

/// For a phase to be reached, on a busy machine.
const REACH_WITHIN: Duration = Duration::from_secs(120);

/// The source's phases in their order, those of failure last.
const PHASES: [&str; 12] = [
    "begin",
    "prepare",
    "mirror",
    "precopy",
    "switchover",
    "device",
    "hand-over",
    "confirm",
    "done",
    "roll-back",
    "failed",
    "undecided",
];

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
        let words = [&["migrate", vm, "--to", peer, "--detach"], options].concat();
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
        let number = |name: &str| PHASES.iter().position(|p| *p == name);
        let mut events = Events::of(socket, &self.id)?;
        loop {
            let progress = events.next()?;
            let now = progress["phase"].as_str().unwrap_or_default();
            if now == phase && enough(&progress) {
                return Ok(progress);
            }
            ensure!(number(now) <= number(phase), "it never was in phase {phase}: {progress}");
        }
    }

    /// Waits for its end, decided or not, and gives its last progress.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&self, agent: &Agent) -> Result<Value> {
        let ended = wait_for("the migration's end", LONG, || {
            Ok(self.now(agent).ok().filter(|p| !p["outcome"].is_null()))
        });
        ended.with_context(|| format!("{:?}", self.now(agent)))
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

/// The API's stream of changes.
struct Events {
    stream: BufReader<UnixStream>,
    end: Instant,
}

impl Events {
    fn of(socket: &Path, id: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        write!(stream, "GET /v1/migrations/{id}/events HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut events = Self { stream: BufReader::new(stream), end: Instant::now() + REACH_WITHIN };
        let status = events.line()?;
        ensure!(status.contains(" 200 "), "events: {status}");
        while !events.line()?.trim().is_empty() {}
        Ok(events)
    }

    fn next(&mut self) -> Result<Value> {
        let line = self.line()?;
        ensure!(!line.is_empty(), "the events ended");
        serde_json::from_str(&line).with_context(|| format!("event {line:?}"))
    }

    fn line(&mut self) -> Result<String> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("waited {} s in vain for the phase", REACH_WITHIN.as_secs());
        }
        self.stream.get_ref().set_read_timeout(Some(left))?;
        let mut line = String::new();
        self.stream.read_line(&mut line).context("waiting for the phase")?;
        Ok(line)
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
