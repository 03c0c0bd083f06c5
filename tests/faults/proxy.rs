//! Something between an agent and a monitor that misbehaves on demand. It takes the place of the
//! monitor's socket, passes bytes and descriptors on, and is not QEMU: what the kernel says of the
//! process that listens there says nothing about QEMU's.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::Value;

const LOOK_EVERY: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Shared {
    /// The client's socket; whole lines are written to it.
    client: Mutex<Option<Arc<UnixStream>>>,
    /// Nothing comes from QEMU.
    silent: AtomicBool,
    ended: AtomicBool,
    /// Words of QMP that QEMU does not have for this client.
    hidden: Vec<&'static str>,
    /// Commands at which the connection is cut, each once, and whether QEMU still hears them.
    cuts: Mutex<Vec<(&'static str, bool)>>,
    /// The connection is cut in the place of the next answer.
    loses_answer: AtomicBool,
}

impl Shared {
    fn to_client(&self, bytes: &[u8]) -> Result<()> {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.as_deref().context("nobody is connected")?.write_all(bytes)?;
        Ok(())
    }

    /// Gives each hidden word another name of the same length, on its way to QEMU as on its way back: QEMU shows
    /// something that nobody knows, and is asked for something that it does not know.
    fn hide(&self, line: &mut [u8]) {
        for word in &self.hidden {
            let quoted = format!("\"{word}\"");
            let places: Vec<usize> = line
                .windows(quoted.len())
                .enumerate()
                .filter(|(_, w)| *w == quoted.as_bytes())
                .map(|(at, _)| at)
                .collect();
            places.into_iter().for_each(|at| line[at + 1] = b'~');
        }
    }

    /// Whether the connection is to be cut at this command, and QEMU to hear it.
    fn cut_at(&self, command: &[u8]) -> Option<bool> {
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        let command = String::from_utf8_lossy(command);
        let is_it = |(name, _): &(&str, bool)| command.contains(&format!("\"execute\":\"{name}\""));
        let at = cuts.iter().position(is_it)?;
        Some(cuts.remove(at).1)
    }

    fn cut(&self) {
        if let Some(client) = self.client.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

/// A proxy in a monitor's place. Dropped, it ends, and the monitor is where it was.
pub struct Proxy {
    path: PathBuf,
    real: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Takes the place of a monitor. Whoever is connected stays connected to the monitor itself.
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn before(monitor: &Path) -> Result<Self> {
        Self::hiding(monitor, &[])
    }

    /// The same, before a QEMU that seems not to have these commands, drivers or arguments.
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn hiding(monitor: &Path, words: &[&'static str]) -> Result<Self> {
        let real = monitor.with_extension("behind");
        std::fs::rename(monitor, &real)?;
        let shared = Arc::new(Shared { hidden: words.to_vec(), ..Shared::default() });
        let mut proxy = Self { path: monitor.to_owned(), real, shared, thread: None };
        proxy.listen()?;
        Ok(proxy)
    }

    /// Listens again after [`Proxy::end`].
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn listen(&mut self) -> Result<()> {
        self.end();
        let listener = UnixListener::bind(&self.path)?;
        listener.set_nonblocking(true)?;
        self.shared = Arc::new(Shared { hidden: self.shared.hidden.clone(), ..Shared::default() });
        let (shared, real) = (Arc::clone(&self.shared), self.real.clone());
        self.thread = Some(std::thread::spawn(move || accept(&listener, &real, &shared)));
        Ok(())
    }

    /// Nobody listens any more, and the connection is cut.
    pub fn end(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.cut();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// The monitor itself is reached again where it was.
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn leave(mut self) -> Result<()> {
        self.end();
        Ok(std::fs::rename(&self.real, &self.path)?)
    }

    /// Cuts the connection; the next one is served.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Cuts the connection when these commands come, each once, with QEMU hearing them or not. The answer to none of
    /// them is passed on.
    pub fn cut_at(&self, commands: &[&'static str], heard: bool) {
        let mut cuts = self.shared.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.extend(commands.iter().map(|command| (*command, heard)));
    }

    /// The commands that have not come yet.
    #[must_use]
    pub fn to_cut_at(&self) -> Vec<&'static str> {
        let cuts = self.shared.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.iter().map(|(command, _)| *command).collect()
    }

    /// Nothing comes from QEMU any more, or everything again.
    pub fn be_silent(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::SeqCst);
    }

    /// Says something to the client, between two lines of QEMU's.
    ///
    /// # Errors
    /// Nobody is connected.
    pub fn say(&self, text: &str) -> Result<()> {
        self.shared.to_client(text.as_bytes())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end();
        if self.real.exists() {
            let _ = std::fs::rename(&self.real, &self.path);
        }
    }
}

fn accept(listener: &UnixListener, real: &Path, shared: &Arc<Shared>) {
    while !shared.ended.load(Ordering::SeqCst) {
        let Ok((client, _)) = listener.accept() else {
            std::thread::sleep(LOOK_EVERY);
            continue;
        };
        let served = client.set_nonblocking(false).is_ok();
        if let (true, Ok(qemu)) = (served, UnixStream::connect(real)) {
            serve(client, qemu, shared);
        }
    }
    shared.cut();
}

fn serve(client: UnixStream, qemu: UnixStream, shared: &Arc<Shared>) {
    let (Ok(from_client), Ok(from_qemu)) = (client.try_clone(), qemu.try_clone()) else { return };
    let client = Arc::new(client);
    *shared.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&client));
    let hides = Arc::clone(shared);
    std::thread::spawn(move || {
        while commands(&from_client, &qemu, &hides).is_ok_and(|more| more) {}
        let _ = qemu.shutdown(Shutdown::Both);
    });
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let _ = answers(&from_qemu, &client, &shared);
        let _ = from_qemu.shutdown(Shutdown::Both);
        let _ = client.shutdown(Shutdown::Both);
    });
}

