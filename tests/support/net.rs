//! Two hosts as network namespaces joined by a veth pair, and what can happen to the link between
//! them. Knows no agent. Rules that let packets through or not are in `firewall`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::firewall;
use super::process::{SHORT, run, run_any};

/// The one interface of each host.
pub const LINK: &str = "link0";

/// A host with a link to each of the two: by whose it is, its address there, and that of the host.
pub const THIRD_LINKS: [(&str, &str, &str); 2] =
    [("alpha", "10.79.1.2", "10.79.1.1"), ("bravo", "10.79.2.2", "10.79.2.1")];

/// One host: a network namespace and a folder.
#[derive(Debug, Clone)]
pub struct Host {
    /// "alpha" or "bravo": also its identity in certificates.
    pub name: String,
    /// Its folder in the lab.
    pub dir: PathBuf,
    /// Its IPv4 address.
    pub v4: String,
    /// Its IPv6 address.
    pub v6: String,
    namespace: String,
    /// The process whose view of the file systems is this host's; none: that of the machine.
    mounts_of: Option<u32>,
}

impl Host {
    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Some(pid) = self.mounts_of else {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.namespace]).arg(program);
            return command;
        };
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid.to_string(), "-m", "-n"]).arg(program);
        command
    }

    /// The same host with the file systems as a process of it sees them.
    pub fn with_mounts_of(&self, pid: u32) -> Self {
        Self { mounts_of: Some(pid), ..self.clone() }
    }

    /// The name of its namespace, for `ip netns exec`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Calls `make` with the network of this host: a socket made there stays there.
    ///
    /// # Errors
    /// The namespace cannot be entered, or those of `make`.
    pub fn inside<T: Send>(&self, make: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        let namespace = fs::File::open(Path::new("/run/netns").join(&self.namespace))?;
        // The namespace belongs to the thread that entered it, so one that ends with the call.
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                make()
            });
            thread.join()
        });
        match made {
            Ok(made) => made.with_context(|| format!("on host {}", self.name)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The TCP connections of this host, as `state local peer`; without listeners.
    pub fn tcp_connections(&self) -> Result<Vec<TcpConnection>> {
        let text = run(self.command("ss").args(["-tnH"]), SHORT)?;
        Ok(text.lines().filter_map(TcpConnection::parse).collect())
    }

    /// What this host has sent over the link, in bytes, by its interface.
    pub fn sent_bytes(&self) -> Result<u64> {
        let counters = run(self.command("ip").args(["-s", "-j", "link", "show", LINK]), SHORT)?;
        let counters: serde_json::Value = serde_json::from_str(&counters)?;
        counters[0]["stats64"]["tx"]["bytes"].as_u64().context("no counter")
    }

    /// The kernel ends every TCP connection from or to this port with a reset. Whether there was one.
    pub fn reset_tcp(&self, port: u16) -> Result<bool> {
        let filter = format!("( dport = :{port} or sport = :{port} )");
        // Its exit code tells nothing: a connection may be gone by itself.
        let killed = run_any(self.command("ss").args(["-K", "-tnH", &filter]), SHORT)?;
        Ok(!killed.stdout.trim().is_empty())
    }

    /// The TCP ports on which something listens on this host.
    pub fn listening_ports(&self) -> Result<Vec<u16>> {
        let text = run(self.command("ss").args(["-tlnH"]), SHORT)?;
        let mut ports: Vec<u16> =
            text.lines().filter_map(|l| port_of(l.split_whitespace().nth(3)?)).collect();
        ports.sort_unstable();
        ports.dedup();
        Ok(ports)
    }

    fn ip(&self, words: &[&str]) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.namespace]).args(words), SHORT).map(drop)
    }

    fn set_up(&self) -> Result<()> {
        self.ip(&["link", "set", "lo", "up"])?;
        // Else a cut link would lose its IPv6 address for good.
        run(
            self.command("sysctl").args(["-qw", &format!("net.ipv6.conf.{LINK}.keep_addr_on_down=1")]),
            SHORT,
        )?;
        self.ip(&["addr", "add", &format!("{}/24", self.v4), "dev", LINK])?;
        self.ip(&["addr", "add", &format!("{}/64", self.v6), "dev", LINK, "nodad"])?;
        self.ip(&["link", "set", LINK, "up"])
    }
}

