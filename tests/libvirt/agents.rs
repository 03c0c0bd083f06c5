//! An agent on each of two hosts with libvirt, with no more rights than it needs: its own user, in the groups
//! of libvirt and of its QEMUs.

#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bed::{Hosts, left_below};
use crate::support::agent::PORT;
use crate::support::process::{LONG, Outcome, wait_for};
use crate::support::{Agent, AgentSpec, Credentials, Host, Lab, Vm, VmEntry, VmferryRun, Way};

/// The agent's user on both hosts (host.sh).
pub(crate) const USER: u32 = 64056;
/// Where the binary is on the hosts.
const VMFERRY: &str = "/run/vmferry-bin";
/// Where the sockets are.
pub(crate) const FOLDER: &str = "/run/vmferry/libvirt";
/// Any domain of the tests may come from the peer, with libvirt's own connection.
const PERMITS: &str = "libvirt = [\"web*\"]\nlibvirt_rpc = true\n";
/// A lost connection is given up after seconds; behind the lines of the peer, which end there.
const IMPATIENT: &str = "[deadlines]\ndead_peer_s = 2\nresume_s = 5\n";
/// A migration by virsh, on two busy cores.
const MOVE_WITHIN: Duration = Duration::from_secs(300);

/// One end of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Both agents.
#[derive(Debug)]
pub(crate) struct Agents {
    pub(crate) alpha: Agent,
    pub(crate) bravo: Agent,
}

impl Agents {
    /// Starts them. Only their port is open between the hosts.
    pub(crate) fn start(lab: &Lab, hosts: &Hosts) -> Result<Self> {
        Self::start_with(lab, hosts, PERMITS)
    }

    /// The same, and everything may pass between the hosts.
    pub(crate) fn start_open(lab: &Lab, hosts: &Hosts) -> Result<Self> {
        Self::begin_both(lab, hosts, PERMITS, USER, None, false)
    }

    /// The same, and a lost connection is given up soon.
    pub(crate) fn start_impatient(lab: &Lab, hosts: &Hosts) -> Result<Self> {
        Self::begin_both(lab, hosts, &format!("{PERMITS}{IMPATIENT}"), USER, None, true)
    }

    /// Agents with all rights.
    pub(crate) fn start_as_root(lab: &Lab, hosts: &Hosts) -> Result<Self> {
        Self::begin_both(lab, hosts, PERMITS, 0, None, true)
    }

    /// The same, beside a guest whose QEMU is nobody's but vmferry's.
    pub(crate) fn start_beside(lab: &Lab, hosts: &Hosts, guest: [&Vm; 2]) -> Result<Self> {
        Self::begin_both(lab, hosts, PERMITS, 0, Some(guest), true)
    }

    /// The same with other lines in the peers' tables.
    pub(crate) fn start_with(lab: &Lab, hosts: &Hosts, peer_lines: &str) -> Result<Self> {
        Self::begin_both(lab, hosts, peer_lines, USER, None, true)
    }

    fn begin_both(
        lab: &Lab,
        hosts: &Hosts,
        peer_lines: &str,
        user: u32,
        guest: Option<[&Vm; 2]>,
        is_walled: bool,
    ) -> Result<Self> {
        if is_walled {
            hosts.net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        }
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let (alpha, bravo) = (&hosts.net.alpha, &hosts.net.bravo);
        Ok(Self {
            alpha: begin(lab, [alpha, bravo], &credentials, peer_lines, user, guest.map(|[a, _]| a))?,
            bravo: begin(lab, [bravo, alpha], &credentials, peer_lines, user, guest.map(|[_, b]| b))?,
        })
    }

    /// The agent where a move this way begins, or where it ends.
    pub(crate) fn of(&mut self, way: Way, end: End) -> &mut Agent {
        match (way, end) {
            (Way::ToBravo, End::Source) | (Way::ToAlpha, End::Destination) => &mut self.alpha,
            (Way::ToBravo, End::Destination) | (Way::ToAlpha, End::Source) => &mut self.bravo,
        }
    }

