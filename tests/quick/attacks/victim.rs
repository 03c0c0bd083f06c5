//! The agent that is attacked, alpha; and who attacks it: bravo, which may send it `web*`, charlie, which it
//! knows and permits nothing, and mallory, whom it does not know, though its authority does.

#![allow(dead_code)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::mpsc;
use uuid::Uuid;
use vmferry::migrate::message::{Asked, Offer, Reply, Request, Response};
use vmferry::migrate::problem::Policy;
use vmferry::mux::{Class, Config, Name, Open, purpose};
use vmferry::net::connect_error::ConnectError;
use vmferry::net::endpoint::Endpoint;
use vmferry::net::message::{self, MessageReceiver, MessageSender};
use vmferry::net::pool::Pool;
use vmferry::net::session::{IncomingStream, OpenStreamError, Session};
use vmferry::net::stream::Stream;
use vmferry::net::tls::{Aead, Tls, TlsPaths};
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

use crate::rig::{LATE, PATIENCE, own_address, soon};

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");
/// For the configuration of a victim that is to think no connection dead, however long this machine stalls.
pub(super) const PATIENT: &str = "[deadlines]\ndead_peer_s = 600\n";
/// The agent tells so often what it tells once.
const TOLD_AGAIN_AFTER_S: u64 = 300;

/// The same for an attacker's side.
pub(super) fn patient() -> Config {
    Config { dead_after: PATIENCE, ..Config::default() }
}

/// The agent under attack.
pub(super) struct Victim {
    child: Child,
    pub(super) address: SocketAddr,
    pub(super) metrics: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    began: Instant,
    pub(super) folder: tempfile::TempDir,
}

/// An attacker's network side.
pub(super) struct Attacker {
    pub(super) pool: Pool,
    pub(super) incoming: mpsc::Receiver<IncomingStream>,
    _started: mpsc::UnboundedReceiver<Session>,
}

impl Victim {
    pub(super) fn start() -> Self {
        Self::start_with(|text| text)
    }

