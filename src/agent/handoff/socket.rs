//! A process takes over from the running one (`vmferry agent --take-over`): both talk over a socket,
//! and the package goes from process to process.
//!
//! ```text
//! successor ── Offer ──► predecessor     what it can read
//!           ◄── yes ────                 or no, and nothing has happened
//!                                        everything stops
//!           ◄── state, descriptors ──
//!           ── yes ───►                  it ends; on no it takes everything back
//! ```

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::transport::{FDS_MAX, Offer, Package, STATE_BYTES_MAX};
use crate::agent::unix_listener;

/// Where a process asks to take over from this one, in the folder of sockets.
const SOCKET: &str = "takeover.sock";
/// How long a process that takes over may take for each of its parts.
const TAKE_DEADLINE: Duration = Duration::from_secs(30);

/// The answer to an [`Offer`], and to what was left.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Yes,
    No(String),
}

/// Opens the socket on which a process asks to take over, for our own user alone.
pub(crate) fn listen(runtime_dir: &Path) -> anyhow::Result<tokio::net::UnixListener> {
    let path = &runtime_dir.join(SOCKET);
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot remove {}", path.display()));
        }
        _ => {}
    }
    unix_listener::bind(path, 0o600)
        .and_then(unix_listener::Bound::listen)
        .with_context(|| format!("cannot listen on {}", path.display()))
}

/// A process that asks to take over.
pub(super) struct Successor(UnixStream);

impl Successor {
    /// Hears what it can; one that cannot take over is told so, and nothing has happened.
    /// Errors: it cannot, or it is nobody who may.
    pub(super) fn hear(stream: tokio::net::UnixStream, has_a_witness: bool) -> anyhow::Result<Self> {
        let peer = stream.peer_cred().context("who asks to take over")?;
        let own = nix::unistd::geteuid().as_raw();
        ensure!(peer.uid() == own || peer.uid() == 0, "user {} may not take over", peer.uid());
        let stream = blocking(stream.into_std()?)?;
        let mut successor = Self(stream);
        let offer: Offer = read_line(&mut successor.0)?;
        match offer.check(has_a_witness) {
            Ok(()) => write_line(&mut successor.0, &Answer::Yes)?,
            Err(e) => {
                write_line(&mut successor.0, &Answer::No(format!("{e:#}")))?;
                return Err(e);
            }
        }
        Ok(successor)
    }

    /// Gives it everything. On an error it has nothing that counts: the caller goes on.
    pub(super) fn give(&mut self, package: &Package) -> anyhow::Result<()> {
        let head = [package.state.len() as u64, package.fds.iter().flatten().count() as u64]
            .map(u64::to_be_bytes)
            .concat();
        self.0.write_all(&head)?;
        self.0.write_all(&package.state)?;
        for fd in package.fds.iter().flatten() {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
            sendmsg(&self.0, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        }
        match read_line(&mut self.0)? {
            Answer::Yes => Ok(()),
            Answer::No(why) => bail!("it did not take over: {why}"),
        }
    }
}

/// An agent that has given us everything, and waits for our word.
pub(crate) struct Predecessor(UnixStream);

/// Asks the agent with this folder of sockets for everything that it holds.
/// Errors: there is none, or it refuses: then it goes on as if nothing had been.
pub(super) fn take_over(runtime_dir: &Path) -> anyhow::Result<(Package, Predecessor)> {
    let path = runtime_dir.join(SOCKET);
    let stream = UnixStream::connect(&path)
        .with_context(|| format!("no agent to take over from answers on {}", path.display()))?;
    let mut stream = blocking(stream)?;
    write_line(&mut stream, &Offer::ours())?;
    if let Answer::No(why) = read_line(&mut stream)? {
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
    let fds = (0..count).map(|_| receive_fd(&stream).map(Some)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok((Package { state, fds }, Predecessor(stream)))
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
    /// Errors: it is gone, or did not wait: then it goes on, or has ended, and we must not.
    pub(crate) fn release(mut self) -> anyhow::Result<()> {
        write_line(&mut self.0, &Answer::Yes)?;
        let mut rest = Vec::new();
        // Until it has ended: its lock and its port are ours then.
        self.0.read_to_end(&mut rest).context("the agent before does not end")?;
        Ok(())
    }

    /// Tells it that we cannot: it goes on.
    pub(super) fn decline(mut self, why: &str) {
        let _ = write_line(&mut self.0, &Answer::No(why.to_owned()));
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
