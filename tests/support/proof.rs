//! What a migration must have left, judged without asking vmferry: identical disks at the
//! hand-over, a guest that went on counting, and nothing that was not there before.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::agent::Agent;
use super::lab::Paths;
use super::process::{LONG, run_any, wait_for};
use super::qmp::Qmp;
use super::vm::{Vm, quoted, write_script};

/// For what vmferry still does after it has reported the end.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// Copies a destination's disks aside when the agent calls its `before_start` hook, that is after
/// the source has handed over and before the guest runs here.
#[derive(Debug, Clone)]
pub struct HandoverCopies {
    dir: PathBuf,
    hook: PathBuf,
}

impl HandoverCopies {
    /// Writes the hook of a destination guest.
    pub fn define(destination: &Vm) -> Result<Self> {
        let dir = destination.dir().join("handover");
        let hook = destination.dir().join("before-start");
        let mut script =
            format!("#!/bin/sh\nset -eu\nmkdir -p {0}\ncd {0}\n", quoted(&dir.display().to_string()));
        for disk in 0..destination.spec.disks.len() {
            let image = destination.disk(disk);
            script.push_str(&format!(
                "cp --sparse=always --reflink=auto {} .\n",
                quoted(&image.display().to_string())
            ));
        }
        script.push_str("date +%s.%N >>called\n");
        write_script(&hook, &script)?;
        Ok(Self { dir, hook })
    }

    /// The command for the agent's configuration.
    pub fn hook(&self) -> &Path {
        &self.hook
    }

    /// How often it was called.
    pub fn calls(&self) -> usize {
        std::fs::read_to_string(self.dir.join("called")).map_or(0, |text| text.lines().count())
    }

    /// The copy of a destination's disk.
    pub fn disk(&self, destination: &Vm, disk: usize) -> Result<PathBuf> {
        let image = destination.disk(disk);
        Ok(self.dir.join(image.file_name().context("a disk without a name")?))
    }

    /// That every disk of the source, which nobody has written to since, holds exactly what the
    /// destination's held at the hand-over.
    pub fn same_as_source(&self, paths: &Paths, source: &Vm, destination: &Vm) -> Result<()> {
        ensure!(self.calls() > 0, "the hook before the start was never called");
        for disk in 0..source.spec.disks.len() {
            let copy = self.disk(destination, disk)?;
            let formats = (source.spec.disks[disk].name(), destination.spec.disks[disk].name());
            same_content(paths, &source.disk(disk), formats.0, &copy, formats.1)?;
        }
        Ok(())
    }
}

/// That two images hold the same guest-visible bytes, whatever their formats.
pub fn same_content(
    paths: &Paths,
    left: &Path,
    left_format: &str,
    right: &Path,
    right_format: &str,
) -> Result<()> {
    let words = ["compare", "-U", "-f", left_format, "-F", right_format];
    let outcome = run_any(paths.qemu_img().args(words).arg(left).arg(right), LONG)?;
    // A longer image whose rest is empty counts as identical, with a warning. Not here. (The
    // strict mode of `compare` is no way out: it wants the same clusters allocated.)
    let same = outcome.code == 0
        && !outcome.stdout.contains("size mismatch")
        && !outcome.stderr.contains("size mismatch");
    ensure!(same, "{} and {} differ: {}{}", left.display(), right.display(), outcome.stdout, outcome.stderr);
    Ok(())
}

/// What is known about a guest that moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continued {
    /// The last completed block that it reported on the source.
    pub source_last: u64,
    /// The first that it reported on the destination.
    pub destination_first: u64,
    /// The last so far on the destination.
    pub destination_last: u64,
}

/// That the guest goes on on the destination where it was on the source: without a second boot, a
/// number twice, or a complaint. That no block is missing is for `disks_whole` to say.
pub fn guest_continued(source: &Vm, destination: &Vm) -> Result<Continued> {
    destination.wait_more(20)?;
    let (before, after) = (source.console()?, destination.console()?);
    ensure!(
        before.generations.len() == 1,
        "the guest booted {} times on the source",
        before.generations.len()
    );
    ensure!(after.generations.is_empty(), "the guest booted again on the destination");
    let source_last = before.last().context("the guest never counted on the source")?;
    let destination_first = after.first().context("the guest never counted on the destination")?;
    ensure!(
        destination_first > source_last,
        "the source counted to {source_last}, the destination began at {destination_first}"
    );
    Ok(Continued { source_last, destination_first, destination_last: after.last().unwrap_or(0) })
}

