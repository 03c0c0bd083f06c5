//! The configuration file, checked whole before any socket opens.
//!
//! One TOML file describes an agent: where it keeps its state, its port, its certificates,
//! the peers it knows and the virtual machines it may move. An error names the file, the
//! line, the key and what was expected. Knows nothing of what the values are used for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::net::identity::Identity;
use crate::rate::{self, Rate};

/// Where a configuration is looked for when none is named.
pub const DEFAULT_PATH: &str = "/etc/vmferry/vmferry.toml";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind.
    #[error("configuration {} is wrong", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and what was expected.
        source: Box<toml::de::Error>,
    },
    /// Valid by itself, but not together with the rest.
    #[error("configuration {}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, in TOML's dotted form.
        key: String,
        /// What is wrong with it and what to write instead.
        problem: String,
    },
}

/// A whole agent configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Journals live here and must survive a reboot.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// The local API's socket lives here.
    #[serde(default = "default_runtime_dir")]
    pub runtime_dir: PathBuf,
    /// Addresses of the one port that peers connect to. Empty: this agent only dials.
    #[serde(default = "default_listen")]
    pub listen: Vec<SocketAddr>,
    /// Certificates.
    pub tls: TlsConfig,
    /// The Prometheus listener; none when the table is absent.
    pub metrics: Option<MetricsConfig>,
    /// Deadlines.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// Other agents, by the name used in `--to`.
    #[serde(default, rename = "peer")]
    pub peers: BTreeMap<String, PeerConfig>,
    /// Virtual machines that may be sent or received, by name.
    #[serde(default, rename = "vm")]
    pub vms: BTreeMap<String, VmConfig>,
}

/// Certificate files. `vmferry certs host` writes all of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the authority that every peer's certificate must come from.
    pub ca: PathBuf,
    /// PEM file with this host's certificate chain.
    pub cert: PathBuf,
    /// PEM file with its private key, mode 0600.
    pub key: PathBuf,
    /// PEM file with revocation lists of the authority.
    pub crl: Option<PathBuf>,
}

/// Where Prometheus scrapes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// Address of the plain HTTP listener; keep it on a management network or loopback.
    pub listen: SocketAddr,
}

/// How long is waited for what. All in seconds.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Nothing received on a connection for this long means that it is dead (1–600).
    pub dead_peer_s: u64,
    /// A session goes on without a connection for this long (1–3600); then it ends, and with it
    /// every migration that has not been handed over.
    pub resume_s: u64,
    /// The same while a migration keeps its guest paused (1–3600): then it rolls back.
    pub resume_paused_s: u64,
    /// A fresh destination QEMU must offer its monitor within this time (1–600).
    pub qemu_start_s: u64,
    /// A mirror or RAM stream without any progress for this long fails the migration (5–3600).
    pub stall_s: u64,
    /// A `before_start` command may take this long; it is downtime (1–600).
    pub hook_s: u64,
    /// A destination that has loaded the guest waits this long for a lost source to return
    /// before it declares, durably, that the guest never ran there (1–86400).
    pub handover_s: u64,
    /// A migration whose guest may be either side's is shown as undecided after this long (1–3600).
    pub undecided_s: u64,
    /// An operator's decision is void unless the migration has taken it within this time (1–600).
    pub order_s: u64,
    /// `recover` waits this long for what another agent knows (1–600).
    pub recover_s: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            dead_peer_s: 5,
            resume_s: 60,
            resume_paused_s: 15,
            qemu_start_s: 60,
            stall_s: 60,
            hook_s: 30,
            handover_s: 120,
            undecided_s: 30,
            order_s: 10,
            recover_s: 5,
        }
    }
}

