//! The configuration file, checked whole before any socket opens.
//!
//! One TOML file describes an agent: where it keeps its state, its port, its certificates,
//! the peers it knows and the virtual machines it may move. An error names the file, the
//! line, the key and what was expected. Knows nothing of what the values are used for.

mod api;
mod create;
mod credential;
mod deadlines;
mod drain;
mod explain;
mod forward;
mod libvirt;
mod peer;
mod sandbox;
mod template;
mod traces;
mod vm;
mod witness;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::net::identity::Identity;
use crate::net::naming::TrustDomain;
use crate::net::tls::KeyExchange;

use explain::{Mistake, explain};

pub use api::ApiConfig;
pub use create::{CreateConfig, CreateFormat, Preallocation};
pub use deadlines::{Deadlines, HOOK_S_MAX};
pub use drain::DrainConfig;
pub use forward::{
    ForwardConfig, LocalSocket, ModeError, NameError, SOCKET_PATH_BYTES_MAX, SocketError, SocketMode,
    TARGET_BYTES_MAX, TargetConfig, TargetName, TargetPattern,
};
pub use libvirt::LibvirtConfig;
pub use peer::{DEFAULT_PORT, LANES_MAX, PeerConfig, glob_matches};
pub use sandbox::SandboxConfig;
pub use traces::{CollectorUrl, CollectorUrlError, TracesConfig};
pub use vm::{Start, VmConfig};
pub use witness::{Endpoint, EndpointError, WitnessConfig};

/// Where a configuration is looked for when none is named.
pub const DEFAULT_PATH: &str = "/etc/vmferry/vmferry.toml";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration {}{}: {}{problem}", path.display(), line_text(*line), key_text(key))]
    Parse {
        path: PathBuf,
        line: Option<usize>,
        /// The key, in TOML's dotted form; empty where there is none.
        key: String,
        problem: String,
    },
    #[error("configuration {}: {key}: {problem}", path.display())]
    Value {
        path: PathBuf,
        /// The key, in TOML's dotted form.
        key: String,
        problem: String,
    },
}

fn line_text(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(", line {line}"))
}

fn key_text(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("{key}: ") }
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
    pub tls: TlsConfig,
    /// The Prometheus listener; none when the table is absent.
    pub metrics: Option<MetricsConfig>,
    /// The collector of traces; none when the table is absent.
    pub traces: Option<TracesConfig>,
    #[serde(default)]
    pub deadlines: Deadlines,
    /// Other agents, by the name used in `--to`.
    #[serde(default, rename = "peer")]
    pub peers: BTreeMap<String, PeerConfig>,
    /// Virtual machines that may be sent or received, by name.
    #[serde(default, rename = "vm")]
    pub vms: BTreeMap<String, VmConfig>,
    /// What holds for those of these names that have no table of their own, by pattern.
    #[serde(skip)]
    pub templates: BTreeMap<String, VmConfig>,
    /// How images are made for guests that come here; none are without it.
    pub create: Option<CreateConfig>,
    /// Sockets of this host that are carried to peers, by name.
    #[serde(default, rename = "forward")]
    pub forwards: BTreeMap<String, ForwardConfig>,
    /// Where this host's libvirt is.
    #[serde(default)]
    pub libvirt: LibvirtConfig,
    /// What the agent takes from itself.
    #[serde(default)]
    pub sandbox: SandboxConfig,
    /// Who may do what through the local API.
    #[serde(default)]
    pub api: ApiConfig,
    /// How much of the audit record is kept.
    #[serde(default)]
    pub audit: AuditConfig,
    /// How many VMs leave at once when this host is emptied.
    #[serde(default)]
    pub drain: DrainConfig,
    /// What peers may be connected to on this host, by name.
    #[serde(default, rename = "target")]
    pub targets: BTreeMap<String, TargetConfig>,
    /// The etcd that is asked when one of two hosts is lost; none when the table is absent.
    pub witness: Option<WitnessConfig>,
}

