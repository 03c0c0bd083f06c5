//! How what one process leaves reaches the next: through the service manager's descriptor store
//! when it restarts us, or from process to process over a socket (`vmferry agent --take-over`).
//!
//! Either way the one that leaves first asks whether the other can read it, and gives up nothing
//! before. Knows not what is in it.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use super::succession::FORMATS;

/// The store's name of the state; descriptors are `vmferry-0`, `vmferry-1`, …
const STATE_NAME: &str = "vmferry-state";
const FD_PREFIX: &str = "vmferry-";
/// Longest state that is read: replay logs and queues of all sessions.
const STATE_BYTES_MAX: u64 = 1 << 31;
/// Most descriptors that are read.
const FDS_MAX: u32 = 16_384;
/// How long asking another program may take.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// How long a process that takes over may take for each of its parts.
const TAKE_DEADLINE: Duration = Duration::from_secs(30);

/// What has been left, as it travels.
pub(super) struct Left {
    pub(super) state: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What the service manager has kept for us, if anything. It keeps nothing afterwards: a
/// descriptor that it still held would hide our end of a socket from QEMU.
///
/// # Errors
/// What it kept is incomplete.
pub(super) fn from_store() -> anyhow::Result<Option<Left>> {
    let kept = sd_listen_fds::get().context("descriptors from the service manager")?;
    let (mut state, mut fds) = (None, Vec::new());
    for (name, fd) in kept {
        let name = name.unwrap_or_default();
        let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)]);
        if name == STATE_NAME {
            state = Some(fd.into_std());
        } else if let Some(number) = name.strip_prefix(FD_PREFIX).and_then(|n| n.parse::<usize>().ok()) {
            fds.push((number, fd.into_std()));
        }
    }
    for (_, fd) in &fds {
        // Children must not hold QEMU's sockets.
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).context("an inherited descriptor")?;
    }
    let Some(state) = state else {
        ensure!(fds.is_empty(), "the service manager kept descriptors but not what they are for");
        return Ok(None);
    };
    fds.sort_by_key(|(number, _)| *number);
    ensure!(fds.iter().enumerate().all(|(at, (number, _))| at == *number), "the service manager lost some");
    let mut file = File::from(state);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(STATE_BYTES_MAX).read_to_end(&mut bytes).context("what the process before left")?;
    Ok(Some(Left { state: bytes, fds: fds.into_iter().map(|(_, fd)| fd).collect() }))
}

/// Leaves everything to the service manager's descriptor store.
///
/// # Errors
/// It takes none (`FileDescriptorStoreMax=`).
pub(super) fn to_store(left: &Left) -> anyhow::Result<()> {
    let state = rustix::fs::memfd_create("vmferry-state", rustix::fs::MemfdFlags::CLOEXEC)
        .context("no memory file for what is left")?;
    let mut file = File::from(state);
    file.write_all(&left.state).context("what is left cannot be written")?;
    for (number, fd) in left.fds.iter().enumerate() {
        let name = format!("{FD_PREFIX}{number}");
        store(&name, fd.as_fd())?;
    }
    // Last: without it the rest is nothing.
    store(STATE_NAME, file.as_fd())
}

fn store(name: &str, fd: std::os::fd::BorrowedFd<'_>) -> anyhow::Result<()> {
    let state = [NotifyState::FdStore, NotifyState::FdName(name)];
    sd_notify::notify_with_fds(&state, &[fd]).context("the service manager keeps no descriptors")
}

/// Whether the service manager is about to start us again, as in `systemctl restart`, rather than
/// to stop us for good.
pub(super) async fn is_restarted() -> anyhow::Result<bool> {
    let unit = own_unit().context("this process belongs to no unit")?;
    let jobs = ["list-jobs", "--no-legend", "--plain", "--full", &unit];
    let text = ask("systemctl", &jobs).await?;
    let words = |line: &str| line.split_whitespace().nth(2).map(str::to_owned);
    Ok(text.lines().filter_map(words).any(|kind| kind == "restart"))
}

/// The unit of the service manager that this process belongs to (cgroups(7)).
fn own_unit() -> Option<String> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let last = groups.lines().filter_map(|line| line.rsplit('/').next()).find(|n| n.ends_with(".service"));
    last.map(str::to_owned)
}

/// That the program which is installed now could take over from this one.
///
/// # Errors
/// It could not, and why.
pub(super) async fn can_succeed() -> anyhow::Result<()> {
    let own = std::env::current_exe().context("this program's own file")?;
    // What has replaced us has our name without this.
    let path = PathBuf::from(own.to_string_lossy().trim_end_matches(" (deleted)"));
    let program = path.display();
    let text = ask(&path, &["agent", "--succession-formats"])
        .await
        .with_context(|| format!("{program} cannot say what it can take over"))?;
    let offer: Offer =
        serde_json::from_str(&text).with_context(|| format!("{program} knows nothing of taking over"))?;
    offer.check().with_context(|| format!("{program}"))
}

async fn ask(program: impl AsRef<std::ffi::OsStr>, words: &[&str]) -> anyhow::Result<String> {
    let mut command = tokio::process::Command::new(&program);
    command.args(words).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let name = program.as_ref().to_string_lossy().into_owned();
    let output = tokio::time::timeout(ASK_DEADLINE, command.output())
        .await
        .with_context(|| format!("{name} did not answer within {} s", ASK_DEADLINE.as_secs()))?
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(output.status.success(), "{name} {} failed with {}", words.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a version can take over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// The version, for people.
    version: String,
    /// Formats that it reads.
    formats: Vec<u32>,
}

impl Offer {
    /// Of this version.
    pub(super) fn ours() -> Self {
        Self { version: env!("CARGO_PKG_VERSION").into(), formats: FORMATS.to_vec() }
    }

    fn check(&self) -> anyhow::Result<()> {
        let ours = FORMATS[0];
        if self.formats.contains(&ours) {
            return Ok(());
        }
        let (version, formats) = (&self.version, &self.formats);
        bail!("version {version} takes over formats {formats:?}, and this one leaves {ours}");
    }
}

/// The answer to an [`Offer`], and to what was left.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Yes,
    No(String),
}