impl Deadlines {
    /// See [`Deadlines::dead_peer_s`].
    #[must_use]
    pub fn dead_peer(&self) -> Duration {
        Duration::from_secs(self.dead_peer_s)
    }
    /// See [`Deadlines::resume_s`].
    #[must_use]
    pub fn resume(&self) -> Duration {
        Duration::from_secs(self.resume_s)
    }
    /// See [`Deadlines::resume_paused_s`].
    #[must_use]
    pub fn resume_paused(&self) -> Duration {
        Duration::from_secs(self.resume_paused_s)
    }
    /// See [`Deadlines::qemu_start_s`].
    #[must_use]
    pub fn qemu_start(&self) -> Duration {
        Duration::from_secs(self.qemu_start_s)
    }
    /// See [`Deadlines::stall_s`].
    #[must_use]
    pub fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_s)
    }
    /// See [`Deadlines::hook_s`].
    #[must_use]
    pub fn hook(&self) -> Duration {
        Duration::from_secs(self.hook_s)
    }
    /// See [`Deadlines::handover_s`].
    #[must_use]
    pub fn handover(&self) -> Duration {
        Duration::from_secs(self.handover_s)
    }
    /// See [`Deadlines::undecided_s`].
    #[must_use]
    pub fn undecided(&self) -> Duration {
        Duration::from_secs(self.undecided_s)
    }
    /// See [`Deadlines::order_s`].
    #[must_use]
    pub fn order(&self) -> Duration {
        Duration::from_secs(self.order_s)
    }
    /// See [`Deadlines::recover_s`].
    #[must_use]
    pub fn recover(&self) -> Duration {
        Duration::from_secs(self.recover_s)
    }
}

/// Another agent.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// The subject alternative name in its certificate, in whatever case. Its address proves nothing.
    pub identity: Identity,
    /// `host:port` to dial. A peer without one can only come to us.
    pub address: Option<String>,
    /// VMs that this peer may send to us: names, `*` matches any run of characters.
    /// Empty, the default, permits none.
    #[serde(default)]
    pub receive: Vec<String>,
    /// What may be sent to this peer in a second, over all migrations: `"100MiB/s"`. None for no
    /// limit. `vmferry limit --peer` changes it until the agent stops.
    #[serde(default, deserialize_with = "rate::from_text")]
    pub limit: Option<Rate>,
    /// Connections that the streams to and from this peer are spread over, 1 to 8: for links that are
    /// faster than one core can encrypt. Both sides should have the same; a peer refuses more than
    /// twice its own number and two, and then there are fewer.
    #[serde(default = "one")]
    pub lanes: usize,
}

/// One virtual machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Unix socket of a QMP monitor that only vmferry uses (a monitor serves one client).
    pub qmp: PathBuf,
    /// QEMU's own log on this host, if it has one: its last lines are told when it ends of itself.
    /// Where QEMU's standard error is a file, or its unit has a journal, that is found without.
    pub log: Option<PathBuf>,
    /// How to start a fresh QEMU that waits for this VM (`-incoming defer -S`).
    pub start: Option<Start>,
    /// Command run on the destination when the source has handed over and before the guest
    /// starts: move an address, switch a bridge port. Its time is downtime; its failure is
    /// reported and does not keep the guest from starting. It runs again when the agent died
    /// while it was at work, so it must not mind that.
    #[serde(default)]
    pub before_start: Vec<String>,
}

/// How a destination's QEMU is started.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Start {
    /// A systemd unit, started with `systemctl start` and stopped with `systemctl stop`.
    Unit(String),
    /// A command and its arguments. It may stay in the foreground or put itself in the
    /// background; its QEMU must not end with the agent.
    Command(Vec<String>),
}

fn default_state_dir() -> PathBuf {
    "/var/lib/vmferry".into()
}
fn default_runtime_dir() -> PathBuf {
    "/run/vmferry".into()
}
fn default_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, crate::config::DEFAULT_PORT))]
}

/// The port that agents listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 9907;

/// Longest that a `before_start` command may take.
pub const HOOK_S_MAX: u64 = 600;

/// Most lanes that a peer may have; each may hold as much memory as a session.
pub const LANES_MAX: usize = 8;

/// The longest path of a unix socket, in bytes: `sun_path` of unix(7) without its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