/// That no number is missing on any disk of a guest that is stopped, or whose QEMU has ended, and
/// that all it ever reported is there.
pub fn disks_whole(vm: &Vm) -> Result<()> {
    let status = if vm.is_running() { vm.qmp()?.status()? } else { "ended".to_owned() };
    ensure!(status != "running", "{} is {status}: its disks cannot be judged", vm.spec.name);
    let reported = vm.console()?.last().unwrap_or(0);
    for disk in 0..vm.spec.disks.len() {
        let verdict = vm.verify(disk, &vm.disk(disk))?;
        ensure!(verdict.ok, "disk {disk} of {}: {verdict:?}", vm.spec.name);
        ensure!(
            verdict.max_seq >= reported,
            "disk {disk} of {}: reported {reported}, found {verdict:?}",
            vm.spec.name
        );
    }
    Ok(())
}

/// That a QEMU has no job, no export and no node that it had not before.
pub fn qemu_is_clean(qmp: &mut Qmp) -> Result<()> {
    wait_for("QEMU to be as it was", SETTLE_WITHIN, || Ok(leftovers(qmp)?.is_empty().then_some(())))
        .or_else(|late| leftovers(qmp).and_then(|left| Err(late.context(format!("left in QEMU: {left:?}")))))
}

/// The jobs, exports, nodes and dirty bitmaps of vmferry's that a QEMU still has.
pub fn leftovers(qmp: &mut Qmp) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for query in ["query-block-jobs", "query-jobs", "query-block-exports"] {
        let found = qmp.query(query)?;
        if found.as_array().is_none_or(|list| !list.is_empty()) {
            left.push(format!("{query}: {found}"));
        }
    }
    let nodes = qmp.execute("query-named-block-nodes", serde_json::json!({"flat": true}))?;
    let names = nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str());
    left.extend(names.filter(|name| name.starts_with("vmferry-")).map(|name| format!("node {name}")));
    let bitmaps = nodes.as_array().into_iter().flatten().map(|node| &node["dirty-bitmaps"]);
    left.extend(bitmaps.filter(|b| b.to_string().contains("vmferry-")).map(|b| format!("bitmaps {b}")));
    Ok(left)
}

/// What a live session holds without any stream: its connection, and the four of its runtime
/// (two of the poll, its waker, the signals' socket).
const DESCRIPTORS_PER_SESSION: usize = 5;

/// The agent holds nothing but its idle descriptors and its sessions, none of which has a stream.
pub fn agent_is_clean(agent: &Agent, idle_descriptors: usize) -> Result<()> {
    let settled = wait_for("the agent to be as it was", SETTLE_WITHIN, || {
        // Counted first: the agent has the connection of the question below for a moment longer.
        let open = agent.open_descriptors()?;
        let status = agent.api("/v1/status")?;
        let sessions = field(&status, "/sessions")?.as_array().map_or(&[][..], Vec::as_slice);
        let streams: u64 = sessions.iter().filter_map(|s| s["streams"].as_u64()).sum();
        let allowed = idle_descriptors + DESCRIPTORS_PER_SESSION * sessions.len();
        let idle = open <= allowed && streams == 0;
        Ok((idle && agent.runtime_leftovers()?.is_empty()).then_some(()))
    });
    settled.with_context(|| {
        let (open, files) = (agent.descriptors(), agent.runtime_leftovers());
        let status = agent.api("/v1/status").map(|s| s["sessions"].to_string());
        format!(
            "agent on {}: {open:?} descriptors open, {idle_descriptors} when idle; files {files:?}; sessions {status:?}",
            agent.host().name
        )
    })
}

/// The value at a JSON pointer, or an error that shows the whole document.
pub fn field<'v>(value: &'v Value, pointer: &str) -> Result<&'v Value> {
    value.pointer(pointer).with_context(|| format!("no {pointer} in {value}"))
}
