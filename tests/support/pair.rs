//! Two hosts with an agent on each, guests that can live on either, and the proofs that belong to
//! a move between them. Knows no fault.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::agent::PORT;
use super::lab::{Lab, Paths};
use super::net::{Net, Way};
use super::process::{LONG, wait_for};
use super::proof::{self, HandoverCopies};
use super::{Agent, AgentSpec, Credentials, Vm, VmEntry, VmSpec};

/// A guest that is defined on both hosts, and copies its disks at each hand-over.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// On alpha.
    pub alpha: Vm,
    /// On bravo.
    pub bravo: Vm,
    /// The disks that alpha got at the last hand-over to it.
    pub alpha_copies: HandoverCopies,
    /// The disks that bravo got at the last hand-over to it.
    pub bravo_copies: HandoverCopies,
}

impl Guest {
    /// Defines it on both hosts; nothing runs yet. Only the QEMUs may differ.
    pub fn define(lab: &Lab, net: &Net, on_alpha: &VmSpec, on_bravo: &VmSpec) -> Result<Self> {
        let alpha = Vm::define(&lab.paths, &net.alpha, on_alpha)?;
        let bravo = Vm::define(&lab.paths, &net.bravo, on_bravo)?;
        let alpha_copies = HandoverCopies::define(&alpha)?;
        let bravo_copies = HandoverCopies::define(&bravo)?;
        Ok(Self { name: on_alpha.name.clone(), alpha, bravo, alpha_copies, bravo_copies })
    }

    /// Source, destination and the destination's copies of a move this way.
    pub fn way(&self, way: Way) -> (&Vm, &Vm, &HandoverCopies) {
        match way {
            Way::ToBravo => (&self.alpha, &self.bravo, &self.bravo_copies),
            Way::ToAlpha => (&self.bravo, &self.alpha, &self.alpha_copies),
        }
    }
}

/// Both agents, and what they held before anything moved.
#[derive(Debug)]
pub struct Pair {
    /// The hosts and their link.
    pub net: Net,
    /// The agent on alpha.
    pub alpha: Agent,
    /// The agent on bravo.
    pub bravo: Agent,
    paths: Paths,
    idle: [usize; 2],
}

impl Pair {
    /// Boots a guest on alpha, then starts both agents.
    pub fn with_guest(lab: &Lab, on_alpha: &VmSpec, on_bravo: &VmSpec) -> Result<(Self, Guest)> {
        let net = lab.two_hosts()?;
        let guest = Guest::define(lab, &net, on_alpha, on_bravo)?;
        guest.alpha.boot()?;
        Ok((Self::start(lab, net, &[&guest])?, guest))
    }

    /// Starts both agents, which know each other and all `guests`. The wall between the hosts lets
    /// their one port through, both ways.
    pub fn start(lab: &Lab, net: Net, guests: &[&Guest]) -> Result<Self> {
        Self::start_with(lab, net, guests, |_, _| {})
    }

    /// The same, with alpha's configuration changed, and bravo's.
    pub fn start_with(
        lab: &Lab,
        net: Net,
        guests: &[&Guest],
        change: impl FnOnce(&mut AgentSpec, &mut AgentSpec),
    ) -> Result<Self> {
        net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let mut on_alpha = AgentSpec::default().peer(&net.bravo);
        let mut on_bravo = AgentSpec::default().peer(&net.alpha);
        for guest in guests {
            on_alpha = on_alpha.vm(VmEntry::of(&guest.alpha).with_hook(guest.alpha_copies.hook()));
            on_bravo = on_bravo.vm(VmEntry::of(&guest.bravo).with_hook(guest.bravo_copies.hook()));
        }
        change(&mut on_alpha, &mut on_bravo);
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        let idle = [alpha.open_descriptors()?, bravo.open_descriptors()?];
        Ok(Self { net, alpha, bravo, paths: lab.paths.clone(), idle })
    }

    /// The agent from which a move this way begins, and the name of the peer that it goes to.
    pub fn from(&self, way: Way) -> (&Agent, &'static str) {
        match way {
            Way::ToBravo => (&self.alpha, "bravo"),
            Way::ToAlpha => (&self.bravo, "alpha"),
        }
    }

    /// What holds after a move, whatever its QEMUs are: the destination's disks were the source's
    /// at the hand-over and no write was missing on them; the source's QEMU has ended; nothing is
    /// left.
    ///
    /// # Errors
    /// Any of it is not so.
    pub fn proves_move(&self, guest: &Guest, way: Way) -> Result<()> {
        let (source, destination, copies) = guest.way(way);
        source.wait_ended().context("the source's QEMU was to end")?;
        copies.same_as_source(&self.paths, source, destination)?;
        copies_whole(source, destination, copies)?;
        proof::qemu_is_clean(&mut destination.qmp()?)?;
        self.is_clean()
    }

    /// That neither agent holds anything of a migration, and that all journals have their end.
    ///
    /// # Errors
    /// Any of it is not so.
    pub fn is_clean(&self) -> Result<()> {
        for (agent, idle) in [&self.alpha, &self.bravo].into_iter().zip(self.idle) {
            proof::agent_is_clean(agent, idle)?;
            journals_ended(agent)?;
        }
        Ok(())
    }
}

/// That the disks at a hand-over hold every number that the guest had reported by then.
fn copies_whole(source: &Vm, destination: &Vm, copies: &HandoverCopies) -> Result<()> {
    let reported = source.console()?.last().unwrap_or(0);
    for disk in 0..destination.spec.disks.len() {
        let verdict = destination.verify(disk, &copies.disk(destination, disk)?)?;
        let whole = verdict.ok && verdict.max_seq >= reported;
        ensure!(whole, "disk {disk} at the hand-over: {reported} were reported, found {verdict:?}");
    }
    Ok(())
}

/// The journals of an agent: the records of each.
pub fn journals(agent: &Agent) -> Result<Vec<Vec<Value>>> {
    let folder = agent.host().dir.join("state/migrations");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let records = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
        found.push(records.with_context(|| format!("{}", path.display()))?);
    }
    Ok(found)
}

/// Those without the record of an end. It need not be the last: what the source confirms, or is cleaned
/// late, follows.
pub fn open_journals(agent: &Agent) -> Result<Vec<Vec<Value>>> {
    let is_open = |lines: &Vec<Value>| lines.iter().all(|line| line["record"]["ended"].is_null());
    Ok(journals(agent)?.into_iter().filter(is_open).collect())
}

/// That each journal of an agent has the record of its end.
///
/// # Errors
/// One stays open; the error shows it.
pub fn journals_ended(agent: &Agent) -> Result<()> {
    wait_for("the journals' ends", LONG, || Ok(open_journals(agent)?.is_empty().then_some(())))
        .with_context(|| format!("open on {}: {:?}", agent.host().name, open_journals(agent)))
}