impl Config {
    /// Reads and checks a configuration file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// [`ConfigError`], with the file, the line and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a configuration that came from `path`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check().map_err(|(key, problem)| ConfigError::Value { path: path.into(), key, problem })?;
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        config.check_sockets().map_err(|(key, problem)| ConfigError::Value {
            path: path.into(),
            key,
            problem,
        })?;
        Ok(config)
    }

    /// The local API's socket.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.runtime_dir.join("vmferry.sock")
    }

    /// The peer whose certificate names `identity`, with the name we gave it.
    #[must_use]
    pub fn peer_by_identity(&self, identity: &Identity) -> Option<(&str, &PeerConfig)> {
        self.peers.iter().find(|(_, p)| p.identity == *identity).map(|(n, p)| (n.as_str(), p))
    }

    /// Checks the configuration that came from `path` against the certificate: who would be a peer of
    /// itself would move its virtual machines onto themselves.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn check_own(&self, own: &Identity, path: &Path) -> Result<(), ConfigError> {
        let Some((name, _)) = self.peer_by_identity(own) else { return Ok(()) };
        let problem = format!("\"{own}\" is this host's own identity; write that of the other host");
        Err(ConfigError::Value { path: path.into(), key: format!("peer.{name}.identity"), problem })
    }

    fn check(&self) -> Result<(), (String, String)> {
        let mut seen = BTreeMap::new();
        for (name, peer) in &self.peers {
            check_peer(name, peer)?;
            if let Some(other) = seen.insert(&peer.identity, name) {
                let problem = format!("\"{}\" is already the identity of peer {other}", peer.identity);
                return Err((format!("peer.{name}.identity"), problem));
            }
        }
        for (name, vm) in &self.vms {
            check_vm(name, vm)?;
        }
        self.deadlines.check()
    }

    /// Whether every unix socket's path is short enough for the kernel.
    fn check_sockets(&self) -> Result<(), (String, String)> {
        // Of an NBD server's listening socket, before its name is removed.
        let nbd = self.runtime_dir.join("nbd").join(uuid::Uuid::nil().to_string());
        let monitors = self.vms.iter().map(|(name, vm)| (format!("vm.{name}.qmp"), vm.qmp.clone()));
        for (key, path) in std::iter::once(("runtime_dir".to_owned(), nbd)).chain(monitors) {
            let bytes = path.as_os_str().len();
            if bytes > SOCKET_PATH_BYTES_MAX {
                let path = path.display();
                let problem =
                    format!("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, {path} has {bytes}");
                return Err((key, problem));
            }
        }
        Ok(())
    }

    fn resolve(&mut self, base: &Path) {
        let against = |p: &mut PathBuf| *p = base.join(&*p);
        against(&mut self.state_dir);
        against(&mut self.runtime_dir);
        against(&mut self.tls.ca);
        against(&mut self.tls.cert);
        against(&mut self.tls.key);
        self.tls.crl.as_mut().map(against);
        for vm in self.vms.values_mut() {
            against(&mut vm.qmp);
            vm.log.as_mut().map(against);
        }
    }
}

impl Deadlines {
    fn check(&self) -> Result<(), (String, String)> {
        let ranges = [
            ("dead_peer_s", self.dead_peer_s, 1, 600),
            ("resume_s", self.resume_s, 1, 3600),
            ("resume_paused_s", self.resume_paused_s, 1, 3600),
            ("qemu_start_s", self.qemu_start_s, 1, 600),
            ("stall_s", self.stall_s, 5, 3600),
            ("hook_s", self.hook_s, 1, HOOK_S_MAX),
            ("handover_s", self.handover_s, 1, 86_400),
            ("undecided_s", self.undecided_s, 1, 3600),
            ("order_s", self.order_s, 1, 600),
            ("recover_s", self.recover_s, 1, 600),
        ];
        for (key, value, low, high) in ranges {
            if value < low || value > high {
                let problem = format!("{value} is outside {low}–{high} seconds");
                return Err((format!("deadlines.{key}"), problem));
            }
        }
        Ok(())
    }
}

fn one() -> usize {
    1
}

fn check_peer(name: &str, peer: &PeerConfig) -> Result<(), (String, String)> {
    if let Some(address) = &peer.address {
        let port = address.rsplit_once(':').and_then(|(_, p)| p.parse::<u16>().ok());
        if port.is_none_or(|p| p == 0) {
            let problem = format!("\"{address}\" is not host:port, as in \"10.0.0.2:{DEFAULT_PORT}\"");
            return Err((format!("peer.{name}.address"), problem));
        }
    }
    if !(1..=LANES_MAX).contains(&peer.lanes) {
        let problem = format!("{} is outside 1–{LANES_MAX}", peer.lanes);
        return Err((format!("peer.{name}.lanes"), problem));
    }
    Ok(())
}

