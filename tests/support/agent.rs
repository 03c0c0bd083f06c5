//! vmferry as its users run it: certificates, a configuration file and the agent on each host, and
//! the command line. Only what is documented to users is used here.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::lab::Paths;
use super::metrics::Metrics;
use super::net::Host;
use super::process::{LONG, Outcome, Running, SHORT, run, run_any, signal_pid, start, wait_for};
use super::vm::Vm;

/// The one port of the tests. Below the ephemeral ones, so nobody else ever has it.
pub const PORT: u16 = 9907;
/// The port of each agent's metrics, on its host's loopback.
pub const METRICS_PORT: u16 = 9908;

/// A certificate authority for the lab, made by `vmferry certs`.
#[derive(Debug, Clone)]
pub struct Credentials {
    dir: PathBuf,
    vmferry: PathBuf,
}

impl Credentials {
    /// Makes the authority in `dir`.
    pub fn create(paths: &Paths, dir: &Path) -> Result<Self> {
        Self::create_named(paths, dir, "vmferry test")
    }

    /// Makes an authority of that name in `dir`.
    pub fn create_named(paths: &Paths, dir: &Path, name: &str) -> Result<Self> {
        let credentials = Self { dir: dir.join("certs"), vmferry: paths.vmferry.clone() };
        run(&mut credentials.certs(&["ca", "--name", name]), SHORT)?;
        Ok(credentials)
    }

    /// The authority that is in `dir` already.
    pub fn of(paths: &Paths, dir: &Path) -> Self {
        Self { dir: dir.join("certs"), vmferry: paths.vmferry.clone() }
    }

    /// The authority's folder, with ca-cert.pem and ca-key.pem.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Issues a host's certificate: its folder, with ca-cert.pem, cert.pem and key.pem.
    pub fn issue(&self, host: &str) -> Result<PathBuf> {
        run(&mut self.certs(&["host", host]), SHORT)?;
        Ok(self.dir.join("hosts").join(host))
    }

    fn certs(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.vmferry);
        command.arg("certs").args(words).arg("--dir").arg(&self.dir);
        command
    }
}

/// A peer in an agent's configuration.
#[derive(Debug, Clone)]
pub struct PeerEntry {
    /// Its name, and its identity.
    pub name: String,
    /// Where to dial it, when this agent is to dial.
    pub address: Option<String>,
    /// Names of the guests that it may send.
    pub receive: Vec<String>,
}

/// A guest in an agent's configuration.
#[derive(Debug, Clone)]
pub struct VmEntry {
    /// Its name.
    pub name: String,
    /// The agent's own monitor.
    pub qmp: PathBuf,
    /// Starts a fresh QEMU.
    pub start: Option<PathBuf>,
    /// Run on the destination after the hand-over and before the guest starts.
    pub before_start: Option<PathBuf>,
}

impl VmEntry {
    /// The entry of a guest of the bed, which the agent can start.
    pub fn of(vm: &Vm) -> Self {
        Self {
            name: vm.spec.name.clone(),
            qmp: vm.agent_monitor(),
            start: Some(vm.start_script()),
            before_start: None,
        }
    }

    /// The same with a command that runs at the hand-over.
    pub fn with_hook(mut self, hook: &Path) -> Self {
        self.before_start = Some(hook.to_owned());
        self
    }
}

/// What goes into an agent's configuration.
#[derive(Debug, Clone, Default)]
pub struct AgentSpec {
    /// The other hosts.
    pub peers: Vec<PeerEntry>,
    /// The guests of this host.
    pub vms: Vec<VmEntry>,
    /// Connections to each of the peers, if not as many as by default.
    pub lanes: Option<usize>,
    /// More lines, put at the end of each peer's table.
    pub peer_lines: String,
    /// The user that it runs as, and the group of the same number; root by default.
    pub user: Option<u32>,
    /// More lines, put before the tables.
    pub top_lines: String,
    /// More lines, put at the end.
    pub end_lines: String,
}

impl AgentSpec {
    /// Adds a peer of the bed: dials it at its IPv4 address and takes any guest from it.
    pub fn peer(mut self, host: &Host) -> Self {
        let address = Some(format!("{}:{PORT}", host.v4));
        self.peers.push(PeerEntry { name: host.name.clone(), address, receive: vec!["*".to_owned()] });
        self
    }

