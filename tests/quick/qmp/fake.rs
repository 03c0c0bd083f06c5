//! A QMP server that does on demand what a real QEMU can't be made to do. Each test brings its
//! script; the server runs it in a thread with blocking sockets and its own time limit.

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

/// Nothing in these tests takes as long, so this is only for a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A server's socket, and the thread that runs its script.
pub(crate) struct Served<T> {
    folder: tempfile::TempDir,
    thread: JoinHandle<T>,
}

impl<T> Served<T> {
    /// Where to connect.
    pub(crate) fn path(&self) -> PathBuf {
        path(self.folder.path())
    }

    /// What the script returns; its panic is the test's. The runtime goes on meanwhile, because
    /// the script may be waiting for the client to close.
    pub(crate) async fn finish(self) -> T
    where
        T: Send + 'static,
    {
        let join = tokio::task::spawn_blocking(|| self.thread.join());
        match join.await.unwrap() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("qmp.sock")
}

/// Serves one client by this script.
pub(crate) fn serve<T: Send + 'static>(script: impl FnOnce(Fake) -> T + Send + 'static) -> Served<T> {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(path(folder.path())).unwrap();
    let thread = std::thread::spawn(move || {
        let socket = accept(&listener);
        script(Fake { listener, socket, bytes: Vec::new(), fds: VecDeque::new() })
    });
    Served { folder, thread }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The server's end of one connection.
pub(crate) struct Fake {
    listener: UnixListener,
    socket: UnixStream,
    bytes: Vec<u8>,
    /// Descriptors that came and that no command has taken, as numbers.
    pub(crate) fds: VecDeque<RawFd>,
}

impl Fake {
    /// Sends a greeting and lets the client into command mode.
    pub(crate) fn greet(mut self) -> Self {
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
        self.send(json!({"QMP": {"version": version, "capabilities": ["oob"]}}));
        let command = self.command().unwrap();
        assert_eq!(command["execute"], "qmp_capabilities");
        self.answer(&command, json!({}));
        self
    }

    /// Cuts the connection and waits for the next one.
    pub(crate) fn cut(mut self) -> Self {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.socket = accept(&self.listener);
        self.bytes.clear();
        self
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, message: Value) {
        self.send_text(&format!("{message}\r\n"));
    }

    /// Sends anything.
    pub(crate) fn send_text(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).unwrap();
    }

    /// Sends an event.
    pub(crate) fn event(&mut self, name: &str, data: Value) {
        let timestamp = json!({"seconds": 5, "microseconds": 6});
        self.send(json!({"timestamp": timestamp, "event": name, "data": data}));
    }

    /// Answers a command.
    pub(crate) fn answer(&mut self, command: &Value, value: Value) {
        self.send(json!({"return": value, "id": command["id"]}));
    }

    /// Refuses a command.
    pub(crate) fn refuse(&mut self, command: &Value, class: &str, desc: &str) {
        let error = json!({"class": class, "desc": desc});
        self.send(json!({"id": command["id"], "error": error}));
    }

    /// The next command; `None` when the client is gone.
    pub(crate) fn command(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            if !self.receive() {
                assert_eq!(self.bytes, b"", "the client left in mid-command");
                return None;
            }
        }
    }

    /// Takes what has come, descriptors too.
    fn receive(&mut self) -> bool {
        let mut chunk = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 16]);
        let mut parts = [IoSliceMut::new(&mut chunk)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let raw = self.socket.as_raw_fd();
        let message = recvmsg::<()>(raw, &mut parts, Some(&mut space), flags).unwrap();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = part {
                self.fds.extend(fds);
            }
        }
        let count = message.bytes;
        self.bytes.extend_from_slice(&chunk[..count]);
        count > 0
    }
}