    /// With its configuration changed.
    pub(super) fn start_with(change: impl FnOnce(String) -> String) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), change)
    }

    /// In a folder in which something is already.
    pub(super) fn start_in(folder: tempfile::TempDir, change: impl FnOnce(String) -> String) -> Self {
        Self::start_by(folder, change, |_| Command::new(VMFERRY))
    }

    /// As a user without a name. Takes root.
    pub(super) fn start_as(user: u32, change: impl FnOnce(String) -> String) -> Self {
        // The way to the program may not be open to that user.
        let program = File::open(VMFERRY).unwrap();
        let by = |folder: &Path| {
            let owner = format!("{user}:{user}");
            assert!(Command::new("chown").arg("-R").arg(owner).arg(folder).status().unwrap().success());
            let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
            command.uid(user).gid(user);
            command
        };
        Self::start_by(tempfile::tempdir().unwrap(), change, by)
    }

    /// With this umask.
    pub(super) fn start_with_umask(umask: u32) -> Self {
        let by = |_: &Path| {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("umask {umask:o}; exec \"$0\" \"$@\""), VMFERRY]);
            command
        };
        Self::start_by(tempfile::tempdir().unwrap(), |text| text, by)
    }

    fn start_by(
        folder: tempfile::TempDir,
        change: impl FnOnce(String) -> String,
        by: impl FnOnce(&Path) -> Command,
    ) -> Self {
        let pki = folder.path().join("pki");
        create_ca(&pki, &CaRequest { name: None, days: 30, domains: Vec::new() }).unwrap();
        for name in ["alpha", "bravo", "charlie", "mallory"] {
            let name = name.parse().unwrap();
            issue_host(&pki, &HostRequest { name, names: Vec::new(), days: 10, force: false }).unwrap();
        }
        let (address, metrics) = (own_address(), own_address());
        let config = folder.path().join("vmferry.toml");
        std::fs::write(&config, change(configuration(&pki.join("hosts/alpha"), address, metrics))).unwrap();
        let mut command = by(folder.path());
        command.arg("agent").arg("--config").arg(&config).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (said, lines) = (Arc::clone(&log), BufReader::new(child.stderr.take().unwrap()));
        std::thread::spawn(move || {
            lines.lines().map_while(Result::ok).for_each(|line| said.lock().unwrap().push(line));
        });
        let victim = Self { child, address, metrics, log, began, folder };
        // The metrics listener is the last that it opens.
        while UnixStream::connect(victim.socket()).is_err() || TcpStream::connect(victim.metrics).is_err() {
            assert!(victim.is_alive(), "the agent has ended: {:?}", victim.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        victim
    }

    pub(super) fn is_alive(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.child.id())).exists()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("run/vmferry.sock")
    }

    pub(super) fn config(&self) -> PathBuf {
        self.folder.path().join("vmferry.toml")
    }

    pub(super) fn pki(&self) -> PathBuf {
        self.folder.path().join("pki")
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Another process of this agent, which takes over from the one that is there.
    pub(super) fn next_process(&self) -> Child {
        let mut command = Command::new(VMFERRY);
        command.arg("agent").arg("--config").arg(self.config()).arg("--take-over");
        command.stderr(Stdio::null()).spawn().unwrap()
    }

    /// Whether its process is there no more, but for its name.
    pub(super) fn has_ended(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
    }

    /// What it has logged so far.
    pub(super) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// How often it may have told by now what it tells once.
    pub(super) fn told_at_most(&self) -> usize {
        1 + (self.began.elapsed().as_secs() / TOLD_AGAIN_AFTER_S) as usize
    }

    /// Waits until a line of its log is so, and returns the first.
    pub(super) async fn logs(&self, is: impl Fn(&str) -> bool) -> String {
        soon("a line in the log", async {
            loop {
                if let Some(line) = self.log().into_iter().find(|line| is(line)) {
                    return line;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }

    /// Resident bytes, by the kernel's word.
    pub(super) fn resident_bytes(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    /// The most that were resident since its start, or since [`Victim::forget_peak`].
    pub(super) fn peak_bytes(&self) -> u64 {
        self.status_bytes("VmHWM:")
    }

    /// From now on the peak is counted anew (proc(5), clear_refs).
    pub(super) fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    fn status_bytes(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Its open descriptors.
    pub(super) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// The local API's answer to a GET.
    pub(super) fn get(&self, path: &str) -> Value {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nhost: vmferry\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// A metric with all its labels, and its value; 0 when it is not there.
    pub(super) fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let found = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        found.unwrap_or(0.0)
    }

    /// What the command line says, and whether it was content.
    pub(super) fn vmferry(&self, words: &[&str]) -> (String, bool) {
        let (said, code) = self.vmferry_ends(words);
        (said, code == Some(0))
    }

    /// The same, with its exit code.
    pub(super) fn vmferry_ends(&self, words: &[&str]) -> (String, Option<i32>) {
        let mut command = Command::new(VMFERRY);
        let said = command.arg("--socket").arg(self.socket()).args(words).output().unwrap();
        (String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned(), said.status.code())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Attacker {
    pub(super) fn new(victim: &Victim, name: &str) -> Self {
        Self::with(victim, name, Config::default())
    }

    pub(super) fn with(victim: &Victim, name: &str, config: Config) -> Self {
        let tls = tls(&victim.pki(), name);
        let endpoint = Endpoint::new(tls, config, PATIENCE).unwrap();
        let (sender, incoming) = mpsc::channel(64);
        let (starts, started) = mpsc::unbounded_channel();
        Self { pool: Pool::new(endpoint, sender, starts), incoming, _started: started }
    }

    pub(super) async fn dial(&self, victim: &Victim) -> Result<Session, ConnectError> {
        let (alpha, address) = ("alpha".parse().unwrap(), victim.address.to_string());
        soon("a session, or none", self.pool.session(&alpha, Some(&address))).await
    }

    /// A session that nobody refuses; dialed again where this machine was too slow for it.
    pub(super) async fn session(&self, victim: &Victim) -> Session {
        soon("a session", async {
            loop {
                let begun = Instant::now();
                match self.dial(victim).await {
                    Ok(session) => return session,
                    Err(error) => assert!(begun.elapsed() > LATE, "{error:?}"),
                }
            }
        })
        .await
    }
}

pub(super) fn tls(pki: &Path, name: &str) -> Tls {
    let host = pki.join("hosts").join(name);
    let [ca, cert, key] = ["ca-cert.pem", "cert.pem", "key.pem"].map(|file| host.join(file));
    Tls::load(&TlsPaths { ca, cert, key, crl: None }, Aead::Auto).unwrap()
}

fn configuration(tls: &Path, address: SocketAddr, metrics: SocketAddr) -> String {
    let tls = tls.display();
    format!(
        "state_dir = 'state'\nruntime_dir = 'run'\nlisten = ['{address}']\n\
         [tls]\nca = '{tls}/ca-cert.pem'\ncert = '{tls}/cert.pem'\nkey = '{tls}/key.pem'\n\
         [metrics]\nlisten = '{metrics}'\n\
         [peer.bravo]\nidentity = 'bravo'\nreceive = ['web*']\nsend = ['*']\n\
         [peer.charlie]\nidentity = 'charlie'\n\
         [vm.web1]\nqmp = 'web1.qmp'\n[vm.web2]\nqmp = 'web2.qmp'\n[vm.db1]\nqmp = 'db1.qmp'\n"
    )
}

/// What a control stream is opened with.
pub(super) fn control(migration: Uuid) -> Open {
    Open {
        purpose: purpose::CONTROL,
        class: Class::Urgent,
        weight: 16,
        migration: *migration.as_bytes(),
        channel: 0,
        name: Name::NONE,
    }
}

/// Opens a control stream.
pub(super) async fn open_control(session: &Session) -> Result<Stream, OpenStreamError> {
    soon("a control stream", session.open(control(Uuid::new_v4()))).await
}

/// A virtual machine without disks.
pub(super) fn offer(vm: &str) -> Offer {
    Offer {
        vm: vm.into(),
        disks: Vec::new(),
        running: true,
        qemu: "QEMU".into(),
        after: None,
        compress: false,
        policy: Policy::default(),
        machine: None,
        audit_head: None,
        witness: None,
        in_band: None,
        hears_busy: false,
        flash: Vec::new(),
        needs: std::collections::BTreeSet::new(),
    }
}

/// Asks on a control stream of its own.
pub(super) async fn ask(session: &Session, request: Request) -> Response {
    let (mut sender, mut receiver) = message::split(open_control(session).await.unwrap(), session);
    answer(&mut sender, &mut receiver, request).await
}

pub(super) async fn answer(
    sender: &mut MessageSender,
    receiver: &mut MessageReceiver,
    request: Request,
) -> Response {
    sender.send(&Asked { number: 1, request, summary: None }).await.unwrap();
    match soon("an answer", receiver.recv::<Reply>()).await.unwrap() {
        Some(Reply::Response { response, .. }) => response,
        other => panic!("no answer: {other:?}"),
    }
}