    /// Adds a guest.
    pub fn vm(mut self, entry: VmEntry) -> Self {
        self.vms.push(entry);
        self
    }

    fn to_toml(&self, host_dir: &Path, credentials: &Path) -> Result<String> {
        let mut text = String::new();
        let string = |path: &Path| toml::Value::from(path.display().to_string()).to_string();
        writeln!(text, "state_dir = {}", string(&host_dir.join("state")))?;
        // With start commands it has to be asked for: every QEMU of these tests lives with it.
        writeln!(text, "sandbox = {{ seccomp = true }}")?;
        writeln!(text, "runtime_dir = {}", string(&host_dir.join("run")))?;
        writeln!(text, "listen = [\"[::]:{PORT}\"]\n{}", self.top_lines)?;
        writeln!(text, "[tls]\nca = {}", string(&credentials.join("ca-cert.pem")))?;
        writeln!(
            text,
            "cert = {}\nkey = {}",
            string(&credentials.join("cert.pem")),
            string(&credentials.join("key.pem"))
        )?;
        writeln!(text, "[metrics]\nlisten = \"127.0.0.1:{METRICS_PORT}\"")?;
        for peer in &self.peers {
            writeln!(text, "[peer.{}]\nidentity = \"{}\"", peer.name, peer.name)?;
            if let Some(address) = &peer.address {
                writeln!(text, "address = \"{address}\"")?;
            }
            writeln!(text, "receive = {}", toml::Value::from(peer.receive.clone()))?;
            writeln!(text, "send = [\"*\"]\n{}", self.peer_lines)?;
            if let Some(lanes) = self.lanes {
                writeln!(text, "lanes = {lanes}")?;
            }
        }
        for vm in &self.vms {
            writeln!(text, "[vm.{}]\nqmp = {}", vm.name, string(&vm.qmp))?;
            if let Some(command) = &vm.start {
                writeln!(text, "start = {{ command = [{}] }}", string(command))?;
            }
            if let Some(command) = &vm.before_start {
                writeln!(text, "before_start = [{}]", string(command))?;
            }
        }
        text.push_str(&self.end_lines);
        Ok(text)
    }
}

/// An agent on a host. Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    host: Host,
    vmferry: PathBuf,
    config: PathBuf,
    user: Option<u32>,
    child: Option<Child>,
}

/// A command of the command line that is still at work.
pub type VmferryRun = Running;

impl Agent {
    /// Writes the configuration, starts the agent and waits until its local API answers.
    pub fn start(paths: &Paths, host: &Host, spec: &AgentSpec, credentials: &Path) -> Result<Self> {
        let config = host.dir.join("vmferry.toml");
        fs::write(&config, spec.to_toml(&host.dir, credentials)?)?;
        for folder in ["state", "run"] {
            fs::create_dir_all(host.dir.join(folder))?;
            std::os::unix::fs::chown(host.dir.join(folder), spec.user, spec.user)?;
        }
        let mut agent =
            Self { host: host.clone(), vmferry: paths.vmferry.clone(), config, user: spec.user, child: None };
        agent.spawn()?;
        Ok(agent)
    }

    fn spawn(&mut self) -> Result<()> {
        self.child = Some(self.start_process(&[])?);
        self.wait_ready()
    }

    fn start_process(&self, words: &[&str]) -> Result<Child> {
        let log = fs::File::options().create(true).append(true).open(self.log())?;
        let mut command = match self.user {
            None => self.host.command(&self.vmferry),
            Some(user) => {
                let mut command = self.host.command("setpriv");
                let ids = [format!("--reuid={user}"), format!("--regid={user}"), "--init-groups".to_owned()];
                command.args(ids).arg(&self.vmferry);
                command
            }
        };
        command.arg("agent").arg("--config").arg(&self.config).args(words);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A daemon is in no terminal's foreground: a Ctrl-C there is not for it.
        command.process_group(0);
        command.spawn().context("cannot start the agent")
    }