/// One line of `ss -tn`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpConnection {
    /// `ESTAB`, `SYN-SENT`, ...
    pub state: String,
    /// Local port.
    pub local_port: u16,
    /// The peer's port.
    pub peer_port: u16,
}

impl TcpConnection {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Some(Self {
            state: (*words.first()?).to_owned(),
            local_port: port_of(words.get(3)?)?,
            peer_port: port_of(words.get(4)?)?,
        })
    }
}

fn port_of(address: &str) -> Option<u16> {
    address.rsplit(':').next()?.parse().ok()
}

/// Which way packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From alpha, the source, to bravo.
    ToBravo,
    /// From bravo, the destination, to alpha.
    ToAlpha,
}

/// The two hosts and their link. The lab's janitor removes them.
#[derive(Debug)]
pub struct Net {
    /// 10.77.0.1, fd77::1.
    pub alpha: Host,
    /// 10.77.0.2, fd77::2.
    pub bravo: Host,
}

impl Net {
    pub(super) fn join(dir: &Path, prefix: &str) -> Result<Self> {
        let alpha = make_host(dir, prefix, "alpha", 1)?;
        let bravo = make_host(dir, prefix, "bravo", 2)?;
        let peer = ["type", "veth", "peer", "name", LINK, "netns", &bravo.namespace];
        run(Command::new("ip").args(["link", "add", LINK, "netns", &alpha.namespace]).args(peer), SHORT)?;
        alpha.set_up()?;
        bravo.set_up()?;
        Ok(Self { alpha, bravo })
    }

    /// A third host, "charlie", that has a link to alpha alone. The lab's janitor removes it.
    pub fn third(&self, lab_dir: &Path) -> Result<Host> {
        const SECOND_LINK: &str = "link1";
        let prefix = self.alpha.namespace.strip_suffix("alpha").unwrap_or_default();
        let mut charlie = make_host(lab_dir, prefix, "charlie", 3)?;
        (charlie.v4, charlie.v6) = ("10.78.0.2".to_owned(), "fd78::2".to_owned());
        let peer = ["type", "veth", "peer", "name", LINK, "netns", &charlie.namespace];
        let of_alpha = ["link", "add", SECOND_LINK, "netns", &self.alpha.namespace];
        run(Command::new("ip").args(of_alpha).args(peer), SHORT)?;
        charlie.set_up()?;
        self.alpha.ip(&["addr", "add", "10.78.0.1/24", "dev", SECOND_LINK])?;
        self.alpha.ip(&["link", "set", SECOND_LINK, "up"])?;
        Ok(charlie)
    }

    /// A host "witness" that has a link to each of the two, and joins them not. The lab's janitor removes it.
    pub fn between(&self, lab_dir: &Path) -> Result<Host> {
        let prefix = self.alpha.namespace.strip_suffix("alpha").unwrap_or_default();
        let mut witness = make_host(lab_dir, prefix, "witness", 4)?;
        witness.v4 = THIRD_LINKS[0].1.to_owned();
        witness.ip(&["link", "set", "lo", "up"])?;
        for (host, (name, its, hosts)) in [&self.alpha, &self.bravo].into_iter().zip(THIRD_LINKS) {
            let link = format!("to-{name}");
            let peer = ["type", "veth", "peer", "name", "to-witness", "netns", &host.namespace];
            run(
                Command::new("ip").args(["link", "add", &link, "netns", &witness.namespace]).args(peer),
                SHORT,
            )?;
            witness.ip(&["addr", "add", &format!("{its}/24"), "dev", &link])?;
            witness.ip(&["link", "set", &link, "up"])?;
            host.ip(&["addr", "add", &format!("{hosts}/24"), "dev", "to-witness"])?;
            host.ip(&["link", "set", "to-witness", "up"])?;
        }
        Ok(witness)
    }

