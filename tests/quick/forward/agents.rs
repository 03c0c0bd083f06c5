//! Two agents on this host, alpha and bravo, as processes with configurations: alpha dials bravo.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::own_address;

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");
/// No wait of these tests is longer; none of them is expected to come near it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until there is something.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder with certificates, for two agents.
pub struct Ground {
    folder: tempfile::TempDir,
    /// Where bravo listens.
    pub bravo: SocketAddr,
}

impl Ground {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for words in [&["ca"][..], &["host", "alpha"], &["host", "bravo"]] {
            let mut certs = Command::new(VMFERRY);
            certs.arg("certs").args(words).arg("--dir").arg(folder.path().join("pki"));
            let made = certs.output().unwrap();
            assert!(made.status.success(), "{made:?}");
        }
        Self { folder, bravo: own_address() }
    }

    /// A socket of a test's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A program's socket.
    pub fn listen(&self, name: &str) -> UnixListener {
        UnixListener::bind(self.path(name)).unwrap()
    }

    /// Alpha, with more in its configuration, in which `DIR` stands for this folder.
    pub fn alpha(&self, more: &str) -> Agent {
        self.alpha_by(self.bravo, more)
    }

    /// Alpha, which finds bravo at this address.
    pub fn alpha_by(&self, bravo: SocketAddr, more: &str) -> Agent {
        let peer = format!("[peer.bravo]\nidentity = 'bravo'\naddress = '{bravo}'\n");
        self.agent("alpha", "[]", &(peer + more))
    }

    /// Bravo.
    pub fn bravo(&self, more: &str) -> Agent {
        let listen = format!("['{}']", self.bravo);
        self.agent("bravo", &listen, &format!("[peer.alpha]\nidentity = 'alpha'\n{more}"))
    }

    fn agent(&self, name: &str, listen: &str, more: &str) -> Agent {
        let mut agent = self.configured(name, listen, more);
        agent.child = Some(agent.spawn(&[]));
        agent.wait_ready();
        agent
    }

    fn configured(&self, name: &str, listen: &str, more: &str) -> Agent {
        let folder = self.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        let (tls, metrics) = (self.path("pki/hosts").join(name), own_address());
        let mut text = format!("state_dir = 'state'\nruntime_dir = 'run'\nlisten = {listen}\n");
        write!(text, "[metrics]\nlisten = '{metrics}'\n[tls]\n").unwrap();
        for (key, file) in [("ca", "ca-cert.pem"), ("cert", "cert.pem"), ("key", "key.pem")] {
            writeln!(text, "{key} = '{}'", tls.join(file).display()).unwrap();
        }
        text += &more.replace("DIR", &self.folder.path().display().to_string());
        std::fs::write(folder.join("vmferry.toml"), text).unwrap();
        Agent { folder, metrics, child: None }
    }

    /// Alpha, which is to refuse its configuration or its start: what it says.
    pub fn alpha_fails(&self, more: &str) -> String {
        let peer = format!("[peer.bravo]\nidentity = 'bravo'\naddress = '{}'\n", self.bravo);
        let agent = self.configured("alpha", "[]", &(peer + more));
        let status = agent.spawn(&[]).wait().unwrap();
        assert!(!status.success(), "it started");
        agent.log()
    }
}

/// An agent. Killed when dropped.
pub struct Agent {
    folder: PathBuf,
    metrics: SocketAddr,
    child: Option<Child>,
}

impl Agent {
    fn spawn(&self, words: &[&str]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut command = Command::new(VMFERRY);
        command.arg("agent").arg("--config").arg(self.folder.join("vmferry.toml")).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("run/vmferry.sock")
    }

    fn wait_ready(&mut self) {
        let (socket, folder) = (self.socket(), self.folder.clone());
        let child = self.child.as_mut().unwrap();
        wait("an agent that answers", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the agent ended with {status}: {}", read(&folder.join("log")));
            }
            UnixStream::connect(&socket).is_ok().then_some(())
        });
    }

    /// What it has said.
    pub fn log(&self) -> String {
        read(&self.folder.join("log"))
    }

    /// Waits until it has said something.
    pub fn says(&self, what: &str) {
        wait(&format!("the word {what:?} in the log"), || self.log().contains(what).then_some(()));
    }

    /// Has another process take over; the one before ends by itself.
    pub fn take_over(&mut self) {
        let next = self.spawn(&["--take-over"]);
        let mut before = self.child.replace(next).unwrap();
        let status = wait("the end of the agent before", || before.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", self.log());
        self.wait_ready();
    }

    /// Ends it in order.
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = wait("the agent's end", || child.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it again.
    pub fn start(&mut self) {
        self.child = Some(self.spawn(&[]));
        self.wait_ready();
    }

    /// The command line against it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(VMFERRY);
        command.args(words).arg("--socket").arg(self.socket());
        command
    }

    /// Runs the command line against it.
    pub fn run(&self, words: &[&str]) -> (bool, String) {
        let output = self.command(words).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    /// Asks the local API.
    pub fn api(&self, path: &str) -> Value {
        serde_json::from_str(&http(UnixStream::connect(self.socket()).unwrap(), path)).unwrap()
    }

    /// A metric by its name and labels, as written; 0 if it is not there.
    pub fn metric(&self, name: &str) -> u64 {
        self.figure(name) as u64
    }

    /// The same of one that is no whole number.
    pub fn figure(&self, name: &str) -> f64 {
        let text = http(TcpStream::connect(self.metrics).unwrap(), "/metrics");
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.map_or(0.0, |number| number.parse().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log in {}\n{}", self.folder.display(), self.log());
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn http(mut stream: impl Read + Write, path: &str) -> String {
    write!(stream, "GET {path} HTTP/1.0\r\nhost: vmferry\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{path}: {answer}");
    body.to_owned()
}
