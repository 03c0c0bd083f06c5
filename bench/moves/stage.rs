//! The two hosts with an agent on each, and all guests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::cpu;
use crate::guest::{Guest, Shape, Writer};
use crate::memory::Memory;
use crate::migration::Migration;
use crate::support::net::LINK;
use crate::support::process::{SHORT, run};
use crate::support::proof::field;
use crate::support::{Agent, AgentSpec, Credentials, Lab, Net, VmEntry};

/// What the certificates of a host look like to QEMU.
const QEMU_NAMES: [(&str, &str); 5] = [
    ("ca-cert.pem", "ca-cert.pem"),
    ("cert.pem", "server-cert.pem"),
    ("key.pem", "server-key.pem"),
    ("cert.pem", "client-cert.pem"),
    ("key.pem", "client-key.pem"),
];

/// Everything that takes part. Agents end before the memory goes.
pub(crate) struct Stage {
    pub(crate) alpha: Agent,
    pub(crate) bravo: Agent,
    pub(crate) net: Net,
    pub(crate) memory: Memory,
    /// One large disk.
    pub(crate) disk: Guest,
    /// Much RAM and no disk.
    pub(crate) ram: Guest,
    /// RAM and two disks.
    pub(crate) both: Guest,
    /// Two with a disk each.
    pub(crate) pair: [Guest; 2],
    pub(crate) writer: Writer,
    /// The same certificates for QEMU's own TLS, of alpha and of bravo.
    pub(crate) qemu_tls: [PathBuf; 2],
}

/// How large the guests of the first two tables are.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) disk_mib: u64,
    pub(crate) ram_mib: u64,
}

impl Stage {
    /// Starts both agents; no QEMU runs yet.
    pub(crate) fn set_up(lab: &Lab, sizes: Sizes) -> Result<Self> {
        let net = lab.two_hosts()?;
        for host in [&net.alpha, &net.bravo] {
            // By the route: what a program asks for itself may not be allowed.
            let cubic = ["route", "replace", "10.77.0.0/24", "dev", LINK, "congctl", "cubic"];
            run(Command::new("ip").args(["-n", host.namespace()]).args(cubic), SHORT)?;
        }
        let memory = Memory::mount(&lab.dir().join("memory"))?;
        let guest = |name, disks, disk_mib, ram_mib| {
            Guest::define(lab, &net, &memory, Shape { name, disks, disk_mib, ram_mib })
        };
        let disk = guest("disk", 1, sizes.disk_mib, None)?;
        let ram = guest("ram", 0, 0, Some(sizes.ram_mib))?;
        let both = guest("both", 2, 512, Some(1024))?;
        let pair = [guest("light", 1, 1024, None)?, guest("heavy", 1, 1024, None)?];
        let writer = Writer::define(lab, &net, &memory)?;

        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let issued = [credentials.issue("alpha")?, credentials.issue("bravo")?];
        let mut specs = [AgentSpec::default().peer(&net.bravo), AgentSpec::default().peer(&net.alpha)];
        let paused = [&disk, &ram, &both, &pair[0], &pair[1]];
        let vms = paused.map(|guest| [&guest.source, &guest.destination]);
        for [on_alpha, on_bravo] in vms.into_iter().chain([[&writer.alpha, &writer.bravo]]) {
            specs[0].vms.push(VmEntry::of(on_alpha));
            specs[1].vms.push(VmEntry::of(on_bravo));
        }
        let alpha = Agent::start(&lab.paths, &net.alpha, &specs[0], &issued[0])?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &specs[1], &issued[1])?;
        let qemu_tls = [for_qemu(&issued[0])?, for_qemu(&issued[1])?];
        Ok(Self { alpha, bravo, net, memory, disk, ram, both, pair, writer, qemu_tls })
    }

    /// Processor seconds of both agents, and of a guest's two QEMUs, so far.
    pub(crate) fn used(&self, guest: &Guest) -> Result<Used> {
        let agents = [&self.alpha, &self.bravo].into_iter().filter_map(Agent::pid).collect::<Vec<_>>();
        Ok(Used { agents: cpu::seconds(&agents)?, qemus: cpu::seconds(&guest.pids()?)? })
    }

    /// Waits for a migration's end; its report, if it moved the guest.
    pub(crate) fn moved(&self, migration: &Migration, agent: &Agent) -> Result<Value> {
        let report = migration.ended(agent)?;
        let outcome = field(&report, "/outcome")?;
        ensure!(outcome["result"] == "moved", "the guest was not moved: {}", outcome["cause"]);
        Ok(report)
    }

    /// The smallest round trip that the session has seen lately, in milliseconds.
    pub(crate) fn round_trip_ms(&self) -> Result<f64> {
        Ok(self.alpha.metrics()?.sum("vmferry_session_rtt_seconds", &[])? * 1e3)
    }
}

/// Processor seconds.
#[derive(Clone, Copy)]
pub(crate) struct Used {
    pub(crate) agents: f64,
    pub(crate) qemus: f64,
}

impl Used {
    pub(crate) fn since(self, before: Self) -> Self {
        Self { agents: self.agents - before.agents, qemus: self.qemus - before.qemus }
    }
}

/// A folder as `tls-creds-x509` wants it.
fn for_qemu(issued: &Path) -> Result<PathBuf> {
    let dir = issued.join("qemu");
    std::fs::create_dir(&dir)?;
    for (ours, theirs) in QEMU_NAMES {
        std::fs::copy(issued.join(ours), dir.join(theirs))?;
    }
    Ok(dir)
}
