//! What must hold on a stage when a migration has ended: all is as it was before, or the guest has
//! moved whole; and no agent has anything of a migration left.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::stage::VM;
use super::{Migration, Side, Stage};
use crate::support::pair::journals_ended;
use crate::support::process::{SHORT, wait_for};
use crate::support::{Agent, Qmp, Version, Vm, proof};

/// What must be as it was after each failure.
pub struct Before {
    descriptors: [usize; 2],
    qemu_descriptors: usize,
    settings: Value,
}

impl Before {
    pub(super) fn of(source: &Vm, alpha: &Agent, bravo: &Agent) -> Result<Self> {
        let descriptors = [idle_descriptors(alpha)?, idle_descriptors(bravo)?];
        let mut qmp = source.qmp()?;
        let settings = settings(&mut qmp)?;
        Ok(Self { descriptors, qemu_descriptors: qemu_descriptors(source)?, settings })
    }

    fn holds(&self, source: &Vm, qmp: &mut Qmp) -> Result<()> {
        let settings = settings(qmp)?;
        ensure!(self.settings == settings, "QEMU's settings were {} and are {settings}", self.settings);
        let settled = wait_for("QEMU's descriptors to be as they were", SHORT, || {
            Ok((qemu_descriptors(source)? <= self.qemu_descriptors).then_some(()))
        });
        settled.with_context(|| format!("{} then, {:?} now", self.qemu_descriptors, qemu_descriptors(source)))
    }
}

impl Stage {
    /// That the guest runs on the source alone, without a lost write, and that neither QEMU nor
    /// agent has anything of a migration left. Waits for what the destination does by itself.
    ///
    /// # Errors
    /// It is not so.
    pub fn is_as_before(&self) -> Result<()> {
        let mut qmp = self.source.qmp()?;
        ensure!(qmp.status()? == "running", "the guest is {} on the source", qmp.status()?);
        self.source.wait_more(20)?;
        self.destination.wait_ended().context("the destination's QEMU")?;
        ensure!(self.destination.console()?.counts.is_empty(), "the guest has run on the destination");
        proof::qemu_is_clean(&mut qmp)?;
        self.before.holds(&self.source, &mut qmp)?;
        self.is_clean()?;
        self.has_no_made_image()
    }

    /// That the agents have nothing of a migration left.
    ///
    /// # Errors
    /// They have: an open journal, a descriptor, a file or a stream.
    pub fn is_clean(&self) -> Result<()> {
        Side::BOTH.into_iter().try_for_each(|side| all_ended(self.agent(side)))?;
        let mut both = Side::BOTH.into_iter().zip(self.before.descriptors);
        both.try_for_each(|(side, idle)| proof::agent_is_clean(self.agent(side), idle))
    }

    /// That a migration which was interrupted after its hand-over has moved the guest all the same,
    /// and both sides say so.
    ///
    /// # Errors
    /// It is not so.
    pub fn has_moved(&self, migration: &Migration) -> Result<()> {
        self.source.wait_ended().context("the source's QEMU")?;
        for agent in [&self.alpha, &self.bravo] {
            let report = migration.ended(agent)?;
            ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
        }
        if !self.loses_ram() {
            proof::guest_continued(&self.source, &self.destination)?;
        }
        proof::qemu_is_clean(&mut self.destination.qmp()?)?;
        self.is_clean()?;
        self.destination.qmp()?.query("stop")?;
        if self.loses_ram() { Ok(()) } else { proof::disks_whole(&self.destination) }
    }

    /// QEMU 7.2 under TCG may lose RAM on the way: of a guest that has arrived there the disks alone are judged.
    fn loses_ram(&self) -> bool {
        self.destination.spec.version == Version::V72
    }

    /// Moves the guest at last, and proves it as the demo does.
    ///
    /// # Errors
    /// It does not move, or a proof fails.
    pub fn moves(&mut self) -> Result<()> {
        self.calm()?;
        let outcome = self.alpha.vmferry(&["migrate", VM, "--to", "bravo", "--keep-source"])?;
        ensure!(outcome.code == 0, "the retry gave {outcome:?}");
        self.is_moved()
    }

    /// That the guest has moved with `--keep-source`, whole, and nothing is left.
    ///
    /// # Errors
    /// A proof fails.
    pub fn is_moved(&self) -> Result<()> {
        if !self.loses_ram() {
            proof::guest_continued(&self.source, &self.destination)?;
        }
        let states = (self.source.qmp()?.status()?, self.destination.qmp()?.status()?);
        ensure!(states == ("postmigrate".to_owned(), "running".to_owned()), "{states:?}");
        self.copies().same_as_source(&self.paths, &self.source, &self.destination)?;
        if !self.loses_ram() {
            self.destination.qmp()?.query("stop")?;
            proof::disks_whole(&self.destination)?;
        }
        proof::qemu_is_clean(&mut self.source.qmp()?)?;
        proof::qemu_is_clean(&mut self.destination.qmp()?)?;
        self.is_clean()
    }
}

/// That no migration is open, by what an agent lists and by its journals.
fn all_ended(agent: &Agent) -> Result<()> {
    wait_for(&format!("the migrations on {} to end", agent.host().name), SHORT, || {
        let listed = agent.api("/v1/migrations")?;
        let open = listed.as_array().is_none_or(|all| all.iter().any(|p| p["outcome"].is_null()));
        Ok((!open).then_some(()))
    })
    .with_context(|| format!("{:?}", agent.api("/v1/migrations")))?;
    journals_ended(agent)
}

/// The local API's connection by which the agent was asked last may still be closing.
fn idle_descriptors(agent: &Agent) -> Result<usize> {
    let (mut least, mut same) = (usize::MAX, 0);
    wait_for("a steady count of descriptors", SHORT, || {
        let now = agent.open_descriptors()?;
        same = if now == least { same + 1 } else { 0 };
        least = now;
        Ok((same == 10).then_some(now))
    })
}

/// The migration settings that vmferry changes.
fn settings(qmp: &mut Qmp) -> Result<Value> {
    let parameters = qmp.query("query-migrate-parameters")?;
    Ok(json!([qmp.query("query-migrate-capabilities")?, parameters["downtime-limit"]]))
}

/// The sockets that QEMU has open while the test's monitor is connected and the agent's is not: what
/// was passed to it and is not used up cannot be asked for in any other way.
fn qemu_descriptors(source: &Vm) -> Result<usize> {
    let pid = source.pid().context("no QEMU")?;
    let files = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let is_socket = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    Ok(files.filter(is_socket).count())
}