    fn source(&self, way: Way) -> &Agent {
        match way {
            Way::ToBravo => &self.alpha,
            Way::ToAlpha => &self.bravo,
        }
    }

    /// Runs `vmferry libvirt migrate` on alpha to its end.
    pub(crate) fn migrate(&self, options: &[&str]) -> Result<Outcome> {
        self.migrate_start(options)?.wait(MOVE_WITHIN)
    }

    /// The same in the background.
    pub(crate) fn migrate_start(&self, options: &[&str]) -> Result<VmferryRun> {
        self.begin_move(Way::ToBravo, "web1", options)
    }

    /// The same of any domain, either way.
    pub(crate) fn begin_move(&self, way: Way, domain: &str, options: &[&str]) -> Result<VmferryRun> {
        let to = match way {
            Way::ToBravo => "bravo",
            Way::ToAlpha => "alpha",
        };
        let words = [&["libvirt", "migrate", domain, "--to", to, "--live"], options].concat();
        self.source(way).vmferry_start(&words)
    }

    /// What alpha's agent knows of its migrations of libvirt's.
    pub(crate) fn migrations(&self) -> Result<Vec<Value>> {
        self.migrations_from(Way::ToBravo)
    }

    /// What the agent where such moves begin knows of them.
    pub(crate) fn migrations_from(&self, way: Way) -> Result<Vec<Value>> {
        Ok(self.source(way).api("/v1/libvirt")?.as_array().context("no list")?.clone())
    }

    /// Waits until one of alpha's is as asked.
    pub(crate) fn wait_migration(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_migration_from(Way::ToBravo, what, is_it)
    }

    /// Waits until one of those that go this way is as asked.
    pub(crate) fn wait_migration_from(
        &self,
        way: Way,
        what: &str,
        is_it: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        wait_for(what, LONG, || Ok(self.migrations_from(way)?.into_iter().find(&is_it)))
    }

    /// That neither host has a socket, a folder or a record of a migration.
    ///
    /// # Errors
    /// Something is left.
    pub(crate) fn are_clean(&self) -> Result<()> {
        let left = || -> Result<Vec<String>> {
            let mut left = Vec::new();
            for agent in [&self.alpha, &self.bravo] {
                left.extend(left_below(agent.host(), FOLDER)?);
                let records = agent.host().dir.join("state/libvirt");
                let records = fs::read_dir(records).into_iter().flatten().flatten();
                left.extend(records.map(|file| file.path().display().to_string()));
            }
            Ok(left)
        };
        let clean = wait_for("both hosts to be clean", LONG, || Ok(left()?.is_empty().then_some(())));
        clean.with_context(|| format!("left: {:?}", left()))
    }
}

fn begin(
    lab: &Lab,
    [host, peer]: [&Host; 2],
    credentials: &Credentials,
    peer_lines: &str,
    user: u32,
    guest: Option<&Vm>,
) -> Result<Agent> {
    let spec = AgentSpec {
        vms: guest.map(VmEntry::of).into_iter().collect(),
        user: Some(user),
        peer_lines: peer_lines.to_owned(),
        end_lines: format!("[libvirt]\nfolder = \"{FOLDER}\"\n"),
        ..AgentSpec::default()
    };
    let tls = host.dir.join("tls");
    fs::create_dir(&tls)?;
    let issued = credentials.issue(&host.name)?;
    for file in ["ca-cert.pem", "cert.pem", "key.pem"] {
        fs::copy(issued.join(file), tls.join(file))?;
        chown(tls.join(file), Some(user), Some(user))?;
    }
    let mut paths = lab.paths.clone();
    paths.vmferry = PathBuf::from(VMFERRY);
    Agent::start(&paths, host, &spec.peer(peer), &tls)
}

/// That a program ended with this code.
///
/// # Errors
/// Another one; the error has all that it said.
pub(crate) fn code(outcome: &Outcome, code: i32) -> Result<()> {
    ensure!(
        outcome.code == code,
        "exit code {} instead of {code}:\n{}{}",
        outcome.code,
        outcome.stdout,
        outcome.stderr
    );
    Ok(())
}