    /// From now on only TCP to `port`, opened in the ways given, crosses the link; the rest is
    /// dropped without an answer and counted.
    pub fn only_port(&self, port: u16, ways: &[Way]) -> Result<()> {
        let opens = |way| ways.contains(&way).then_some(port);
        firewall::wall(&self.bravo, opens(Way::ToBravo), port)?;
        firewall::wall(&self.alpha, opens(Way::ToAlpha), port)
    }

    /// How many packets the walls of `only_port` have dropped.
    pub fn refused_packets(&self) -> Result<u64> {
        Ok(firewall::refused(&self.alpha)? + firewall::refused(&self.bravo)?)
    }

    /// Silently drops every packet, as a failed switch would; both ends still see a carrier.
    pub fn cut(&self) -> Result<()> {
        self.drop_way(Way::ToAlpha)?;
        self.drop_way(Way::ToBravo)
    }

    /// Silently drops every packet in one way only.
    pub fn drop_way(&self, way: Way) -> Result<()> {
        firewall::black_hole(self.receiver(way))
    }

    /// Undoes `cut` and `drop_way`.
    pub fn restore(&self) -> Result<()> {
        firewall::clear_black_hole(&self.alpha)?;
        firewall::clear_black_hole(&self.bravo)
    }

    /// Pulls the cable: both ends lose their carrier.
    pub fn pull_cable(&self) -> Result<()> {
        self.alpha.ip(&["link", "set", LINK, "down"])
    }

    /// Plugs it in again.
    pub fn plug_cable(&self) -> Result<()> {
        self.alpha.ip(&["link", "set", LINK, "up"])
    }

    /// Answers everything that reaches the one port of bravo with a reset, as a NAT that forgot
    /// its state would, until `restore`.
    pub fn reset_connections(&self, port: u16) -> Result<()> {
        firewall::resets(&self.bravo, port)
    }

    /// Limits both ways of the link, in megabits per second: a migration that takes a while.
    pub fn limit_mbit(&self, mbit: u32) -> Result<()> {
        self.limit(mbit, "512kb")
    }

    /// The same with a shallow queue, in which what is small does not wait long behind what is large.
    pub fn limit_mbit_shallow(&self, mbit: u32) -> Result<()> {
        self.limit(mbit, "16kb")
    }

    fn limit(&self, mbit: u32, burst: &str) -> Result<()> {
        let rate = format!("{mbit}mbit");
        let words = ["root", "tbf", "rate", &rate, "burst", burst, "latency", "50ms"];
        for host in [&self.alpha, &self.bravo] {
            let of_link = ["-n", &host.namespace, "qdisc", "replace", "dev", LINK];
            run(Command::new("tc").args(of_link).args(words), SHORT)?;
        }
        Ok(())
    }

    /// Takes the limit away.
    pub fn no_limit(&self) -> Result<()> {
        for host in [&self.alpha, &self.bravo] {
            run(
                Command::new("tc").args(["-n", &host.namespace, "qdisc", "del", "dev", LINK, "root"]),
                SHORT,
            )?;
        }
        Ok(())
    }

    // Packets are dropped where they arrive: dropped where they leave, the program that sends them
    // would be told, which no network does.
    fn receiver(&self, way: Way) -> &Host {
        match way {
            Way::ToBravo => &self.bravo,
            Way::ToAlpha => &self.alpha,
        }
    }
}

fn make_host(dir: &Path, prefix: &str, name: &str, number: u8) -> Result<Host> {
    let host = Host {
        name: name.to_owned(),
        dir: dir.join(name),
        v4: format!("10.77.0.{number}"),
        v6: format!("fd77::{number}"),
        namespace: format!("{prefix}{name}"),
        mounts_of: None,
    };
    fs::create_dir(&host.dir).with_context(|| format!("cannot make {}", host.dir.display()))?;
    run(Command::new("ip").args(["netns", "add", &host.namespace]), SHORT)?;
    Ok(host)
}
