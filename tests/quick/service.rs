//! What an agent and its service manager owe each other, without one: sockets that are passed to it, and a watchdog that
//! hears nothing when the agent stands still. tests/real/systemd.rs and tests/real/package.rs have the real one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use crate::api::configuration;

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");
/// For whatever has to come.
const SOON: Duration = Duration::from_secs(60);

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder with everything that an agent needs.
fn configured() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let pki = folder.path().join("pki");
    for words in [&["ca"][..], &["host", "alpha"]] {
        let made = Command::new(VMFERRY).arg("certs").args(words).arg("--dir").arg(&pki).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    }
    std::fs::write(folder.path().join("vmferry.toml"), configuration(&pki.join("hosts/alpha"))).unwrap();
    folder
}

fn ask_status(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"GET /v1/names HTTP/1.0\r\nhost: vmferry\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The configuration has it listen nowhere. Both connections are made before it runs, and neither is lost.
#[test]
fn an_agent_listens_on_the_sockets_that_it_is_given() {
    let folder = configured();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let socket = run.join("vmferry.sock");
    let (api, port) = (UnixListener::bind(&socket).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let mut peer = TcpStream::connect(port.local_addr().unwrap()).unwrap();
    let script = "exec 3<&0 4<&1 0</dev/null 1>/dev/null; \
                  LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=vmferry.socket:vmferry.socket exec \"$0\" agent --config \"$1\"";
    let mut command = Command::new("bash");
    command.arg("-c").arg(script).arg(VMFERRY).arg(folder.path().join("vmferry.toml"));
    command.stdin(Stdio::from(OwnedFd::from(api))).stdout(Stdio::from(OwnedFd::from(port)));
    let _agent = Ended(command.spawn().unwrap());
    // Its own copies are gone with this.
    drop(command);
    let answer = ask_status(&socket);
    assert!(answer.contains("200 OK") && answer.contains("web1"), "{answer}");
    // No TLS: it says so, or just closes.
    peer.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    peer.set_read_timeout(Some(SOON)).unwrap();
    let mut said = Vec::new();
    let heard = peer.read_to_end(&mut said);
    let refused = heard.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
    assert!(heard.is_ok() || refused, "nobody took the connection: {heard:?}");
}

/// Reads the log up to a line that has this.
fn log_until(log: &mut BufReader<ChildStderr>, what: &str) {
    let mut line = String::new();
    while !line.contains(what) {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the log ends before {what:?}");
    }
}

/// The next connection.
fn next(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let since = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => return stream,
            Err(e) => assert!(since.elapsed() < SOON, "nobody has connected: {e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the service manager was told up to now.
fn told(manager: &UnixDatagram) -> Vec<String> {
    let mut buffer = [0; 4096];
    manager.set_nonblocking(true).unwrap();
    std::iter::from_fn(|| {
        manager.recv(&mut buffer).ok().map(|n| String::from_utf8_lossy(&buffer[..n]).into())
    })
    .collect()
}

#[test]
fn the_watchdog_hears_nothing_while_the_local_api_stands_still() {
    const KICK: &str = "WATCHDOG=1";
    let folder = configured();
    let manager_path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&manager_path).unwrap();
    let mut command = Command::new(VMFERRY);
    command.arg("agent").arg("--config").arg(folder.path().join("vmferry.toml"));
    command.env("NOTIFY_SOCKET", &manager_path).env("WATCHDOG_USEC", "2000000").stderr(Stdio::piped());
    let mut agent = Ended(command.spawn().unwrap());
    let mut log = BufReader::new(agent.0.stderr.take().unwrap());
    // It is heard again and again.
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut kicks = 0;
    while kicks < 3 {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).unwrap();
        kicks += String::from_utf8_lossy(&buffer[..length]).matches(KICK).count();
    }
    // Somebody who takes connections and never answers stands for an API that hangs.
    let socket = folder.path().join("run/vmferry.sock");
    let aside = folder.path().join("run/aside.sock");
    std::fs::rename(&socket, &aside).unwrap();
    let hangs = UnixListener::bind(&socket).unwrap();
    let first = next(&hangs);
    // What is told from here on is of this question, until there is another one.
    told(&manager);
    let second = next(&hangs);
    let since = told(&manager);
    assert!(since.iter().all(|said| !said.contains(KICK)), "{since:?}");
    log_until(&mut log, "the local API");
    drop((first, second, hangs));
    std::fs::rename(&aside, &socket).unwrap();
    manager.set_nonblocking(false).unwrap();
    let mut buffer = [0; 4096];
    let length = manager.recv(&mut buffer).unwrap();
    assert!(String::from_utf8_lossy(&buffer[..length]).contains(KICK));
}
