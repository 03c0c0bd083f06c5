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
use crate::support::process::{LONG, Outcome, SHORT, wait_for};
use crate::support::{Agent, AgentSpec, Credentials, Host, Lab, VmferryRun, Way};

/// The agent's user on both hosts (host.sh).
pub(crate) const USER: u32 = 64056;
/// Where the binary is on the hosts.
const VMFERRY: &str = "/run/vmferry-bin";
/// Where the sockets are.
pub(crate) const FOLDER: &str = "/run/vmferry/libvirt";
/// Any domain of the tests may come from the peer, with libvirt's own connection.
const PERMITS: &str = "libvirt = [\"web*\"]\nlibvirt_rpc = true\n";
/// A migration by virsh, on two busy cores.
const MOVE_WITHIN: Duration = Duration::from_secs(300);

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

    /// Agents with all rights.
    pub(crate) fn start_as_root(lab: &Lab, hosts: &Hosts) -> Result<Self> {
        Self::begin_both(lab, hosts, PERMITS, 0)
    }

    /// The same with other lines in the peers' tables.
    pub(crate) fn start_with(lab: &Lab, hosts: &Hosts, peer_lines: &str) -> Result<Self> {
        Self::begin_both(lab, hosts, peer_lines, USER)
    }

    fn begin_both(lab: &Lab, hosts: &Hosts, peer_lines: &str, user: u32) -> Result<Self> {
        hosts.net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let (alpha, bravo) = (&hosts.net.alpha, &hosts.net.bravo);
        Ok(Self {
            alpha: begin(lab, alpha, bravo, &credentials, peer_lines, user)?,
            bravo: begin(lab, bravo, alpha, &credentials, peer_lines, user)?,
        })
    }

    /// Runs `vmferry libvirt migrate` on alpha to its end.
    pub(crate) fn migrate(&self, options: &[&str]) -> Result<Outcome> {
        self.migrate_start(options)?.wait(MOVE_WITHIN)
    }

    /// The same in the background.
    pub(crate) fn migrate_start(&self, options: &[&str]) -> Result<VmferryRun> {
        let words = [&["libvirt", "migrate", "web1", "--to", "bravo", "--live"], options].concat();
        self.alpha.vmferry_start(&words)
    }

    /// What alpha's agent knows of its migrations of libvirt's.
    pub(crate) fn migrations(&self) -> Result<Vec<Value>> {
        Ok(self.alpha.api("/v1/libvirt")?.as_array().context("no list")?.clone())
    }

    /// Waits until one of them is as asked.
    pub(crate) fn wait_migration(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for(what, SHORT, || Ok(self.migrations()?.into_iter().find(&is_it)))
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
    host: &Host,
    peer: &Host,
    credentials: &Credentials,
    peer_lines: &str,
    user: u32,
) -> Result<Agent> {
    let spec = AgentSpec {
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