/// Certificate files. `vmferry certs host` writes all of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the authority that every peer's certificate must come from; several while one replaces
    /// another.
    pub ca: PathBuf,
    /// PEM file with this host's certificate chain.
    pub cert: PathBuf,
    /// PEM file with its private key, mode 0600.
    pub key: PathBuf,
    /// PEM file with revocation lists of the authority.
    pub crl: Option<PathBuf>,
    /// Whether connections may have a key exchange without a post-quantum part.
    #[serde(default)]
    pub key_exchange: KeyExchange,
    /// With it hosts are known by the URI names `vmferry://TRUST_DOMAIN/host/NAME` in their certificates, without
    /// it by a DNS name.
    pub trust_domain: Option<TrustDomain>,
}

impl TlsConfig {
    /// The files that it names, each with its key.
    fn files(&mut self) -> impl Iterator<Item = (&'static str, &mut PathBuf)> {
        let files = [("ca", &mut self.ca), ("cert", &mut self.cert), ("key", &mut self.key)];
        files.into_iter().chain(self.crl.as_mut().map(|crl| ("crl", crl)))
    }
}

/// Where Prometheus scrapes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// Address of the plain HTTP listener; keep it on a management network or loopback.
    pub listen: SocketAddr,
}

/// The audit record.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConfig {
    /// Files of 16 MiB that are kept.
    #[serde(default = "default_audit_files")]
    pub files: usize,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { files: default_audit_files() }
    }
}

fn default_audit_files() -> usize {
    64
}
fn default_state_dir() -> PathBuf {
    "/var/lib/vmferry".into()
}
fn default_runtime_dir() -> PathBuf {
    "/run/vmferry".into()
}
fn default_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, DEFAULT_PORT))]
}