    /// Has another process take over from the running one, which must end by itself, in order.
    pub fn take_over(&mut self) -> Result<()> {
        let next = self.start_process(&["--take-over"])?;
        let before = self.child.replace(next);
        let mut before = before.context("the agent does not run")?;
        let name = format!("the end of the agent before on {}", self.host.name);
        let status = wait_for(&name, LONG, || Ok(before.try_wait()?)).inspect_err(|_| drop(before.kill()))?;
        ensure!(status.success(), "the agent before ended with {status}");
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let name = format!("the agent on {}", self.host.name);
        let since = Instant::now();
        wait_for(&name, SHORT, || {
            let Some(child) = &mut self.child else { bail!("it was never started") };
            if let Some(status) = child.try_wait()? {
                bail!(
                    "it ended by itself: {status}; it said: {}",
                    fs::read_to_string(self.host.dir.join("agent.log"))?
                );
            }
            // The last that it listens on, and its record, unless a disk takes none: what it holds from then on is what
            // it holds when idle.
            let listens = self.host.dir.join("run/takeover.sock").exists();
            let records = self.descriptors().is_ok_and(|all| all.iter().any(|name| name.contains("/audit/")));
            let holds_all = listens && (records || since.elapsed() > SHORT / 3);
            Ok(api_get(&self.host.dir.join("run/vmferry.sock"), "/v1/status").ok().filter(|_| holds_all))
        })
        .map(drop)
    }

    /// The host it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its log file.
    pub fn log(&self) -> PathBuf {
        self.host.dir.join("agent.log")
    }

    /// The socket of its local API.
    pub fn socket(&self) -> PathBuf {
        self.host.dir.join("run/vmferry.sock")
    }

    /// Its process id, while it runs. (`ip netns exec` becomes the program it runs.)
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Asks its local API.
    pub fn api(&self, path: &str) -> Result<Value> {
        api_get(&self.socket(), path)
    }

    /// What Prometheus would scrape.
    pub fn metrics(&self) -> Result<Metrics> {
        let mut stream = self.host.inside(|| std::net::TcpStream::connect(("127.0.0.1", METRICS_PORT)))?;
        stream.set_read_timeout(Some(SHORT))?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200"), "{head}");
        Ok(Metrics::new(body.to_owned()))
    }

    /// The number of descriptors it has open: compare with the same when it was idle before.
    pub fn open_descriptors(&self) -> Result<usize> {
        let pid = self.pid().context("the agent does not run")?;
        Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }

    /// What those descriptors are, as the kernel names them.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        let pid = self.pid().context("the agent does not run")?;
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        let mut found: Vec<_> = entries
            .map(|e| fs::read_link(e.path()).map_or_else(|_| "gone".to_owned(), |p| p.display().to_string()))
            .collect();
        found.sort_unstable();
        Ok(found)
    }

    /// What lies in its runtime folder and is not one of its two sockets.
    pub fn runtime_leftovers(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.host.dir.join("run"))? {
            let path = entry?.path();
            let is_empty = path.is_dir() && fs::read_dir(&path)?.next().is_none();
            let is_ours = path == self.socket() || path.ends_with("takeover.sock");
            if !is_ours && !is_empty {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// Kills it as a crash would, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_end(SHORT)
    }

    /// Asks it to end and waits for that.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        self.wait_end(LONG)
    }

    /// Starts it again after `kill` or `terminate`, with the same configuration and state.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the agent on {} still runs", self.host.name);
        self.spawn()
    }

    /// Leaves it running when this program ends.
    pub fn leave(mut self) {
        self.child = None;
    }

    /// Sends it a signal (SIGHUP, SIGSTOP, ...).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal_pid(self.pid().context("the agent does not run")?, signal)
    }

    /// Waits for its end, after a signal.
    ///
    /// # Errors
    /// It does not end: it is killed then.
    pub fn wait_end(&mut self, within: Duration) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        let ended =
            wait_for(
                &format!("the end of the agent on {}", self.host.name),
                within,
                || Ok(child.try_wait()?),
            );
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        ended.map(drop)
    }

    /// The command line on this host, talking to this agent: `command(&["migrate", "web1", ...])`.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command(&self.vmferry);
        command.args(words).arg("--socket").arg(self.socket());
        command
    }

    /// Runs a command of the command line to its end.
    pub fn vmferry(&self, words: &[&str]) -> Result<Outcome> {
        run_any(&mut self.command(words), LONG)
    }

    /// Starts a command of the command line.
    pub fn vmferry_start(&self, words: &[&str]) -> Result<VmferryRun> {
        start(&mut self.command(words))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One request to a local API: HTTP/1.0, so that the answer ends where the connection does.
///
/// # Errors
/// No answer within 30 s, any status but 200, or no JSON.
pub fn api_get(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SHORT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "{path}: {status}: {body}");
    Ok(serde_json::from_str(body)?)
}