/// Passes on what the client has sent, descriptors too. `false`: it is gone.
fn commands(client: &UnixStream, qemu: &UnixStream, shared: &Shared) -> Result<bool> {
    let mut chunk = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let (count, fds) = {
        let mut parts = [IoSliceMut::new(&mut chunk)];
        let message =
            recvmsg::<()>(client.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut fds: Vec<RawFd> = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                fds.extend(raw);
            }
        }
        (message.bytes, fds)
    };
    // The agent writes a command at once.
    shared.hide(&mut chunk[..count]);
    let passed = match shared.cut_at(&chunk[..count]) {
        Some(false) => Ok(client.shutdown(Shutdown::Both)?),
        heard => {
            shared.loses_answer.fetch_or(heard.is_some(), Ordering::SeqCst);
            pass(qemu, &chunk[..count], &fds)
        }
    };
    fds.into_iter().try_for_each(nix::unistd::close)?;
    passed.map(|()| count > 0)
}

fn pass(qemu: &UnixStream, mut rest: &[u8], fds: &[RawFd]) -> Result<()> {
    let mut rights = vec![ControlMessage::ScmRights(fds)];
    rights.truncate(usize::from(!fds.is_empty()));
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(qemu.as_raw_fd(), &[IoSlice::new(rest)], &rights, flags, None)?;
        rights.clear();
        rest = &rest[sent..];
    }
    Ok(())
}

/// Whether one of these lines answers a command; the others are events.
fn is_answer(lines: &[u8]) -> bool {
    let is = |line: &[u8]| {
        let said: Value = serde_json::from_slice(line).unwrap_or_default();
        said.get("return").or(said.get("error")).is_some()
    };
    lines.split(|byte| *byte == b'\n').any(is)
}

/// Passes on what QEMU says, line by line.
fn answers(mut qemu: &UnixStream, mut client: &UnixStream, shared: &Shared) -> Result<()> {
    let (mut chunk, mut waiting) = ([0; 65536], Vec::new());
    loop {
        let count = qemu.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        waiting.extend_from_slice(&chunk[..count]);
        while shared.silent.load(Ordering::SeqCst) && !shared.ended.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK_EVERY);
        }
        if let Some(end) = waiting.iter().rposition(|byte| *byte == b'\n') {
            let mut lines: Vec<u8> = waiting.drain(..=end).collect();
            if is_answer(&lines) && shared.loses_answer.swap(false, Ordering::SeqCst) {
                return Ok(());
            }
            shared.hide(&mut lines);
            let _whole_lines = shared.client.lock().unwrap_or_else(PoisonError::into_inner);
            client.write_all(&lines)?;
        }
    }
}