/// Where a process asks to take over from this one.
pub(super) fn socket_path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("takeover.sock")
}

/// Opens that socket, for our own user alone.
///
/// # Errors
/// The operating system's.
pub(super) fn listen(path: &Path) -> anyhow::Result<tokio::net::UnixListener> {
    super::listen::make_folder(path)?;
    super::listen::make_folder(path)?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot remove {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(tokio::net::UnixListener::from_std(listener)?)
}

/// A process that asks to take over.
pub(super) struct Successor(UnixStream);

impl Successor {
    /// Hears what it can; one that cannot take over is told so, and nothing has happened.
    ///
    /// # Errors
    /// It cannot, or it is nobody who may.
    pub(super) fn hear(stream: tokio::net::UnixStream) -> anyhow::Result<Self> {
        let peer = stream.peer_cred().context("who asks to take over")?;
        let own = nix::unistd::geteuid().as_raw();
        ensure!(peer.uid() == own || peer.uid() == 0, "user {} may not take over", peer.uid());
        let stream = blocking(stream.into_std()?)?;
        let mut successor = Self(stream);
        let offer: Offer = read_line(&mut successor.0)?;
        match offer.check() {
            Ok(()) => write_line(&mut successor.0, &Word::Yes)?,
            Err(e) => {
                write_line(&mut successor.0, &Word::No(format!("{e:#}")))?;
                return Err(e);
            }
        }
        Ok(successor)
    }

    /// Gives it everything. On an error it has nothing that counts: the caller goes on.
    ///
    /// # Errors
    /// It did not take it.
    pub(super) fn give(&mut self, left: &Left) -> anyhow::Result<()> {
        let head = [left.state.len() as u64, left.fds.len() as u64].map(u64::to_be_bytes).concat();
        self.0.write_all(&head)?;
        self.0.write_all(&left.state)?;
        for fd in &left.fds {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
            sendmsg(&self.0, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        }
        match read_line(&mut self.0)? {
            Word::Yes => Ok(()),
            Word::No(why) => bail!("it did not take over: {why}"),
        }
    }
}

/// An agent that has given us everything, and waits for our word.
pub(super) struct Predecessor(UnixStream);

/// Asks the agent behind `path` for everything that it holds.
///
/// # Errors
/// There is none, or it refuses: then it goes on as if nothing had been.
pub(super) fn take_over(path: &Path) -> anyhow::Result<(Left, Predecessor)> {
    let stream = UnixStream::connect(path)
        .with_context(|| format!("no agent to take over from answers on {}", path.display()))?;
    let mut stream = blocking(stream)?;
    write_line(&mut stream, &Offer::ours())?;
    if let Word::No(why) = read_line(&mut stream)? {
        bail!("the running agent does not give way: {why}");
    }
    let mut head = [0; 16];
    stream.read_exact(&mut head).context("the running agent gave nothing")?;
    let (state, count) = head.split_at(8);
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    let (length, count) = (number(state), number(count));
    ensure!(length <= STATE_BYTES_MAX && count <= u64::from(FDS_MAX), "the running agent gives too much");
    let mut state = Vec::new();
    (&mut stream).take(length).read_to_end(&mut state)?;
    ensure!(state.len() as u64 == length, "the running agent gave only a part");
    let fds = (0..count).map(|_| receive_fd(&stream)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok((Left { state, fds }, Predecessor(stream)))
}

fn receive_fd(stream: &UnixStream) -> anyhow::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    ensure!(message.bytes == 1, "the running agent gave too few descriptors");
    let mut received = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    received.next().and_then(|mut fds| fds.next()).context("a descriptor did not come along")
}

impl Predecessor {
    /// Tells it that we go on with everything: it ends.
    ///
    /// # Errors
    /// It is gone, or did not wait: then it goes on, or has ended, and we must not.
    pub(super) fn release(mut self) -> anyhow::Result<()> {
        write_line(&mut self.0, &Word::Yes)?;
        let mut rest = Vec::new();
        // Until it has ended: its lock and its port are ours then.
        self.0.read_to_end(&mut rest).context("the agent before does not end")?;
        Ok(())
    }

    /// Tells it that we cannot: it goes on.
    pub(super) fn decline(mut self, why: &str) {
        let _ = write_line(&mut self.0, &Word::No(why.to_owned()));
    }
}

fn blocking(stream: UnixStream) -> anyhow::Result<UnixStream> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TAKE_DEADLINE))?;
    stream.set_write_timeout(Some(TAKE_DEADLINE))?;
    Ok(stream)
}

fn write_line(stream: &mut UnixStream, word: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// A line is short, and nothing of what follows it may be read: byte by byte.
fn read_line<T: serde::de::DeserializeOwned>(stream: &mut UnixStream) -> anyhow::Result<T> {
    const LINE_BYTES_MAX: usize = 4096;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LINE_BYTES_MAX {
        stream.read_exact(&mut byte).context("the other process went away")?;
        if byte == *b"\n" {
            return Ok(serde_json::from_slice(&line)?);
        }
        line.push(byte[0]);
    }
    bail!("the other process says too much")
}