fn check_vm(name: &str, vm: &VmConfig) -> Result<(), (String, String)> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(legal) {
        let problem = "a VM's name is 1–128 letters, digits, '-', '_' or '.'";
        return Err((format!("vm.{name}"), problem.into()));
    }
    match &vm.start {
        Some(Start::Command(words)) if words.is_empty() => {
            Err((format!("vm.{name}.start.command"), "is empty; write the program and its arguments".into()))
        }
        _ => Ok(()),
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters.
#[must_use]
pub fn glob_matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[tls]
ca = "ca-cert.pem"
cert = "cert.pem"
key = "key.pem"
[peer.bravo]
identity = "bravo"
address = "10.0.0.2:9907"
receive = ["web*"]
[vm.web1]
qmp = "/run/qemu/web1.qmp"
start = { command = ["start", "web1"] }
"#;

    fn error(text: &str) -> String {
        let e = Config::parse(text, Path::new("/etc/vmferry/vmferry.toml")).unwrap_err();
        let source = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
        format!("{e}: {source}")
    }

    #[test]
    fn a_good_file_is_taken_and_its_paths_are_relative_to_its_folder() {
        let c = Config::parse(GOOD, Path::new("/etc/vmferry/vmferry.toml")).unwrap();
        assert_eq!(c.tls.key, Path::new("/etc/vmferry/key.pem"));
        assert_eq!(c.vms["web1"].start, Some(Start::Command(vec!["start".into(), "web1".into()])));
        assert_eq!(c.peer_by_identity(&"BRAVO".parse().unwrap()).unwrap().0, "bravo");
        assert_eq!(c.listen[0].port(), DEFAULT_PORT);
    }

    #[test]
    fn each_mistake_names_its_place() {
        let cases = [
            (GOOD.replace("receive", "recieve"), "recieve"),
            (GOOD.replace("10.0.0.2:9907", "10.0.0.2"), "peer.bravo.address"),
            (GOOD.replace("identity = \"bravo\"", "identity = \"\""), "`` can't be a host's identity"),
            (GOOD.replace("identity = \"bravo\"", "identity = \"10.0.0.2\""), "line 7"),
            (format!("{GOOD}\n[peer.charlie]\nidentity = \"Bravo\"\n"), "already the identity of peer bravo"),
            (GOOD.replace("[\"start\", \"web1\"]", "[]"), "vm.web1.start.command"),
            (format!("{GOOD}\n[deadlines]\nstall_s = 1\n"), "deadlines.stall_s"),
            (format!("{GOOD}\n[peer.charlie]\nidentity = \"bravo\"\n"), "already the identity of peer bravo"),
            (GOOD.replace("receive = [\"web*\"]", "limit = \"fast\""), "\"fast\" is no rate"),
            (GOOD.replace("receive = [\"web*\"]", "limit = \"1K\""), "too few"),
            (GOOD.replace("receive = [\"web*\"]", "lanes = 0"), "peer.bravo.lanes: 0 is outside 1–8"),
            (GOOD.replace("receive = [\"web*\"]", "lanes = 9"), "peer.bravo.lanes"),
            (GOOD.replace("ca = \"ca-cert.pem\"\n", ""), "missing field `ca`"),
            (GOOD.replace("/run/qemu", &"/long".repeat(20)), "vm.web1.qmp: a socket's path has at most 107"),
            (format!("runtime_dir = \"/run/{}\"\n{GOOD}", "long".repeat(20)), "runtime_dir: a socket's path"),
        ];
        for (text, expected) in cases {
            let got = error(&text);
            assert!(got.contains(expected), "{expected:?} not in {got:?}");
        }
    }

    #[test]
    fn an_identity_is_the_same_in_whatever_case_and_never_the_hosts_own() {
        let path = Path::new("/etc/vmferry/vmferry.toml");
        let config = Config::parse(&GOOD.replace("\"bravo\"", "\"Bravo.Example\""), path).unwrap();
        assert_eq!(config.peers["bravo"].identity.as_str(), "bravo.example");
        assert!(config.peer_by_identity(&"BRAVO.example".parse().unwrap()).is_some());
        assert!(config.check_own(&"alpha".parse().unwrap(), path).is_ok());
        let own = config.check_own(&"bravo.Example".parse().unwrap(), path).unwrap_err().to_string();
        assert!(own.contains("peer.bravo.identity: \"bravo.example\" is this host's own"), "{own}");
    }

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("web*", "web1", true),
            ("web*", "db1", false),
            ("*", "anything", true),
            ("web1", "web1", true),
            ("web1", "web10", false),
            ("*-prod-*", "a-prod-b", true),
            ("ab*ba", "aba", false),
            ("", "x", false),
        ] {
            assert_eq!(glob_matches(pattern, name), expected, "{pattern} against {name}");
        }
    }
}
