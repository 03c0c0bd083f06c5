//! What vmferry reports of the last migration, as a script would read it: `status ID --json`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::Agent;
use crate::support::proof::field;

/// The numbers that the demo shows.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) downtime_ms: u64,
    pub(crate) total_ms: u64,
    /// Name and payload bytes of each stream.
    pub(crate) streams: Vec<(String, u64)>,
}

impl Report {
    /// Asks the agent for its only migration.
    pub(crate) fn of(agent: &Agent) -> Result<Self> {
        let all = json(agent, &["list", "--json"])?;
        let list =
            all.as_array().or_else(|| all["migrations"].as_array()).context("`list --json` gave no list")?;
        ensure!(list.len() == 1, "one migration was made, {} are listed", list.len());
        let id = field(&list[0], "/id")?.as_str().context("an id is text")?;
        Self::read(&json(agent, &["status", id, "--json"])?)
    }

    fn read(status: &Value) -> Result<Self> {
        let number = |pointer: &str| {
            field(status, pointer)?.as_u64().with_context(|| format!("{pointer} is no number"))
        };
        let disks = field(status, "/disks")?.as_array().context("/disks is no list")?;
        let mut streams = disks.iter().map(disk).collect::<Result<Vec<_>>>()?;
        streams.push(("RAM".to_owned(), number("/ram/stream_bytes")?));
        Ok(Self { downtime_ms: number("/downtime/total_ms")?, total_ms: number("/elapsed_ms")?, streams })
    }
}

fn disk(value: &Value) -> Result<(String, u64)> {
    let name = field(value, "/name")?.as_str().context("a name is text")?;
    let bytes = field(value, "/stream_bytes")?.as_u64().context("bytes are a number")?;
    Ok((format!("disk {name}"), bytes))
}

fn json(agent: &Agent, words: &[&str]) -> Result<Value> {
    let outcome = agent.vmferry(words)?;
    ensure!(outcome.code == 0, "vmferry {} gave {}: {}", words.join(" "), outcome.code, outcome.stderr);
    serde_json::from_str(&outcome.stdout).with_context(|| format!("vmferry {} gave no JSON", words.join(" ")))
}