impl Config {
    /// Reads and checks a configuration file. Relative paths in it are relative to its folder.
    /// Errors: [`ConfigError`], with the file, the line and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        Self::parse_with(&text, path, credentials.as_deref())
    }

    /// Checks the text of a configuration that came from `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::parse_with(text, path, None)
    }

    /// The same, with the folder in which systemd has put this service's credentials.
    fn parse_with(text: &str, path: &Path, credentials: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| {
            let Mistake { line, key, problem } = explain(text, &error);
            ConfigError::Parse { path: path.into(), line, key, problem }
        })?;
        config.templates = template::split(&mut config.vms);
        config.check().map_err(|(key, problem)| ConfigError::Value { path: path.into(), key, problem })?;
        let found = config.find_credentials(credentials);
        found.map_err(|(key, problem)| ConfigError::Value { path: path.into(), key, problem })?;
        config.resolve(path.parent().unwrap_or(Path::new(".")));
        config.check_sockets().map_err(|(key, problem)| ConfigError::Value {
            path: path.into(),
            key,
            problem,
        })?;
        Ok(config)
    }

    /// The local API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.runtime_dir.join("vmferry.sock")
    }

    /// The audit record's folder.
    #[must_use]
    pub fn audit_folder(&self) -> PathBuf {
        self.state_dir.join("audit")
    }

    /// Whether the agent runs programs of the configuration's choosing, a QEMU among them, which have whatever
    /// it has taken from itself taken from them as well.
    pub fn runs_commands(&self) -> bool {
        self.vm_tables().any(|vm| matches!(vm.start, Some(Start::Command(_))) || !vm.before_start.is_empty())
    }

    /// Where migrations that libvirt makes itself have their folders.
    #[must_use]
    pub fn libvirt_folder(&self) -> PathBuf {
        self.libvirt.folder.clone().unwrap_or_else(|| self.runtime_dir.join("libvirt"))
    }

    /// What holds for a virtual machine: its own table, or the longest pattern that it matches.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<VmConfig> {
        let own = self.vms.get(name);
        Some(own.or_else(|| Some(self.template(name)?.1))?.filled(name))
    }

    /// The pattern, and its table, of a virtual machine that has no table of its own.
    #[must_use]
    pub fn template(&self, name: &str) -> Option<(&str, &VmConfig)> {
        if self.vms.contains_key(name) { None } else { template::matching(&self.templates, name) }
    }

    fn vm_tables(&self) -> impl Iterator<Item = &VmConfig> {
        self.vms.values().chain(self.templates.values())
    }

    /// All ways in which images are made here.
    pub fn creates(&self) -> impl Iterator<Item = &CreateConfig> {
        self.vm_tables().filter_map(|vm| vm.create.as_ref()).chain(&self.create)
    }

    /// How images are made for this VM, if they are.
    pub fn create_for<'a>(&'a self, vm: &'a VmConfig) -> Option<&'a CreateConfig> {
        vm.create.as_ref().or(self.create.as_ref())
    }

    /// The peer whose certificate names `identity`, with the name we gave it.
    pub fn peer_by_identity(&self, identity: &Identity) -> Option<(&str, &PeerConfig)> {
        self.peers.iter().find(|(_, p)| p.identity == *identity).map(|(n, p)| (n.as_str(), p))
    }

    /// Checks the configuration that came from `path` against the certificate: who would be a peer of
    /// itself would move its virtual machines onto themselves.
    pub fn check_own(&self, own: &Identity, path: &Path) -> Result<(), ConfigError> {
        let Some((name, _)) = self.peer_by_identity(own) else { return Ok(()) };
        let problem = format!("\"{own}\" is this host's own identity; write that of the other host");
        Err(ConfigError::Value { path: path.into(), key: format!("peer.{name}.identity"), problem })
    }

    fn check(&self) -> Result<(), (String, String)> {
        let mut seen = BTreeMap::new();
        for (name, peer) in &self.peers {
            peer.check(name)?;
            if let Some(other) = seen.insert(&peer.identity, name) {
                let problem = format!("\"{}\" is already the identity of peer {other}", peer.identity);
                return Err((format!("peer.{name}.identity"), problem));
            }
        }
        for (name, vm) in &self.vms {
            vm.check(name)?;
        }
        for (pattern, vm) in &self.templates {
            vm.check_template(pattern)?;
        }
        for (name, vm) in self.vms.iter().chain(&self.templates) {
            vm.check_values(name)?;
            if !vm.disk_arguments.is_empty() && self.create_for(vm).is_none() {
                let problem = "there is no `create`, so that no disk has a path here";
                return Err((format!("vm.{name}.disk_arguments"), problem.into()));
            }
        }
        self.create.as_ref().map_or(Ok(()), |create| create.check("create"))?;
        for (name, forward) in &self.forwards {
            forward.check(name, &self.peers)?;
        }
        forward::check_all(&self.forwards)?;
        for (name, target) in &self.targets {
            target.check(name, &self.peers)?;
        }
        self.api.check()?;
        self.drain.check()?;
        self.witness.as_ref().map_or(Ok(()), WitnessConfig::check)?;
        if self.audit.files < 2 {
            return Err(("audit.files".into(), "at least 2: one that is written, and the one before".into()));
        }
        self.deadlines.check()
    }

    /// Whether every unix socket's path is short enough for the kernel.
    fn check_sockets(&self) -> Result<(), (String, String)> {
        // Of an NBD server's listening socket, before its name is removed.
        let nbd = self.runtime_dir.join("nbd").join(uuid::Uuid::nil().to_string());
        let of_libvirt =
            self.libvirt_folder().join(uuid::Uuid::nil().simple().to_string()).join("libvirt.sock");
        let folder = if self.libvirt.folder.is_some() { "libvirt.folder" } else { "runtime_dir" };
        let monitors = self.vms.iter().map(|(name, vm)| (format!("vm.{name}.qmp"), vm.filled(name).qmp));
        for (key, path) in
            [("runtime_dir".to_owned(), nbd), (folder.to_owned(), of_libvirt)].into_iter().chain(monitors)
        {
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

    /// Puts paths in the place of credentials' names.
    fn find_credentials(&mut self, folder: Option<&Path>) -> Result<(), (String, String)> {
        credential::find("tls", self.tls.files(), folder)?;
        self.witness.as_mut().map_or(Ok(()), |witness| credential::find("witness", witness.files(), folder))
    }

    fn resolve(&mut self, base: &Path) {
        let against = |p: &mut PathBuf| *p = base.join(&*p);
        against(&mut self.state_dir);
        against(&mut self.runtime_dir);
        self.sandbox.write.iter_mut().for_each(against);
        let of_witness = self.witness.as_mut().into_iter().flat_map(WitnessConfig::files);
        self.tls.files().chain(of_witness).for_each(|(_, file)| against(file));
        self.libvirt.folder.as_mut().map(against);
        self.libvirt.socket.as_mut().map(against);
        self.vms.values_mut().chain(self.templates.values_mut()).for_each(|vm| vm.resolve(base));
        if let Some(create) = &mut self.create {
            create.resolve(base);
        }
    }
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
            (GOOD.replace("receive = [\"web*\"]", "receive_at_once = 0"), "peer.bravo.receive_at_once: 0 is"),
            (GOOD.replace("receive = [\"web*\"]", "receive_size = \"big\""), "\"big\" is no size"),
            (GOOD.replace("receive = [\"web*\"]", "lanes = 0"), "peer.bravo.lanes: 0 is outside 1–8"),
            (GOOD.replace("receive = [\"web*\"]", "lanes = 9"), "peer.bravo.lanes"),
            (format!("{GOOD}\n[api]\nview = [\"\"]\n"), "api.view: a group has a name"),
            (format!("{GOOD}\n[audit]\nfiles = 1\n"), "audit.files: at least 2"),
            (format!("{GOOD}\n[drain]\nat_once = 0\n"), "drain.at_once: 0 is outside 1–64"),
            (format!("{GOOD}\n[drain]\nat_once_per_peer = 65\n"), "drain.at_once_per_peer: 65 is"),
            (GOOD.replace("ca = \"ca-cert.pem\"\n", ""), "the key `ca` is missing"),
            (GOOD.replace("[tls]", "[tls]\ntrust_domain = \"*.corp\""), "can't be a trust domain"),
            (GOOD.replace("/run/qemu", &"/long".repeat(20)), "vm.web1.qmp: a socket's path has at most 107"),
            (
                format!("{GOOD}\n[forward.vnc]\nlisten = \"vnc.sock\"\nto = \"bravo\"\n"),
                "neither an absolute path",
            ),
            (format!("{GOOD}\n[forward.vnc]\nlisten = \"10.0.0.1:5900\"\nto = \"bravo\"\n"), "no loopback"),
            (
                format!("{GOOD}\n[forward.vnc]\nlisten = \"/run/vnc\"\nto = \"delta\"\n"),
                "forward.vnc.to: there is no [peer.delta]",
            ),
            (
                format!("{GOOD}\n[forward.vnc]\nlisten = \"/run/vnc\"\nto = \"bravo\"\nmode = \"9\"\n"),
                "\"9\" is no mode",
            ),
            (
                format!(
                    "{GOOD}\n[forward.a]\nlisten = \"/run/vnc\"\nto = \"bravo\"\n\
                     [forward.b]\nlisten = \"/run/vnc\"\nto = \"bravo\"\n"
                ),
                "forward.b.listen: forwarding a listens there",
            ),
            (format!("{GOOD}\n[target.\"../x\"]\nconnect = \"/run/x\"\n"), "a target's name is"),
            (format!("{GOOD}\n[target.\"vnc-*\"]\nconnect = \"/run/x\"\n"), "write {} once"),
            (format!("{GOOD}\n[target.vnc]\nconnect = \"/run/{{}}\"\n"), "the target's name has no `*`"),
            (
                format!("{GOOD}\n[target.vnc]\nconnect = \"/run/x\"\nfrom = [\"delta\"]\n"),
                "from: there is no [peer.delta]",
            ),
            (format!("runtime_dir = \"/run/{}\"\n{GOOD}", "long".repeat(20)), "runtime_dir: a socket's path"),
        ];
        for (text, expected) in cases {
            let got = error(&text);
            assert!(got.contains(expected), "{expected:?} not in {got:?}");
        }
    }

    #[test]
    fn a_mistake_is_told_in_plain_words_with_its_line_and_key() {
        let in_vain = |more: &str| error(&format!("{GOOD}{more}\n"));
        for (more, expected) in [
            (
                "[deadlines]\nstall_s = \"long\"",
                "line 14: deadlines.stall_s: a whole number that is not negative is expected here, not the text \"long\"",
            ),
            (
                "[deadlines]\nstall_s = -5",
                "line 14: deadlines.stall_s: a whole number that is not negative is expected here, not the number -5",
            ),
            (
                "[deadlines]\nstall_s = 1.5",
                "line 14: deadlines.stall_s: a whole number that is not negative is expected here, not the number 1.5",
            ),
            (
                "[deadlines]\nstal_s = 5",
                "line 14: deadlines.stal_s: there is no key `stal_s` here; there is `dead_peer_s`",
            ),
            (
                "[sandbox]\nlandlock = \"yes\"",
                "sandbox.landlock: `true` or `false` is expected here, not the text \"yes\"",
            ),
            ("[vm.db]\nqmp = 5", "line 14: vm.db.qmp: a text in quotes is expected here, not the number 5"),
            ("[vm.db]\nstart = { unit = \"x\" }", "vm.db: the key `qmp` is missing"),
            (
                "[peer.x]\nidentity = \"x\"\nreceive = \"web\"",
                "line 15: peer.x.receive: a list in [ ] is expected here, not the text \"web\"",
            ),
        ] {
            let said = in_vain(more);
            assert!(said.contains(expected), "{expected:?} not in {said:?}");
            assert!(
                !["u64", "usize", "expected struct", "invalid type"].iter().any(|rust| said.contains(rust)),
                "{said}"
            );
        }
    }

    #[test]
    fn a_credential_is_a_file_that_systemd_has_given() {
        let text = GOOD.replace("\"key.pem\"", "\"credential:vmferry.key\"");
        let path = Path::new("/etc/vmferry/vmferry.toml");
        let given = Path::new("/run/credentials/vmferry.service");
        let config = Config::parse_with(&text, path, Some(given)).unwrap();
        assert_eq!(config.tls.key, given.join("vmferry.key"));
        assert_eq!(config.tls.cert, Path::new("/etc/vmferry/cert.pem"));
        assert!(error(&text).contains("tls.key: this process was given no credentials"), "{}", error(&text));
        for wrong in ["", "../key", "a/b"] {
            let text = text.replace("vmferry.key", wrong);
            let problem = Config::parse_with(&text, path, Some(given)).unwrap_err().to_string();
            assert!(problem.contains("a credential's name has no `/`"), "{problem}");
        }
        let witness =
            "[witness]\nendpoints = ['https://a']\nca = 'ca'\ncert = 'c'\nkey = 'credential:etcd.key'\n";
        let text = format!("{GOOD}{witness}");
        let of_witness = Config::parse_with(&text, path, Some(given)).unwrap().witness.unwrap();
        assert_eq!(of_witness.key.unwrap(), given.join("etcd.key"));
        assert_eq!(of_witness.ca.unwrap(), Path::new("/etc/vmferry/ca"));
        assert!(
            error(&text).contains("witness.key: this process was given no credentials"),
            "{}",
            error(&text)
        );
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
}
