//! Two hosts, a domain that is moved to and fro, and an agent on each. Each move is measured, whatever its
//! direction: the hosts are alike.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agents::Agents;
use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER, virsh_ok, virsh_start};
use crate::cpu::Group;
use crate::relay::{self, Kit};
use crate::support::agent::PORT;
use crate::support::net::TcpConnection;
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::{DiskFormat, Host, Lab, Version, VmSpec, Way as Direction};
use crate::way::Way;

const MOVE_WITHIN: Duration = Duration::from_secs(300);
/// The guest has its blocks below this.
const CONTENT_FROM_MIB: u64 = 16;
/// So long that no page is written again while it is moved.
const REST_MS: u64 = 3_600_000;

/// One move.
#[derive(Clone)]
pub(crate) struct Sample {
    pub(crate) cpu_s: f64,
    pub(crate) wall_s: f64,
    /// Between the hosts, while it went on.
    pub(crate) connections: f64,
}

/// Everything that takes part.
pub(crate) struct Stage<'a> {
    usage: &'a Group,
    hosts: Hosts,
    domain: Domain,
    agents: Agents,
    kit: Kit,
    copies: bool,
    /// Where the next move goes.
    next: Direction,
}

impl<'a> Stage<'a> {
    pub(crate) fn set_up(
        lab: &Lab,
        usage: &'a Group,
        relays: &Path,
        ram_mib: u32,
        disk_mib: u32,
    ) -> Result<Self> {
        let hosts = Hosts::start_of(lab, QEMU_USER, [Libvirt::V11; 2])?;
        let kit = Kit { programs: relays.canonicalize()?, keys: lab.dir().join("ssh") };
        relay::keys(&kit)?;
        let copies = disk_mib > 0;
        let spec = VmSpec {
            disks: if copies { vec![DiskFormat::Raw] } else { Vec::new() },
            disk_mib,
            memory_mib: ram_mib + 128,
            rate: 20,
            dirty_mib: ram_mib,
            dirty_rest_ms: REST_MS,
            ..VmSpec::new("web1", Version::V10)
        };
        // There is no wall: what is compared with goes by ports of its own.
        let agents = Agents::start_open(lab, &hosts)?;
        for host in [&hosts.net.alpha, &hosts.net.bravo] {
            relay::libvirt_pki(host, &host.dir.join("tls"))?;
            listen(host)?;
        }
        let domain = Domain::boot_with(lab, &hosts, &spec, |[source, _]| {
            if copies { fill(&source.disk(0), u64::from(disk_mib)) } else { Ok(()) }
        })?;
        let stage = Self { usage, hosts, domain, agents, kit, copies, next: Direction::ToBravo };
        stage.wait_filled(ram_mib)?;
        Ok(stage)
    }

    /// All of the RAM that is to be moved has something in it.
    fn wait_filled(&self, mib: u32) -> Result<()> {
        wait_for("the guest's RAM to be filled", LONG, || {
            let said = virsh_ok(&self.hosts.net.alpha, &["dommemstat", "web1"])?;
            let rss = said.lines().find_map(|line| line.strip_prefix("rss "));
            let kib: u64 = rss.context("libvirt tells no rss")?.trim().parse()?;
            Ok((kib / 1024 >= u64::from(mib)).then_some(()))
        })
    }

    /// Moves the domain once.
    pub(crate) fn move_by(&mut self, way: Way) -> Result<Sample> {
        let direction = self.next;
        let net = &self.hosts.net;
        let (from, to) = match direction {
            Direction::ToBravo => (&net.alpha, &net.bravo),
            Direction::ToAlpha => (&net.bravo, &net.alpha),
        };
        let relay = match way {
            Way::Relay(relay) => Some(relay.start(&self.kit, from, to)?),
            _ => None,
        };
        let (before, began) = (self.usage.seconds()?, Instant::now());
        let mut running = if way == Way::Vmferry {
            let options: &[&str] = if self.copies { &["--p2p", "--copy-storage-all"] } else { &["--p2p"] };
            self.agents.begin_move(direction, "web1", options)?
        } else {
            let mut words = way.words(&to.name, self.copies);
            words.push("--domain=web1".to_owned());
            virsh_start(from, &words.iter().map(String::as_str).collect::<Vec<_>>())?
        };
        let mut most = 0;
        while running.ended()?.is_none() && began.elapsed() < MOVE_WITHIN {
            most = most.max(connections(from, way)?);
            std::thread::sleep(Duration::from_millis(200));
        }
        let outcome = running.wait(Duration::from_secs(1))?;
        let sample = Sample {
            wall_s: began.elapsed().as_secs_f64(),
            cpu_s: self.usage.seconds()? - before,
            connections: most as f64,
        };
        drop(relay);
        ensure!(outcome.code == 0, "{outcome:?}");
        self.domain.goes_on(direction).context("the guest does not go on")?;
        self.next = match direction {
            Direction::ToBravo => Direction::ToAlpha,
            Direction::ToAlpha => Direction::ToBravo,
        };
        Ok(sample)
    }
}

/// Those of the agents' own session are vmferry's.
fn connections(host: &Host, way: Way) -> Result<usize> {
    let all = host.tcp_connections()?;
    let counts = |c: &&TcpConnection| {
        c.state == "ESTAB" && (way == Way::Vmferry || ![c.local_port, c.peer_port].contains(&PORT))
    };
    Ok(all.iter().filter(counts).count())
}

/// Starts libvirt's daemon anew, so that it listens on the network.
fn listen(host: &Host) -> Result<()> {
    let script = "printf '%s\\n' 'listen_tcp = 1' 'auth_tcp = \"none\"' 'listen_tls = 1' 'auth_tls = \"none\"' \
                  >>/etc/libvirt/libvirtd.conf && kill $(cat /run/libvirtd.pid)";
    std::fs::write(host.dir.join("libvirtd.words"), "--listen")?;
    run(host.command("bash").arg("-c").arg(script), SHORT)?;
    wait_for(&format!("libvirtd to listen on {}", host.name), SHORT, || {
        let ports = host.listening_ports()?;
        Ok((ports.contains(&16509) && ports.contains(&16514)).then_some(()))
    })
}

/// Puts content that cannot be shortened into three quarters of a disk.
fn fill(disk: &Path, mib: u64) -> Result<()> {
    let mut file = File::options().write(true).open(disk)?;
    file.seek(SeekFrom::Start(CONTENT_FROM_MIB << 20))?;
    let mut random = File::open("/dev/urandom")?.take((mib << 20) * 3 / 4);
    let mut chunk = vec![0; 1 << 20];
    loop {
        let read = random.read(&mut chunk)?;
        if read == 0 {
            return Ok(());
        }
        file.write_all(&chunk[..read])?;
    }
}
